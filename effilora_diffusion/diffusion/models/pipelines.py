"""Load diffusers pipelines: the embedded base, a folder, a hub id or a single checkpoint file."""

from __future__ import annotations

import contextlib
import importlib.util
import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    BitsAndBytesConfig,
    DiffusionPipeline,
    PipelineQuantizationConfig,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    TorchAoConfig,
)
from safetensors import SafetensorError, safe_open

from ...core import EffiLoRAError
from ...core.assets import asset
from ...core.errors import is_out_of_memory
from ...core.hub import EMBEDDED_BASE as EMBEDDED_BASE
from ...core.hub import loading_options, not_cached
from ...core.hub import public_name as public_name
from . import trainable

UNUSED_PARTS = ("safety_checker", "pe", "pe_tokenizer")
"""Components that are not loaded: the safety checker, and ERNIE-Image's prompt enhancer."""

DEFAULT_CONFIG = "stable-diffusion-v1-5/stable-diffusion-v1-5"
"""One of the hub's models from which diffusers takes the configuration of a single file."""


@contextlib.contextmanager
def quiet_loading() -> Any:
    """Hide loading progress bars in this context, and a warning of every download that diffusers itself gives rise to."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks")
            yield
    finally:
        diffusers_logging.enable_progress_bar()
        transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def _quiet_diffusers() -> Any:
    """Hide the single-file loader's warnings, which concern its own conversion."""
    from diffusers.utils import logging as diffusers_logging

    level = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(level)


def load_pipeline(
    model: str | None,
    dtype: torch.dtype = torch.float32,
    single_file_config: str | None = None,
    to_train: bool = False,
    train_text: bool = False,
    **kwargs: Any,
) -> DiffusionPipeline:
    """Load a pipeline, frozen, with progress bars off.

    Args:
        model: a diffusers folder, a hub id, a ``.safetensors`` checkpoint of Stable Diffusion 1.x, 2.x or XL, or
            ``None`` for the embedded base.
        dtype: of all weights.
        single_file_config: folder or hub id with the configuration and tokenizers of a single checkpoint file; default:
            the one that diffusers finds for it on the hub.
        to_train: refuse a pipeline that can't be trained before its weights are fetched or read.
        train_text: refuse one whose text encoders can't be trained, too.
        kwargs: further arguments of ``from_pretrained``; ``None`` values are dropped.
    """
    name = model or str(asset("base"))
    path = Path(name)
    options = {key: value for key, value in kwargs.items() if value is not None}
    options |= loading_options(name, options.get("revision"))
    try:
        with quiet_loading():
            if path.is_file():
                pipe = _load_single_file(path, dtype, single_file_config, options)
            else:
                parts = read_index(name, options)
                if to_train:
                    trainable(str(parts.get("_class_name")), train_text)
                options |= {name: None for name in UNUSED_PARTS if name in parts}
                pipe = DiffusionPipeline.from_pretrained(name, dtype=dtype, **options)
    except EffiLoRAError:
        raise
    except (OSError, ValueError, ImportError, AttributeError, RuntimeError, KeyError, TypeError) as error:
        if is_out_of_memory(error):
            raise
        raise EffiLoRAError(reason_for(name, error, options)) from error
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(
                False
            )  # torch multiplies otherwise where it is set, also without gradients: other last bits
    return pipe


def check_trainable(model: str | None, revision: str | None = None) -> None:
    """Raise :class:`EffiLoRAError` for a model whose pipeline can't be trained, by the file that names its parts.

    A single file, and a model that can't be looked up, are told of when they are loaded.
    """
    if model is None or Path(model).is_file():
        return
    options = {**loading_options(model, revision), **({} if revision is None else {"revision": revision})}
    try:
        parts = read_index(model, options)
    except (OSError, ValueError):
        return
    trainable(str(parts.get("_class_name")))


def read_index(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """What ``model_index.json`` says; raises :class:`EffiLoRAError` for a folder that has none."""
    path = Path(name)
    if path.exists() and not (path / "model_index.json").is_file():
        raise EffiLoRAError(f"{name} is not a diffusers model folder: it has no model_index.json")
    known = {key: options[key] for key in ("revision", "local_files_only") if key in options}
    return dict(DiffusionPipeline.load_config(name, **known))


def reason_for(name: str, error: Exception, options: dict[str, Any]) -> str:
    """Why a model could not be loaded, in one sentence."""
    if options.get("local_files_only"):
        return f"the model can't be loaded: {not_cached(name)}"
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"the model {name!r} can't be loaded: {first}"


def single_file_kind(path: Path) -> type[StableDiffusionPipeline] | type[StableDiffusionXLPipeline] | None:
    """The pipeline of a whole checkpoint, by the names of its tensors; ``None`` for other files of tensors.

    Raises :class:`EffiLoRAError` for what is no safetensors file.
    """
    try:
        with safe_open(path, "pt") as file:
            keys = set(file.keys())
    except SafetensorError as error:
        raise EffiLoRAError(f"{path} is damaged or no safetensors file: {error}") from error
    if any(key.startswith("conditioner.embedders.") for key in keys):
        return StableDiffusionXLPipeline
    return StableDiffusionPipeline if any(key.startswith("cond_stage_model.") for key in keys) else None


def _load_single_file(
    path: Path, dtype: torch.dtype, config: str | None, options: dict[str, Any]
) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    """Load a single-file checkpoint; its architecture is determined from the tensor names in its header."""
    if options.get("quantization_config") is not None:
        raise EffiLoRAError("--quantization needs a diffusers folder or hub id, not a single file")
    if path.suffix != ".safetensors":
        raise EffiLoRAError(
            f"{path} is not a .safetensors file: other checkpoint files may run code, so none is opened"
        )
    kind = single_file_kind(path)
    if kind is StableDiffusionPipeline:
        options["safety_checker"] = None
    if kind is None:
        raise EffiLoRAError(
            f"{path} is no whole Stable Diffusion 1.x, 2.x or XL checkpoint (it lacks their text encoder): "
            "for other models give the diffusers folder or hub id"
        )
    if config is not None:
        options["config"] = config
    options |= loading_options(config or DEFAULT_CONFIG)
    try:
        with _quiet_diffusers():
            return kind.from_single_file(str(path), dtype=dtype, **options)
    except OSError as error:
        raise EffiLoRAError(
            f"{path} can't be loaded without its configuration and tokenizers, which were not found: go online once, or "
            "give a folder of the same architecture with --single_file_config"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise EffiLoRAError(
            f"{path} can't be loaded with the configuration of {config or 'the hub'}: {error}"
        ) from error


def quantization(kind: str | None, dtype: torch.dtype) -> PipelineQuantizationConfig | None:
    """Return the quantisation configuration of the denoiser; raises :class:`EffiLoRAError` if its library is missing."""
    if kind is None:
        return None
    library = "bitsandbytes" if kind.startswith("bnb") else "torchao"
    if importlib.util.find_spec(library) is None:
        raise EffiLoRAError(f"--quantization {kind} needs {library}: pip install {library}")
    chosen: Any
    if library == "bitsandbytes":
        eight = kind == "bnb-8bit"
        chosen = (
            BitsAndBytesConfig(load_in_8bit=True)
            if eight
            else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
        )
    else:
        import torchao.quantization as torchao

        integer = kind == "torchao-int8"
        chosen = TorchAoConfig(torchao.Int8WeightOnlyConfig() if integer else torchao.Float8WeightOnlyConfig())
    return PipelineQuantizationConfig(quant_mapping={"transformer": chosen, "unet": chosen})

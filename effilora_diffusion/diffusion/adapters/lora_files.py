"""Plain LoRA files (kohya, diffusers, PEFT, LoKr) on a pipeline, by diffusers' own loaders: checked, loaded, removed."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

from diffusers.utils import logging as diffusers_logging
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from torch import nn

from ...core import EffiLoRAError
from ...core.errors import is_out_of_memory

logger = logging.getLogger(__name__)

PLAIN_NAMES = ("lora_A", "lora_B", "lora_down", "lora.down", "lora.up", "lora_up", "lokr_w")
"""Parts of the tensor names by which a plain LoRA file is known."""

UNREADABLE_NAMES = ("hada_w", "oft_blocks", "ia3_l", "lora_mid")
"""Parts of the tensor names of adapters that diffusers can't load: LyCORIS LoHa and OFT, (IA)3, LoCon of convolutions."""


def is_plain_lora(path: str | Path) -> bool:
    """Whether ``path`` is a safetensors file of plain LoRA, judged by the names of its tensors."""
    try:
        with safe_open(str(path), "pt") as file:
            names = list(file.keys())
    except (SafetensorError, OSError):
        return False
    unreadable = [part for part in UNREADABLE_NAMES if any(part in name for name in names)]
    if unreadable:
        raise EffiLoRAError(
            f"{Path(path).name} is an adapter that diffusers can't load (it has {unreadable[0]}): export it as LoRA"
        )
    return any(part in name for name in names for part in PLAIN_NAMES)


def describe_plain(path: str | Path) -> dict[str, Any]:
    """What a plain LoRA file says of itself: ``layers``, ``parameters``, ``ranks``, and ``base_model`` and
    ``trigger_prompt`` where its metadata (kohya's, modelspec's) name them."""
    ranks: set[int] = set()
    layers = parameters = 0
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            for name in file.keys():  # noqa: SIM118 (not a dict)
                shape = file.get_slice(name).get_shape()
                parameters += math.prod(shape)
                if any(part in name for part in ("lora_A", "lora_down", "lora.down", "lokr_w1")) and shape:
                    layers += 1
                    ranks.add(int(shape[0]))
    except (SafetensorError, OSError) as error:
        raise EffiLoRAError(f"{Path(path).name} is not a readable safetensors file: get it again") from error
    named = {
        "base_model": metadata.get("ss_sd_model_name") or metadata.get("modelspec.architecture"),
        "trigger_prompt": metadata.get("modelspec.trigger_phrase"),
    }
    facts = {"layers": layers, "parameters": parameters, "ranks": sorted(ranks)}
    return {**facts, **{key: value for key, value in named.items() if value}}


def check_weights(path: str | Path) -> None:
    """Raise :class:`EffiLoRAError` for a plain LoRA file whose weights are not finite, or whose update is zero."""
    acts = False
    with safe_open(str(path), "pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a dict)
            tensor = file.get_tensor(name)
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise EffiLoRAError(f"{Path(path).name} holds NaN or infinite values: get it again")
            if any(part in name for part in ("lora_B", "lora_up", "lora.up", "lokr_w2")):
                acts = acts or bool(tensor.any())
    if not acts:
        raise EffiLoRAError(f"{Path(path).name} changes nothing: all its updates are zero")


def plain_layers(pipe: Any, name: str) -> int:
    """Number of layers of ``pipe`` on which the plain LoRA ``name`` acts."""
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    layers = [layer for part in parts for layer in part.modules() if isinstance(layer, BaseTunerLayer)]
    return sum(name in layer.active_adapters and name in layer._get_available_adapters() for layer in layers)


def load_plain_lora(pipe: Any, path: str | Path, name: str) -> int:
    """Load a plain LoRA file under ``name``; returns the number of layers it acts on. Load native adapters before.

    Raises :class:`EffiLoRAError`, and leaves the pipeline without any plain LoRA, if the file does not fit the model.
    """
    if not hasattr(pipe, "load_lora_weights"):
        raise EffiLoRAError(f"diffusers has no loader for plain LoRA in {type(pipe).__name__}")
    check_weights(path)
    file, level = Path(path), diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity(diffusers_logging.CRITICAL)  # what goes wrong is raised here, in fewer words
    try:
        pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name, local_files_only=True)
        layers = plain_layers(pipe, name)
    except Exception as error:  # diffusers and PEFT raise a dozen kinds for files made for another model
        if is_out_of_memory(error):
            raise
        remove_plain_loras(pipe)
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()[:200]
        raise EffiLoRAError(f"{file.name} does not fit this model, it was made for another base: {reason}") from error
    finally:
        diffusers_logging.set_verbosity(level)
    if layers == 0:
        remove_plain_loras(pipe)
        raise EffiLoRAError(f"{file.name} changes no layer of this model: it was made for another base")
    held = describe_plain(path)["layers"]
    if layers < held:
        logger.warning(
            "%s acts on %d layers of this model, and names %d: the others are not here", file.name, layers, held
        )
    return layers


def set_plain_strengths(pipe: Any, strengths: dict[str, float]) -> None:
    """Let exactly the loaded plain LoRAs in ``strengths`` act, each at its strength."""
    pipe.set_adapters(list(strengths), list(strengths.values()))


def remove_plain_loras(pipe: Any) -> None:
    """Take every plain LoRA off ``pipe``: afterwards its layers are what they were."""
    if not hasattr(pipe, "unload_lora_weights"):
        return
    for part in pipe.components.values():
        if isinstance(part, nn.Module) and any(isinstance(layer, BaseTunerLayer) for layer in part.modules()):
            part.__dict__["_hf_peft_config_loaded"] = (
                True  # a load that failed half-way has not set it, and unloading asks for it
            )
    pipe.unload_lora_weights()

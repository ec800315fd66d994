"""Plain LoRA files (kohya, diffusers, PEFT, LoKr) on a pipeline, by diffusers' own loaders: checked, loaded, removed."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

from diffusers.utils import logging as diffusers_logging
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ...core import EffiLoRAError
from ...core.errors import is_out_of_memory
from .plain_file import PAIRS, read_header, read_plain
from .restore import unchanged_on_error

logger = logging.getLogger(__name__)

PLAIN_NAMES = (*PAIRS, *PAIRS.values(), "lokr_w")
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
    header = read_header(Path(path))
    ranks: set[int] = set()
    layers = parameters = 0
    for name, shape in header.shapes.items():
        parameters += math.prod(shape)
        if any(part in name for part in (*PAIRS, "lokr_w1")) and shape:
            layers += 1
            ranks.add(int(shape[0]))
    metadata = header.metadata
    named = {
        "base_model": metadata.get("ss_sd_model_name") or metadata.get("modelspec.architecture"),
        "trigger_prompt": metadata.get("modelspec.trigger_phrase"),
    }
    facts = {"layers": layers, "parameters": parameters, "ranks": sorted(ranks)}
    return {**facts, **{key: value for key, value in named.items() if value}}


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
    file, level = Path(path), diffusers_logging.get_verbosity()
    tensors = read_plain(file)
    diffusers_logging.set_verbosity(diffusers_logging.CRITICAL)  # what goes wrong is raised here, in fewer words
    try:
        with unchanged_on_error(pipe):
            layers = _load(pipe, tensors, name, file.name)
    except EffiLoRAError:
        remove_plain_loras(pipe)
        raise
    finally:
        diffusers_logging.set_verbosity(level)
    held = describe_plain(path)["layers"]
    if layers < held:
        logger.warning(
            "%s acts on %d layers of this model, and names %d: the others are not here", file.name, layers, held
        )
    return layers


def _load(pipe: Any, tensors: dict[str, Tensor], name: str, file: str) -> int:
    """Hand the tensors to diffusers; returns the number of layers they act on."""
    try:
        pipe.load_lora_weights(tensors, adapter_name=name)
    except Exception as error:  # diffusers and PEFT raise a dozen kinds for files made for another model
        if is_out_of_memory(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()[:200]
        raise EffiLoRAError(f"{file} does not fit this model, it was made for another base: {reason}") from error
    layers = plain_layers(pipe, name)
    if layers == 0:
        raise EffiLoRAError(f"{file} changes no layer of this model: it was made for another base")
    return layers


def set_plain_strengths(pipe: Any, strengths: dict[str, float]) -> None:
    """Let exactly the loaded plain LoRAs in ``strengths`` act, each at its strength."""
    pipe.set_adapters(list(strengths), list(strengths.values()))


def remove_plain_loras(pipe: Any) -> None:
    """Take every plain LoRA off ``pipe``: afterwards its layers are what they were."""
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    if any(isinstance(layer, BaseTunerLayer) for part in parts for layer in part.modules()):
        pipe.unload_lora_weights()

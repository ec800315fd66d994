"""Reading a plain LoRA file: everything in it is checked before a model sees it, and of its metadata only the strength is used.

diffusers would make a PEFT configuration of a file's ``lora_adapter_metadata``, whatever stands there, and regular expressions of
its tensors' names. Here the strength (alpha by rank) is worked into the weights, and PEFT learns the ranks from their shapes.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...core import EffiLoRAError

PAIRS = {
    "lora_A": "lora_B",
    "lora_down": "lora_up",
    "lora.down": "lora.up",
    "lora_linear_layer.down": "lora_linear_layer.up",
}
"""Marks in the names of the two factors, as the programs that write LoRAs call them; the last ones are those of text encoders in
diffusers' DreamBooth scripts."""

UP_PARTS = (*PAIRS.values(), "lokr_w2")
"""Marks of the tensors that are zero in an adapter that changes nothing."""

NAME = re.compile(r"[A-Za-z0-9_.-]{1,300}")
OTHER_PART = re.compile(r".+\.(alpha|dora_scale|lora_magnitude_vector(\.\w+)?(\.weight)?|lokr_w[12](_[ab])?)")
"""Names of what is no factor of a pair: alphas, DoRA's magnitudes, the factors of LoKr."""

END = re.compile(r"(\.\w+)?\.(weight|bias)|")
"""What may follow the mark of a factor: PEFT may put the adapter's name in between."""

FLOATS = ("F64", "F32", "F16", "BF16")
INTEGERS = ("I64", "I32", "I16", "I8", "U8")
MOST_TENSORS = 20_000
MOST_STRENGTH = 1000.0
"""Largest alpha by rank: usual are 0.1 to 32."""

METADATA = "lora_adapter_metadata"


@dataclass(frozen=True)
class Header:
    """What stands at the beginning of a safetensors file: shapes and types by name, and the metadata."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Read no weights; raises :class:`EffiLoRAError` for a file that is no safetensors file."""
    try:
        with safe_open(str(path), "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            shapes = {name: tuple(found.get_shape()) for name, found in slices.items()}
            return Header(shapes, {name: found.get_dtype() for name, found in slices.items()}, file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise EffiLoRAError(f"{path.name} is not a readable safetensors file: get it again") from error


def read_plain(path: Path) -> dict[str, Tensor]:
    """The tensors of a plain LoRA file, each up factor multiplied by the strength that the metadata state.

    Raises :class:`EffiLoRAError` for anything but a whole LoRA with finite weights that changes something.
    """
    header = read_header(path)
    try:
        ranks = _check_names(header)
        strengths = _strengths(header, ranks)
        tensors = _read_tensors(path, strengths)
        _check_alphas(tensors, ranks)
    except EffiLoRAError as error:
        raise EffiLoRAError(f"{path.name} {error}") from error
    return tensors


def _check_names(header: Header) -> dict[str, int]:
    """Check names, types and shapes; returns the rank of each pair by the name before its mark."""
    if len(header.shapes) > MOST_TENSORS:
        raise EffiLoRAError(f"holds {len(header.shapes)} tensors, {MOST_TENSORS} at most can be used")
    ranks = {}
    for name, shape in header.shapes.items():
        parts = split_factor(name)
        if not NAME.fullmatch(name) or (parts is None and not OTHER_PART.fullmatch(name)):
            raise EffiLoRAError(f"holds {name[:80]!r}, which is no part of a LoRA: export it as LoRA")
        is_alpha = name.endswith(".alpha")
        if header.dtypes[name] not in (FLOATS + INTEGERS if is_alpha else FLOATS):
            raise EffiLoRAError(f"holds {header.dtypes[name]} numbers: convert it to float16")
        if math.prod(shape) != 1 if is_alpha else 0 in shape:
            raise EffiLoRAError(f"holds {name} of the shape {shape}: get it again")
        if parts is None or name.endswith(".bias"):
            continue
        stem, mark, end = parts
        other, what = (PAIRS[mark], True) if mark in PAIRS else (_DOWN[mark], False)
        if f"{stem}{other}{end}" not in header.shapes:
            raise EffiLoRAError(f"holds {mark} without {other}, so it changes nothing there: get it again")
        if what:
            up = header.shapes[f"{stem}{other}{end}"]
            if len(shape) < 2 or len(up) != len(shape) or shape[0] != up[1]:
                raise EffiLoRAError(f"holds {name} of the shape {shape} beside {up}, which do not fit: get it again")
            ranks[stem] = shape[0]
    return ranks


_DOWN = {up: down for down, up in PAIRS.items()}


def split_factor(name: str) -> tuple[str, str, str] | None:
    """A factor's name before its mark, the mark, and what follows; ``None`` for what is no factor."""
    for mark in (*PAIRS, *_DOWN):
        stem, found, end = name.rpartition(mark)
        if found and END.fullmatch(end):
            return stem, mark, end
    return None


def _strengths(header: Header, ranks: dict[str, int]) -> dict[str, float]:
    """What the metadata multiply the update of each pair with, by the name of the tensor that is to be multiplied."""
    text = header.metadata.get(METADATA)
    if not text or any(name.endswith(".alpha") for name in header.shapes):
        return {}
    try:
        stated = json.loads(text)
    except (ValueError, RecursionError):
        stated = None
    if not isinstance(stated, dict):
        raise EffiLoRAError(f"has damaged metadata ({METADATA}): get it again")
    found = {}
    for name in header.shapes:
        component, _, rest = name.partition(".")
        own = {key.removeprefix(f"{component}."): value for key, value in stated.items() if isinstance(key, str)}
        parts = split_factor(name)
        if parts is not None and parts[1] in _DOWN:
            rank = ranks[parts[0]]
            module = rest[: len(parts[0]) - len(component) - 1].rstrip(".")
            divisor = math.sqrt(rank) if own.get("use_rslora") is True else rank
            found[name] = _strength(_alpha_of(module, own, rank), divisor)
        elif re.search(r"\.lokr_w1(_a)?\Z", name):
            found[name] = _strength(own.get("alpha", own.get("r", 1)), own.get("r", 1))
    return found


def _alpha_of(module: str, stated: dict[str, Any], rank: int) -> Any:
    """The alpha of a module: PEFT's patterns are names, or ends of names, here; never regular expressions."""
    patterns = stated.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise EffiLoRAError(f"has damaged metadata ({METADATA}): get it again")
    for pattern, alpha in patterns.items():
        wanted = pattern.removeprefix("^")
        if module == wanted or (module.endswith(f".{wanted}") and not pattern.startswith("^")):
            return alpha
    return stated.get("lora_alpha", rank)


def _strength(alpha: Any, rank: Any) -> float:
    """Alpha by rank; raises :class:`EffiLoRAError` for what no training writes."""
    numbers = all(type(value) in (int, float) for value in (alpha, rank))
    try:
        found = alpha / rank if numbers else math.nan
    except (OverflowError, ZeroDivisionError):
        found = math.nan
    if not 0 < found <= MOST_STRENGTH:
        raise EffiLoRAError(f"states an alpha of {str(alpha)[:40]} for the rank {str(rank)[:40]}: get it again")
    return found


def _read_tensors(path: Path, strengths: dict[str, float]) -> dict[str, Tensor]:
    tensors, acts = {}, False
    with safe_open(str(path), "pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a dict)
            tensor = file.get_tensor(name)
            if strengths.get(name, 1.0) != 1.0:
                tensor = (tensor.float() * strengths[name]).to(tensor.dtype)
            if not tensor.isfinite().all():
                raise EffiLoRAError("holds NaN or infinite values: get it again")
            acts = acts or (any(part in name for part in UP_PARTS) and bool(tensor.any()))
            tensors[name] = tensor
    if not acts:
        raise EffiLoRAError("changes nothing: all its updates are zero")
    return tensors


def _check_alphas(tensors: dict[str, Tensor], ranks: dict[str, int]) -> None:
    """Alphas that are tensors, as kohya's programs write them, are left to diffusers, once they can be right."""
    known = {stem.rstrip("._"): rank for stem, rank in ranks.items()}
    for name, tensor in tensors.items():
        stem = name.removesuffix(".alpha")
        if stem != name and stem in known:
            _strength(tensor.item(), known[stem])

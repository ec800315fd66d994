"""Adapters made of others: their weighted sum, a smaller one, the difference of two models."""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...core import EffiLoRAError
from ...core.load import host_model
from ...core.low_rank import Ranks, low_rank, reduced, weighted_sum
from ...core.writing import check_new, write_folder
from ..models.pipelines import load_pipeline
from .lora_files import load_plain_lora, remove_plain_loras
from .lora_pairs import ORIGINAL, LoRAPairs, layer_name, write_pairs

logger = logging.getLogger(__name__)


@dataclass
class Outcome:
    """A plain LoRA, and how it was made.

    Args:
        lora: itself.
        error: Frobenius norm of what a lower rank left out, relative to the whole update; 0: exact up to rounding.
        notes: what else to know.
    """

    lora: LoRAPairs
    error: float = 0.0
    notes: tuple[str, ...] = ()

    def describe(self) -> str:
        """Layers, ranks and error in words."""
        ranks = [len(pair.down) for pair in self.lora.pairs.values()]
        shown = (
            f"rank {ranks[0]}"
            if len(set(ranks)) == 1
            else f"ranks {min(ranks)} to {max(ranks)}, {sum(ranks) / len(ranks):.1f} on average"
        )
        missing = "exact" if self.error < 1e-6 else f"{self.error:.1%} of the update missing"
        return f"{len(ranks)} layers, {shown}, {missing}"


def merged(parts: Sequence[tuple[LoRAPairs, float]], ranks: Ranks | None = None, kohya: bool | None = None) -> Outcome:
    """The weighted sum of plain LoRAs of one base model.

    Args:
        parts: LoRAs and their weights; a layer that only some have is taken from these.
        ranks: reduce every layer to them; ``None``: ranks add up, and the sum is exact.
        kohya: naming of the layers; ``None``: sd-scripts' if all parts have it.

    Raises:
        EffiLoRAError: the parts do not belong to one model, or their namings can't be brought together.
    """
    wanted = all(lora.kohya for lora, _ in parts) if kohya is None else kohya
    if not wanted and any(lora.kohya and lora.content is None for lora, _ in parts):
        wanted = True  # sd-scripts' names don't tell diffusers', the other way round they do
        if kohya is False:
            raise EffiLoRAError("a file in sd-scripts' naming can't be written in diffusers': leave --format out")
    _check_namings([lora for lora, _ in parts if lora.content is None])
    named = [(lora.renamed(wanted), weight) for lora, weight in parts]
    layers = dict.fromkeys(name for lora, _ in named for name in lora.pairs)
    if len(named) > 1 and all(sum(name in lora.pairs for lora, _ in named) == 1 for name in layers):
        raise EffiLoRAError(
            "the files have no layer in common: they are for different models, or of different namings"
        )
    pairs = {}
    for name in layers:
        own = [(lora.pairs[name], weight) for lora, weight in named if name in lora.pairs]
        shapes = {(pair.down.shape[1:], pair.up.shape[:1]) for pair, _ in own}
        if len(shapes) > 1:
            raise EffiLoRAError(f"the layer {name[:100]} has another size in each file: they are for different models")
        pairs[name] = weighted_sum(own)
    first = named[0][0].metadata
    metadata = {
        key: value for key, value in first.items() if all(lora.metadata.get(key) == value for lora, _ in named)
    }
    notes = tuple(
        f"the plain form of adapter {number} is itself a fit: {lora.missing:.1%} of its update missing"
        for number, (lora, _) in enumerate(named, 1)
        if lora.missing
    )
    whole = LoRAPairs(pairs, metadata)
    return Outcome(whole, notes=notes) if ranks is None else _with_notes(resized(whole, ranks), notes)


def _check_namings(files: list[LoRAPairs]) -> None:
    """Raise :class:`EffiLoRAError` where files in both namings are to be added, and one has layers of an original model."""
    original = any(ORIGINAL.match(name) for lora in files for name in lora.pairs)
    if original and len({lora.kohya for lora in files}) > 1:
        raise EffiLoRAError(
            "one file names layers as the original model does and another as diffusers does: use files of one naming"
        )


def _with_notes(outcome: Outcome, notes: tuple[str, ...]) -> Outcome:
    return Outcome(outcome.lora, outcome.error, notes)


def resized(lora: LoRAPairs, ranks: Ranks) -> Outcome:
    """The best LoRA of lower ranks."""
    pairs, errors, wholes = {}, 0.0, 0.0
    for name, pair in lora.pairs.items():
        pairs[name], error, whole = reduced(pair, ranks)
        errors, wholes = errors + error, wholes + whole
    return Outcome(LoRAPairs(pairs, lora.metadata, lora.missing), math.sqrt(errors / wholes) if wholes else 0.0)


def write_into(lora: LoRAPairs, base: str | None, output: Path, config: str | None, dtype: torch.dtype) -> None:
    """Write the base model with a LoRA merged into its weights, as a folder for diffusers.

    Raises :class:`EffiLoRAError` if it does not fit the model, or the folder holds something.
    """
    check_new(output)
    pipe: Any = load_pipeline(base, dtype, single_file_config=config)
    if lora.kohya or any(name.startswith("text_encoder") for name in lora.pairs):
        with tempfile.TemporaryDirectory() as folder:  # diffusers' own loader names the layers
            file = Path(folder) / "the sum.safetensors"
            write_pairs(file, lora, {})
            load_plain_lora(pipe, file, "merged")
        pipe.fuse_lora(adapter_names=["merged"])
        remove_plain_loras(pipe)
    else:
        _add_to_denoiser(pipe, lora)
    write_folder(output, pipe.save_pretrained)


@torch.no_grad()
def _add_to_denoiser(pipe: Any, lora: LoRAPairs) -> None:
    component = _denoiser(pipe)
    modules = dict(getattr(pipe, component).named_modules())
    for name, pair in lora.pairs.items():
        weight = getattr(modules.get(name.removeprefix(f"{component}.")), "weight", None)
        update = pair.up.flatten(1) @ pair.down.flatten(1)
        if weight is None or weight.flatten(1).shape != update.shape:
            raise EffiLoRAError(
                f"the layer {name[:100]} is not in this model, or has another size there: it is for another base"
            )
        weight += update.view(weight.shape).to(weight)


def extracted(
    tuned: str | None,
    base: str | None,
    rank: int,
    conv_rank: int | None = None,
    text_encoders: bool = False,
    dtype: torch.dtype = torch.float32,
    say: Callable[[str], None] = logger.info,
) -> Outcome:
    """The difference of two models of one architecture as a plain LoRA: of every linear that differs the best of ``rank``.

    Args:
        tuned, base: model folders, hub ids or checkpoint files.
        rank: of linears.
        conv_rank: of convolutions; ``None``: they are left out.
        text_encoders: also take the text encoders' linears.
        dtype: that the models are loaded in; differences are computed in float32.
        say: gets what the LoRA can't hold.

    Raises:
        EffiLoRAError: the models are not of one architecture, or do not differ in any layer that a LoRA can hold.
    """
    pipes = [load_pipeline(model, dtype) for model in (tuned, base)]
    components = [_denoiser(pipes[1])]
    if text_encoders:
        components += [
            name for name, part in pipes[1].components.items() if name.startswith("text_encoder") and part is not None
        ]
    pairs, errors, wholes, left = {}, 0.0, 0.0, 0
    for component in components:
        new, old = (getattr(pipe, component, None) for pipe in pipes)
        if new is None or old is None or _shapes(new) != _shapes(old):
            raise EffiLoRAError(
                f"the two models are not of one architecture: their {component} differ in layers or sizes"
            )
        modules = dict(old.named_modules())
        for path, name, difference in _differences(new, old):
            own = _rank_of(modules[path], name, rank, conv_rank)
            if own is None:
                left += 1
                wholes, errors = (value + float(difference.double().square().sum()) for value in (wholes, errors))
                continue
            pairs[layer_name(f"{component}.{path}")], error, whole = low_rank(difference, own)
            errors, wholes = errors + error, wholes + whole
    if not pairs:
        raise EffiLoRAError("the two models have the same linears: there is nothing that a LoRA could hold")
    if left:
        say(f"{left} other tensors differ too (convolutions, norms, biases), which this LoRA does not hold")
    return Outcome(LoRAPairs(pairs), math.sqrt(errors / wholes))


def _denoiser(pipe: Any) -> str:
    part = host_model(pipe)
    return next(name for name, found in pipe.components.items() if found is part)


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in module.state_dict().items()}


def _differences(new: nn.Module, old: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """Module, name and difference of every tensor that differs."""
    before = old.state_dict()
    for name, value in new.state_dict().items():
        if value.is_floating_point() and not torch.equal(value, before[name]):
            path, _, own = name.rpartition(".")
            yield path, own, value.float() - before[name].float()


def _rank_of(module: nn.Module, name: str, rank: int, conv_rank: int | None) -> int | None:
    """The rank for a module's tensor; ``None`` for what a LoRA can't hold, or is not wanted to."""
    if name != "weight":
        return None
    if isinstance(module, nn.Linear):
        return rank
    return conv_rank if isinstance(module, nn.Conv2d) and module.groups == 1 else None


def save(outcome: Outcome, path: Path, tool: str, dtype: torch.dtype) -> str:
    """Write the outcome's file; returns what is told of it."""
    write_pairs(path, outcome.lora, {"made_by": tool, "relative_error": outcome.error}, dtype)
    naming = "sd-scripts' naming" if outcome.lora.kohya else "diffusers' naming"
    return "\n".join([*(f"note: {note}" for note in outcome.notes), f"{path} ({outcome.describe()}, {naming})"])

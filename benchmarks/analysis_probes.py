"""What trained adapters look like inside: part of ``python -m benchmarks.analysis``."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from effilora_diffusion.core import EffiLoRA
from effilora_diffusion.core.sites import Site
from effilora_diffusion.diffusion.training.trainer import Trainer

from .judging import LEVELS, Probe


def overlap(one: Tensor, other: Tensor) -> float:
    """How much of one column space lies in another, from 0 to 1: ``(d, r)`` and ``(d, s)``.

    Of random spaces of dimension r it is r / d on average.
    """
    first, second = (torch.linalg.qr(value.double())[0] for value in (one, other))
    return float((first.T @ second).square().sum()) / min(one.shape[1], other.shape[1])


def columns(adapter: EffiLoRA, kind: str) -> dict[str, Tensor]:
    """A (``(d_in, r)``, by site) or B (``(d_out, N r)``, by linear) of every place."""
    if kind == "A":
        return {site.name: adapter.shared_a(site).detach().T for site in adapter.sites}
    found = {}
    for site, heads in zip(adapter.sites, adapter.B, strict=True):
        for path, _ in site.linears:
            found[path] = heads.detach()[site.rows(path)].flatten(1)
    return found


def overlaps_within(adapter: EffiLoRA, kind: str) -> list[tuple[str, str, float, float]]:
    """Overlaps between all places of equal width: names, overlap, and that of random spaces."""
    found = columns(adapter, kind)
    return [
        (one, other, overlap(found[one], found[other]), found[one].shape[1] / len(found[one]))
        for one, other in itertools.combinations(found, 2)
        if len(found[one]) == len(found[other])
    ]


def overlaps_between(one: EffiLoRA, other: EffiLoRA, kind: str) -> list[float]:
    """Overlaps of every place in one adapter with the same place in another."""
    first, second = columns(one, kind), columns(other, kind)
    return [overlap(first[name], second[name]) for name in first]


@contextmanager
def recorded_gates(adapter: EffiLoRA) -> Iterator[dict[int, Tensor]]:
    """The gates ``(N, rows)`` of every site in the last forward pass of this context."""
    found: dict[int, Tensor] = {}
    own = adapter.gates

    def gates(index: int, h: Tensor | None = None) -> Tensor | None:
        result = own(index, h)
        if result is not None:
            found[index] = result.detach()
        return result

    adapter.gates = gates  # type: ignore[method-assign]
    try:
        yield found
    finally:
        del adapter.gates


def entropy(gates: Tensor) -> Tensor:
    """Entropy of gates along the first dimension, as a share of the largest possible."""
    return -(gates * gates.clamp_min(1e-12).log()).sum(0) / math.log(len(gates))


def reads_text(site: Site) -> bool:
    """Whether a site reads the prompt: key and value of a cross-attention."""
    return all(".attn2." in path and path.rsplit(".", 1)[1] in ("to_k", "to_v") for path, _ in site.linears)


@torch.no_grad()
def head_usage(trainer: Trainer, probe: Probe, levels: int = LEVELS) -> dict[str, Any]:
    """Gates of a trained adapter on the first image of ``probe``: by block, by noise level and by word of the prompt."""
    adapter, timesteps = trainer.adapter.eval(), probe.timesteps[:levels]
    conditions = {name: value[:levels] for name, value in probe.conditions.items()}
    with recorded_gates(adapter) as gates:
        trainer.family.predict(probe.noisy[:levels], timesteps, conditions)
    blocks: dict[str, list[list[float]]] = {name: [] for name in adapter.blocks}
    mixed: dict[str, list[float]] = {name: [] for name in adapter.blocks}
    by_level, by_token = [], []
    for index, site in enumerate(adapter.sites):
        rows = gates[index].unflatten(1, (levels, -1))
        blocks[site.block].append(rows.mean((1, 2)).sort(descending=True).values.tolist())
        mixed[site.block].append(float(entropy(rows).mean()))
        if reads_text(site):
            by_token.append(rows.mean(1))
        else:
            by_level.append(rows.mean(2))
    changing = [(one - one.mean(1, keepdim=True)).abs().amax(0) for one in by_level]
    words = trainer.family.pipe.tokenizer.tokenize(str(trainer.config.instance_prompt))
    return {
        "blocks": {name: [statistics.mean(head) for head in zip(*rows, strict=True)] for name, rows in blocks.items()},
        "entropy": {name: statistics.mean(values) for name, values in mixed.items()},
        "levels": torch.stack([entropy(one) for one in by_level]).mean(0).tolist(),
        "level change": torch.stack(changing).mean(0).tolist(),
        "timesteps": timesteps.tolist(),
        "token entropy": torch.stack([entropy(one) for one in by_token]).mean(0)[: len(words) + 2].tolist(),
        "token top": torch.stack([one.amax(0) for one in by_token]).mean(0)[: len(words) + 2].tolist(),
        "words": ["start", *(word.removesuffix("</w>") for word in words), "end"],
    }


@torch.no_grad()
def removal(trainer: Trainer, probe: Probe) -> dict[str, Any]:
    """How much the held-out loss rises when a block's or a kind of layer's heads are taken out, as a share of all gained."""
    adapter = trainer.adapter.eval()

    def loss() -> float:
        return probe.loss(trainer.family)

    whole = loss()
    with adapter.disabled():
        gained = loss() - whole
    found: dict[str, Any] = {"gained": gained, "blocks": {}, "kinds": {}}
    for block in adapter.blocks:
        adapter.block_strength[block] = 0.0
        found["blocks"][block] = (loss() - whole) / gained
        del adapter.block_strength[block]
    kinds: dict[str, list[int]] = {}
    for index, site in enumerate(adapter.sites):
        kinds.setdefault(kind_of(site), []).append(index)
    for kind, places in kinds.items():
        kept = [adapter.B[index].clone() for index in places]
        for index in places:
            adapter.B[index].zero_()
        found["kinds"][kind] = (loss() - whole) / gained
        for index, value in zip(places, kept, strict=True):
            adapter.B[index].copy_(value)
    return found


def kind_of(site: Site) -> str:
    """What a site's linears are to their attention, as ``self q k v`` and ``cross out``."""
    names = [path.split(".") for path, _ in site.linears]
    attention = "self" if "attn1" in names[0] else "cross"
    return " ".join([attention, *(parts[-1].removeprefix("to_") if parts[-1] != "0" else "out" for parts in names)])

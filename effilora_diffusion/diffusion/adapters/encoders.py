"""The part of an adapter on a pipeline's CLIP text encoders: which linears, and its shape.

It has one head, which acts on every prompt, so that its plain LoRA is exact, and one A per width as elsewhere.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from ...core import EffiLoRA, EffiLoRAConfig, Site
from ...core.config import ReducerConfig
from ...core.files import ENCODERS
from ...core.rng import counter_seed
from ...core.sites import block_of, linears_of, widths

TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
"""The linears of a CLIP's attention, those that diffusers' scripts train; the first three read one input."""


def clip_encoders(pipe: Any) -> dict[str, nn.Module]:
    """The CLIP text encoders of a pipeline, by their names there."""
    found = {name: getattr(pipe, name, None) for name in ENCODERS}
    return {
        name: part for name, part in found.items() if isinstance(part, CLIPTextModel | CLIPTextModelWithProjection)
    }


def encoder_sites(encoder: nn.Module) -> list[Site]:
    """The sites of a CLIP text encoder: in every attention one for q, k and v, and one for the output."""
    size: dict[str, tuple[int, int]] = {}
    for path, linear in linears_of(encoder).items():
        found = widths(linear)
        if found is not None and path.rpartition(".")[2] in TARGETS:
            size[path] = found
    sites = []
    for parent in dict.fromkeys(path.rpartition(".")[0] for path in size):
        for names in (TARGETS[:3], TARGETS[3:]):
            maps = tuple((f"{parent}.{name}", size[f"{parent}.{name}"][1]) for name in names)
            sites.append(Site(f"{parent}.{'_'.join(names)}", block_of(parent), size[maps[0][0]][0], maps))
    return sites


def encoder_config(config: EffiLoRAConfig) -> EffiLoRAConfig:
    """The configuration of the part on a text encoder, beside that of the denoiser."""
    single = replace(config, heads=1, routing="static", concepts=(), common_head=False, a_sharing="width")
    return replace(single, target_modules=TARGETS, reducer=ReducerConfig(), timestep_range=1000.0)


def add_encoders(adapter: EffiLoRA, pipe: Any, seed: int, a_start: str) -> None:
    """Give a fresh adapter its parts on the CLIP text encoders of ``pipe``, which change nothing until they are trained."""
    for name, encoder in clip_encoders(pipe).items():
        own = counter_seed(seed, "encoder", ENCODERS.index(name))
        adapter.add_encoder(name, EffiLoRA(encoder_config(adapter.config), encoder_sites(encoder), own, a_start))

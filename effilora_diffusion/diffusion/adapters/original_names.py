"""Layer names of the original models, where they differ from diffusers' and other programs know no others.

Sources: diffusers' single-file loader (``single_file_utils.py``) for Lumina 2, the order of blocks in Stability's UNet for SDXL.
"""

from __future__ import annotations

import re

import torch

from ...core import EffiLoRAError
from ...core.convert import PlainLoRA
from ..models.architectures import LUMINA, SDXL

_SDXL_NAMES = (
    (r"time_embedding\.linear_1$", "time_embed.0"),
    (r"time_embedding\.linear_2$", "time_embed.2"),
    (r"add_embedding\.linear_1$", "label_emb.0.0"),
    (r"add_embedding\.linear_2$", "label_emb.0.2"),
    (r"mid_block\.attentions\.0\.", "middle_block.1."),
    (r"mid_block\.resnets\.0\.time_emb_proj$", "middle_block.0.emb_layers.1"),
    (r"mid_block\.resnets\.1\.time_emb_proj$", "middle_block.2.emb_layers.1"),
)
_SDXL_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(attentions|resnets)\.(\d+)\.(.*)")
_LUMINA_NAMES = (
    (r"\.attn\.to_out\.0$", ".attention.out"),
    (r"\.feed_forward\.linear_(\d)$", r".feed_forward.w\1"),
    (r"\.norm1\.linear$", ".adaLN_modulation.1"),
    (r"^time_caption_embed\.timestep_embedder\.linear_1$", "t_embedder.mlp.0"),
    (r"^time_caption_embed\.timestep_embedder\.linear_2$", "t_embedder.mlp.2"),
    (r"^time_caption_embed\.caption_embedder\.", "cap_embedder."),
    (r"^norm_out\.linear_1$", "final_layer.adaLN_modulation.1"),
    (r"^norm_out\.linear_2$", "final_layer.linear"),
)
_QKV = ("to_q", "to_k", "to_v")


def original_factors(
    factors: dict[str, PlainLoRA], architecture: str, layers_per_block: int = 2
) -> dict[str, PlainLoRA]:
    """Plain LoRA factors under the original model's names; diffusers' own for architectures that keep them.

    Args:
        factors: pairs by diffusers' names of the layers.
        architecture: modelspec's name.
        layers_per_block: of the UNet, which the original counts its blocks by: 2 in SDXL, 1 in models distilled from it.

    Raises:
        EffiLoRAError: a layer that is part of a fused one of the original, whose other parts the adapter does not have.
    """
    if architecture == SDXL:
        return {_sdxl_name(path, layers_per_block): pair for path, pair in factors.items()}
    if architecture == LUMINA:
        return _lumina_factors(factors)
    return factors


def _sdxl_name(path: str, layers: int) -> str:
    match = _SDXL_BLOCK.fullmatch(path)
    if match is None:
        return _renamed(path, _SDXL_NAMES)
    side, block, kind, layer, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    # A block is its layers and a resampling on the way down, one layer more on the way up.
    index = (layers + 1) * block + layer + (side == "down")
    inner = f"1.{rest}" if kind == "attentions" else rest.replace("time_emb_proj", "0.emb_layers.1")
    return f"{'input' if side == 'down' else 'output'}_blocks.{index}.{inner}"


def _lumina_factors(factors: dict[str, PlainLoRA]) -> dict[str, PlainLoRA]:
    found = {}
    for path, pair in factors.items():
        parent, _, name = path.rpartition(".")
        if not parent.endswith(".attn") or name not in _QKV:
            found[_renamed(path, _LUMINA_NAMES)] = pair
        elif name == "to_q" or f"{parent}.to_q" not in factors:
            missing = [part for part in _QKV if f"{parent}.{part}" not in factors]
            if missing:
                raise EffiLoRAError(
                    f"the original model has one layer for q, k and v, and the adapter does not act on {missing[0]} of {parent}: "
                    "only adapters of all three have a form for other programs"
                )
            found[f"{parent.removesuffix('attn')}attention.qkv"] = _fused(
                [factors[f"{parent}.{part}"] for part in _QKV]
            )
    return found


def _fused(pairs: list[PlainLoRA]) -> PlainLoRA:
    """One LoRA of maps that read the same input, their outputs one after the other."""
    if all(torch.equal(pair.down, pairs[0].down) for pair in pairs):
        return PlainLoRA(pairs[0].down, torch.cat([pair.up for pair in pairs]))
    return PlainLoRA(torch.cat([pair.down for pair in pairs]), torch.block_diag(*(pair.up for pair in pairs)))


def _renamed(path: str, names: tuple[tuple[str, str], ...]) -> str:
    for pattern, name in names:
        path = re.sub(pattern, name, path)
    return path

"""Randomness by counter: every draw comes from (seed, purpose, indices), never from an ambient generator.

A resumed run therefore needs no generator state, and neither worker nor process counts can change what is drawn.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def counter_seed(seed: int, purpose: str, *indices: int) -> int:
    """A 63-bit seed that depends on all arguments."""
    digest = hashlib.sha256(repr((seed, purpose, indices)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, purpose: str, *indices: int) -> torch.Generator:
    """A CPU generator for one purpose at one place of the run; CPU, so that every device draws the same numbers."""
    return torch.Generator().manual_seed(counter_seed(seed, purpose, *indices))


def draw_normal(shape: tuple[int, ...], seed: int, purpose: str, *indices: int) -> Tensor:
    """Standard normal numbers of ``shape``, float32 on the CPU."""
    return torch.randn(shape, generator=generator(seed, purpose, *indices))


def draw_uniform(count: int, seed: int, purpose: str, *indices: int) -> Tensor:
    """``count`` numbers in [0, 1), float32 on the CPU."""
    return torch.rand(count, generator=generator(seed, purpose, *indices))


def draw_item(position: int, count: int, seed: int, purpose: str) -> int:
    """The item at ``position`` of an endless sequence of shuffled epochs over ``count`` items."""
    epoch, place = divmod(position, count)
    return int(torch.randperm(count, generator=generator(seed, purpose, epoch))[place])

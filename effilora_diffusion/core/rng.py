"""Counter-based random numbers: every draw is a function of (seed, purpose, indices), without generator state.

A resumed run therefore draws the same numbers, whatever the number of workers or processes.
"""

from __future__ import annotations

import functools
import hashlib

import torch
from torch import Tensor


def counter_seed(seed: int, purpose: str, *indices: int) -> int:
    """Hash the arguments to a 63-bit seed."""
    digest = hashlib.sha256(repr((seed, purpose, indices)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, purpose: str, *indices: int) -> torch.Generator:
    """Return a generator seeded with :func:`counter_seed`; on the CPU, so that every device draws the same numbers."""
    return torch.Generator().manual_seed(counter_seed(seed, purpose, *indices))


def draw_normal(shape: tuple[int, ...], seed: int, purpose: str, *indices: int) -> Tensor:
    """Draw standard normal numbers, float32 on the CPU."""
    return torch.randn(shape, generator=generator(seed, purpose, *indices))


def draw_uniform(count: int, seed: int, purpose: str, *indices: int) -> Tensor:
    """Draw ``count`` uniform numbers in [0, 1), float32 on the CPU."""
    return torch.rand(count, generator=generator(seed, purpose, *indices))


def draw_item(position: int, count: int, seed: int, purpose: str) -> int:
    """Return the item at ``position`` of an endless sequence of shuffled epochs over ``count`` items."""
    epoch, index = divmod(position, count)
    return int(_shuffled(count, seed, purpose, epoch)[index])


@functools.lru_cache(maxsize=16)
def _shuffled(count: int, seed: int, purpose: str, epoch: int) -> Tensor:
    """One epoch; kept, because the next position is mostly in the same one, and 100,000 items take a millisecond."""
    return torch.randperm(count, generator=generator(seed, purpose, epoch))

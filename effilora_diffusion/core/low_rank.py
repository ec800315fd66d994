"""Plain LoRAs as low-rank matrices: sums, the best ones of a lower rank, and how much is missing in these."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .convert import PlainLoRA
from .errors import EffiLoRAError

METHODS = ("sv_ratio", "sv_fro", "sv_cumulative")
"""Ways to choose the rank of every layer by its singular values, by sd-scripts' names."""

WHOLE = 1024
"""Smaller edge of the largest matrix of which all singular values are computed."""


@dataclass(frozen=True)
class Ranks:
    """How the rank of a layer is chosen.

    Args:
        most: the largest rank.
        method: of :data:`METHODS`; ``None``: always ``most``.
        value: of the method. ``sv_ratio``: singular values above the largest by ``value`` are kept; ``sv_fro``: so many that
            they are this share of the Frobenius norm; ``sv_cumulative``: so many that they are this share of their sum.
    """

    most: int
    method: str | None = None
    value: float = 0.0

    def __post_init__(self) -> None:
        if self.most < 1:
            raise EffiLoRAError(f"--rank must be at least 1, not {self.most}")
        if self.method not in (None, *METHODS):
            raise EffiLoRAError(f"--dynamic_method must be one of {', '.join(METHODS)}, not {self.method[:50]!r}")
        if self.method == "sv_ratio" and not (math.isfinite(self.value) and self.value >= 1):
            raise EffiLoRAError(
                f"--dynamic_param must be at least 1 for sv_ratio, not {self.value:g}: 2 to 20 are usual"
            )
        if self.method in ("sv_fro", "sv_cumulative") and not 0 < self.value <= 1:
            raise EffiLoRAError(f"--dynamic_param must be above 0 and at most 1 for {self.method}, not {self.value:g}")

    def of(self, values: Tensor) -> int:
        """The rank for singular values in falling order, at least 1."""
        if self.method == "sv_ratio":
            wanted = int((values > values[0] / self.value).sum())
        elif self.method == "sv_fro":
            wanted = _reaching(values.square(), self.value**2)
        elif self.method == "sv_cumulative":
            wanted = _reaching(values, self.value)
        else:
            wanted = self.most
        return max(1, min(wanted, self.most, len(values)))


def _reaching(values: Tensor, share: float) -> int:
    """How many of ``values`` are ``share`` of their sum."""
    reached = values.double().cumsum(0) / values.double().sum().clamp_min(1e-300)
    return int((reached < share - 1e-9).sum()) + 1


@torch.no_grad()
def weighted_sum(parts: Sequence[tuple[PlainLoRA, float]]) -> PlainLoRA:
    """The exact sum of weighted updates: ranks add up, but for parts with the same ``down``, as of one shared A.

    Of convolutions ``down`` is ``(r, c_in, k, k)`` and ``up`` ``(c_out, r, 1, 1)``.

    Example:
        >>> one = PlainLoRA(torch.ones(1, 2), torch.ones(3, 1))
        >>> weighted_sum([(one, 0.5), (one, 0.5)]).up.shape
        torch.Size([3, 1])
    """
    downs: list[Tensor] = []
    ups: list[Tensor] = []
    for pair, weight in parts:
        up = pair.up.float() * weight
        same = [index for index, down in enumerate(downs) if torch.equal(down, pair.down.float())]
        if same:
            ups[same[0]] = ups[same[0]] + up
        else:
            downs.append(pair.down.float())
            ups.append(up)
    return PlainLoRA(torch.cat(downs), torch.cat(ups, 1))


@torch.no_grad()
def reduced(pair: PlainLoRA, ranks: Ranks) -> tuple[PlainLoRA, float, float]:
    """The best update of a lower rank, its squared error, and the squared norm of the whole (Eckart-Young).

    The update itself, which is large, is never computed.
    """
    left, inner = torch.linalg.qr(pair.up.double().flatten(1))
    right, outer = torch.linalg.qr(pair.down.double().flatten(1).t())
    u, values, v = torch.linalg.svd(inner @ outer.t())
    rank = ranks.of(values)
    kept = _halves(left @ u[:, :rank], values[:rank], (right @ v[:rank].t()).t())
    shaped = _shaped(kept, pair.down.shape[1:], pair.up.shape[2:])
    return shaped, float(values[rank:].square().sum()), float(values.square().sum())


@torch.no_grad()
def low_rank(update: Tensor, rank: int) -> tuple[PlainLoRA, float, float]:
    """The best update of ``rank`` for a whole matrix ``(d_out, d_in)`` or kernel ``(c_out, c_in, k, k)``; as :func:`reduced`.

    Of large matrices the singular vectors are found by randomised iteration, always with the same random numbers.
    """
    flat = update.float().flatten(1)
    rank = min(rank, *flat.shape)
    if min(flat.shape) <= max(WHOLE, 3 * rank):
        u, values, v = torch.linalg.svd(flat, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, values, columns = torch.svd_lowrank(flat, q=min(2 * rank + 8, *flat.shape), niter=6)
        v = columns.t()
    kept = _halves(u[:, :rank], values[:rank], v[:rank])
    whole = float(flat.double().square().sum())
    error = max(0.0, whole - float(values[:rank].double().square().sum()))
    return _shaped(kept, update.shape[1:], (1,) * (update.ndim - 2)), error, whole


def _halves(u: Tensor, values: Tensor, v: Tensor) -> PlainLoRA:
    """Factors that share the singular values evenly, so that neither overflows in float16."""
    root = values.sqrt()
    return PlainLoRA((root[:, None] * v).float().contiguous(), (u * root).float().contiguous())


def _shaped(pair: PlainLoRA, inner: Sequence[int], outer: Sequence[int]) -> PlainLoRA:
    return PlainLoRA(pair.down.view(-1, *inner), pair.up.view(*pair.up.shape, *outer))

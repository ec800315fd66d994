"""Plain LoRA from an EffiLoRA adapter: exact for one head, static gates and each concept, else the least-squares fit of B.

With ``h = A x`` and gates ``w``, the best fixed ``B*`` for the same A minimises the mean squared output error:
``B* = s sum_i B_i C_i C^-1`` with ``C = E[h h^T]`` and ``C_i = E[w_i h h^T]``. Those r x r moments are the
calibration; the error itself needs ``E[w_i w_j h h^T]`` and is measured while they are collected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .adapter import EffiLoRA, SharedActivations
from .concepts import number_of
from .config import EffiLoRAConfig, ReducerConfig
from .errors import EffiLoRAError

RIDGE = 1e-5
"""Added to C's diagonal, relative to its mean: C is close to singular where few inputs were seen. It is well above what
rounding to float32, in which the moments are stored, puts into directions that no input had (some 1e-8 of the trace)."""


@dataclass
class PlainLoRA:
    """The two factors of one linear map's update: ``down`` ``(r, d_in)``, ``up`` ``(d_out, r)``, scale included."""

    down: Tensor
    up: Tensor


def is_exact(adapter: EffiLoRA) -> bool:
    """Whether the plain-LoRA form of ``adapter`` (of each concept, if it has several) computes the same function."""
    return adapter.config.heads == 1 or adapter.config.routing in ("static", "concept")


@torch.no_grad()
def single_concept(adapter: EffiLoRA, name: str | None) -> EffiLoRA:
    """One concept of ``adapter`` as an adapter with one head, which acts always: its own head and the common one, added.

    Raises:
        EffiLoRAError: ``name`` is no concept of the adapter, or ``None``.
    """
    return fixed_heads(adapter, adapter.concept_gates([[number_of(adapter.concepts, name)]]).heads.tolist())


@torch.no_grad()
def fixed_heads(adapter: EffiLoRA, numbers: list[int]) -> EffiLoRA:
    """The sum of some heads of an adapter with concepts, as an adapter with one head, which acts always."""
    config = replace(adapter.config, heads=1, routing="static", concepts=(), common_head=False)
    single = EffiLoRA(config, adapter.sites)
    for key, value in adapter.A.items():
        single.A[key].copy_(value)
    for target, heads in zip(single.B, adapter.B, strict=True):
        target.copy_(heads[:, numbers].sum(1, keepdim=True))
    return single


@torch.no_grad()
def without_concepts(adapter: EffiLoRA, names: Sequence[str]) -> EffiLoRA:
    """A copy of ``adapter`` without some of its concepts; A, the other heads and the common one keep their bits.

    Raises:
        EffiLoRAError: one of ``names`` is no concept of the adapter, or none would be left.
    """
    config = adapter.config
    if not config.concepts:
        raise EffiLoRAError("the adapter has no concepts, of which one could be taken out")
    gone = {number_of(config.concepts, name) for name in names}
    kept = [number for number in range(len(config.concepts)) if number not in gone]
    if not kept:
        raise EffiLoRAError("no concept would be left in the adapter: keep one, or delete the file")
    concepts = tuple(config.concepts[number] for number in kept)
    heads = [*kept, len(config.concepts)] if config.common_head else kept
    smaller = EffiLoRA(replace(config, heads=len(heads), concepts=concepts), adapter.sites)
    for key, value in adapter.A.items():
        smaller.A[key].copy_(value)
    for target, found in zip(smaller.B, adapter.B, strict=True):
        target.copy_(found[:, heads])
    return smaller


def describe_export_error(error: float | None, others: float | None = None) -> str:
    """How close the plain LoRA is, in words.

    ``error`` is its relative error, ``None`` where it is exact; ``others`` that on everything but the subject, if it is known.
    """
    if error is None:
        return "exact"
    missing = f"a fit, {error:.1%} of the update missing"
    return missing if others is None else f"{missing} on the subject, {others:.1%} on everything else"


class Moments:
    """Second moments of one site, gathered in float64: ``c (r, r)``, ``ci (N, r, r)``, ``cij (N, N, r, r)``."""

    def __init__(self, heads: int, rank: int):
        self.rows = 0
        self.c = torch.zeros(rank, rank, dtype=torch.float64)
        self.ci = torch.zeros(heads, rank, rank, dtype=torch.float64)
        self.cij = torch.zeros(heads, heads, rank, rank, dtype=torch.float64)

    def add(self, gated: Tensor) -> None:
        """Take in the gated codes ``w_i h``, ``(rows, N r)``; as gates sum to 1, their sum over the heads is ``h``."""
        heads, rank = self.ci.shape[:2]
        flat = gated.double().cpu()
        h = flat.view(-1, heads, rank).sum(1)
        self.rows += len(h)
        self.c += h.t() @ h
        self.ci += (flat.t() @ h).view(heads, rank, rank)
        self.cij += (flat.t() @ flat).view(heads, rank, heads, rank).permute(0, 2, 1, 3)

    def stacked(self) -> Tensor:
        """``(N + 1, r, r)`` float32: C, then every C_i, as they are stored in the native file."""
        return (torch.cat([self.c.unsqueeze(0), self.ci]) / max(1, self.rows)).float()


@torch.no_grad()
def calibrate(model: nn.Module, adapter: EffiLoRA, run: Callable[[], object]) -> tuple[dict[str, Tensor], float]:
    """Watch the attached ``adapter`` while ``run`` drives ``model`` over typical inputs.

    Returns the calibration by site name and the relative output error of the least-squares export (root of summed
    squared errors over summed squared updates, all maps together). Both are empty and zero for exact adapters.
    """
    if is_exact(adapter):
        return {}, 0.0
    moments = [Moments(adapter.config.heads, adapter.config.rank) for _ in adapter.sites]
    original = adapter.add_to

    def watched(output: Tensor, index: int, position: int, shared: SharedActivations, fresh: bool) -> Tensor:
        if position == 0:  # the site's first map: once per call, whether or not its maps share the code
            moments[index].add(shared[0])
        return original(output, index, position, shared, fresh)

    adapter.__dict__["add_to"] = watched
    try:
        run()
    finally:
        del adapter.__dict__["add_to"]
    calibration = {site.name: m.stacked() for site, m in zip(adapter.sites, moments, strict=True) if m.rows}
    wrong = total = 0.0
    for index, site_moments in enumerate(moments):
        if site_moments.rows:
            error, size = _output_error(adapter, index, site_moments)
            wrong, total = wrong + error, total + size
    return calibration, (wrong / total) ** 0.5 if total > 0 else 0.0


def _fit(heads: Tensor, calibration: Tensor) -> Tensor:
    """``sum_i B_i C_i C^-1``: heads ``(d_out, N, r)``, calibration ``(N + 1, r, r)`` to ``(d_out, r)``."""
    c, ci = calibration[0].double(), calibration[1:].double()
    ridge = RIDGE * c.diagonal().mean().clamp_min(1e-30) * torch.eye(len(c), dtype=torch.float64)
    # B* C = sum_i B_i C_i; the ridge pulls towards the mean gates, not towards zero.
    share = ci.diagonal(dim1=1, dim2=2).sum(1) / c.diagonal().sum().clamp_min(1e-30)
    mean = torch.einsum("n,dnr->dr", share, heads.double())
    right = torch.einsum("dnr,nrs->ds", heads.double(), ci) + mean @ ridge
    found, _ = torch.linalg.solve_ex(c + ridge, right.t())  # a singular C, which no inputs give, yields infinities
    return found.t()


def _output_error(adapter: EffiLoRA, index: int, moments: Moments) -> tuple[float, float]:
    """Summed squared error of the export and summed squared update, over what the moments have seen."""
    heads = adapter.B[index].detach().cpu().double()
    best = _fit(heads, moments.stacked())
    size = float(torch.einsum("dnr,nmrs,dms->", heads, moments.cij, heads))
    cross = float(torch.einsum("dnr,nrs,ds->", heads, moments.ci, best))
    fitted = float(torch.einsum("dr,rs,ds->", best, moments.c, best))
    return max(0.0, size - 2 * cross + fitted), size


@torch.no_grad()
def to_lora(
    adapter: EffiLoRA, calibration: dict[str, Tensor] | None = None, concept: str | None = None
) -> dict[str, PlainLoRA]:
    """Plain LoRA factors by module path, of rank r, the scale baked into ``up`` (so alpha = rank).

    Of an adapter with several concepts one is converted, ``concept``; a plain LoRA can't tell prompts apart.

    Raises :class:`EffiLoRAError` if the adapter routes by input and a site has no calibration, a factor is not finite, or
    ``concept`` is not one of the adapter's.
    """
    if concept is not None or adapter.config.routing == "concept":
        adapter = single_concept(adapter, concept)
    factors = {}
    exact = is_exact(adapter)
    for index, site in enumerate(adapter.sites):
        if not exact and site.name not in (calibration or {}):
            raise EffiLoRAError(
                f"the adapter's {adapter.config.routing} routing needs calibration to become plain LoRA, and "
                f"{site.name} has none: save the adapter with calibrate() run over typical inputs"
            )
        for path, _ in site.linears:
            rows = site.rows(path)
            if exact:
                up = adapter.mixed_heads(index)[rows]
            else:
                assert calibration is not None
                up = _fit(adapter.B[index][rows].cpu(), calibration[site.name].cpu())
            up = (up.double() * adapter.config.scale).float().cpu().contiguous()
            if not up.isfinite().all():
                raise EffiLoRAError(f"the plain LoRA of {path} is not finite: its heads or its calibration are broken")
            factors[path] = PlainLoRA(adapter.shared_a(site).detach().float().cpu().clone().contiguous(), up)
    return factors


def plain_config(config: EffiLoRAConfig) -> EffiLoRAConfig:
    """The configuration of a plain LoRA that stands for an adapter of ``config``: one head over the same A."""
    return replace(config, heads=1, routing="static", dropout=0.0, reducer=ReducerConfig())


@torch.no_grad()
def fitted(adapter: EffiLoRA, calibration: dict[str, Tensor]) -> EffiLoRA:
    """The least-squares fit of ``adapter`` as an adapter with one head: its plain LoRA, which can be attached and trained.

    It has the same A, sites and scale; raises :class:`EffiLoRAError` as :func:`to_lora` does.
    """
    factors = to_lora(adapter, calibration)
    config = plain_config(adapter.config)
    single = EffiLoRA(config, adapter.sites)
    for key, value in adapter.A.items():
        single.A[key].copy_(value)
    for target, site in zip(single.B, adapter.sites, strict=True):
        target[:, 0] = torch.cat([factors[path].up for path, _ in site.linears]) / config.scale
    return single

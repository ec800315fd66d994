"""How deep backpropagation goes: blocks in the order in which they run, and the plan of where it ends (not in the paper).

Backpropagation runs from the last block to the earliest one that is trained. What lies before that keeps no activations
and takes no backward pass, what lies after it is nearly free to train. So the one choice that saves time and memory is
the *cut*: a position in the order of execution, before which everything is frozen.
"""

from __future__ import annotations

import contextlib
import random
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from .adapter import EffiLoRA
from .attachment import unwrap
from .config import is_number
from .errors import EffiLoRAError
from .weights import paths_of, weights_of

_GOLDEN = (5**0.5 - 1) / 2
_DIGITS = 4
_MEASURED = ("seconds", "time", "kept")


@dataclass(frozen=True)
class DepthPlan:
    """Which part of the steps is cut where.

    Steps take their cuts in turn, as evenly as their shares allow, so that every stretch of a run keeps the budget. Where
    that begins follows from the seed; a step's cut depends on (seed, step) only.

    Args:
        order: the adapter's blocks in the order in which they run.
        shares: ``(cut, share of the steps)``, by cut; blocks ``order[:cut]`` are frozen in these steps. Shares have at
            most four digits and sum to 1.
        seconds: of a step that trains every block, if it was measured.
        time: what the plan's steps take of such a step's time on average, if it was measured.
        kept: what the plan's deepest steps keep of such a step's activations, if it was measured.

    Example:
        >>> plan = DepthPlan(("down", "middle", "up"), ((0, 0.25), (2, 0.75)))
        >>> [len(plan.active(step, seed=0)) for step in range(8)].count(3)
        2
    """

    order: tuple[str, ...]
    shares: tuple[tuple[int, float], ...]
    seconds: float | None = None
    time: float | None = None
    kept: float | None = None

    def cut(self, step: int, seed: int = 0) -> int:
        """The number of blocks that ``step`` freezes."""
        # Multiples of the golden ratio modulo 1 fill the unit interval more evenly than random numbers.
        position = (random.Random(f"depth {seed}").random() + step * _GOLDEN) % 1
        for cut, share in self.shares:
            position -= share
            if position < 0:
                return cut
        return self.shares[-1][0]

    def active(self, step: int, seed: int = 0) -> tuple[str, ...]:
        """The blocks that ``step`` trains, in the order in which they run."""
        return self.order[self.cut(step, seed) :]

    def mean(self, costs: Mapping[int, float]) -> float:
        """The mean of a cost per cut over the steps."""
        return sum(share * costs[cut] for cut, share in self.shares)

    def text(self) -> str:
        """The shares as a setting: ``0:0.25,2:0.75``; :func:`parse_shares` reads it."""
        return ",".join(f"{cut}:{share:g}" for cut, share in self.shares)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        measured = {name: getattr(self, name) for name in _MEASURED}
        return {"order": list(self.order), "shares": [list(pair) for pair in self.shares], **measured}

    @classmethod
    def from_dict(cls, data: Any, blocks: Sequence[str]) -> DepthPlan:
        """Inverse of :meth:`to_dict`; raises :class:`EffiLoRAError` for what is no plan of an adapter with ``blocks``."""
        if not isinstance(data, dict) or set(data) != {"order", "shares", *_MEASURED}:
            raise EffiLoRAError("the checkpoint's plan of depths is damaged: it has other entries than it must have")
        order, shares, measured = data["order"], data["shares"], {name: data[name] for name in _MEASURED}
        names = isinstance(order, list) and all(isinstance(name, str) for name in order)
        if not names or sorted(order) != sorted(blocks):
            raise EffiLoRAError("the checkpoint's plan of depths is for other blocks than this adapter's")
        pairs = isinstance(shares, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in shares)
        if not pairs or not all(value is None or is_number(value, 0, 1e9) for value in measured.values()):
            raise EffiLoRAError("the checkpoint's plan of depths is out of range")
        checked = check_shares([(pair[0], pair[1]) for pair in shares], len(order), "the checkpoint's plan of depths")
        return cls(tuple(order), checked, **measured)


def check_shares(shares: Sequence[tuple[Any, Any]], blocks: int, where: str) -> tuple[tuple[int, float], ...]:
    """``shares`` of a plan for ``blocks`` blocks; raises :class:`EffiLoRAError` naming ``where`` if they are none."""
    cuts = [cut for cut, _ in shares]
    if not shares or not all(type(cut) is int and 0 <= cut < blocks for cut in cuts):
        raise EffiLoRAError(f"{where} must cut at 0 to {blocks - 1}, this adapter's {blocks} blocks")
    if sorted(set(cuts)) != cuts:
        raise EffiLoRAError(f"{where} must name its cuts once each, in rising order")
    parts = [share for _, share in shares]
    if not all(is_number(share, 0, 1) and share > 0 for share in parts) or abs(sum(parts) - 1) > 1e-6:
        raise EffiLoRAError(f"{where} must have shares above 0 that sum to 1")
    return tuple((cut, float(share)) for cut, share in shares)


def parse_shares(text: str, blocks: int) -> tuple[tuple[int, float], ...]:
    """The shares that ``--reducer_plan`` names, as ``0:0.25,2:0.75``; raises :class:`EffiLoRAError` for anything else."""
    pairs: list[tuple[int, float]] = []
    for part in text.split(","):
        cut, _, share = part.strip().partition(":")
        try:
            pairs.append((int(cut), float(share)))
        except ValueError:
            raise EffiLoRAError(
                f"--reducer_plan {text!r:.200} is no list of CUT:SHARE, as 0:0.25,2:0.75: leave it out to have it measured"
            ) from None
    return check_shares(pairs, blocks, "--reducer_plan")


def fixed_plan(order: Sequence[str], cut: int) -> DepthPlan:
    """Every step is cut at ``cut``."""
    return DepthPlan(tuple(order), ((cut, 1.0),))


def plan_for_time(order: Sequence[str], times: Mapping[int, float], share: float, first: int = 0) -> DepthPlan:
    """The plan whose steps take ``share`` of a full one on average: some of the deepest, the rest of the shallowest kind.

    Args:
        order: see :class:`DepthPlan`.
        times: of a step by cut, as shares of a full one; ``first`` and the last cut must be among them.
        share: the budget.
        first: the deepest cut that may be taken.

    Raises:
        EffiLoRAError: no cut is cheap enough.
    """
    if times[first] <= share:
        return fixed_plan(order, first)
    last = len(order) - 1
    if times[last] > share:
        raise EffiLoRAError(
            f"--reducer_time {share:g} can't be met: a step that trains the last block only takes {times[last]:.2f} of a "
            f"full one: ask for {times[last] + 0.01:.2f} or more"
        )
    deep = round((share - times[last]) / (times[first] - times[last]), _DIGITS)
    if deep == 0:
        return fixed_plan(order, last)
    return DepthPlan(tuple(order), ((first, deep), (last, round(1 - deep, _DIGITS))))


def first_within(costs: Callable[[int], float], limit: float, blocks: int) -> int | None:
    """The smallest cut whose cost is at most ``limit``, for costs that fall with the cut; ``None`` if there is none."""
    low, high = 0, blocks
    while low < high:
        middle = (low + high) // 2
        if costs(middle) <= limit:
            high = middle
        else:
            low = middle + 1
    return low if low < blocks else None


@torch.no_grad()
def execution_order(model: nn.Module, adapter: EffiLoRA, run: Callable[[], object]) -> tuple[str, ...]:
    """The adapter's blocks by their first call in one forward pass without gradients.

    A model may register its blocks in another order than it runs them: a UNet lists its middle block last. Blocks that
    are never called come first, as nothing reaches them.

    Args:
        model: the one that the adapter is attached to.
        adapter: its blocks are watched.
        run: calls the model.
    """
    called: dict[str, None] = {}
    with _watching(model, adapter, lambda block: called.setdefault(block)):
        run()
    return (*(block for block in adapter.blocks if block not in called), *called)


@contextlib.contextmanager
def _watching(model: nn.Module, adapter: EffiLoRA, called: Callable[[str], object]) -> Iterator[None]:
    """Call ``called`` with the block of every adapted linear, or mixture of experts, before it runs."""
    weights = weights_of(unwrap(model), paths_of(adapter.sites))
    handles = []
    for site in adapter.sites:
        for path, _ in site.linears:
            handles.append(weights[path].module.register_forward_pre_hook(_Watch(site.block, called)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Watch:
    """Forward pre-hook that tells its block."""

    def __init__(self, block: str, called: Callable[[str], object]):
        self.block, self.called = block, called

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: Any) -> None:
        self.called(self.block)


def kept_bytes(model: nn.Module, run: Callable[[], Tensor]) -> int:
    """Bytes that a forward pass keeps for the backward pass, without the model's own weights.

    Nothing is kept while they are counted: only a step that fits into memory would tell what others save otherwise. Counted
    is what would be alive at the end: gradient checkpointing also saves its inputs where nothing needs a gradient, and
    drops them at once.

    Args:
        model: whose weights do not count.
        run: calls the model with gradients and returns what would be backpropagated from; its backward pass is impossible.
    """
    own = {value.untyped_storage()._cdata for value in (*model.parameters(), *model.buffers())}
    packed: list[weakref.ref[_Kept]] = []

    def count(value: Tensor) -> _Kept:
        kept = _Kept(value)
        packed.append(weakref.ref(kept))
        return kept

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, _Kept.never):
        loss = run()
    alive = (reference() for reference in packed)
    sizes = {kept.storage.cdata: kept.size for kept in alive if kept is not None}
    del loss
    return sum(size for storage, size in sizes.items() if storage not in own)


class _Kept:
    """What autograd would keep: a storage, which is freed with its tensors although its identity is remembered."""

    __slots__ = ("__weakref__", "size", "storage")

    def __init__(self, value: Tensor):
        storage = value.untyped_storage()
        self.size = storage.nbytes()
        self.storage = StorageWeakRef(storage)  # a plain number would be another storage's when this one is freed

    def never(self) -> Tensor:
        """Nothing is there for a backward pass."""
        raise AssertionError("no backward pass after a forward pass that was only counted")

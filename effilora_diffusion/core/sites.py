"""Where an adapter acts: sites, each one input and the linears that read it."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from .config import TARGET_GROUPS
from .errors import EffiLoRAError

MAX_WIDTH = 1 << 24
"""The widest input or output of a linear that an adapter file may name."""

MAX_EXPERTS = 1 << 16
"""The largest number of experts that an adapter file may name."""

_PATH = re.compile(r"[^\s/]{1,300}")
_BLOCK = re.compile(r"^(.*(?:blocks|layers|layer|h)\.\d+)\.")


@dataclass(frozen=True)
class Site:
    """One input and every adapted linear that reads it: ``h = A x`` and the gates are computed once for all.

    ``linears`` pairs each linear layer's module path with its output width; ``block`` is the Reducer's unit. Of a site with
    ``experts`` the only path is that of a parameter with the matrices of so many experts, and its width that of all together.
    """

    name: str
    block: str
    in_features: int
    linears: tuple[tuple[str, int], ...]
    experts: int = 0

    @property
    def parent(self) -> str:
        """Path of the module that calls the linears."""
        return self.linears[0][0].rpartition(".")[0]

    @property
    def out_features(self) -> int:
        """Sum of the linears' output widths."""
        return sum(width for _, width in self.linears)

    def rows(self, path: str) -> slice:
        """The rows of the site's stacked heads that belong to the linear ``path``."""
        start = 0
        for name, width in self.linears:
            if name == path:
                return slice(start, start + width)
            start += width
        raise KeyError(path)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary; without ``experts`` where there are none, so that earlier versions read it."""
        maps = [list(pair) for pair in self.linears]
        found = {"name": self.name, "layer": self.block, "in_features": self.in_features, "maps": maps}
        return {**found, "experts": self.experts} if self.experts else found

    @classmethod
    def from_dict(cls, data: Any) -> Site:
        """Inverse of :meth:`to_dict`; raises :class:`EffiLoRAError` on malformed input."""
        maps = data.get("maps") if isinstance(data, dict) else None
        if (
            not isinstance(maps, list)
            or not maps
            or not all(isinstance(pair, list) and len(pair) == 2 for pair in maps)
        ):
            raise EffiLoRAError("a site is no object with maps of a path and a width")
        paths = [data.get("name"), data.get("layer"), *(path for path, _ in maps)]
        widths = [data.get("in_features"), *(width for _, width in maps)]
        for path in paths:
            if not isinstance(path, str) or _PATH.fullmatch(path) is None or not path.isprintable():
                raise EffiLoRAError(f"a site names {path!r}, which is no module's path")
        for width in widths:
            if type(width) is not int or not 1 <= width <= MAX_WIDTH:
                raise EffiLoRAError(f"the site {paths[0]} has the width {width!r}")
        experts = data.get("experts", 0)
        stacked = type(experts) is int and 0 < experts <= MAX_EXPERTS and len(maps) == 1 and not widths[1] % experts
        if not stacked and (type(experts) is not int or experts != 0):
            raise EffiLoRAError(f"the site {paths[0]} is not one of {experts!r:.40} experts")
        return cls(paths[0], paths[1], widths[0], tuple((path, width) for path, width in maps), experts)


def block_of(path: str) -> str:
    """The block a module belongs to, e.g. ``...transformer_blocks.0``; the path itself outside any block."""
    match = _BLOCK.match(path)
    return match.group(1) if match else path


def widths(module: nn.Module) -> tuple[int, int] | None:
    """``(in_features, out_features)`` if ``module`` is a linear (quantised ones included), else ``None``."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if is_transposed(module):
        inner, outer = module.weight.shape  # type: ignore[union-attr,misc]
        return int(inner), int(outer)
    return None


def is_transposed(module: nn.Module) -> bool:
    """Whether ``module`` is a linear that keeps its weight as ``(in, out)``: transformers' ``Conv1D`` of GPT-2."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def linears_of(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear of ``model`` by its path, in model order.

    Of a linear that PEFT has wrapped, the wrapped one under the wrapper's path; what PEFT has added is left out.
    """
    found: dict[str, nn.Module] = {}
    wrapper = None
    for path, module in model.named_modules():
        if wrapper is not None and path.startswith(wrapper):
            continue
        base = base_layer(module)
        if base is not module:
            wrapper = f"{path}."
        if widths(base) is not None:
            found[path] = base
    return found


def base_layer(module: nn.Module) -> nn.Module:
    """The layer itself where ``module`` is PEFT's wrapper of one."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module


def is_target(path: str, targets: Iterable[str]) -> bool:
    """Whether ``path`` is, or ends in, one of the target names; groups of :data:`TARGET_GROUPS` stand for theirs."""
    return _pattern(tuple(targets)).search(path) is not None


@functools.cache
def _pattern(targets: tuple[str, ...]) -> re.Pattern[str]:
    names = [name for target in targets for name in TARGET_GROUPS.get(target, (target,))]
    endings = "|".join(re.escape(name).replace(r"\*", "[^.]*") for name in names)
    return re.compile(rf"(?:^|\.)(?:{endings})$")


def single_sites(model: nn.Module, targets: Iterable[str], taken: Iterable[str] = ()) -> list[Site]:
    """One site per targeted linear layer of ``model`` that is not in ``taken``."""
    targets, taken = tuple(targets), set(taken)
    sites = []
    for path, module in linears_of(model).items():
        size = widths(module)
        if size is not None and path not in taken and is_target(path, targets):
            sites.append(Site(path, block_of(path), size[0], ((path, size[1]),)))
    return sites

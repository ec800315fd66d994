"""The weights that sites name in a model: those of its linears, and the stacked ones of a mixture's experts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .errors import EffiLoRAError
from .sites import Site, base_layer, is_transposed, linears_of, widths

WHOLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Types of weights that an update can be added to; others, as float8, go with scales of their own."""


@dataclass(frozen=True)
class Weight:
    """A weight of a module: one matrix, or with ``experts`` as many of them in one parameter.

    A linear's is ``(out, in)``, that of experts ``(experts, out, in)``; ``transposed`` ones have ``in`` before ``out``.
    ``out_features`` counts the rows of all experts.
    """

    module: nn.Module
    name: str
    in_features: int
    out_features: int
    experts: int = 0
    transposed: bool = False

    @property
    def value(self) -> Tensor:
        """The parameter itself, whatever its name stands for while the module runs."""
        found = self.module._parameters[self.name]
        assert found is not None
        return found

    def shaped(self, update: Tensor) -> Tensor:
        """``update`` ``(out_features, in_features)`` as the parameter has it."""
        if self.experts:
            update = update.view(self.experts, -1, self.in_features)
        return update.transpose(-1, -2) if self.transposed else update


def weights_of(model: nn.Module, paths: Iterable[str]) -> dict[str, Weight]:
    """The weights of the linears and experts at ``paths``; what ``model`` does not have is left out."""
    paths, linears = list(paths), linears_of(model)
    experts = experts_of(model) if any(path not in linears for path in paths) else {}
    found = {}
    for path in paths:
        size = widths(linears[path]) if path in linears else None
        if size is not None:
            found[path] = Weight(linears[path], "weight", *size, transposed=is_transposed(linears[path]))
        elif path in experts:
            found[path] = experts[path]
    return found


def paths_of(sites: Iterable[Site]) -> list[str]:
    """The paths of everything that ``sites`` adapt."""
    return [path for site in sites for path, _ in site.linears]


def experts_of(model: nn.Module) -> dict[str, Weight]:
    """The matrices of a mixture's experts by their parameter's path, in model order.

    They are the three-dimensional parameters of a module called ``experts`` that says how they lie (``is_transposed``, which
    transformers sets); others, quantised ones among them, are not found.
    """
    found: dict[str, Weight] = {}
    for path, module in expert_modules(model).items():
        transposed = getattr(module, "is_transposed", None)
        for name, value in module.named_parameters(recurse=False):
            if value.ndim != 3 or value.dtype not in WHOLE or not isinstance(transposed, bool):
                continue
            count, first, second = value.shape
            inner, outer = (first, second) if transposed else (second, first)
            found[f"{path}.{name}"] = Weight(module, name, inner, count * outer, count, transposed)
    return found


def expert_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that hold the weights of several experts by their path; of one that PEFT has wrapped, the wrapped one."""
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        inner = base_layer(module)
        if path.rpartition(".")[2] == "experts" and next(inner.parameters(recurse=False), None) is not None:
            found[path] = inner
    return found


def check_sites(model: nn.Module, sites: Iterable[Site]) -> None:
    """Raise :class:`EffiLoRAError` if what a site adapts is missing from ``model`` or has other widths."""
    sites = tuple(sites)
    weights = weights_of(model, paths_of(sites))
    for site in sites:
        for path, width in site.linears:
            weight = weights.get(path)
            size = None if weight is None else (weight.in_features, weight.out_features, weight.experts)
            if size != (site.in_features, width, site.experts):
                found = "is missing" if size is None else f"is {size[0]} to {size[1]} wide"
                raise EffiLoRAError(
                    f"the adapter was made for another base model: its layer {path} "
                    f"({site.in_features} to {width}) {found} in this {type(model).__name__}"
                )


def added(weight: Tensor, experts: int, transposed: bool, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """``weight`` of experts with ``scale`` times the update added; ``down`` is ``(r, in)``, ``up`` ``(experts out, r)``.

    Nothing of the parameter's size is computed but the result. In bfloat16 the factors are rounded to it, which costs far less
    than the rounding of the sum; float16 would lose small heads, so there the update is computed in their own type.
    """
    heads = up.view(experts, -1, up.shape[-1])
    shared = down.expand(experts, *down.shape)
    left, right = (shared.mT, heads.mT) if transposed else (heads, shared)
    if weight.dtype in (up.dtype, torch.bfloat16):
        return torch.baddbmm(weight, left.to(weight.dtype), right.to(weight.dtype), alpha=scale)
    return weight + (torch.bmm(left, right) * scale).to(weight.dtype)

"""Attaching adapters to a model: forward hooks on its linear maps, exactly undone by detaching.

No module is replaced, so quantised layers work as they are, state-dict keys of the base never change, and whatever
later swaps attention processors (IP-Adapter, slicing, another backend) cannot drop the adapter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .adapter import Code, EffiLoRA, timestep_features
from .errors import EffiLoRAError
from .sites import Site, check_sites, is_transposed

HOST_ATTRIBUTE = "effilora"
"""Name under which the host model carries its adapters (an ``nn.ModuleDict`` by adapter name)."""

SCOPE_ATTRIBUTE = "_effilora_scope"
"""Name under which a module that calls several maps on one input carries their :class:`Scope`."""


class Scope:
    """What the maps of one layer share during one call, so that ``h = A x`` is computed once for q, k and v.

    Open only while an attention processor runs: outside it nothing is kept, so recomputation (gradient
    checkpointing) and later calls never meet a stale tensor.
    """

    def __init__(self) -> None:
        self.open = False
        self.memo: list[tuple[EffiLoRA, int, Tensor, Code]] = []

    def code(self, adapter: EffiLoRA, index: int, x: Tensor) -> Code:
        """The site's code for ``x``, from the memo if a map of this call has already asked for it."""
        for owner, site, source, code in self.memo:
            if owner is adapter and site == index and source is x:
                return code
        code = adapter.code(index, x)
        if self.open:
            self.memo.append((adapter, index, x, code))
        return code


class AdapterHost(nn.ModuleDict):
    """The adapters of one model by name, and the base weights that merging has overwritten."""

    def __init__(self) -> None:
        super().__init__()
        self.originals: dict[str, Tensor] = {}


class LinearHook:
    """Forward hook of one adapted linear map. An object, not a closure, so that a deep copy of the model is whole."""

    def __init__(self, adapter: EffiLoRA, index: int, path: str, scope: Scope):
        self.adapter, self.index, self.scope = adapter, index, scope
        self.position = [name for name, _ in adapter.sites[index].linears].index(path)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """The map's output with the adapter's update added."""
        if not self.adapter.acts:
            return output
        code = self.scope.code(self.adapter, self.index, args[0])
        return self.adapter.add_to(output, self.index, self.position, code, _is_fresh(module))


def _is_fresh(module: nn.Module) -> bool:
    """Whether nobody but adapters can hold the module's output, so that it may be changed in place."""
    return type(module) is nn.Linear and all(type(hook) is LinearHook for hook in module._forward_hooks.values())


class TimestepHook:
    """Forward pre-hook of the host that shows the timestep to a ``timestep`` router.

    With gradient checkpointing, run the backward pass before the next forward pass: recomputation sees the last one's.
    """

    def __init__(self, adapter: EffiLoRA):
        self.adapter = adapter

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the encoding of the call's timestep, ``(batch or 1, features)``."""
        named = (kwargs[name] for name in ("timestep", "timesteps", "t") if kwargs.get(name) is not None)
        timestep = next(named, args[1] if len(args) > 1 else None)
        if timestep is None:
            raise EffiLoRAError("timestep routing needs a model that is called with a timestep")
        device = next(self.adapter.parameters()).device
        scaled = torch.as_tensor(timestep, device=device) * (1000 / self.adapter.config.timestep_range)
        self.adapter.noise_features = timestep_features(scaled)


def adapters_of(model: nn.Module) -> dict[str, EffiLoRA]:
    """The adapters attached to ``model`` by name, in the order they were attached."""
    host = getattr(model, HOST_ATTRIBUTE, None)
    return dict(host.items()) if isinstance(host, AdapterHost) else {}  # type: ignore[arg-type]


def attach(model: nn.Module, adapter: EffiLoRA, name: str = "default") -> EffiLoRA:
    """Let ``adapter`` act on ``model``; it is registered once, as ``model.effilora[name]``.

    Raises :class:`EffiLoRAError` if the name is taken, the adapter is attached elsewhere, or its layers are not found
    in the model with the same widths. Nothing is changed in that case.
    """
    if name in adapters_of(model):
        raise EffiLoRAError(f"an adapter named {name!r} is already attached: detach it or give another name")
    if not name or "." in name:
        raise EffiLoRAError(f"an adapter's name must be non-empty and without dots, not {name!r}")
    if adapter.hooks:
        raise EffiLoRAError("this adapter is attached to a model already: detach it first")
    check_sites(model, adapter.sites)
    if not adapters_of(model):
        setattr(model, HOST_ATTRIBUTE, AdapterHost())
    adapter.to(next(model.parameters()).device)
    getattr(model, HOST_ATTRIBUTE)[name] = adapter
    modules = dict(model.named_modules())
    for index, site in enumerate(adapter.sites):
        scope = _scope_of(modules, site)
        for path, _ in site.linears:
            hook = LinearHook(adapter, index, path, scope)
            adapter.hooks.append(modules[path].register_forward_hook(hook))
    if adapter.config.routing == "timestep" and adapter.config.heads > 1:
        adapter.hooks.append(model.register_forward_pre_hook(TimestepHook(adapter), with_kwargs=True))
    return adapter


def _scope_of(modules: dict[str, nn.Module], site: Site) -> Scope:
    """The scope of the nearest ancestor of the site's maps that has one (an attention with our processor)."""
    parts = site.linears[0][0].split(".")
    for length in range(len(parts) - 1, 0, -1):
        scope = getattr(modules[".".join(parts[:length])], SCOPE_ATTRIBUTE, None)
        if scope is not None:
            return scope
    return Scope()


def detach(model: nn.Module, name: str | None = None) -> None:
    """Take one adapter (or all) off ``model``; merged weights are restored first. Exact inverse of :func:`attach`."""
    attached = adapters_of(model)
    for key in list(attached) if name is None else [name]:
        adapter = named(model, key)
        unmerge(model, key)
        for hook in adapter.hooks:
            hook.remove()
        adapter.hooks.clear()
        adapter.noise_features = None
        del getattr(model, HOST_ATTRIBUTE)[key]
    if attached and not adapters_of(model):
        delattr(model, HOST_ATTRIBUTE)


def named(model: nn.Module, name: str) -> EffiLoRA:
    """The attached adapter ``name``; raises :class:`EffiLoRAError` if there is none."""
    attached = adapters_of(model)
    if name not in attached:
        raise EffiLoRAError(f"no adapter named {name!r} is attached; there are {sorted(attached)}")
    return attached[name]


def merge(model: nn.Module, name: str = "default") -> None:
    """Add an adapter's update to the base weights, so that it costs nothing more; :func:`unmerge` restores the bits.

    Raises :class:`EffiLoRAError` where the update is no fixed matrix (token and timestep routing with several heads),
    where a base weight is not in floating point, and where a result would not be finite; nothing is changed then. The
    strength at this moment is merged: set it before, changes while merged have no effect.
    """
    adapter = named(model, name)
    if adapter.merged:
        return
    if adapter.config.heads > 1 and adapter.config.routing != "static":
        raise EffiLoRAError(
            f"{adapter.config.routing} routing mixes the heads differently for every input, so it can't be merged: "
            "keep the adapter attached, or export it as plain LoRA (least squares) and merge that"
        )
    originals = getattr(model, HOST_ATTRIBUTE).originals
    modules = dict(model.named_modules())
    paths = [path for site in adapter.sites for path, _ in site.linears]
    weights: dict[str, Tensor] = {path: modules[path].weight for path in paths}  # type: ignore[misc]
    for path, weight in weights.items():
        if not weight.is_floating_point() or type(weight.detach()) is not Tensor:
            raise EffiLoRAError(f"{path} is quantised: dequantise the model before merging, or keep it attached")
    for path, weight in weights.items():
        originals.setdefault(path, weight.detach().clone())
    adapter.merged = True
    try:
        _rebuild(model)
    except EffiLoRAError:
        adapter.merged = False
        _rebuild(model)
        raise


def unmerge(model: nn.Module, name: str = "default") -> None:
    """Put the base weights back as they were before :func:`merge`, bit for bit (other merged adapters stay merged)."""
    adapter = named(model, name)
    if adapter.merged:
        adapter.merged = False
        _rebuild(model)


@torch.no_grad()
def _rebuild(model: nn.Module) -> None:
    """Base weights = the originals plus every merged adapter's update, always computed from the originals."""
    originals: dict[str, Tensor] = getattr(model, HOST_ATTRIBUTE).originals
    updates: dict[str, Tensor] = {}
    for adapter in adapters_of(model).values():
        if not adapter.merged:
            continue
        for index, site in enumerate(adapter.sites):
            for path, _ in site.linears:
                update = adapter.mixed_heads(index)[site.rows(path)] @ adapter.shared_a(site)
                updates[path] = updates.get(path, 0) + adapter.site_scale(site) * update.float()
    modules = dict(model.named_modules())
    for path, original in originals.items():
        if path in updates:
            update = updates[path].t() if is_transposed(modules[path]) else updates[path]
            value = (original.float() + update.to(original.device)).to(original.dtype)
            if not value.isfinite().all():
                raise EffiLoRAError(f"merging would make {path} infinite or NaN: the base is left as it was")
            modules[path].weight.copy_(value)  # type: ignore[union-attr,operator]
        else:
            modules[path].weight.copy_(original)  # type: ignore[union-attr,operator]
    for path in set(originals) - set(updates):
        del originals[path]

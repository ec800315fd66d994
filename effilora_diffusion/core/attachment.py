"""Attach adapters to a model: forward hooks on its linears, exactly undone by detaching.

No module is replaced, so quantised layers work as they are, state-dict keys of the base never change, and whatever
later swaps attention processors (IP-Adapter, slicing, another backend) or wraps linears (PEFT) cannot drop the adapter.
Everything that attaching adds is owned by one object on the model, :class:`AdapterHost`.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import EffiLoRA, SharedActivations, timestep_features
from .concepts import number_of
from .errors import EffiLoRAError
from .experts import ExpertsHook
from .weights import check_sites, paths_of, weights_of

logger = logging.getLogger(__name__)

HOST_ATTRIBUTE = "effilora"
"""Name under which the model carries its adapters (an :class:`AdapterHost`, by adapter name)."""

SCOPE_ATTRIBUTE = "_effilora_scope"
"""Name under which a module that calls several linears on one input carries their :class:`Scope`."""


class Scope:
    """What the linears of one module share during one call, so that ``h = A x`` is computed once for q, k and v.

    Open only while the module runs: outside it nothing is kept, so recomputation (gradient checkpointing) and later
    calls never meet a stale tensor.
    """

    def __init__(self) -> None:
        self.open = False
        self.memo: list[tuple[EffiLoRA, int, Tensor, SharedActivations]] = []

    def activations(self, adapter: EffiLoRA, index: int, x: Tensor) -> SharedActivations:
        """The shared activations of site ``index`` for ``x``, computed by the first linear of the call that asks."""
        for owner, site, source, found in self.memo:
            if owner is adapter and site == index and source is x:
                return found
        found = adapter.activations(index, x)
        if self.open:
            self.memo.append((adapter, index, x, found))
        return found

    def enter(self, module: nn.Module, args: Any) -> None:
        """Forward pre-hook: open the scope; entries of a call that an error cut short are dropped."""
        self.memo.clear()
        self.open = True

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook: close the scope."""
        self.open = False
        self.memo.clear()


class AdapterHost(nn.ModuleDict):
    """The adapters of one model by name, and everything that attaching them has added to the model.

    Attributes:
        originals: base weights that merging has overwritten, by module path.
        handles: hook handles by adapter name.
        scopes: paths of the modules that carry a :class:`Scope`.
        scope_handles: hook handles of the scopes.
        processors: attention processors that were swapped, by module path (diffusers models only).
        cleanups: called with the model when its last adapter goes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.originals: dict[str, Tensor] = {}
        self.handles: dict[str, list[Any]] = {}
        self.scopes: list[str] = []
        self.scope_handles: list[Any] = []
        self.processors: dict[str, Any] = {}
        self.cleanups: list[Callable[[nn.Module], None]] = []


class LinearHook:
    """Forward hook of one adapted linear. An object, not a closure, so that models can be deep-copied and pickled."""

    def __init__(self, adapter: EffiLoRA, index: int, path: str, scope: Scope):
        self.adapter, self.index, self.scope = adapter, index, scope
        self.position = [name for name, _ in adapter.sites[index].linears].index(path)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """The linear's output with the adapter's update added."""
        if not self.adapter.acts:
            return output
        shared = self.scope.activations(self.adapter, self.index, args[0])
        return self.adapter.add_to(output, self.index, self.position, shared, _is_fresh(module))


def _is_fresh(module: nn.Module) -> bool:
    """Whether nobody but adapters can hold the module's output, so that it may be changed in place."""
    return type(module) is nn.Linear and all(type(hook) is LinearHook for hook in module._forward_hooks.values())


class TimestepHook:
    """Forward pre-hook of the model that shows the timestep to a ``timestep`` router.

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


class ConceptHook:
    """Forward pre-hook of the model that lays an adapter's concept gates out for the call's batch.

    With gradient checkpointing, run the backward pass before the next forward pass: recomputation sees the last one's.
    """

    def __init__(self, adapter: EffiLoRA, model: nn.Module):
        self.adapter = adapter
        self.first = list(inspect.signature(type(model).forward).parameters)[1]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the gates of the call, ``(k, batch)``; the batch is that of the model's first argument."""
        gates = self.adapter.routed
        if self.adapter.acts and gates is not None:
            self.adapter.row_gates = gates.for_batch(len(args[0] if args else kwargs[self.first]))


class SaveBase:
    """Stands in for the model's ``save_pretrained`` while adapters are attached: writes the base alone, with a warning."""

    def __init__(self, model: Any):
        self.model = model
        self.__signature__ = inspect.signature(self.model.save_pretrained)  # pipelines look at it

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the class's own ``save_pretrained`` on the model without its adapters."""
        adapters = adapters_of(self.model)
        merged = [name for name, adapter in adapters.items() if adapter.merged]
        logger.warning(
            "save_pretrained writes the base model without its adapters (%s)%s: save those with save_adapter_file",
            ", ".join(adapters),
            f", but with the merged weights of {', '.join(merged)}" if merged else "",
        )
        host = self.model._modules.pop(HOST_ATTRIBUTE)
        try:
            return type(self.model).save_pretrained(self.model, *args, **kwargs)
        finally:
            self.model._modules[HOST_ATTRIBUTE] = host


def unwrap(model: nn.Module) -> nn.Module:
    """The module itself where ``model`` is what ``torch.compile`` made of it."""
    original = getattr(model, "_orig_mod", None)
    return original if isinstance(original, nn.Module) else model


def adapters_of(model: nn.Module) -> dict[str, EffiLoRA]:
    """The adapters attached to ``model`` by name, in the order they were attached."""
    host = getattr(unwrap(model), HOST_ATTRIBUTE, None)
    return dict(host.items()) if isinstance(host, AdapterHost) else {}  # type: ignore[arg-type]


@contextlib.contextmanager
def for_rows(model: nn.Module, mask: Tensor) -> Iterator[None]:
    """Call ``model`` on the rows of a batch that ``mask`` ``(n,)`` marks: concept gates are narrowed to those in this context."""
    routing = [adapter for adapter in adapters_of(model).values() if adapter.concepts and not adapter.merged]
    routed = [(adapter, adapter.routed) for adapter in routing if adapter.routed is not None]
    try:
        for adapter, gates in routed:
            adapter.route(gates.taken(mask))
        yield
    finally:
        for adapter, gates in routed:
            adapter.route(gates)


def host_of(model: nn.Module) -> AdapterHost:
    """The object on ``model`` that owns its adapters; there must be one."""
    host = getattr(unwrap(model), HOST_ATTRIBUTE)
    assert isinstance(host, AdapterHost)
    return host


def attach(model: nn.Module, adapter: EffiLoRA, name: str = "default") -> EffiLoRA:
    """Let ``adapter`` act on ``model``; it is registered once, as ``model.effilora[name]``.

    Args:
        model: image or language model, compiled or not; linears may be quantised or wrapped by PEFT.
        adapter: made for a model with the same linears.
        name: under which it can be detached and merged.

    Returns:
        ``adapter``, on the model's device.

    Raises:
        EffiLoRAError: the name is taken, the adapter is attached elsewhere, or its linears are not found in the model
            with the same widths. Nothing is changed in that case.
    """
    model = unwrap(model)
    if name in adapters_of(model):
        raise EffiLoRAError(f"an adapter named {name!r} is already attached: detach it or give another name")
    if not name or "." in name:
        raise EffiLoRAError(f"an adapter's name must be non-empty and without dots, not {name!r}")
    if adapter.attached:
        raise EffiLoRAError("this adapter is attached to a model already: detach it first")
    check_sites(model, adapter.sites)
    if any(site.experts for site in adapter.sites) and getattr(model, "use_kernels", False):
        raise EffiLoRAError(
            "kernels that run experts past their modules (use_kernels) leave no place for an adapter there"
        )
    if not adapters_of(model):
        if hasattr(type(model), "save_pretrained"):
            model.__dict__["save_pretrained"] = SaveBase(model)
        setattr(model, HOST_ATTRIBUTE, AdapterHost())
    host = host_of(model)
    adapter.to(next(model.parameters()).device)
    host[name] = adapter
    host.handles[name] = _add_hooks(model, host, adapter)
    adapter.attached = True
    return adapter


def _add_hooks(model: nn.Module, host: AdapterHost, adapter: EffiLoRA) -> list[Any]:
    handles: list[Any] = []
    weights = weights_of(model, paths_of(adapter.sites))
    for index, site in enumerate(adapter.sites):
        if site.experts:
            handles += ExpertsHook(adapter, index).register(weights[site.linears[0][0]])
            continue
        scope = _scope_of(model, host, site.parent) if len(site.linears) > 1 else Scope()
        for path, _ in site.linears:
            handles.append(weights[path].module.register_forward_hook(LinearHook(adapter, index, path, scope)))
    if adapter.config.routing == "timestep" and adapter.config.heads > 1:
        handles.append(model.register_forward_pre_hook(TimestepHook(adapter), with_kwargs=True))
    if adapter.config.routing == "concept":
        handles.append(model.register_forward_pre_hook(ConceptHook(adapter, model), with_kwargs=True))
    return handles


def _scope_of(model: nn.Module, host: AdapterHost, path: str) -> Scope:
    """The scope of the module at ``path``, opened by hooks for the length of its calls."""
    module = model.get_submodule(path)
    if path not in host.scopes:
        scope = Scope()
        setattr(module, SCOPE_ATTRIBUTE, scope)
        host.scopes.append(path)
        host.scope_handles += [
            module.register_forward_pre_hook(scope.enter),
            module.register_forward_hook(scope.leave, always_call=True),
        ]
    found = getattr(module, SCOPE_ATTRIBUTE)
    assert isinstance(found, Scope)
    return found


def detach(model: nn.Module, name: str | None = None) -> None:
    """Take one adapter (or all) off ``model``; merged weights are restored first. Exact inverse of :func:`attach`."""
    model = unwrap(model)
    attached = adapters_of(model)
    for key in list(attached) if name is None else [name]:
        adapter = named(model, key)
        unmerge(model, key)
        host = host_of(model)
        for handle in host.handles.pop(key):
            handle.remove()
        adapter.attached, adapter.noise_features = False, None
        adapter.clear_concept()
        del host[key]
    if attached and not adapters_of(model):
        _close(model)


def _close(model: nn.Module) -> None:
    """Remove what the adapters of ``model`` had in common."""
    host = host_of(model)
    for cleanup in host.cleanups:
        cleanup(model)
    for handle in host.scope_handles:
        handle.remove()
    for path in host.scopes:
        delattr(model.get_submodule(path), SCOPE_ATTRIBUTE)
    model.__dict__.pop("save_pretrained", None)
    delattr(model, HOST_ATTRIBUTE)


def named(model: nn.Module, name: str) -> EffiLoRA:
    """The attached adapter ``name``; raises :class:`EffiLoRAError` if there is none."""
    attached = adapters_of(model)
    if name not in attached:
        raise EffiLoRAError(f"no adapter named {name!r} is attached; there are {sorted(attached)}")
    return attached[name]


def merge(model: nn.Module, name: str = "default", concept: str | None = None) -> None:
    """Add an adapter's update to the base weights, so that it costs nothing more; :func:`unmerge` restores the bits.

    The strength at this moment is merged: set it before, changes while merged have no effect. Of an adapter with several
    concepts one is merged, ``concept``.

    Raises:
        EffiLoRAError: the update is no fixed matrix (token and timestep routing with several heads), a base weight is
            quantised, or a result would not be finite. Nothing is changed in that case.
    """
    model = unwrap(model)
    adapter = named(model, name)
    if adapter.merged:
        return
    if adapter.config.routing == "concept":
        number_of(adapter.concepts, concept)
    elif adapter.config.heads > 1 and adapter.config.routing != "static":
        raise EffiLoRAError(
            f"{adapter.config.routing} routing mixes the heads differently for every input, so it can't be merged: "
            "keep the adapter attached, or export it as plain LoRA (least squares) and merge that"
        )
    originals = host_of(model).originals
    weights = {path: weight.value for path, weight in weights_of(model, paths_of(adapter.sites)).items()}
    for path, weight in weights.items():
        if not weight.is_floating_point() or type(weight.detach()) is not Tensor:
            raise EffiLoRAError(f"{path} is quantised: dequantise the model before merging, or keep it attached")
    for path, weight in weights.items():
        originals.setdefault(path, weight.detach().clone())
    if concept is not None and adapter.config.routing == "concept":
        adapter.set_concept(concept)
    adapter.merged = True
    try:
        _rebuild(model)
    except EffiLoRAError:
        adapter.merged = False
        _rebuild(model)
        adapter.clear_concept()
        raise


def unmerge(model: nn.Module, name: str = "default") -> None:
    """Put the base weights back as they were before :func:`merge`, bit for bit (other merged adapters stay merged)."""
    model = unwrap(model)
    adapter = named(model, name)
    if adapter.merged:
        adapter.merged = False
        _rebuild(model)
        adapter.clear_concept()


@torch.no_grad()
def _rebuild(model: nn.Module) -> None:
    """Base weights = the originals plus every merged adapter's update, always computed from the originals."""
    originals = host_of(model).originals
    updates: dict[str, Tensor] = {}
    for adapter in adapters_of(model).values():
        if not adapter.merged:
            continue
        for index, site in enumerate(adapter.sites):
            for path, _ in site.linears:
                update = adapter.mixed_heads(index)[site.rows(path)] @ adapter.shared_a(site)
                updates[path] = updates.get(path, 0) + adapter.site_scale(site) * update.float()
    weights = weights_of(model, originals)
    for path, original in originals.items():
        weight = weights[path].value
        if path in updates:
            update = weights[path].shaped(updates[path])
            value = (original.float() + update.to(original.device)).to(original.dtype)
            if not value.isfinite().all():
                raise EffiLoRAError(f"merging would make {path} infinite or NaN: the base is left as it was")
            weight.copy_(value)
        else:
            weight.copy_(original)
    for path in set(originals) - set(updates):
        del originals[path]

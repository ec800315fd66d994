"""EffiLoRA on diffusers models: sites of attention modules, and the processors that share ``h = A x``.

Every attention processor is swapped for a subclass of its own class, so that signature-based keyword filters, class
attributes such as ``_attention_backend`` and class-based look-ups see what they saw before. The processor opens the
attention's :class:`~effilora_diffusion.core.attach.Scope` for the length of its call; the arithmetic is in forward
hooks of the linear maps, so a processor that something else installs later can lose the sharing, never the adapter.
"""

from __future__ import annotations

import functools
import inspect
import logging
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from ...core import EffiLoRA, EffiLoRAConfig, EffiLoRAError, Site
from ...core import attach as attach_maps
from ...core import detach as detach_maps
from ...core.attach import HOST_ATTRIBUTE, SCOPE_ATTRIBUTE, Scope, adapters_of
from ...core.sites import block_of, is_target, single_sites, widths

logger = logging.getLogger(__name__)


_SAME_INPUT = (
    ("to_q", "to_k", "to_v", "to_gate"),
    ("to_out.0",),
    ("add_q_proj", "add_k_proj", "add_v_proj"),
    ("to_q_t", "to_k_t", "to_v_t"),
    ("to_query", "to_key", "to_value"),
)
"""Projections that read one input (in cross-attention, key and value read another one than the rest)."""


def is_attention(module: nn.Module) -> bool:
    """Whether ``module`` computes attention through a processor and has linear projections of its own."""
    if not callable(getattr(module, "set_processor", None)) or getattr(module, "processor", None) is None:
        return False
    return any(widths(part) is not None for part in module.modules())


def is_fused(module: nn.Module) -> bool:
    """Whether ``fuse_qkv_projections`` has replaced the attention's q, k and v by one projection.

    The older ``Attention`` is asked by its processor: unfusing puts that back but leaves ``fused_projections`` true.
    Projections that a model has fused from the start are ordinary targets.
    """
    fused = bool(getattr(module, "fused_projections", False))
    return fused and (not isinstance(module, Attention) or "Fused" in type(module.processor).__name__)


def find_sites(model: nn.Module, config: EffiLoRAConfig) -> list[Site]:
    """All sites of ``model``: those of its attentions, then single ones for other targeted linear layers.

    In self-attention one site serves q, k and v; in cross-attention q reads the image, k and v read the text. Joint
    attention has a second q, k and v (``add_q_proj`` ...) that read the text.
    """
    sites: list[Site] = []
    for path, module in model.named_modules():
        if is_attention(module):
            for group in _input_groups(module):
                sites += _shared_sites(module, path, group, config)
    taken = [path for site in sites for path, _ in site.linears]
    return sites + single_sites(model, config.target_modules, taken)


def _input_groups(module: nn.Module) -> list[tuple[str, ...]]:
    """Names of the attention's linear layers, those that read one input together."""
    cross = bool(getattr(module, "is_cross_attention", False))
    groups: list[tuple[str, ...]] = []
    for names in _SAME_INPUT:
        groups += [(names[0], *names[3:]), names[1:3]] if cross else [names]
    known = {name for names in groups for name in names}
    others = [name for name, part in module.named_modules() if name not in known and widths(part) is not None]
    return groups + [(name,) for name in others]


def _shared_sites(module: nn.Module, path: str, names: tuple[str, ...], config: EffiLoRAConfig) -> list[Site]:
    """The site of the maps ``names`` of one attention; one each where their inputs differ in width."""
    by_width: dict[int, list[tuple[str, int]]] = {}
    for name in names:
        child = _child(module, name)
        size = widths(child) if child is not None else None
        if size is not None and is_target(f"{path}.{name}", config.target_modules):
            by_width.setdefault(size[0], []).append((name, size[1]))
    sites = []
    for width, maps in by_width.items():
        label = "_".join(name.removeprefix("to_") for name, _ in maps)
        paths = tuple((f"{path}.{name}", outputs) for name, outputs in maps)
        sites.append(Site(f"{path}.{label}", block_of(path), width, paths))
    return sites


def _child(module: nn.Module, name: str) -> nn.Module | None:
    try:
        return module.get_submodule(name)
    except AttributeError:
        return None


def create_adapter(model: nn.Module, config: EffiLoRAConfig, seed: int = 0) -> EffiLoRA:
    """A fresh adapter for ``model`` (identity until trained); raises :class:`EffiLoRAError` if nothing is targeted."""
    return EffiLoRA(config, find_sites(model, config), seed)


class _EqualToBase(type):
    """Metaclass of the processor classes: equal to the class they extend, with its hash.

    diffusers looks processors up by exact class (``set_default_attn_processor``, ``AttentionProcessorRegistry``).
    """

    _effilora_base: type

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is cls._effilora_base

    def __hash__(cls) -> int:
        return hash(cls._effilora_base)


@functools.cache
def effilora_class(base: type) -> type:
    """The EffiLoRA processor class for processors of class ``base`` (cached, so that identity comparisons hold)."""
    call = base.__call__

    @functools.wraps(call)
    def shared_call(self: Any, attn: nn.Module, *args: Any, **kwargs: Any) -> Any:
        scope = getattr(attn, SCOPE_ATTRIBUTE, None)
        if scope is None or scope.open:
            return call(self, attn, *args, **kwargs)
        scope.open = True
        try:
            return call(self, attn, *args, **kwargs)
        finally:
            scope.open = False
            scope.memo.clear()

    shared_call.__signature__ = inspect.signature(call)  # type: ignore[attr-defined]
    namespace = {
        "__call__": shared_call,
        "__doc__": f"{base.__name__} whose attention computes the adapters' ``h = A x`` once for q, k and v.",
        "__module__": __name__,
        "_effilora_base": base,
    }
    return _EqualToBase(f"EffiLoRA{base.__name__}", (base,), namespace)


def is_effilora_processor(processor: Any) -> bool:
    """Whether ``processor`` opens its attention's scope."""
    return isinstance(type(processor), _EqualToBase)


def _wrap(processor: Any) -> Any:
    kind: type = type(processor)
    wrapped: Any = object.__new__(effilora_class(kind))
    wrapped.__dict__.update(processor.__dict__)  # IP-Adapter processors carry weights: they are shared, not copied
    return wrapped


def _unwrap(processor: Any) -> Any:
    plain = object.__new__(type(processor)._effilora_base)
    plain.__dict__.update(processor.__dict__)
    return plain


def _swap_processors(model: nn.Module) -> None:
    for module in model.modules():
        if is_attention(module) and not is_effilora_processor(module.processor):
            if not hasattr(module, SCOPE_ATTRIBUTE):
                setattr(module, SCOPE_ATTRIBUTE, Scope())
            original = module.processor
            module.processor = _wrap(original)  # type: ignore[assignment]
            module.__dict__["_effilora_original"] = original


def _restore_processors(model: nn.Module) -> None:
    for module in model.modules():
        original = module.__dict__.pop("_effilora_original", None)
        if is_attention(module) and is_effilora_processor(module.processor):
            live: Any = module.processor
            same = original is not None and type(live)._effilora_base is type(original)
            if same:
                original.__dict__.update(live.__dict__)  # what was set on the processor meanwhile is kept
            module.processor = original if same else _unwrap(live)
        if hasattr(module, SCOPE_ATTRIBUTE):
            delattr(module, SCOPE_ATTRIBUTE)


_FUSED = (
    "the model's q, k and v projections {when} while an adapter is attached, which would bypass it: "
    "{remedy}merge the adapter first, or detach it"
)


class FuseGuard:
    """Stands in for the host's ``fuse_qkv_projections`` while adapters are attached."""

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self) -> None:
        """Fuse if no adapter acts; else raise :class:`EffiLoRAError`."""
        if any(adapter.acts for adapter in adapters_of(self.model).values()):
            raise EffiLoRAError(_FUSED.format(when="can't be fused", remedy=""))
        type(self.model).fuse_qkv_projections(self.model)  # type: ignore[attr-defined]


class HostCheck:
    """Pre-hook of the host: whatever replaced processors since the last call is wrapped again, and said."""

    handle: torch.utils.hooks.RemovableHandle

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Check every attention of ``module``; raises :class:`EffiLoRAError` for fused projections."""
        if torch.compiler.is_compiling():
            return
        replaced = 0
        for part in module.modules():
            if is_attention(part):
                if is_fused(part) and any(adapter.acts for adapter in adapters_of(module).values()):
                    raise EffiLoRAError(
                        _FUSED.format(
                            when="were fused",
                            remedy="call unfuse_qkv_projections() (or unfuse_projections() of the attention), ",
                        )
                    )
                replaced += not is_effilora_processor(part.processor)
        if replaced:
            logger.info(
                "%d attention processors were replaced since the adapter was attached; wrapped again", replaced
            )
            _swap_processors(module)


def attach(model: nn.Module, adapter: EffiLoRA, name: str = "default") -> EffiLoRA:
    """Let ``adapter`` act on a diffusers model: processors swapped, maps hooked. See :func:`effilora_diffusion.core.attach`."""
    fused = [path for path, part in model.named_modules() if is_attention(part) and is_fused(part)]
    if fused:
        raise EffiLoRAError(f"{fused[0]} has fused q, k, v projections: call unfuse_qkv_projections() first")
    fresh = not adapters_of(model)
    if fresh:
        _swap_processors(model)
    try:
        attach_maps(model, adapter, name)
    except EffiLoRAError:
        if fresh:
            _restore_processors(model)
        raise
    if fresh:
        check = HostCheck()
        check.handle = model.register_forward_pre_hook(check)
        getattr(model, HOST_ATTRIBUTE).check = check
        if hasattr(type(model), "fuse_qkv_projections"):
            model.__dict__["fuse_qkv_projections"] = FuseGuard(model)
    return adapter


def detach(model: nn.Module, name: str | None = None) -> None:
    """Take one adapter (or all) off ``model``; with the last one the original processors return. Exact inverse."""
    host = getattr(model, HOST_ATTRIBUTE, None)
    detach_maps(model, name)
    if host is not None and not adapters_of(model):
        host.check.handle.remove()
        model.__dict__.pop("fuse_qkv_projections", None)
        _restore_processors(model)

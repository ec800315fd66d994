"""EffiLoRA on diffusers models: sites of attention modules, and the processors that share ``h = A x``.

Every attention processor is swapped for a subclass of its own class, so that signature-based keyword filters, class
attributes such as ``_attention_backend`` and class-based look-ups see what they saw before. The processor opens the
attention's :class:`~effilora_diffusion.core.attachment.Scope` for the length of its call. The arithmetic is in forward hooks
of the linears and the attention's own hooks open the scope as well, so a processor that something else installs later
loses neither the adapter nor the sharing.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from ...core import EffiLoRA, EffiLoRAConfig, EffiLoRAError, Site
from ...core import attach as attach_to_linears
from ...core.attachment import SCOPE_ATTRIBUTE, adapters_of, host_of, unwrap
from ...core.sites import base_layer, block_of, is_target, linears_of, single_sites, widths
from .call_scale import follow_scale

_SAME_INPUT = (
    ("to_q", "to_k", "to_v", "to_gate"),
    ("to_out.0",),
    ("add_q_proj", "add_k_proj", "add_v_proj"),
    ("to_q_t", "to_k_t", "to_v_t"),
    ("to_query", "to_key", "to_value"),
)
"""Projections that read one input (in cross-attention, key and value read another one than the rest)."""


TOKENS_FIRST = ("ErnieImageTransformer2DModel",)
"""Models that hand linears outside attention ``(tokens, batch, width)``."""


def is_attention(module: nn.Module) -> bool:
    """Whether ``module`` computes attention through a processor and has linear projections of its own."""
    if not callable(getattr(module, "set_processor", None)) or getattr(module, "processor", None) is None:
        return False
    return bool(linears_of(module))


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
    others = [name for name in linears_of(module) if name not in known]
    return groups + [(name,) for name in others]


def _shared_sites(module: nn.Module, path: str, names: tuple[str, ...], config: EffiLoRAConfig) -> list[Site]:
    """The site of the linears ``names`` of one attention; one each where their inputs differ in width."""
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
        return base_layer(module.get_submodule(name))
    except AttributeError:
        return None


def create_adapter(model: nn.Module, config: EffiLoRAConfig, seed: int = 0, a_start: str = "gaussian") -> EffiLoRA:
    """A fresh adapter for ``model`` (identity until trained); raises :class:`EffiLoRAError` if nothing is targeted.

    A starts as in diffusers' scripts (PEFT's ``init_lora_weights="gaussian"``) unless ``a_start`` says otherwise: under Adam an
    update grows in proportion to A, so that a learning rate only means what it means there if A is as long.
    """
    return EffiLoRA(config, find_sites(model, config), seed, a_start)


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
        if (
            scope is None or scope.open
        ):  # open where the attention was called, closed where its processor is called alone
            return call(self, attn, *args, **kwargs)
        scope.enter(attn, args)
        try:
            return call(self, attn, *args, **kwargs)
        finally:
            scope.leave(attn, args, None)

    shared_call.__signature__ = inspect.signature(call)  # type: ignore[attr-defined]
    namespace = {
        "__call__": shared_call,
        "__doc__": f"{base.__name__} whose attention computes the adapters' ``h = A x`` once for q, k and v.",
        "__module__": __name__,
        "__reduce__": lambda self: (_new, (base,), self.__dict__),  # by its base: pickle can't find this class by name
        "_effilora_base": base,
    }
    return _EqualToBase(f"EffiLoRA{base.__name__}", (base,), namespace)


def _new(base: type) -> Any:
    """An EffiLoRA processor for processors of class ``base``, without its state."""
    return object.__new__(effilora_class(base))


def is_effilora_processor(processor: Any) -> bool:
    """Whether ``processor`` opens its attention's scope."""
    return isinstance(type(processor), _EqualToBase)


def _swap_processors(model: nn.Module) -> None:
    """Give every attention of ``model`` an EffiLoRA processor; the host keeps the originals."""
    originals = host_of(model).processors
    for path, module in model.named_modules():
        if is_attention(module) and not is_effilora_processor(module.processor):
            original: Any = module.processor
            swapped = _new(type(original))
            swapped.__dict__.update(original.__dict__)  # IP-Adapter processors carry weights: shared, not copied
            module.processor = swapped
            originals[path] = original


def _restore_processors(model: nn.Module) -> None:
    """Put the original processors back; what others have installed since stays."""
    originals = host_of(model).processors
    for path, module in model.named_modules():
        if not is_attention(module) or not is_effilora_processor(module.processor):
            continue
        live: Any = module.processor
        original, base = originals.get(path), type(live)._effilora_base
        plain: Any = original if type(original) is base else object.__new__(base)
        plain.__dict__.update(live.__dict__)  # what was set on the processor meanwhile is kept
        module.processor = plain


class FuseGuard:
    """Refuses fused q, k and v projections while an adapter acts, since they would bypass it.

    Stands in for the model's ``fuse_qkv_projections``, and is a forward pre-hook of the model as attentions can also be
    fused one by one.
    """

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self) -> None:
        """Fuse if no adapter acts; else raise :class:`EffiLoRAError`."""
        if self._acts():
            raise EffiLoRAError(
                "the model's q, k and v projections can't be fused while an adapter is attached, which would bypass it: "
                "merge the adapter first, or detach it"
            )
        type(self.model).fuse_qkv_projections(self.model)  # type: ignore[attr-defined]

    def check(self, module: nn.Module, args: Any) -> None:
        """Raise :class:`EffiLoRAError` if an attention was fused."""
        if not self._acts() or torch.compiler.is_compiling():
            return
        if any(is_fused(part) and is_attention(part) for part in module.modules()):
            raise EffiLoRAError(
                "the model's q, k and v projections were fused while an adapter is attached, which would bypass it: call "
                "unfuse_qkv_projections() (or unfuse_projections() of the attention), merge the adapter first, or detach it"
            )

    def _acts(self) -> bool:
        return any(adapter.acts for adapter in adapters_of(self.model).values())


def attach(model: nn.Module, adapter: EffiLoRA, name: str = "default") -> EffiLoRA:
    """Let ``adapter`` act on a diffusers model: :func:`effilora_diffusion.core.attach`, with the processors swapped.

    The original processors return with :func:`effilora_diffusion.core.detach` of the last adapter.
    """
    bare = unwrap(model)
    fused = [path for path, part in bare.named_modules() if is_attention(part) and is_fused(part)]
    if fused:
        raise EffiLoRAError(f"{fused[0]} has fused q, k, v projections: call unfuse_qkv_projections() first")
    fresh = not adapters_of(bare)
    attach_to_linears(model, adapter, name)
    follow_scale(bare, adapter, name)
    adapter.tokens_first = type(bare).__name__ in TOKENS_FIRST
    _swap_processors(bare)
    if fresh:
        guard = FuseGuard(bare)
        if hasattr(type(bare), "fuse_qkv_projections"):
            bare.__dict__["fuse_qkv_projections"] = guard
        host = host_of(bare)
        host.scope_handles.append(bare.register_forward_pre_hook(guard.check))
        host.cleanups.append(_restore)
    return adapter


def _restore(model: nn.Module) -> None:
    model.__dict__.pop("fuse_qkv_projections", None)
    _restore_processors(model)

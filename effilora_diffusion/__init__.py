"""EffiLoRA Diffusion: teach a diffusers model a new subject or style with one small adapter."""

from typing import TYPE_CHECKING, Any

from .core import EffiLoRA, EffiLoRAConfig, EffiLoRAError, ReducerConfig

if TYPE_CHECKING:
    from .diffusion.export import export_lora
    from .diffusion.loading import load_adapter, remove_adapter

__version__ = "0.1.0"

__all__ = [
    "EffiLoRA",
    "EffiLoRAConfig",
    "EffiLoRAError",
    "ReducerConfig",
    "__version__",
    "export_lora",
    "load_adapter",
    "remove_adapter",
]

_DIFFUSION = {
    "export_lora": ".diffusion.export",
    "load_adapter": ".diffusion.loading",
    "remove_adapter": ".diffusion.loading",
}


def __getattr__(name: str) -> Any:
    """Import what needs diffusers only when it is used: the core works without it."""
    if name in _DIFFUSION:
        from importlib import import_module

        return getattr(import_module(_DIFFUSION[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

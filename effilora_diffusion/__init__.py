"""EffiLoRA Diffusion: teach a diffusers model a new subject or style with one small adapter."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .core import EffiLoRA, EffiLoRAConfig, EffiLoRAError, ReducerConfig
    from .diffusion.adapters.export import export_lora
    from .diffusion.adapters.load import load_adapter, remove_adapter

__version__ = "0.1.0"

_MODULES = {
    "EffiLoRA": ".core",
    "EffiLoRAConfig": ".core",
    "EffiLoRAError": ".core",
    "ReducerConfig": ".core",
    "export_lora": ".diffusion.adapters.export",
    "load_adapter": ".diffusion.adapters.load",
    "remove_adapter": ".diffusion.adapters.load",
}
"""Where each public name is: imported when it is used, since torch and diffusers take seconds."""

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


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

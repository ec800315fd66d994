"""The method: shared A, stacked heads, routers and the Reducer, on torch and safetensors alone."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapter import EffiLoRA
    from .attachment import adapters_of, attach, detach, merge, unmerge, unwrap
    from .config import EffiLoRAConfig, ReducerConfig
    from .convert import calibrate, is_exact, to_lora
    from .errors import EffiLoRAError, exit_code
    from .files import AdapterFile, is_native, load_adapter_file, save_adapter_file
    from .reducer import Reducer
    from .sites import Site

_MODULES = {
    "adapter": ("EffiLoRA",),
    "attachment": ("adapters_of", "attach", "detach", "merge", "unmerge", "unwrap"),
    "config": ("EffiLoRAConfig", "ReducerConfig"),
    "convert": ("calibrate", "is_exact", "to_lora"),
    "errors": ("EffiLoRAError", "exit_code"),
    "files": ("AdapterFile", "is_native", "load_adapter_file", "save_adapter_file"),
    "reducer": ("Reducer",),
    "sites": ("Site",),
}

__all__ = [
    "AdapterFile",
    "EffiLoRA",
    "EffiLoRAConfig",
    "EffiLoRAError",
    "Reducer",
    "ReducerConfig",
    "Site",
    "adapters_of",
    "attach",
    "calibrate",
    "detach",
    "exit_code",
    "is_exact",
    "is_native",
    "load_adapter_file",
    "merge",
    "save_adapter_file",
    "to_lora",
    "unmerge",
    "unwrap",
]


def __getattr__(name: str) -> Any:
    """Import what is used when it is used: settings and messages need no torch, which takes seconds."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

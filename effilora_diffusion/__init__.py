"""EffiLoRA Diffusion: teach a diffusers model a new subject or style with one small adapter.

The functions are the same for diffusers pipelines and transformers models; ``docs/api.md`` shows a training loop.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import (
        attach,
        create_adapter,
        detach,
        encode_prompt,
        export_lora,
        load_adapter,
        merge,
        reference_model,
        remove_adapter,
        remove_concepts,
        save_adapter,
        unmerge,
    )
    from .core import AdapterFile, EffiLoRA, EffiLoRAConfig, EffiLoRAError, ReducerConfig

__version__ = "0.1.0"

__all__ = [
    "AdapterFile",
    "EffiLoRA",
    "EffiLoRAConfig",
    "EffiLoRAError",
    "ReducerConfig",
    "__version__",
    "attach",
    "create_adapter",
    "detach",
    "encode_prompt",
    "export_lora",
    "load_adapter",
    "merge",
    "reference_model",
    "remove_adapter",
    "remove_concepts",
    "save_adapter",
    "unmerge",
]


def __getattr__(name: str) -> Any:
    """Import what is used when it is used: torch and diffusers take seconds."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".core" if name[0].isupper() else ".api", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

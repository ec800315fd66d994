"""The method: shared A, stacked heads, routers and the Reducer, on torch and safetensors alone."""

from .adapter import EffiLoRA
from .attach import adapters_of, attach, detach, merge, unmerge, unwrap
from .config import EffiLoRAConfig, ReducerConfig
from .convert import calibrate, is_exact, to_lora
from .errors import EffiLoRAError, exit_code
from .files import AdapterFile, is_native, load_adapter_file, save_adapter_file
from .reducer import Reducer
from .sites import Site

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

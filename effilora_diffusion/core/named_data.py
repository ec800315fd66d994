"""Data sets of the hub's library ``datasets``, by hub id or local folder; the package is imported only where one is named."""

from __future__ import annotations

import importlib.util
from typing import Any

from .errors import EffiLoRAError

EXTRA = "pip install 'effilora-diffusion[data]'"
"""How to get ``datasets``, and ``pyarrow`` with it."""


def load_named(name: str, config_name: str | None = None, split: str = "train", flag: str = "--dataset_name") -> Any:
    """One split of a data set, memory-mapped from the cache of ``datasets``.

    Args:
        name: hub id or local folder, as ``datasets.load_dataset`` takes them.
        config_name: of a data set with several configurations.
        split: its name, or a slice as ``train[:90%]``.
        flag: which setting named it, for errors.

    Raises:
        EffiLoRAError: the package is missing, or the data set, its configuration or its split can't be loaded.

    Example:
        >>> rows = load_named("HuggingFaceTB/smoltalk", "all", "train[:1000]")
    """
    if importlib.util.find_spec("datasets") is None:
        raise EffiLoRAError(f"{flag} needs datasets: {EXTRA}")
    import datasets

    try:
        return datasets.load_dataset(name, config_name, split=split)
    except Exception as error:  # of the library, the network, or of whatever reads the files
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise EffiLoRAError(f"{flag} {name[:200]} can't be loaded: {reason}") from error

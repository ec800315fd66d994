"""A new run that starts from an existing adapter instead of a fresh one (``--init_from``)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from .adapter import EffiLoRA
from .config import EffiLoRAConfig
from .errors import EffiLoRAError
from .files import AdapterFile
from .options import AdapterOptions
from .reference import adapter_file

Options = TypeVar("Options", bound=AdapterOptions)


def initial_file(text: str) -> Path:
    """The file that ``--init_from`` means: an adapter, a run's folder, or ``RUN@STEP`` for one of its checkpoints."""
    try:
        return adapter_file(str(Path(text).expanduser()))
    except EffiLoRAError as error:
        raise EffiLoRAError(f"--init_from {error}") from error


def start_from(content: EffiLoRA, options: Options, source: Path) -> tuple[Options, EffiLoRA]:
    """A new adapter with the weights of ``content``, to be trained by ``options``.

    Args:
        content: the existing adapter; it is not changed.
        options: the run's settings; those that shape the adapter are its own where the run leaves them at their defaults.
        source: its file, for messages.

    Returns:
        The settings with the adapter's shape, and the new adapter; dropout and Reducer are the run's.

    Raises:
        EffiLoRAError: the run names another shape.
    """
    given = content.config
    _check_agreement(options.adapter_config(), type(options)().adapter_config(), given, source)
    shaped = replace(
        options,
        rank=given.rank,
        lora_alpha=given.alpha,
        heads=given.heads,
        routing=given.routing,
        a_sharing=given.a_sharing,
        target_modules=list(given.target_modules),
        adapt_feed_forward=False,
    )
    reducer = shaped.adapter_config().reducer
    adapter = EffiLoRA(replace(given, dropout=shaped.lora_dropout, reducer=reducer), content.sites)
    adapter.load_state_dict(content.state_dict())
    return shaped, adapter


def has_learned(adapter: EffiLoRA, initial: AdapterFile | None) -> bool:
    """Whether any head is not what it was at the start: zero, or that of the ``initial`` adapter."""
    if initial is None:
        return any(bool(heads.detach().any()) for heads in adapter.B)
    pairs = zip(adapter.B, initial.adapter.B, strict=True)
    return any(not torch.equal(new.detach().cpu(), old) for new, old in pairs)


def _check_agreement(chosen: EffiLoRAConfig, default: EffiLoRAConfig, given: EffiLoRAConfig, source: Path) -> None:
    """Raise :class:`EffiLoRAError` where the run names what the adapter has not."""
    for name in ("rank", "heads", "routing", "a_sharing"):
        wanted, has = getattr(chosen, name), getattr(given, name)
        if wanted not in (has, getattr(default, name)):
            raise EffiLoRAError(f"--{name} {wanted}, but --init_from {source} has {has}: leave --{name} out")
    if {*chosen.target_modules} not in ({*given.target_modules}, {*default.target_modules}):
        raise EffiLoRAError(
            f"--target_modules {' '.join(chosen.target_modules)}, but --init_from {source} acts on "
            f"{' '.join(given.target_modules)[:200]}: leave it out"
        )
    if chosen.alpha is not None and chosen.alpha * given.rank != given.scale * chosen.rank * given.rank:
        raise EffiLoRAError(f"--lora_alpha {chosen.alpha}, but --init_from {source} has another one: leave it out")

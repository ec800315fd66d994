"""A new run that starts from an existing adapter instead of a fresh one (``--init_from``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from .adapter import EffiLoRA
from .concepts import Concept
from .config import EffiLoRAConfig
from .errors import EffiLoRAError
from .files import AdapterFile, encoders_of
from .options import AdapterOptions
from .reference import adapter_file
from .words import NewWords

Options = TypeVar("Options", bound=AdapterOptions)


def initial_file(text: str) -> Path:
    """The file that ``--init_from`` means: an adapter, a run's folder, or ``RUN@STEP`` for one of its checkpoints."""
    try:
        return adapter_file(str(Path(text).expanduser()))
    except EffiLoRAError as error:
        raise EffiLoRAError(f"--init_from {error}") from error


def start_from(
    content: EffiLoRA, options: Options, source: Path, concepts: Sequence[Concept] = ()
) -> tuple[Options, EffiLoRA]:
    """A new adapter with the weights of ``content``, to be trained by ``options``.

    Args:
        content: the existing adapter; it is not changed.
        options: the run's settings; those that shape the adapter are its own where the run leaves them at their defaults.
        source: its file, for messages.
        concepts: the run's own. Those that an adapter of several concepts does not have get a head of their own behind its
            others; those of its that the run does not have keep theirs, and A, as they are: see
            :attr:`.EffiLoRA.kept_heads`.

    Returns:
        The settings with the adapter's shape, and the new adapter; dropout and Reducer are the run's.

    Raises:
        EffiLoRAError: the run names another shape.
    """
    given = content.config
    if given.concepts and not concepts:
        names = ", ".join(concept.name for concept in given.concepts)
        raise EffiLoRAError(
            f"--init_from {source} has several concepts ({names}): name those to be trained in --concepts_list, or train "
            "one with --routing concept"
        )
    _check_agreement(options.adapter_config(concepts), type(options)().adapter_config(), given, source)
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
    changes: dict[str, Any] = {"dropout": shaped.lora_dropout, "reducer": shaped.adapter_config(concepts).reducer}
    if given.concepts:
        return replace(shaped, common_head=given.common_head), _with_concepts(content, concepts, changes)
    adapter = EffiLoRA(replace(given, **changes), content.sites)
    for name, part in encoders_of(content).items():
        adapter.add_encoder(name, EffiLoRA(replace(part.config, dropout=shaped.lora_dropout), part.sites))
    if content.words is not None:
        widths = {part: rows.shape[1] for part, rows in content.words.embeddings.items()}
        adapter.words = NewWords(content.words.meanings, widths)
    adapter.load_state_dict(content.state_dict())
    return shaped, adapter


@torch.no_grad()
def _with_concepts(content: EffiLoRA, concepts: Sequence[Concept], changes: dict[str, Any]) -> EffiLoRA:
    """A copy of ``content`` with new heads, which are zero, for those of ``concepts`` that it does not have."""
    given, trained = content.config, {concept.name: concept for concept in concepts}
    known = [trained.get(concept.name, concept) for concept in given.concepts]
    names = [concept.name for concept in known]
    whole = tuple(known) + tuple(concept for concept in concepts if concept.name not in names)
    config = replace(given, concepts=whole, heads=len(whole) + given.common_head, **changes)
    adapter = EffiLoRA(config, content.sites)
    for key, value in content.A.items():
        adapter.A[key].copy_(value)
    kept = list(range(len(known)))
    for new, old in zip(adapter.B, content.B, strict=True):
        new[:, kept] = old[:, kept]
        if given.common_head:
            new[:, -1] = old[:, -1]
    if set(names) != set(trained):
        common = [config.heads - 1] if given.common_head else []
        adapter.kept_heads = tuple([number for number in kept if names[number] not in trained] + common)
        adapter.A.requires_grad_(False)
    return adapter


def has_learned(adapter: EffiLoRA, initial: AdapterFile | None) -> bool:
    """Whether any head is not what it was at the start: zero, or that of the ``initial`` adapter.

    New words have always learned.
    """
    if adapter.words is not None:
        return True
    if initial is None:
        return any(bool(heads.detach().any()) for heads in adapter.B)
    pairs = zip(adapter.B, initial.adapter.B, strict=True)
    if adapter.config.heads != initial.adapter.config.heads:
        fresh = slice(len(initial.adapter.concepts), len(adapter.concepts))
        return any(bool(new.detach()[:, fresh].any()) for new, _ in pairs)
    return any(not torch.equal(new.detach().cpu(), old) for new, old in pairs)


def _check_agreement(chosen: EffiLoRAConfig, default: EffiLoRAConfig, given: EffiLoRAConfig, source: Path) -> None:
    """Raise :class:`EffiLoRAError` where the run names what the adapter has not."""
    for name in ("rank", "routing", "a_sharing", *(() if given.concepts else ("heads",))):
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

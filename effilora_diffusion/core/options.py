"""Settings as dataclass fields that carry their own description: help, bounds, choices, group, and where they show.

The command line, the config file, the web UI and ``docs/settings.md`` are made from these fields.
"""

from __future__ import annotations

import math
import types
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Union, get_args, get_origin, get_type_hints

from .concepts import Concept
from .config import A_SHARINGS, PAPER_MODES, ROUTINGS, EffiLoRAConfig, ReducerConfig
from .errors import EffiLoRAError

ADAPTER = "Adapter"
REDUCER = "Reducer"


@dataclass(frozen=True)
class Bounds:
    """The numbers that a setting may have; ``None``: no bound. NaN and infinity are outside of any bounds."""

    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None
    multiple_of: int | None = None

    def __str__(self) -> str:
        """In words, as ``at least 0 and below 1``."""
        named = (
            ("at least", self.at_least),
            ("above", self.above),
            ("at most", self.at_most),
            ("below", self.below),
            ("a multiple of", self.multiple_of),
        )
        return " and ".join(f"{word} {value}" for word, value in named if value is not None)

    def hold(self, value: float) -> bool:
        """Whether ``value`` is finite and within the bounds."""
        return (
            math.isfinite(value)
            and (self.at_least is None or value >= self.at_least)
            and (self.at_most is None or value <= self.at_most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
            and (self.multiple_of is None or value % self.multiple_of == 0)
        )


COUNT = Bounds(at_least=1)
NATURAL = Bounds(at_least=0)
POSITIVE = Bounds(above=0)
SHARE = Bounds(above=0, at_most=1)


def option(
    default: Any,
    text: str,
    group: str,
    *,
    choices: tuple[str, ...] | None = None,
    bounds: Bounds | None = None,
    usual: bool = False,
    fixed: bool = False,
    form: bool = True,
    command: bool = True,
    blank: bool = False,
) -> Any:
    """A dataclass field that is also a setting.

    Args:
        default: its value if nobody names one.
        text: help, in one line.
        group: heading under which it stands in ``--help``, in the web UI and in the docs.
        choices: the only values.
        bounds: of numbers.
        usual: whether it is among the settings that most runs name; those come first.
        fixed: whether a resumed run must have the same value, since it decides what a step computes.
        form: whether the web UI shows it among the advanced settings.
        command: whether it is a flag of the command line; else config files alone have it.
        blank: whether an empty text is a value like any other.
    """
    metadata = {
        "help": text,
        "group": group,
        "choices": choices,
        "bounds": bounds,
        "usual": usual,
        "fixed": fixed,
        "form": form,
        "command": command,
        "blank": blank,
    }
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def settings_of(kind: type) -> list[Field[Any]]:
    """The fields of ``kind`` that were made by :func:`option`."""
    return [entry for entry in fields(kind) if "group" in entry.metadata]


def default_of(entry: Field[Any]) -> Any:
    """The default of a field."""
    return entry.default if entry.default_factory is MISSING else entry.default_factory()


def base_type(hint: Any) -> Any:
    """The type itself, without ``| None``; ``str`` for ``list[str]``."""
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(arg for arg in get_args(hint) if arg is not type(None))
    return get_args(hint)[0] if get_origin(hint) is list else hint


def check_options(settings: Any) -> None:
    """Raise :class:`EffiLoRAError` for a value outside its choices or bounds; ``None`` passes where it is the default."""
    for entry in settings_of(type(settings)):
        value, metadata = getattr(settings, entry.name), entry.metadata
        if value is None and entry.default is None:
            continue
        words = value if isinstance(value, list) else [value]
        empty = [text for text in words if isinstance(text, str) and not text.strip()]
        if any(text or not metadata["blank"] for text in empty):
            raise EffiLoRAError(f"--{entry.name} is empty: name it, or leave the setting out")
        choices, bounds = metadata["choices"], metadata["bounds"]
        if choices and value not in (*choices, entry.default):
            raise EffiLoRAError(f"--{entry.name} must be one of {', '.join(choices)}, not {value!r}")
        if bounds is not None and not bounds.hold(value):
            raise EffiLoRAError(f"--{entry.name} must be {bounds}, not {value}")


def from_text(name: str, hint: Any, value: Any) -> Any:
    """``value`` of a config file as the type ``hint``: YAML reads 1e-4 as text and 1 as int, both meant as float.

    Raises :class:`EffiLoRAError` for values of another type.
    """
    kind = base_type(hint)
    if value is None and type(None) in get_args(hint):
        return None
    if get_origin(hint) is list:
        items = [] if value is None else value if isinstance(value, list) else [value]
        if get_origin(kind) is dict:
            if not isinstance(value or [], list):
                raise EffiLoRAError(f"the setting {name} must be a list, not {value!r:.200}")
            return items
        if any(isinstance(item, bool) or not isinstance(item, str | int | float) for item in items):
            raise EffiLoRAError(f"the setting {name} must be a list of text, not {value!r:.200}")
        return [str(item) for item in items]
    if not isinstance(value, bool) or kind is bool:
        if kind is float and isinstance(value, str | int | float):
            try:
                return float(value)
            except ValueError:
                pass
        elif isinstance(kind, type) and isinstance(value, kind):
            return value
    members = [arg for arg in get_args(hint) if arg is not type(None)]
    if len(members) > 1 and isinstance(value, tuple(arg for arg in members if isinstance(arg, type))):
        return value  # transformers' own unions
    raise EffiLoRAError(f"the setting {name} must be of type {getattr(kind, '__name__', kind)}, not {value!r}")


def hints_of(kinds: Iterable[type]) -> dict[str, Any]:
    """Types of the settings of several dataclasses by name."""
    return {
        name: hint
        for kind in kinds
        for name, hint in get_type_hints(kind).items()
        if any(entry.name == name and entry.init for entry in fields(kind))
    }


@dataclass
class AdapterOptions:
    """What an adapter is and how its Reducer works, by the names that every training command has."""

    init_from: str | None = option(
        None,
        "start from an existing adapter: a file, a run's folder or RUN@STEP (default: a fresh one)",
        ADAPTER,
        form=False,
    )
    rank: int = option(4, "rank of the shared A", ADAPTER, bounds=COUNT, usual=True, fixed=True)
    lora_alpha: float | None = option(
        None, "the update is scaled by lora_alpha / rank (default: rank)", ADAPTER, bounds=POSITIVE, fixed=True
    )
    lora_dropout: float = option(
        0.0, "dropout on the adapter's input", ADAPTER, bounds=Bounds(at_least=0, below=1), fixed=True
    )
    heads: int = option(
        3, "B heads per adapted linear; 1 is plain LoRA with a shared A", ADAPTER, bounds=COUNT, usual=True, fixed=True
    )
    routing: str = option(
        "token",
        "what the gates of the heads depend on; concept: one head per subject, which acts where the prompt names it",
        ADAPTER,
        choices=ROUTINGS,
        fixed=True,
    )
    common_head: bool = option(
        False, "with routing concept: one more head, which acts on every prompt", ADAPTER, fixed=True
    )
    a_sharing: str = option(
        "width",
        "one A per input width, one sliced A, or one per linear (HydraLoRA)",
        ADAPTER,
        choices=A_SHARINGS,
        fixed=True,
    )
    target_modules: list[str] = option(
        ["attention"], "groups (attention, feed_forward) and name endings of the linears to adapt", ADAPTER, fixed=True
    )
    adapt_feed_forward: bool = option(False, "adapt the feed-forward linears too", ADAPTER, fixed=True)
    reducer: str = option("off", "which blocks' heads are trained", REDUCER, choices=PAPER_MODES, fixed=True)
    reducer_active: float = option(0.5, "share of the blocks trained per step", REDUCER, bounds=SHARE, fixed=True)
    reducer_interval: int = option(
        10, "optimizer steps between two measurements of importance", REDUCER, bounds=COUNT, fixed=True
    )
    reducer_warmup: int = option(
        20, "optimizer steps before the first measurement", REDUCER, bounds=NATURAL, fixed=True
    )
    reducer_train_shared: bool = option(
        False, "let frozen blocks train A and routers (as in the paper; saves less)", REDUCER, fixed=True
    )

    def adapter_config(self, concepts: Sequence[Concept] = ()) -> EffiLoRAConfig:
        """The adapter these settings describe, with routing ``concept`` that of ``concepts``."""
        extra = ("feed_forward",) if self.adapt_feed_forward else ()
        by_concept = self.routing == "concept"
        if by_concept and not concepts:
            raise EffiLoRAError("--routing concept is for runs on images: leave it out")
        return EffiLoRAConfig(
            rank=self.rank,
            alpha=self.lora_alpha,
            heads=len(concepts) + self.common_head if by_concept else self.heads,
            concepts=tuple(concepts) if by_concept else (),
            common_head=self.common_head,
            routing=self.routing,
            a_sharing=self.a_sharing,
            target_modules=tuple(dict.fromkeys((*self.target_modules, *extra))),
            dropout=self.lora_dropout,
            reducer=ReducerConfig(
                mode=self.reducer,
                active=self.reducer_active,
                interval=self.reducer_interval,
                warmup=self.reducer_warmup,
                train_shared=self.reducer_train_shared,
            ),
        )


ADAPTER_SETTINGS = tuple(entry.name for entry in fields(AdapterOptions))
"""Names that :meth:`AdapterOptions.adapter_config` stands for."""

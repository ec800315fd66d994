"""Exactly the adapters that a drawing asks for, native and plain, on one pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core import AdapterFile, EffiLoRA, EffiLoRAError, is_native, load_adapter_file
from ...core.files import ADAPTER_FILE
from ...core.inspection import single_head
from .load import component_of, load_adapter, remove_adapter, unique_name
from .lora_files import is_plain_lora, load_plain_lora, plain_layers, remove_plain_loras, set_plain_strengths


@dataclass(frozen=True)
class AdapterRef:
    """An adapter for a drawing: its file, native or plain LoRA, its strength, and the only ``head`` that is to act."""

    path: Path
    strength: float = 1.0
    head: int | None = None

    def mark(self) -> tuple[Any, ...]:
        """What it is loaded from: it changes when the file does."""
        return (self.path, self.path.stat().st_mtime_ns, self.head)

    def content(self) -> AdapterFile:
        """The native file, or that with a single head."""
        content = load_adapter_file(self.path)
        return content if self.head is None else single_head(content, self.head)


class ActiveAdapters:
    """The adapters on ``pipe``: :meth:`use` loads what is missing, removes what is not wanted, keeps the rest.

    Native adapters go on before plain ones, since PEFT wraps the layers that native ones look for.
    """

    def __init__(self, pipe: Any):
        self.pipe = pipe
        self.native: dict[tuple[Any, ...], EffiLoRA] = {}
        self.plain: dict[tuple[Any, ...], str] = {}

    def use(self, wanted: list[AdapterRef]) -> None:
        """Let exactly ``wanted`` act.

        Raises :class:`EffiLoRAError` for files that can't; what acts then is not said, but the next call is right again.
        """
        if len({one.mark() for one in wanted}) < len(wanted):
            raise EffiLoRAError("the same adapter is given twice: give it once, with another strength")
        native = {one.mark(): one for one in wanted if one.head is not None or is_native(one.path)}
        plain = {one.mark(): one for one in wanted if one.mark() not in native}
        for one in plain.values():
            if not is_plain_lora(one.path):
                load_adapter_file(one.path)  # says what is wrong with it
        kept = _common_start(list(self.native), list(native))
        fresh = {mark: one.content() for mark, one in native.items() if mark not in kept}
        if self.plain and (fresh or self.plain.keys() != plain.keys()):
            remove_plain_loras(self.pipe)
            self.plain.clear()
        for mark in [mark for mark in self.native if mark not in kept]:
            remove_adapter(self.pipe, self.native.pop(mark))
        for mark, content in fresh.items():
            name = unique_name(component_of(self.pipe), label_of(mark[0]))
            self.native[mark] = load_adapter(self.pipe, content, name=name)
        for mark, one in native.items():
            self.native[mark].strength = one.strength
        self._use_plain(plain)

    def layers(self, one: AdapterRef) -> int:
        """Number of the model's layers on which a plain LoRA in use acts; its file may name more than the model has."""
        return plain_layers(self.pipe, self.plain[one.mark()])

    def _use_plain(self, plain: dict[tuple[Any, ...], AdapterRef]) -> None:
        try:
            for mark, one in plain.items():
                if mark not in self.plain:
                    name = f"plain_{len(self.plain)}"
                    load_plain_lora(self.pipe, one.path, name)
                    self.plain[mark] = name
        except EffiLoRAError:
            remove_plain_loras(self.pipe)
            self.plain.clear()
            raise
        if plain:
            set_plain_strengths(self.pipe, {self.plain[mark]: one.strength for mark, one in plain.items()})


def label_of(path: Path) -> str:
    """What people call an adapter's file: its name, or that of the training run's folder."""
    return path.resolve().parent.name if path.name == ADAPTER_FILE else path.stem


def _common_start(one: list[Any], other: list[Any]) -> list[Any]:
    """The items that both begin with: adapters stay only in their order, since sums in another order round otherwise."""
    same = 0
    while same < min(len(one), len(other)) and one[same] == other[same]:
        same += 1
    return one[:same]

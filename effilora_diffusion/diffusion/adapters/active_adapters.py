"""The active adapters of a pipeline, native and plain LoRA: exactly those that a drawing asks for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core import AdapterFile, EffiLoRA, EffiLoRAError, is_native, load_adapter_file
from ...core.files import ADAPTER_FILE
from ...core.inspection import single_head
from ...core.load import host_model, load, remove, unique_name
from ...core.reference import Reference
from ...core.run_folder import CHECKPOINT_ADAPTER, step_of
from .lora_files import is_plain_lora, load_plain_lora, plain_layers, remove_plain_loras, set_plain_strengths
from .processors import attach
from .prompts import follow_prompts


@dataclass(frozen=True)
class AdapterRef:
    """An adapter for a drawing: its file, native or plain LoRA, its strength, and the only ``head`` that is to act."""

    path: Path
    strength: float = 1.0
    head: int | None = None

    def key(self) -> tuple[Any, ...]:
        """What it is loaded from: it changes when the file does."""
        return (self.path, self.path.stat().st_mtime_ns, self.head)

    def content(self) -> AdapterFile:
        """The native file, or that with a single head."""
        content = load_adapter_file(self.path)
        return content if self.head is None else single_head(content, self.head)


class ActiveAdapters:
    """The adapters on ``pipe``: :meth:`use` loads what is missing, removes what is not wanted, keeps the rest."""

    def __init__(self, pipe: Any):
        self.pipe = pipe
        self.native: dict[tuple[Any, ...], EffiLoRA] = {}
        self.plain: dict[tuple[Any, ...], str] = {}

    def use(self, wanted: list[AdapterRef]) -> None:
        """Let exactly ``wanted`` act.

        Raises:
            EffiLoRAError: a file can't be used. The active set is undefined then; the next call recovers.
        """
        if len({one.key() for one in wanted}) < len(wanted):
            raise EffiLoRAError("the same adapter is given twice: give it once, with another strength")
        native = {one.key(): one for one in wanted if one.head is not None or is_native(one.path)}
        plain = {one.key(): one for one in wanted if one.key() not in native}
        for one in plain.values():
            if not is_plain_lora(one.path):
                load_adapter_file(one.path)  # raises: it says what is wrong with the file
        self._use_native(native)
        self._use_plain(plain)

    def layers(self, one: AdapterRef) -> int:
        """Number of the model's layers on which a plain LoRA in use acts; its file may name more than the model has."""
        return plain_layers(self.pipe, self.plain[one.key()])

    def _use_native(self, native: dict[tuple[Any, ...], AdapterRef]) -> None:
        model = host_model(self.pipe)
        kept = _common_start(list(self.native), list(native))
        fresh = {key: one.content() for key, one in native.items() if key not in kept}
        for key in [key for key in self.native if key not in kept]:
            remove(self.pipe, self.native.pop(key))
        for key, content in fresh.items():
            self.native[key] = load(self.pipe, content, 1.0, unique_name(model, label_of(key[0])), attach)
        follow_prompts(self.pipe)
        for key, one in native.items():
            self.native[key].strength = one.strength

    def _use_plain(self, plain: dict[tuple[Any, ...], AdapterRef]) -> None:
        if self.plain and self.plain.keys() != plain.keys():
            remove_plain_loras(self.pipe)
            self.plain.clear()
        try:
            for key, one in plain.items():
                if key not in self.plain:
                    name = f"plain_{len(self.plain)}"
                    load_plain_lora(self.pipe, one.path, name)
                    self.plain[key] = name
        except EffiLoRAError:
            remove_plain_loras(self.pipe)
            self.plain.clear()
            raise
        if plain:
            set_plain_strengths(self.pipe, {self.plain[key]: one.strength for key, one in plain.items()})


def label_of(path: Path) -> str:
    """What people call an adapter's file: its name, that of the training run's folder, or ``RUN @ STEP`` for a checkpoint's."""
    folder = path.resolve().parent
    if path.name in (ADAPTER_FILE, CHECKPOINT_ADAPTER) and folder.name.startswith("checkpoint-"):
        return str(Reference(folder.parent.name, step_of(folder)))
    return folder.name if path.name == ADAPTER_FILE else path.stem


def _common_start(one: list[Any], other: list[Any]) -> list[Any]:
    """The items that both begin with: adapters stay only in their order, since sums in another order round otherwise."""
    same = 0
    while same < min(len(one), len(other)) and one[same] == other[same]:
        same += 1
    return one[:same]

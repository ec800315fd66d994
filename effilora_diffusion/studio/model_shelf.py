"""The models that can be opened without a restart: the embedded base, a folder of models, the hub's cache, and recent ones."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

from huggingface_hub import constants

from .. import EffiLoRAError
from ..core.hub import EMBEDDED_BASE
from ..core.writing import write_text
from ..diffusion.models.pipelines import single_file_kind
from .words import clean, is_text

RECENT_FILE = "recent_models.json"
MOST_RECENT = 12
INDEX = "model_index.json"


class ModelShelf:
    """Models by the names that the page shows; no other can be opened by a name from a browser.

    Args:
        outputs: where the recent models are noted.
        folder: of models: diffusers folders and single files, also one folder deeper.
        typed: whether a path or hub id may be typed: not where other machines can reach the page.
    """

    def __init__(self, outputs: Path, folder: Path | None = None, typed: bool = True):
        self.file, self.folder, self.typed = outputs / RECENT_FILE, folder, typed

    def models(self) -> dict[str, str | None]:
        """What can be opened, by its name: a path or hub id, ``None`` for the embedded base."""
        found: dict[str, str | None] = {EMBEDDED_BASE: None}
        for model in [*self._in_folder(), *self._in_cache(), *self.recent()]:
            if model not in found.values() and is_text(model):
                found[self._free(model, found)] = model
        return found

    def label(self, model: str | None) -> str:
        """What the page calls a model."""
        return next((label for label, one in self.models().items() if one == model), clean(_name(model or "")))

    def find(self, label: str) -> str | None:
        """The model of a name, or what was typed where that is allowed; raises :class:`EffiLoRAError` for others."""
        models = self.models()
        if label in models:
            return models[label]
        if not self.typed or not label.strip():
            raise EffiLoRAError(f"there is no model named {clean(label, 80)!r}: choose one of the list")
        path = Path(label.strip()).expanduser()
        return str(path.resolve()) if path.exists() else label.strip()

    def recent(self) -> list[str]:
        """The models that were opened here, the last first; those that are gone are left out."""
        try:
            noted = json.loads(self.file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return []
        texts = [one for one in noted if isinstance(one, str)] if isinstance(noted, list) else []
        return [one for one in texts if Path(one).exists() or not Path(one).is_absolute()]

    def note(self, model: str | None) -> None:
        """Remember a model that was opened."""
        if model is not None:
            path = Path(model)
            model = str(path.resolve()) if path.exists() else model
            kept = [model, *[one for one in self.recent() if one != model]][:MOST_RECENT]
            write_text(self.file, json.dumps(kept, indent=1) + "\n")

    def _in_folder(self) -> list[str]:
        """Diffusers folders and whole checkpoints of the models folder, by name."""
        if self.folder is None or not self.folder.is_dir():
            return []
        folder = self.folder.resolve()
        indices = [*folder.glob(f"*/{INDEX}"), *folder.glob(f"*/*/{INDEX}")]
        files = [*folder.glob("*.safetensors"), *folder.glob("*/*.safetensors")]
        wholes = [file for file in files if file.parent not in {index.parent for index in indices} and _is_whole(file)]
        return sorted(str(path) for path in [*[index.parent for index in indices], *wholes])

    @staticmethod
    def _in_cache() -> list[str]:
        """Hub ids of the diffusers models in the hub's cache."""
        cache = Path(os.environ.get("HF_HUB_CACHE") or constants.HF_HUB_CACHE)
        indices = cache.glob(f"models--*/snapshots/*/{INDEX}")
        return sorted({index.parents[2].name.removeprefix("models--").replace("--", "/") for index in indices})

    @staticmethod
    def _free(model: str, taken: dict[str, str | None]) -> str:
        """The last part of a path, with as much before it as tells it from others; a hub id as it is."""
        parts = Path(model).parts if Path(model).is_absolute() else (model,)
        for count in range(1, len(parts) + 1):
            label = "/".join(parts[-count:])
            if label not in taken:
                return label
        return model


def _name(model: str) -> str:
    path = Path(model)
    return path.name if path.exists() else model


def _is_whole(file: Path) -> bool:
    stated = file.stat()
    return _whole(file, stated.st_mtime_ns, stated.st_size)


@functools.lru_cache(maxsize=1024)
def _whole(file: Path, changed: int, size: int) -> bool:
    """Whether a file is a whole checkpoint; its header is read once, as long as it does not change."""
    try:
        return single_file_kind(file) is not None
    except (EffiLoRAError, OSError):
        return False

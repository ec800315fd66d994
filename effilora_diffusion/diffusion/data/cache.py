"""Latents and text states on disk, for more images than memory holds: found again by what they were made of."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ...core.fingerprint import model_hash
from ...core.writing import write_atomic, writing
from ..models import Family

FORMAT = 1
"""Raised whenever what is stored, or how it is made, changes."""

CHECKSUM = "crc32"

TOLD = 3
"""Damaged files that are told by name."""


@dataclass
class DiskCache:
    """Tensors in a folder, one file per key, whose name is the hash of the key and of ``facts``.

    Args:
        folder: made if needed; several runs may share it.
        facts: of everything that makes the tensors and is no part of a key: the model, and how it is called.
        say: prints a line.

    Example:
        >>> cache = DiskCache(Path("cache"), {"autoencoder": "1f03"}, print)
        >>> cache.save({"image": "ab12"}, {"moments": torch.zeros(2, 4, 8, 8)})
        >>> cache.load({"image": "ab12"})["moments"].shape
        torch.Size([2, 4, 8, 8])
    """

    folder: Path
    facts: Mapping[str, Any]
    say: Callable[[str], None]
    damaged: int = field(default=0, init=False)

    def path(self, key: Mapping[str, Any]) -> Path:
        """Where the tensors of ``key`` are, or would be."""
        text = json.dumps([FORMAT, self.facts, key], sort_keys=True, default=str)
        name = hashlib.sha256(text.encode()).hexdigest()
        return self.folder / name[:2] / f"{name[2:]}.safetensors"

    def __contains__(self, key: Mapping[str, Any]) -> bool:
        return self.path(key).is_file()

    def load(self, key: Mapping[str, Any]) -> dict[str, Tensor] | None:
        """The tensors of ``key``; ``None`` where there are none, and for a damaged file, which is told."""
        path = self.path(key)
        if not path.is_file():
            return None
        try:
            with safe_open(str(path), "pt") as file:
                found = {name: file.get_tensor(name) for name in sorted(file.keys())}
                whole = (file.metadata() or {}).get(CHECKSUM) == _checksum(found)
        except (SafetensorError, OSError):
            whole = False
        if whole:
            return found
        self.damaged += 1
        if self.damaged <= TOLD:
            more = "; further ones are not told" if self.damaged == TOLD else ""
            self.say(f"note: {path} is damaged and made again{more}")
        return None

    def save(self, key: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Store the tensors of ``key``, whole or not at all; raises :class:`.WriteError` where the system refuses."""
        kept = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        path = self.path(key)
        with writing(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, lambda temporary: save_file(kept, temporary, {CHECKSUM: _checksum(kept)}))

    def get(self, key: Mapping[str, Any], make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors of ``key``, made and stored if they are not there."""
        found = self.load(key)
        if found is None:
            found = make()
            self.save(key, found)
        return found


@dataclass(frozen=True)
class Caches:
    """Where the outputs of a run's encoders are kept: on disk, or, ``None``, in memory.

    ``process`` of ``processes`` encodes its share of what is kept on disk before training.
    """

    latents: DiskCache | None = None
    texts: DiskCache | None = None
    process: int = 0
    processes: int = 1

    def mine(self, number: int) -> bool:
        """Whether this process encodes the item ``number`` of what is kept on disk."""
        return number % self.processes == self.process


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes(), value)
    return f"{value:08x}"


def latent_facts(family: Family, source: Any) -> dict[str, Any]:
    """What latents depend on besides the image: the autoencoder, and how the family calls it."""
    vae = family.pipe.vae
    return {"kind": "latents", "family": family.title, "autoencoder": _identity(vae, source)}


def text_facts(family: Family, source: Any) -> dict[str, Any]:
    """What text states depend on besides the prompt: the encoders, and how the pipeline calls them."""
    options = {name: value for name, value in family.text_options.items() if name != "device"}
    encoders = [
        _identity(part, source)
        for name, part in sorted(family.pipe.components.items())
        if isinstance(part, nn.Module) and name not in ("vae", family.component)
    ]
    return {
        "kind": "texts",
        "family": family.title,
        "encoders": encoders,
        "options": options,
        "chunks": getattr(family, "chunks", 1),
    }


def _identity(part: Any, source: Any) -> list[Any]:
    """Class, configuration, type and weights of a module; ``source`` names the model where its weights can't be compared."""
    config: Any = getattr(part, "config", {})
    values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    plain = {name: value for name, value in values.items() if not name.startswith("_")}
    return [type(part).__name__, plain, str(getattr(part, "dtype", None)), model_hash(part) or source]

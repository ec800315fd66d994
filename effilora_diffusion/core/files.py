"""The native file: one ``.safetensors`` file with a checksum, in which every tensor is stored once.

Names: ``shared_A.<width>`` (or, unshared, ``shared_A.<site>`` with "/" for "."), ``<path of linear>.stacked_B``
``(d_out, N, r)``, ``<site>.router`` and ``<site>.calibration`` ``(N + 1, r, r)``; none contains "lora", so that loaders
of plain LoRA reject the file. The metadata key ``effilora`` is JSON: format version, configuration, sites,
base model, trigger prompt, library version, and the SHA-256 of the tensors and of itself.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .adapter import EffiLoRA, a_widths
from .config import FORMAT_VERSION, EffiLoRAConfig
from .errors import EffiLoRAError
from .sites import Site
from .writing import write_atomic

ADAPTER_FILE = "effilora.safetensors"
"""File name in a run's folder."""

HEADER_KEY = "effilora"

LANGUAGE = "language"
"""The ``component`` in the metadata of an adapter for a language model."""

MAX_BYTES = 8 << 30

_RENAMED = {"pictures": "images"}
"""Metadata keys of version 0.1.0 and their present names."""


@dataclass
class AdapterFile:
    """The content of a native file.

    Args:
        adapter: the adapter.
        metadata: ``base_model``, ``base_hash``, ``trigger_prompt``, ``export_error`` (relative output error of the plain
            LoRA) and others.
        calibration: second moments ``(N + 1, r, r)`` by site name, see :mod:`.convert`.
        sha256: of the tensors.
    """

    adapter: EffiLoRA
    metadata: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Tensor] = field(default_factory=dict)
    sha256: str = ""


def tensors_sha256(tensors: dict[str, Tensor]) -> str:
    """Return the SHA-256 of names, dtypes, shapes and bytes of ``tensors``, in name order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous().cpu()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def header_sha256(header: dict[str, Any]) -> str:
    """Return the SHA-256 of a header without its own ``header_sha256``."""
    rest = {key: value for key, value in header.items() if key != "header_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def adapter_tensors(adapter: EffiLoRA) -> dict[str, Tensor]:
    """Return the trained tensors under their names in the native file."""
    tensors = {f"shared_A.{key}": value for key, value in adapter.A.items()}
    for index, site in enumerate(adapter.sites):
        for path, _ in site.linears:
            tensors[f"{path}.stacked_B"] = adapter.B[index][site.rows(path)]
        if len(adapter.G):
            tensors[f"{site.name}.router"] = adapter.G[index]
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def save_adapter_file(path: str | Path, content: AdapterFile, dtype: torch.dtype | None = None) -> str:
    """Write a native file atomically.

    Args:
        path: the file.
        content: what to write.
        dtype: stores the trained tensors in another type (``torch.float16`` halves the file); calibration keeps its
            type, since the least-squares fit inverts it.

    Returns:
        The SHA-256 of the tensors.

    Raises:
        EffiLoRAError: for weights that are not finite, before anything is written.
    """
    tensors = adapter_tensors(content.adapter)
    if dtype is not None:
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    tensors |= {f"{site}.calibration": c.detach().cpu().contiguous() for site, c in content.calibration.items()}
    for name, tensor in tensors.items():  # in the stored type: float16 overflows at 65504
        if not tensor.isfinite().all():
            raise EffiLoRAError(f"{name} has NaN or infinite values: nothing was written to {path}")
    from .. import __version__

    header = {
        "format_version": FORMAT_VERSION,
        "library_version": __version__,
        "config": content.adapter.config.to_dict(),
        "sites": [site.to_dict() for site in content.adapter.sites],
        "metadata": content.metadata,
        "sha256": tensors_sha256(tensors),
    }
    header = json.loads(json.dumps(header))  # as it will be parsed: tuples become lists, keys strings
    text = {HEADER_KEY: json.dumps({**header, "header_sha256": header_sha256(header)})}
    write_atomic(Path(path), lambda temporary: save_file(tensors, temporary, metadata=text))
    return str(header["sha256"])


def adapter_path(path: str | Path) -> Path:
    """Return the native file at ``path``, which may be a training run's folder."""
    path = Path(path)
    return path / ADAPTER_FILE if path.is_dir() else path


def is_native(path: str | Path) -> bool:
    """Return whether ``path`` is a native file, by its header."""
    try:
        with safe_open(str(path), "pt") as file:
            return HEADER_KEY in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def load_adapter_file(path: str | Path) -> AdapterFile:
    """Read a native file; raises :class:`EffiLoRAError` for a missing, damaged or invalid one."""
    path = Path(path)
    header, tensors = _read(path)
    try:
        config = EffiLoRAConfig.from_dict(header["config"])
        sites = [Site.from_dict(entry) for entry in header["sites"]]
        saved: dict[str, Any] = dict(header.get("metadata") or {})
        metadata = {_RENAMED.get(key, key): value for key, value in saved.items()}
    except EffiLoRAError as error:
        raise EffiLoRAError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise EffiLoRAError(f"{path}: its header is damaged ({error!r}): get the file again") from error
    if not sites:
        raise EffiLoRAError(f"{path}: its header has no sites: get the file again")
    available = sum(tensor.numel() for tensor in tensors.values())
    stated = config.rank * sum(a_widths(config, sites).values())
    stated += sum(config.rank * config.heads * site.out_features for site in sites)
    if stated > available:  # before allocating what a forged header claims
        raise EffiLoRAError(f"{path}: its header claims {stated} parameters of A and heads, the file has {available}")
    adapter = EffiLoRA(config, sites)
    calibration = _fill(path, adapter, tensors)
    return AdapterFile(adapter, metadata, calibration, str(header["sha256"]))


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise EffiLoRAError(f"{path}: no such file")
    if path.stat().st_size > MAX_BYTES:
        raise EffiLoRAError(f"{path}: {path.stat().st_size} bytes is too large for an adapter")
    try:
        with safe_open(str(path), "pt") as file:
            text = (file.metadata() or {}).get(HEADER_KEY)
            if text is None:
                raise EffiLoRAError(
                    f"{path}: a safetensors file, but not an EffiLoRA adapter; load plain LoRA with "
                    "pipe.load_lora_weights"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        header = json.loads(text)
        digest = header_sha256(header) if isinstance(header, dict) else ""  # deep nesting may raise here too
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        if isinstance(error, EffiLoRAError):
            raise
        raise EffiLoRAError(f"{path}: not a readable safetensors file ({error}): get the file again") from error
    if not isinstance(header, dict) or header.get("format_version") != FORMAT_VERSION:
        version = header.get("format_version") if isinstance(header, dict) else None
        raise EffiLoRAError(f"{path}: format version {version!r}, this library reads {FORMAT_VERSION}: update it")
    if header.get("header_sha256") != digest:
        raise EffiLoRAError(f"{path}: its header does not match its checksum: the file is damaged, get it again")
    if header.get("sha256") != tensors_sha256(tensors):
        raise EffiLoRAError(f"{path}: the weights do not match their checksum: the file is damaged, get it again")
    return header, tensors


@torch.no_grad()
def _fill(path: Path, adapter: EffiLoRA, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy the tensors into ``adapter``; return the calibration."""
    remaining = dict(tensors)
    size = (adapter.config.heads + 1, adapter.config.rank, adapter.config.rank)

    def take(name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = remaining.pop(name, None)
        if tensor is None:
            raise EffiLoRAError(f"{path}: the tensor {name} is missing")
        if tuple(tensor.shape) != shape or not tensor.is_floating_point():
            raise EffiLoRAError(f"{path}: {name} is {tuple(tensor.shape)} {tensor.dtype}, expected {shape}")
        tensor = tensor.float()
        if not tensor.isfinite().all():
            raise EffiLoRAError(f"{path}: {name} has NaN or infinite values")
        return tensor

    for key, parameter in adapter.A.items():
        parameter.copy_(take(f"shared_A.{key}", tuple(parameter.shape)))
    calibration = {}
    for index, site in enumerate(adapter.sites):
        for linear_path, out_features in site.linears:
            shape = (out_features, adapter.config.heads, adapter.config.rank)
            adapter.B[index][site.rows(linear_path)] = take(f"{linear_path}.stacked_B", shape)
        if len(adapter.G):
            adapter.G[index].copy_(take(f"{site.name}.router", tuple(adapter.G[index].shape)))
        if f"{site.name}.calibration" in remaining:
            calibration[site.name] = take(f"{site.name}.calibration", size)
    if remaining:
        raise EffiLoRAError(f"{path}: unknown tensors {sorted(remaining)[:3]}: written by a newer version?")
    return calibration

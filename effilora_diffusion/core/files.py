"""The native file: one ``.safetensors`` file with a checksum, in which every tensor is stored once.

Names: ``shared_A.<width>`` (or, unshared, ``shared_A.<site>`` with "/" for "."), ``<path of linear>.stacked_B``
``(d_out, N, r)``, ``<site>.router`` and ``<site>.calibration`` ``(N + 1, r, r)``; where the plain LoRA was distilled, its A and
heads under the same names behind ``plain/``; those of its parts on text encoders behind ``text_encoder/`` and so on, with
``words`` for the embeddings of new words, ``(tokens, width)``. None contains "lora", so that loaders of plain LoRA reject the
file. The metadata key ``effilora`` is JSON: format version, configuration (of the plain LoRA and the parts too), sites, new
words, base model, trigger prompt, library version, and the SHA-256 of the tensors and of itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .adapter import EffiLoRA, a_widths, router_shape
from .config import FORMAT_VERSION, EffiLoRAConfig
from .convert import PlainLoRA, is_exact, to_lora
from .errors import EffiLoRAError
from .metadata import read_metadata
from .sites import Site
from .tensor_io import open_tensors, read_tensors
from .text_io import parse_json, printable
from .words import NewWords
from .writing import write_atomic

ADAPTER_FILE = "effilora.safetensors"
"""File name in a run's folder."""

HEADER_KEY = "effilora"

LANGUAGE = "language"
"""The ``component`` in the metadata of an adapter for a language model."""

PLAIN = "plain/"
"""Before the names of the plain LoRA's tensors; no module's path contains a slash."""

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")
"""Names of text encoders in pipelines."""

WORDS = "words"
"""Behind the name of a text encoder: the embeddings of new words."""

HEADER_DEPTH = 8
"""How deep the header's JSON may be nested; what is written has half of it."""


@dataclass
class AdapterFile:
    """The content of a native file.

    Args:
        adapter: the adapter.
        metadata: ``base_model``, ``base_hash``, ``trigger_prompt``, ``export_error`` (relative error of the plain LoRA: of the
            model's predictions where a run of image training measured it, else of the linears' outputs) and others.
        calibration: second moments ``(N + 1, r, r)`` by site name, see :mod:`.convert`.
        sha256: of the tensors.
        plain: the plain LoRA as an adapter with one head on the same sites, where it was distilled.
    """

    adapter: EffiLoRA
    metadata: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Tensor] = field(default_factory=dict)
    sha256: str = ""
    plain: EffiLoRA | None = None

    def factors(self) -> dict[str, PlainLoRA]:
        """The plain LoRA by module path: the distilled one, else as :func:`.to_lora` converts the adapter."""
        if self.plain is None or is_exact(self.adapter):
            return to_lora(self.adapter, self.calibration)
        return to_lora(self.plain)

    def encoder_factors(self) -> dict[str, dict[str, PlainLoRA]]:
        """The plain LoRA of the parts on text encoders, which is exact: by the encoder's name, then by module path."""
        return {name: to_lora(part) for name, part in encoders_of(self.adapter).items()}


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
    found = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    for part, encoder in encoders_of(adapter).items():
        found |= {f"{part}/{name}": tensor for name, tensor in adapter_tensors(encoder).items()}
    if adapter.words is not None:
        rows = adapter.words.embeddings.items()
        found |= {f"{part}/{WORDS}": value.detach().cpu().contiguous().clone() for part, value in rows}
    return found


def encoders_of(adapter: EffiLoRA) -> dict[str, EffiLoRA]:
    """Return the parts of ``adapter`` on text encoders by their names."""
    return dict(adapter.encoders.items())  # type: ignore[arg-type]


def described(adapter: EffiLoRA) -> dict[str, Any]:
    """Return what the header says of an adapter's shape."""
    found: dict[str, Any] = {
        "config": adapter.config.to_dict(),
        "sites": [site.to_dict() for site in adapter.sites],
    }
    if encoders := encoders_of(adapter):
        found["encoders"] = {name: described(encoder) for name, encoder in encoders.items()}
    if adapter.words is not None:
        found["words"] = adapter.words.described()
    return found


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
    if content.plain is not None:
        tensors |= {PLAIN + name: value for name, value in adapter_tensors(content.plain).items()}
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
        **described(content.adapter),
        "metadata": content.metadata,
        "sha256": tensors_sha256(tensors),
    }
    if content.plain is not None:
        header["plain"] = content.plain.config.to_dict()
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
        with open_tensors(Path(path)) as file:
            return HEADER_KEY in (file.metadata() or {})
    except EffiLoRAError:
        return False


def load_adapter_file(path: str | Path) -> AdapterFile:
    """Read a native file; raises :class:`EffiLoRAError` for a missing, damaged or invalid one.

    Whatever the file holds, what is returned can be used: weights and widths fit one another, numbers are finite and bounded,
    texts can be printed. Nothing is allocated before the file's tensors are known to be what its header claims.
    """
    path = Path(path)
    with open_tensors(path) as file:
        text = (file.metadata() or {}).get(HEADER_KEY)
        if text is None:
            raise EffiLoRAError(
                f"{path}: a safetensors file, but not an EffiLoRA adapter; load plain LoRA with pipe.load_lora_weights"
            )
        try:
            header = _read_header(text)
            config, sites = _described(header)
            encoders = _encoders(header)
            words = NewWords.from_description(header["words"], ENCODERS) if "words" in header else None
            plain = _plain_config(header, sites)
        except EffiLoRAError as error:
            raise EffiLoRAError(f"{path}: {printable(error)[:400]}") from error
        required, optional = tensor_shapes(config, sites)
        for part, shape in encoders.items():
            required |= {f"{part}/{name}": size for name, size in tensor_shapes(*shape)[0].items()}
        if words is not None:
            required |= {f"{part}/{WORDS}": tuple(rows.shape) for part, rows in words.embeddings.items()}
        if plain is not None:
            required |= {PLAIN + name: shape for name, shape in tensor_shapes(plain, sites)[0].items()}
        tensors = read_tensors(path, file, required, optional)
    if header.get("sha256") != tensors_sha256(tensors):
        raise EffiLoRAError(f"{path}: the weights do not match their checksum: the file is damaged, get it again")
    adapter = EffiLoRA(config, sites)
    calibration = _fill(path, adapter, tensors)
    for part, shape in encoders.items():
        adapter.add_encoder(part, EffiLoRA(*shape))
        _fill(path, encoders_of(adapter)[part], tensors, f"{part}/")
    if words is not None:
        adapter.words = _fill_words(path, words, tensors)
    content = AdapterFile(adapter, read_metadata(header["metadata"]), calibration, header["sha256"])
    if plain is not None:
        content.plain = EffiLoRA(plain, sites)
        _fill(path, content.plain, tensors, PLAIN)
    return content


def _read_header(text: str) -> dict[str, Any]:
    """The JSON of a native file, of this version and as it was written."""
    try:
        header = parse_json(text, HEADER_DEPTH)
    except EffiLoRAError as error:
        raise EffiLoRAError(f"not a readable safetensors file (its header: {error}): get the file again") from error
    version = header.get("format_version") if isinstance(header, dict) else None
    if type(version) is not int or version != FORMAT_VERSION:
        raise EffiLoRAError(f"format version {version!r:.40}, this library reads {FORMAT_VERSION}: update it")
    if header.get("header_sha256") != header_sha256(header):
        raise EffiLoRAError("its header does not match its checksum: the file is damaged, get it again")
    return dict(header)


def _described(header: dict[str, Any]) -> tuple[EffiLoRAConfig, list[Site]]:
    """Configuration and sites of the adapter that a header claims."""
    if not isinstance(header.setdefault("metadata", {}), dict):
        raise EffiLoRAError("its header has no object of metadata: get the file again")
    return _shape(header)


def _shape(header: dict[str, Any]) -> tuple[EffiLoRAConfig, list[Site]]:
    """Configuration and sites as :func:`described` wrote them."""
    config, entries = EffiLoRAConfig.from_dict(header.get("config", {})), header.get("sites")
    if not isinstance(entries, list) or not entries:
        raise EffiLoRAError("its header has no sites: get the file again")
    sites = [Site.from_dict(entry) for entry in entries]
    names = {site.name for site in sites}
    paths = [path for site in sites for path, _ in site.linears]
    if len(names) < len(sites) or len(set(paths)) < len(paths):
        raise EffiLoRAError("its header names a site or a linear twice: get the file again")
    _check_names(config, sites)
    return config, sites


def _encoders(header: dict[str, Any]) -> dict[str, tuple[EffiLoRAConfig, list[Site]]]:
    """Configuration and sites of the parts on text encoders that a header claims."""
    entries = header.get("encoders", {})
    if not isinstance(entries, dict) or not set(entries) <= {*ENCODERS}:
        raise EffiLoRAError("its header names parts that no pipeline has: get the file again")
    found = {name: _shape(entry) for name, entry in entries.items() if isinstance(entry, dict)}
    if len(found) < len(entries) or any(config.heads != 1 for config, _ in found.values()):
        raise EffiLoRAError("its header claims what no adapter has on a text encoder: get the file again")
    return found


def _plain_config(header: dict[str, Any], sites: list[Site]) -> EffiLoRAConfig | None:
    """Configuration of the plain LoRA that the file holds beside the adapter, if it does."""
    if "plain" not in header:
        return None
    config = EffiLoRAConfig.from_dict(header["plain"])
    if config.heads != 1 or config.routing != "static":
        raise EffiLoRAError("its header claims a plain LoRA with several heads: get the file again")
    _check_names(config, sites)
    return config


def _check_names(config: EffiLoRAConfig, sites: list[Site]) -> None:
    reserved = nn.ParameterDict()
    if any(hasattr(reserved, key) for key in a_widths(config, sites)):  # torch could not hold a weight of that name
        raise EffiLoRAError("its header names a site as no module can be named: get the file again")


def tensor_shapes(
    config: EffiLoRAConfig, sites: Sequence[Site]
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Shapes of the tensors that the file of such an adapter must have, and of the calibration that it may have."""
    required: dict[str, tuple[int, ...]] = {
        f"shared_A.{key}": (config.rank, width) for key, width in a_widths(config, sites).items()
    }
    for site in sites:
        required |= {f"{path}.stacked_B": (width, config.heads, config.rank) for path, width in site.linears}
        if config.has_routers:
            required[f"{site.name}.router"] = router_shape(config)
    size = (config.heads + 1, config.rank, config.rank)
    return required, {f"{site.name}.calibration": size for site in sites}


@torch.no_grad()
def _fill_words(path: Path, words: NewWords, tensors: dict[str, Tensor]) -> NewWords:
    for part, rows in words.embeddings.items():
        found = tensors[f"{part}/{WORDS}"].float()
        if not found.isfinite().all():
            raise EffiLoRAError(f"{path}: its new words have NaN or infinite values")
        rows.copy_(found)
    return words


@torch.no_grad()
def _fill(path: Path, adapter: EffiLoRA, tensors: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Copy the tensors with ``prefix`` into ``adapter``; return the calibration."""

    def take(name: str) -> Tensor:
        tensor = tensors[prefix + name].float()
        if not tensor.isfinite().all():
            raise EffiLoRAError(f"{path}: {name} has NaN or infinite values")
        return tensor

    for key, parameter in adapter.A.items():
        parameter.copy_(take(f"shared_A.{key}"))
    calibration = {}
    for index, site in enumerate(adapter.sites):
        for linear_path, _ in site.linears:
            adapter.B[index][site.rows(linear_path)] = take(f"{linear_path}.stacked_B")
        if len(adapter.G):
            adapter.G[index].copy_(take(f"{site.name}.router"))
        if not prefix and f"{site.name}.calibration" in tensors:
            calibration[site.name] = take(f"{site.name}.calibration")
    return calibration

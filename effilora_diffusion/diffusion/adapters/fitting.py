"""Which adapter files fit a model, by the names and widths of its layers: asked of a file, without loading it onto the model."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from ...core import is_native, load_adapter_file
from ...core.files import ENCODERS, encoders_of
from ...core.load import host_model
from ...core.sites import Site
from .plain_file import PAIRS, read_header, split_factor

Widths = dict[str, tuple[int, int]]
"""Input and output width of layers, by their paths."""

HOST_PREFIX = re.compile(
    r"(base_model\.model\.|diffusion_model\.|unet\.|transformer\.|lora_unet_|lora_transformer_|lycoris_)"
)
ENCODER_PREFIX = re.compile(r"(lora_te|text_encoder|text_model|lora_prior_te)")
KNOWN_SHAPES = 0.5
"""Share of a file's layers of unknown names whose widths the model must have: other programs rename layers, and join some."""


class Layers:
    """The layers of a pipeline that adapters act on, as they are before any is on it."""

    def __init__(self, pipe: Any):
        self.host = _widths(host_model(pipe))
        parts = {name: getattr(pipe, name, None) for name in ENCODERS}
        self.encoders = {name: _widths(part) for name, part in parts.items() if isinstance(part, nn.Module)}
        self._flat = {path.replace(".", "_"): widths for path, widths in self.host.items()}
        self._shapes = set(self.host.values())

    def fit(self, path: Path) -> bool:
        """Whether the adapter in a file was made for a model of these layers.

        Raises :class:`EffiLoRAError` for a file that is no adapter.
        """
        if is_native(path):
            adapter = load_adapter_file(path).adapter
            encoders = encoders_of(adapter).items()
            return _has(self.host, adapter.sites) and all(
                _has(self.encoders.get(name, {}), part.sites) for name, part in encoders
            )
        return self._fits_plain(_pairs(read_header(path).shapes))

    def _fits_plain(self, pairs: dict[str, tuple[int, int]]) -> bool:
        """Layers of known names must have the file's widths; where no name is known, most widths must be the model's."""
        host = {stem: widths for stem, widths in pairs.items() if not ENCODER_PREFIX.match(stem)}
        if not host:
            return True  # of text encoders alone, or of a kind whose layers only the loader tells apart
        named = {stem: HOST_PREFIX.sub("", stem, count=1).strip("._").replace(".", "_") for stem in host}
        known = [self._flat[name] == host[stem] for stem, name in named.items() if name in self._flat]
        if known:
            return all(known)
        return sum(map(self._has_shape, host.values())) >= KNOWN_SHAPES * len(host)

    def _has_shape(self, widths: tuple[int, int]) -> bool:
        """Whether some layer has these widths, or three of them joined, as q, k and v are elsewhere."""
        return widths in self._shapes or (widths[1] % 3 == 0 and (widths[0], widths[1] // 3) in self._shapes)


def _has(layers: Widths, sites: Iterable[Site]) -> bool:
    return all(layers.get(path) == (site.in_features, width) for site in sites for path, width in site.linears)


def _widths(model: nn.Module) -> Widths:
    """Of linears and convolutions; quantised ones keep their widths as attributes."""
    found: Widths = {}
    for path, module in model.named_modules():
        if hasattr(module, "in_features") and hasattr(module, "out_features"):
            found[path] = (int(module.in_features), int(module.out_features))
        elif isinstance(module, nn.Conv2d):
            found[path] = (module.in_channels, module.out_channels)
    return found


def _pairs(shapes: dict[str, tuple[int, ...]]) -> Widths:
    """Input and output width that each pair of factors of a plain LoRA is for."""
    found: Widths = {}
    for name, shape in shapes.items():
        parts = split_factor(name)
        if parts is None or parts[1] not in PAIRS or len(shape) < 2:
            continue
        stem, mark, end = parts
        up = shapes.get(f"{stem}{PAIRS[mark]}{end}", ())
        if len(up) >= 2:
            found[stem] = (int(shape[1]), int(up[0]))
    return found

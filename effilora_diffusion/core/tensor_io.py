"""Read safetensors files from elsewhere: nothing is allocated before names, shapes and types are as expected."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import EffiLoRAError
from .text_io import open_regular, printable

MAX_BYTES = 8 << 30
MAX_HEADER = 16 << 20
"""Bytes of a header; 20,000 adapted linears take a third of it."""

FLOATS = ("F64", "F32", "F16", "BF16")
"""Types of weights, as safetensors calls them; float8 and integers need scales that an adapter does not have."""


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file once its kind, its size and the length of its header are known.

    Raises:
        EffiLoRAError: it is missing, no regular file, too large or damaged.
    """
    if not path.is_file():
        raise EffiLoRAError(f"{path}: no such file")
    try:
        with open_regular(path) as start:
            size, claimed = os.fstat(start.fileno()).st_size, int.from_bytes(start.read(8), "little")
        if size > MAX_BYTES:
            raise EffiLoRAError(f"{path}: {size} bytes is too large for an adapter")
        if claimed > MAX_HEADER:
            raise EffiLoRAError(
                f"{path}: not a readable safetensors file (its header claims {claimed} bytes): get the file again"
            )
        with safe_open(str(path), "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        reason = printable(error)[:200]
        raise EffiLoRAError(f"{path}: not a readable safetensors file ({reason}): get the file again") from error


def read_tensors(
    path: Path,
    file: Any,
    required: Mapping[str, tuple[int, ...]],
    optional: Mapping[str, tuple[int, ...]] | None = None,
    types: tuple[str, ...] = FLOATS,
) -> dict[str, Tensor]:
    """The tensors of an opened file.

    Args:
        path: its path, for errors.
        file: of :func:`open_tensors`.
        required: shapes of the tensors that must be there, by name.
        optional: shapes of those that may be there.
        types: that they may have.

    Raises:
        EffiLoRAError: a tensor is missing, unknown, or of another shape or type.
    """
    known = {**(optional or {}), **required}
    names = set(file.keys())
    for name in required:
        if name not in names:
            raise EffiLoRAError(f"{path}: the tensor {name} is missing")
    unknown = sorted(names - set(known))
    if unknown:
        shown = ", ".join(printable(name)[:80] for name in unknown[:3])
        raise EffiLoRAError(f"{path}: unknown tensors ({shown}): written by a newer version?")
    for name in names:
        layout = file.get_slice(name)
        shape, kind = tuple(layout.get_shape()), layout.get_dtype()
        if shape != known[name] or kind not in types:
            raise EffiLoRAError(
                f"{path}: {name} is {str(shape)[:80]} {kind}, expected {known[name]} of {' or '.join(types)}"
            )
    return {name: file.get_tensor(name) for name in sorted(names)}

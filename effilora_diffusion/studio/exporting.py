"""Exports of adapters, which the page and programs can download."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from .. import EffiLoRAError, export_lora
from ..core import is_native
from ..core.convert import describe_export_error
from ..core.writing import write_atomic
from ..diffusion.adapters import export
from .session import Session

AS_IT_IS = "as it is"
"""The adapter's own file."""

MERGED = "merged"
"""A whole model, which is too large to be sent."""

FORMATS = (*export.FORMATS, AS_IT_IS)

FOLDERS = ("peft", MERGED)
"""Formats that are folders; they are packed to be sent."""


@dataclass(frozen=True)
class Exported:
    """What was written: the file to be sent, or the folder of a merged model; and how exact it is, in words."""

    path: Path
    said: str


def export_adapter(session: Session, name: str, format: str) -> Exported:
    """Write an adapter of the list in one of :data:`FORMATS`, in place of an earlier export of the same name.

    Raises :class:`EffiLoRAError` for names and formats that are not there, and for what can't be exported so.
    """
    path = session.adapter_path(name)
    if format not in FORMATS:
        raise EffiLoRAError(f"format must be one of {', '.join(FORMATS)}")
    session.exports.mkdir(parents=True, exist_ok=True)
    target = session.exports / f"{name}-{format.replace(' ', '-')}"
    file = Path(f"{target}.safetensors")
    if format == AS_IT_IS:
        write_atomic(file, lambda temporary: shutil.copyfile(path, temporary))
        return Exported(file, "The file as it is.")
    if not is_native(path):
        raise EffiLoRAError("it is a plain LoRA already: take it as it is")
    folder = format in FOLDERS
    if folder:
        shutil.rmtree(target, ignore_errors=True)
    error = export_lora(path, target if folder else file, format, session.model)
    missing = describe_export_error(error or None)
    if format == MERGED:
        place = target.relative_to(session.outputs)
        return Exported(target, f"The whole model with the adapter in it is in {place} of the outputs: {missing}.")
    sent = Path(shutil.make_archive(str(target), "zip", target)) if folder else file
    return Exported(sent, f"Plain LoRA for {format}: {missing}.")

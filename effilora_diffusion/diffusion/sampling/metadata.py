"""What an image says of how it was drawn: ours, those of A1111, Forge and Civitai, and ComfyUI's."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from ...core import EffiLoRAError
from .a1111 import parse_infotext
from .comfyui import parse_graph
from .png import OURS, THEIRS

FORMATS = ("PNG", "JPEG", "WEBP", "MPO", "AVIF")
MOST_BYTES = 1 << 28
"""The largest file that is opened; only its header is read."""

OTHERS = {"sui_image_params": "SwarmUI", "base_model_hash": "Fooocus", "base_model": "Fooocus"}
"""Programs whose JSON stands where earlier versions wrote ours, by a key of theirs."""

EXIF, USER_COMMENT, MAKE, MODEL = 0x8769, 0x9286, 0x010F, 0x0110


@dataclass
class ImageFacts:
    """How an image was drawn.

    Attributes:
        parameters: as :meth:`~.request.GenerationRequest.from_parameters` takes them.
        program: that wrote them: EffiLoRA, A1111 (or Forge, or Civitai), ComfyUI.
        notes: what could not be taken over, a few words each.
    """

    parameters: dict[str, Any]
    program: str = "EffiLoRA"
    notes: list[str] = field(default_factory=list)


def read_parameters(path: Path) -> dict[str, Any]:
    """The parameters in an image that :func:`~.png.save_png` wrote; raises :class:`EffiLoRAError` if there are none."""
    found = _ours(_texts(path)[0])
    if found is None:
        raise EffiLoRAError(
            "this image carries no parameters of ours: only images generated here do, saved as they are"
        )
    return found


def read_image(path: Path) -> ImageFacts:
    """What a PNG, JPEG, WebP or AVIF says, whichever program has drawn it.

    Raises:
        EffiLoRAError: it is no image, or says nothing that is known here.

    Example:
        >>> facts = read_image(Path("00001-1234.png"))
        >>> request = GenerationRequest.from_parameters(facts.parameters)
    """
    texts, size = _texts(path)
    ours = _ours(texts)
    if ours is not None:
        for key, program in OTHERS.items():
            if key in ours and "num_inference_steps" not in ours:
                raise EffiLoRAError(f"this image's parameters are those of {program}, which are not read here")
        return ImageFacts(ours)
    if theirs := texts.get(THEIRS):
        found = ImageFacts(*_named(parse_infotext(theirs), "A1111"))
    elif texts.get("prompt") or texts.get("workflow"):
        found = ImageFacts(*_named(parse_graph(texts.get("prompt"), texts.get("workflow")), "ComfyUI"))
    else:
        raise EffiLoRAError(
            "this image carries no parameters: they are lost where a program or website saves an image anew"
        )
    return _completed(found, size)


def _named(parsed: tuple[dict[str, Any], list[str]], program: str) -> tuple[dict[str, Any], str, list[str]]:
    return parsed[0], program, parsed[1]


def _completed(found: ImageFacts, size: tuple[int, int]) -> ImageFacts:
    """What a request must have: an image's own size, cut to multiples of 8, and a seed."""
    facts = found.parameters
    if facts["width"] is None or facts["height"] is None:
        facts["width"], facts["height"] = (edge - edge % 8 for edge in size)
    if facts["seed"] is None:
        facts["seed"] = 0
        found.notes.append("the seed, which it does not say")
    return found


def _ours(texts: dict[str, str]) -> dict[str, Any] | None:
    """Our JSON, also where earlier versions wrote it."""
    for name in (OURS, THEIRS):
        text = texts.get(name)
        if not text or (name == THEIRS and text.lstrip()[:1] not in ("{", "[")):
            continue
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            if name == THEIRS:  # a prompt of A1111 may begin so
                continue
            raise EffiLoRAError("this image's parameters are damaged") from error
        if isinstance(found, dict):
            return found
    return None


def _texts(path: Path) -> tuple[dict[str, str], tuple[int, int]]:
    """The texts in an image's header by the names that PNG has for them, and its size in pixels."""
    try:
        if Path(path).stat().st_size > MOST_BYTES:
            raise EffiLoRAError("this file is too large to be an image")
        with Image.open(path, formats=FORMATS) as image:
            texts = {str(key): str(value) for key, value in image.info.items() if isinstance(value, str)}
            return texts if image.format == "PNG" else _exif_texts(image), image.size
    except EffiLoRAError:
        raise
    except Exception as error:  # Pillow raises whatever its parsers of damaged files come upon
        raise EffiLoRAError("this file is no image, or its parameters are damaged") from error


def _exif_texts(image: Image.Image) -> dict[str, str]:
    """The comment of a JPEG or WebP, and the fields in which ComfyUI writes its graphs."""
    exif = image.getexif()
    texts = {}
    comment = exif.get_ifd(EXIF).get(USER_COMMENT)
    if isinstance(comment, bytes):
        texts[THEIRS] = _comment(comment)
    elif isinstance(comment, str):
        texts[THEIRS] = comment
    for number in (MAKE, MODEL):
        name, colon, graph = str(exif.get(number) or "").partition(":")
        if colon and name in ("prompt", "workflow"):
            texts[name] = graph
    return texts


def _comment(content: bytes) -> str:
    """An EXIF comment: eight bytes name its encoding; the byte order of UTF-16 is told by where the zeros are."""
    kind, text = content[:8], content[8:]
    if kind.startswith(b"UNICODE"):
        order = "utf-16-le" if text[1::2].count(0) > text[0::2].count(0) else "utf-16-be"
        return text.decode(order, "replace").strip("\0")
    return (text if kind.startswith((b"ASCII", b"JIS", b"\0")) else content).decode("utf-8", "replace").strip("\0")

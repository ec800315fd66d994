"""What people bring to train on: images, captions and masks in one drop, sorted out, checked and kept."""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from gradio_client.utils import strip_invalid_filename_characters

from .. import EffiLoRAError
from ..core.image_io import ImageError, load_image
from ..diffusion.data.caption_files import CAPTION_SUFFIXES, captions_of, read_caption_files, same_name
from ..diffusion.data.folder import is_mask, mask_stem
from ..diffusion.data.image_check import Copies, ImageCheck, check_image
from .words import clean, plain_words

CAPTION_FILES = (*CAPTION_SUFFIXES, ".csv", ".jsonl")
"""Suffixes of files that are read as captions."""

MAX_IMAGES = 200

THUMBNAIL = 224
"""Longest edge of a card's image, in pixels."""

NAMED = 5
"""Files that are named in one sentence."""

ANYWAY = "Train with these images anyway"


@dataclass(frozen=True)
class Brought:
    """The files of one drop by what they are."""

    images: list[Path] = field(default_factory=list)
    captions: list[Path] = field(default_factory=list)
    masks: list[Path] = field(default_factory=list)


@dataclass(frozen=True)
class Seen:
    """An image as it was found: ``check`` is ``None`` where it can't be read, ``faults`` say why it should not be used."""

    path: Path
    check: ImageCheck | None
    faults: list[str]

    @property
    def name(self) -> str:
        """Its file's name, for people."""
        return clean(self.path.name, 80)


def sort_out(files: Iterable[str] | None) -> Brought:
    """The files of a drop by what they are."""
    found = Brought()
    for path in map(Path, files or ()):
        if path.suffix.lower() in CAPTION_FILES:
            found.captions.append(path)
        elif is_mask(path):
            found.masks.append(path)
        else:
            found.images.append(path)
    return found


def key_of(path: Path) -> str:
    """What a card calls its file by: the page never names a path."""
    return hashlib.sha256(str(path).encode()).hexdigest()[:16]


def look_at(images: Sequence[Path], edge: int = 0) -> list[Seen]:
    """Every image with what is wrong with it, at a training ``edge`` in pixels."""
    copies, found = Copies(), []
    for path in images:
        try:
            check = _check(path, path.stat().st_mtime_ns, edge)
        except ImageError as error:
            found.append(Seen(path, None, [error.reason]))
            continue
        except OSError as error:
            found.append(Seen(path, None, [f"it can't be read ({error.strerror})"]))
            continue
        again = copies.add(path.name, check)
        found.append(Seen(path, check, [*check.faults, *([again] if again else [])]))
    return found


@functools.lru_cache(maxsize=1024)
def _check(path: Path, changed: int, edge: int) -> ImageCheck:
    """:func:`check_image`, once for every file: a form asks often."""
    return check_image(path, edge)


@functools.lru_cache(maxsize=512)
def thumbnail(path: Path, changed: int) -> str:
    """A small copy of an image as an address that holds it, so that nothing has to be served for it."""
    image = load_image(path)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return as_address(image)


def as_address(image: Any) -> str:
    """An image as a ``data:`` address."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def refuse_faulty(seen: Sequence[Seen], anyway: bool, who: str = "") -> None:
    """Raise :class:`EffiLoRAError` for images that training can't use, unless somebody wants them all the same."""
    bad = [one for one in seen if one.faults]
    if anyway or not bad:
        return
    named = "; ".join(f"{one.name}: {one.faults[0]}" for one in bad[:NAMED])
    more = f"; and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
    what = "an image" if len(bad) == 1 else f"{len(bad)} images"
    raise EffiLoRAError(
        f"{who}{what} can't be trained on ({named}{more}): remove or replace "
        f"{'it' if len(bad) == 1 else 'them'}, or tick '{ANYWAY}'"
    )


def check_number(images: Sequence[Path], who: str = "there are") -> None:
    """Raise :class:`EffiLoRAError` for more images than are taken here."""
    if len(images) > MAX_IMAGES:
        raise EffiLoRAError(f"{who} {len(images)} images, {MAX_IMAGES} at most can be taken here")


# -------------------------------------------------------------------------------------------------------------- captions


def read_captions(images: Sequence[Path], files: Sequence[Path]) -> tuple[dict[str, str], list[str]]:
    """The captions in ``files`` by their images' keys, a line for each of several, and what is to be said of the files."""
    said: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file in files:
            if (folder / file.name).exists():
                said.append(f"There are two files named {clean(file.name, 80)}: the last one is used.")
            shutil.copyfile(file, folder / file.name)
        try:
            lists = read_caption_files(folder, sorted(folder.iterdir()))
            beside = {stem: "\n".join(captions_of(path)) for stem, path in lists.sidecars.items()}
        except EffiLoRAError as error:
            return {}, [f"No captions were read: {str(error).replace(f'{folder}/', '')}."]
    said += [f"{clean(path.name, 80)} was not read: {reason}." for path, reason in lists.unread]
    listed = {_listed_name(entry.name): "\n".join(entry.captions) for entry in lists.listed.values()}
    found, used = dict[str, str](), set[str]()
    for path in images:
        names = [same_name(path.stem), _listed_name(path.name)]
        text = beside.get(names[0], listed.get(names[1]))
        used.update(names)
        if text:
            found[key_of(path)] = text
    lost = [path.name for stem, path in lists.sidecars.items() if stem not in used]
    lost += [name for name in listed if name not in used]
    if lost:
        more = f" and {len(lost) - NAMED} more" if len(lost) > NAMED else ""
        said.append(
            f"Captions without an image of that name: {', '.join(clean(one, 80) for one in lost[:NAMED])}{more}."
        )
    return found, said


def _listed_name(name: str) -> str:
    """The name of a file in a list as an upload has it, which is without folders and some letters."""
    return same_name(strip_invalid_filename_characters(PurePosixPath(name).name))


def captions_in(cards: Any) -> dict[str, str]:
    """The captions that stand in the cards, by key; what else the page may send counts for nothing."""
    rows = [one for one in cards if isinstance(one, Mapping)] if isinstance(cards, list) else []
    return {str(one.get("key")): str(one.get("caption") or "").strip() for one in rows}


# --------------------------------------------------------------------------------------------------------------- keeping


def keep(brought: Brought, cards: Any, folder: Path, painted: Path | None = None) -> None:
    """Copy images, their captions in the ``cards`` and their masks into a data set, replacing what is there.

    ``painted`` is a folder of masks named by the hash of their image; a mask that was brought goes before them.
    """
    captions = captions_in(cards)
    own = {mask_stem(path): path for path in brought.masks}
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=".images-", dir=folder.parent))
    try:
        for index, file in enumerate(brought.images):
            target = fresh / f"{index:03d}-{file.name[-60:]}"
            shutil.copyfile(file, target)
            if captions.get(key_of(file)):
                target.with_suffix(".txt").write_text(captions[key_of(file)], encoding="utf-8")
            mask = own.get(file.stem) or (painted and painted_mask(file, painted))
            if mask and mask.is_file():
                shutil.copyfile(mask, target.with_name(f"{target.stem}.mask{mask.suffix}"))
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


def painted_mask(image: Path, painted: Path) -> Path:
    """Where the mask lies that was painted for an image, if there is one."""
    return painted / f"{hashlib.sha256(image.read_bytes()).hexdigest()}.png"


def lost_masks(brought: Brought) -> list[str]:
    """What is to be said of masks without an image."""
    stems = {path.stem for path in brought.images}
    lost = [path.name for path in brought.masks if mask_stem(path) not in stems]
    return (
        [f"Masks without an image of that name: {', '.join(clean(name, 80) for name in lost[:NAMED])}."]
        if lost
        else []
    )


def words_for_page(lines: Iterable[str]) -> str:
    """Lines for Markdown, as text and nothing else."""
    return "  \n".join(plain_words(line, 400) for line in lines)

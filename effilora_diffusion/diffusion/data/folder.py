"""Turn a folder of images into a checked list of training examples before the first step."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from ...core.errors import EffiLoRAError
from ...core.image_io import ImageError, glance_at_image, load_image
from ...core.text_io import printable
from ..caption_options import PLAIN, CaptionStyle
from .caption_files import (
    CAPTION_SUFFIXES,
    METADATA_NAME,
    CaptionFiles,
    Listed,
    captions_of,
    read_caption_files,
    same_name,
)
from .image_check import Copies, ImageCheck, check_image, size_faults
from .images import prepare_image

__all__ = [
    "METADATA_NAME",
    "Example",
    "ImageError",
    "Problem",
    "is_unrelated",
    "load_image",
    "prepare_image",
    "report_problems",
    "scan_images",
]

MOST_DECODED = 1000
"""Of more images only the headers and ends are looked at before training."""

MOST_REPEATS = 1000
"""A larger number in front of a folder's name is a year, or a mistake."""

LISTED = 20
"""Remarks of one kind that are told one by one."""

MASK_ENDINGS = (".mask", "-masklabel")
"""How the name of a mask beside its image ends, before the suffix."""

OF_A_FOLDER = "the name of the folder"
"""How the source of a caption begins that is the name of an image's folder."""

_UNRELATED_NAMES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx"}
_UNRELATED_SUFFIXES = {
    *(".txt", ".caption", ".csv", ".md", ".json", ".jsonl", ".yaml", ".yml", ".toml"),
    *(".py", ".log", ".safetensors", ".npz"),
}
_REPEATED = re.compile(r"(\d+)_(.*)", re.DOTALL)
"""sd-scripts' names of folders, as ``10_sks dog``."""


@dataclass(frozen=True)
class Problem:
    """One finding about a file in the image folder.

    ``reason`` is a phrase for the user. With ``fatal`` the file is left out of training; otherwise it is only a note.
    """

    path: Path
    reason: str
    fatal: bool


@dataclass(frozen=True, slots=True)
class Example:
    """One image to train on, with its caption.

    ``sha256`` is the hex digest of the file's bytes, ``size`` the width and height in pixels after EXIF rotation, ``source``
    where the caption stands, "" for the default one, and ``concept`` the name of its subject where a run has several.
    ``others`` are further captions, of which one is drawn for every row, ``repeats`` how often an epoch has the image,
    ``style`` what is done to its captions, and ``triggers`` words that this keeps. ``mask`` is the file that says which parts
    count, with its hash, where masks are used, ``resolution`` that of the image where it is not the run's.
    """

    path: Path
    caption: str
    sha256: str
    size: tuple[int, int]
    source: str = ""
    concept: str = ""
    others: tuple[str, ...] = ()
    repeats: int = 1
    style: CaptionStyle = PLAIN
    triggers: tuple[str, ...] = ()
    mask: Path | None = None
    mask_sha256: str = ""
    resolution: int = 0

    @property
    def captions(self) -> tuple[str, ...]:
        """All captions of the image."""
        return (self.caption, *self.others)


@dataclass(frozen=True)
class _Folder:
    """A folder with its ``files``, its path ``name`` in the chosen one, and what its own name asks for."""

    path: Path
    name: str
    files: list[Path]
    captions: CaptionFiles
    repeats: int
    tokens: str
    named: str


def scan_images(
    folder: Path, default_caption: str | None, caption_extension: str | None = None, edge: int = 0
) -> tuple[list[Example], list[Problem]]:
    """Look at every image in a folder and its sub-folders once and pair it with its captions.

    Captions come from ``name.txt`` or ``name.caption`` beside the image (each line is one), else from ``metadata.jsonl``,
    ``metadata.csv`` or another CSV file in its folder or one above, else from sd-scripts' name of its folder
    (``10_sks dog``: ten times per epoch, as "sks dog"), else it is ``default_caption``. Hidden files and plainly unrelated
    ones are passed over; every other file that is not a usable image becomes a fatal `Problem`. Examples and problems are
    sorted by path. Up to ``MOST_DECODED`` images are decoded, of more only the headers are read.

    Args:
        folder: the folder.
        default_caption: of images without one.
        caption_extension: suffix of the files with one image's captions, instead of both.
        edge: of the training images in pixels, for notes on images that are too small for it; 0: not known.

    Raises:
        EffiLoRAError: the folder is missing, empty or without a usable image, a caption source cannot be read, or an
            image has no caption at all.
    """
    folder = Path(folder)
    folders = _walk(folder, caption_extension)
    lists = {one.name: one.captions for one in folders}
    candidates = [(path, one) for one in folders for path in one.files if not is_unrelated(path)]
    if not candidates:
        raise EffiLoRAError(f"the image folder '{printable(folder)}' holds no images; put PNG or JPEG files there")
    candidates.sort(key=lambda pair: pair[0].parts)

    examples: list[Example] = []
    problems = _unmatched(folders)
    copies = Copies()
    for path, home in candidates:
        try:
            found = _inspect(path, len(candidates) > MOST_DECODED, edge)
        except ImageError as error:
            problems.append(Problem(path, error.reason, fatal=True))
            continue
        captions, source, remark = _captions(path, home, lists, default_caption)
        again = copies.add(str(path.relative_to(folder)), found)
        said = (*found.remarks, *found.faults, again, remark)
        problems += [Problem(path, reason, fatal=False) for reason in said if reason]
        examples.append(
            Example(path, captions[0], found.sha256, found.size, source, others=captions[1:], repeats=home.repeats)
        )
    problems.sort(key=lambda problem: problem.path.parts)
    if not examples:
        raise EffiLoRAError(_nothing_left(folder, problems))
    return examples, problems


def report_problems(problems: list[Problem], folder: Path | None = None) -> str:
    """Return one line for each problem, ``skipped  name: reason`` or ``note  name: reason``; "" for none.

    Names are paths in ``folder``. Of more than ``LISTED`` of one kind the first are told, and how many there are.
    """
    kinds: dict[tuple[bool, str], int] = {}
    lines = []
    for problem in problems:
        kind = (problem.fatal, re.sub(r"'.*'|\d+", "", problem.reason))
        kinds[kind] = kinds.get(kind, 0) + 1
        if kinds[kind] <= LISTED:
            inside = folder is not None and problem.path.is_relative_to(folder)
            name = problem.path.relative_to(folder) if inside and folder is not None else problem.path.name
            lines.append(f"{'skipped' if problem.fatal else 'note'}  {printable(name)}: {problem.reason}")
    for (fatal, reason), count in kinds.items():
        if count > LISTED:
            lines.append(f"{'skipped' if fatal else 'note'}  {count - LISTED:,} more: {' '.join(reason.split())}")
    return "\n".join(lines)


def is_unrelated(path: Path) -> bool:
    """Whether a file is plainly no image and needs no word: captions, notes, masks, a system's litter."""
    return is_mask(path) or path.name.casefold() in _UNRELATED_NAMES or path.suffix.lower() in _UNRELATED_SUFFIXES


def is_mask(path: Path) -> bool:
    """Whether a file is named as the mask of an image beside it."""
    return path.stem.casefold().endswith(MASK_ENDINGS)


def mask_stem(path: Path) -> str:
    """The stem of the image that a mask is named after."""
    stem = path.stem
    for ending in MASK_ENDINGS:
        stem = stem[: -len(ending)] if stem.lower().endswith(ending) else stem
    return stem


def _walk(root: Path, suffix: str | None) -> list[_Folder]:
    """The chosen folder and those in it, with their caption files read."""
    found: list[_Folder] = []
    seen: set[str] = set()  # a link may lead back to a folder above

    def visit(path: Path, name: str, repeats: int, tokens: str, named: str) -> None:
        real = os.path.realpath(path)
        if real in seen:
            return
        seen.add(real)
        entries = _list_folder(path)
        inner = [entry for entry in entries if entry.is_dir()]
        files = sorted(set(entries) - set(inner), key=lambda entry: entry.name)
        found.append(_Folder(path, name, files, read_caption_files(path, entries, suffix), repeats, tokens, named))
        for entry in inner:
            if not is_unrelated(entry):
                visit(entry, f"{name}{entry.name}/", *_asked(entry, repeats, tokens, named))

    visit(root, "", 1, "", "")
    return found


def _asked(folder: Path, repeats: int, tokens: str, named: str) -> tuple[int, str, str]:
    """Repeats and caption of the images in a folder by its name, and the name; else those of the folder above."""
    match = _REPEATED.fullmatch(folder.name)
    if match is None:
        return repeats, tokens, named
    if not 1 <= int(match[1]) <= MOST_REPEATS:
        raise EffiLoRAError(
            f"the name of the folder '{printable(folder)}' asks for {int(match[1])} repeats of its images, as in sd-scripts; "
            f"1 to {MOST_REPEATS} are possible: rename it"
        )
    return int(match[1]), match[2].strip() or tokens, folder.name


def _list_folder(folder: Path) -> list[Path]:
    """Return what the folder holds, hidden entries left out, sorted by name."""
    shown = printable(folder)
    if not folder.exists():
        raise EffiLoRAError(f"the image folder '{shown}' does not exist; give the folder that holds your images")
    if not folder.is_dir():
        raise EffiLoRAError(f"'{shown}' is a file, not a folder; give the folder that holds your images")
    try:
        entries = sorted(folder.iterdir(), key=lambda path: path.name)
    except OSError as error:
        raise EffiLoRAError(f"cannot list the image folder '{shown}': {error.strerror}; check its rights") from error
    return [path for path in entries if not path.name.startswith(".")]


def _inspect(path: Path, quick: bool, edge: int) -> ImageCheck:
    """What is to be said of an image; decode it unless ``quick``."""
    if quick and (found := glance_at_image(path)) is not None:
        size, remarks, digest = found
        faults = size_faults(size, edge)
        return ImageCheck(size, [] if faults else remarks, faults, digest)
    return check_image(path, edge)


def _captions(
    image: Path, home: _Folder, lists: dict[str, CaptionFiles], default: str | None
) -> tuple[tuple[str, ...], str, str | None]:
    """Return an image's captions, where they stand, and a remark where another stands in for an empty one."""
    source, captions = "", tuple[str, ...]()
    sidecar, entry = home.captions.sidecars.get(same_name(image.stem)), _entry(image, home, lists)
    if sidecar is not None:
        source, captions = f"'{printable(sidecar.name)}'", captions_of(sidecar)
    elif entry is not None:
        source, captions = entry.where, entry.captions
    if captions:
        return captions, source, None
    empty = f"the caption in {source} is empty, so the {'name of its folder' if home.tokens else 'default'} is used"
    if home.tokens:
        return (home.tokens,), f"{OF_A_FOLDER} '{printable(home.named)}'", empty if source else None
    if default is None:
        gap = (
            f"{source} is empty" if source else f"there is no '{printable(image.stem)}{CAPTION_SUFFIXES[0]}' beside it"
        )
        where = printable(image)
        raise EffiLoRAError(f"the image '{where}' has no caption: {gap}; write one there or give a default prompt")
    return (default,), "", empty if source else None


def _entry(image: Path, home: _Folder, lists: dict[str, CaptionFiles]) -> Listed | None:
    """What lists of captions say of an image: that in its own folder, else the next one above."""
    name = home.name
    while True:
        entry = lists[name].listed.get(same_name(f"{home.name}{image.name}"[len(name) :]))
        if entry is not None or not name:
            return entry
        name = name[: name.rstrip("/").rfind("/") + 1]


def _unmatched(folders: list[_Folder]) -> list[Problem]:
    """Note captions that belong to no image: mostly a misspelt name, and then that image gets the default."""
    problems: list[Problem] = []
    filled = [one.name for one in folders if not all(map(is_unrelated, one.files))]
    images = {same_name(one.name + path.name) for one in folders for path in one.files if not is_unrelated(path)}
    for one in folders:
        problems += [
            Problem(one.path / entry.name, f"{entry.where} names '{printable(entry.name)}', which is not here", False)
            for key, entry in one.captions.listed.items()
            if same_name(one.name) + key not in images
        ]
        problems += [Problem(path, reason, True) for path, reason in one.captions.unread]
        stems = {same_name(path.stem) for path in one.files if not is_unrelated(path)}
        reason = "it is no image's caption: no image here has this name"
        problems += [Problem(path, reason, False) for stem, path in one.captions.sidecars.items() if stem not in stems]
        if one.name and not any(name.startswith(one.name) for name in filled):
            problems.append(Problem(one.path, "it is a folder without images", False))
    return problems


def _nothing_left(folder: Path, problems: list[Problem]) -> str:
    bad = [problem for problem in problems if problem.fatal]
    reasons = "; ".join(f"{printable(problem.path.name)}: {problem.reason}" for problem in bad[:3])
    more = f"; and {len(bad) - 3} more" if len(bad) > 3 else ""
    return f"none of the {len(bad)} files in '{printable(folder)}' is a usable image ({reasons}{more})"

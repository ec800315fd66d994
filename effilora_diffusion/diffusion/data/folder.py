"""Turn a folder of images into a checked list of training examples before the first step."""

import hashlib
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from ...core.errors import EffiLoRAError
from ...core.image_io import ImageError, inspect_image, load_image
from ...core.text_io import parse_json, printable, read_user_text
from .images import prepare_image

__all__ = [
    "Example",
    "ImageError",
    "Problem",
    "is_unrelated",
    "load_image",
    "prepare_image",
    "report_problems",
    "scan_images",
]

METADATA_NAME = "metadata.jsonl"
CAPTION_LIMIT = 1 << 20
METADATA_LIMIT = 64 << 20
"""Bytes: a caption of a megabyte is no caption, and 64 of them are the captions of a hundred thousand images."""
_CAPTION_KEYS = ("text", "caption", "prompt")
_UNRELATED_NAMES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx"}
_UNRELATED_SUFFIXES = {".txt", ".md", ".json", ".jsonl", ".yaml", ".yml", ".toml", ".py", ".log", ".safetensors"}
# Other trainers read captions from these; passing over them in silence would train on the wrong words.
_FOREIGN_CAPTIONS = {".caption", ".csv"}


@dataclass(frozen=True)
class Problem:
    """One finding about a file in the image folder.

    ``reason`` is a phrase for the user. With ``fatal`` the file is left out of training; otherwise it is only a note.
    """

    path: Path
    reason: str
    fatal: bool


@dataclass(frozen=True)
class Example:
    """One image to train on, with its caption.

    ``sha256`` is the hex digest of the file's bytes, ``size`` the width and height in pixels after EXIF rotation, ``source``
    where the caption stands, "" for the default one, and ``concept`` the name of its subject where a run has several.
    """

    path: Path
    caption: str
    sha256: str
    size: tuple[int, int]
    source: str = ""
    concept: str = ""


@dataclass(frozen=True)
class _Listed:
    """One entry of metadata.jsonl; ``caption`` is "" where it gives none."""

    name: str
    caption: str
    line: int


def scan_images(folder: Path, default_caption: str | None) -> tuple[list[Example], list[Problem]]:
    """Decode every image directly in a folder once and pair it with its caption.

    A caption comes from ``name.txt`` beside the image, else from the folder's ``metadata.jsonl``, else it is
    ``default_caption``. Hidden files and plainly unrelated ones are passed over; every other file that is not a usable
    image becomes a fatal `Problem`. Examples and problems are sorted by file name.

    Raises:
        EffiLoRAError: the folder is missing, empty or without a usable image, a caption source cannot be read, or a
            image has no caption at all.
    """
    folder = Path(folder)
    files = _list_folder(folder)
    sidecars = {_key(file.stem): file for file in files if file.suffix.lower() == ".txt"}
    candidates = [file for file in files if not is_unrelated(file)]
    if not candidates:
        raise EffiLoRAError(f"the image folder '{printable(folder)}' holds no images; put PNG or JPEG files there")
    listed = _read_metadata(folder / METADATA_NAME)

    examples: list[Example] = []
    problems = _unmatched(folder, candidates, sidecars, listed)
    first_with: dict[str, Path] = {}
    for path in candidates:
        try:
            size, remarks, digest = _inspect(path)
        except ImageError as error:
            problems.append(Problem(path, error.reason, fatal=True))
            continue
        caption, source, remark = _caption(
            path, sidecars.get(_key(path.stem)), listed.get(_key(path.name)), default_caption
        )
        first = first_with.setdefault(digest, path)
        if first is not path:
            remarks.append(f"the same file as '{printable(first.name)}', so it counts twice")
        remarks += [remark] if remark else []
        problems += [Problem(path, reason, fatal=False) for reason in remarks]
        examples.append(Example(path, caption, digest, size, source))
    problems.sort(key=lambda problem: problem.path.name)
    if not examples:
        raise EffiLoRAError(_nothing_left(folder, problems))
    return examples, problems


def report_problems(problems: list[Problem]) -> str:
    """Return one line for each problem, ``skipped  name: reason`` or ``note  name: reason``; "" for none."""
    return "\n".join(
        f"{'skipped' if problem.fatal else 'note'}  {printable(problem.path.name)}: {problem.reason}"
        for problem in problems
    )


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


def is_unrelated(path: Path) -> bool:
    """Whether a file is plainly no image and needs no word: captions, notes, a system's litter."""
    return path.name.casefold() in _UNRELATED_NAMES or path.suffix.lower() in _UNRELATED_SUFFIXES


def _key(name: str) -> str:
    """Return a name in one Unicode form, as macOS may spell a letter with its accent apart."""
    return unicodedata.normalize("NFC", name)


def _inspect(path: Path) -> tuple[tuple[int, int], list[str], str]:
    """Decode an image fully; return its size in pixels, remarks on it, and the SHA-256 of the file"""
    if path.suffix.lower() in _FOREIGN_CAPTIONS:
        raise ImageError(path, f"captions are read only from .txt files and {METADATA_NAME}")
    size, remarks = inspect_image(path)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return size, remarks, digest.hexdigest()


def _caption(
    image: Path, sidecar: Path | None, entry: _Listed | None, default: str | None
) -> tuple[str, str, str | None]:
    """Return an image's caption, where it stands, and a remark where the default stands in for an empty one."""
    source = ""
    if sidecar is not None:
        source, caption = f"'{printable(sidecar.name)}'", _read_text(sidecar, CAPTION_LIMIT).strip()
    elif entry is not None:
        source, caption = f"line {entry.line} of {METADATA_NAME}", entry.caption
    if source and caption:
        return caption, source, None
    if default is None:
        gap = f"{source} is empty" if source else f"there is no '{printable(image.stem)}.txt' beside it"
        where = printable(image)
        raise EffiLoRAError(f"the image '{where}' has no caption: {gap}; write one there or give a default prompt")
    return default, "", f"the caption in {source} is empty, so the default is used" if source else None


def _read_text(path: Path, limit: int) -> str:
    return read_user_text(path, limit, f"the caption file '{path}'")


def _read_metadata(path: Path) -> dict[str, _Listed]:
    """Read Hugging Face ImageFolder metadata, one JSON object a line; {} where the file is missing"""
    found: dict[str, _Listed] = {}
    if not path.is_symlink() and not path.exists():
        return found
    # Only "\n" ends a line: str.splitlines would also cut at U+2028, which JSON allows inside a string.
    for line, text in enumerate(_read_text(path, METADATA_LIMIT).split("\n"), start=1):
        if not text.strip():
            continue
        entry = _parse_entry(text, line, f"line {line} of '{printable(path)}'")
        earlier = found.setdefault(_key(entry.name), entry)
        if earlier.caption != entry.caption:
            name = printable(entry.name)
            raise EffiLoRAError(
                f"lines {earlier.line} and {line} of '{printable(path)}' give '{name}' two captions; keep one of them"
            )
    return found


def _parse_entry(text: str, line: int, where: str) -> _Listed:
    try:
        entry = parse_json(text)
    except EffiLoRAError as error:
        raise EffiLoRAError(f"{where} is not valid JSON ({error}); write one JSON object a line") from error
    if not isinstance(entry, dict):
        raise EffiLoRAError(f'{where} is not a JSON object; write one like {{"file_name": ..., "text": ...}}.')
    name = entry.get("file_name")
    if not isinstance(name, str) or not name:
        raise EffiLoRAError(f'{where} has no "file_name"; name the image there.')
    caption = next((entry[key] for key in _CAPTION_KEYS if not _is_blank(entry.get(key))), "")
    # A lone surrogate such as "\ud800" is valid JSON, but no tokenizer can encode it.
    if not isinstance(caption, str) or any("\ud800" <= character <= "\udfff" for character in caption):
        raise EffiLoRAError(f"{where} has a caption that is not text; put it in double quotes")
    return _Listed(name.removeprefix("./"), caption.strip(), line)


def _is_blank(caption: object) -> bool:
    return caption is None or (isinstance(caption, str) and not caption.strip())


def _unmatched(
    folder: Path, candidates: list[Path], sidecars: dict[str, Path], listed: dict[str, _Listed]
) -> list[Problem]:
    """Note captions that belong to no image: mostly a misspelt name, and then that image gets the default."""
    names = {_key(path.name) for path in candidates}
    stems = {_key(path.stem) for path in candidates}
    problems = [
        Problem(
            folder / entry.name,
            f"line {entry.line} of {METADATA_NAME} names '{printable(entry.name)}', which is not here",
            False,
        )
        for key, entry in listed.items()
        if key not in names
    ]
    reason = "it is no image's caption: no image here has this name"
    return problems + [Problem(path, reason, False) for stem, path in sidecars.items() if stem not in stems]


def _nothing_left(folder: Path, problems: list[Problem]) -> str:
    bad = [problem for problem in problems if problem.fatal]
    reasons = "; ".join(f"{printable(problem.path.name)}: {problem.reason}" for problem in bad[:3])
    more = f"; and {len(bad) - 3} more" if len(bad) > 3 else ""
    return f"none of the {len(bad)} files in '{printable(folder)}' is a usable image ({reasons}{more})"

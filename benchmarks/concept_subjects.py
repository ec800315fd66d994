"""Six subjects that the embedded base has never seen, nine pictures of each: five to learn from, four to be judged by.

Cats of Twemoji (shipped), cats and people of ``@lobehub/fluent-emoji-3d`` (MIT, fetched with ``npm pack``), and three
characters that are drawn here. All on white, 64 x 64 pixels.
"""

from __future__ import annotations

import hashlib
import subprocess
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from effilora_diffusion.core.assets import asset
from effilora_diffusion.core.errors import EffiLoRAError

SIZE, FINE = 64, 256
"""Edges of the pictures, and of what they are scaled down from, in pixels."""
TRAINED = 5

PACKAGE = ("@lobehub/fluent-emoji-3d", "1.1.0")
CHECKSUM = (
    "5a5ab69554ad4e7afc043a48274a449d328ee0bb83c71a931214ef46d0f50cb4"
    "45d267bba207914232a87a10c75ee549d9069e720979c1106feb4954006de1ee"
)
CATS_3D = ("1f63a", "1f639", "1f640", "1f63d", "1f63e", "1f638", "1f63b", "1f63c", "1f63f")
PEOPLE_3D = ("1f645", "1f64b", "1f64d", "1f926", "1f481", "1f646", "1f64e", "1f937", "1f647")


@dataclass(frozen=True)
class Subject:
    """One subject: its ``trigger``, and what it is (``noun``)."""

    name: str
    trigger: str
    noun: str

    @property
    def prompt(self) -> str:
        """The prompt that it is learned by and drawn with."""
        return f"an emoji of {self.trigger} {self.noun}"


SUBJECTS = (
    Subject("flat-cat", "sks", "cat"),
    Subject("round-cat", "zwx", "cat"),
    Subject("person", "ohwx", "person"),
    Subject("robot", "kbq", "robot"),
    Subject("ghost", "vlt", "ghost"),
    Subject("bird", "mzn", "bird"),
)

EYES = ("open", "wide", "left", "right", "closed")
MOUTHS = ("smile", "line", "round", "frown")


def build(work: Path, subjects: Sequence[Subject] = SUBJECTS) -> dict[str, tuple[Path, Path]]:
    """Write the pictures of every subject where they are missing; returns the folders to learn from and to be judged by."""
    found = {}
    for subject in subjects:
        folders = work / subject.name / "train", work / subject.name / "held_out"
        if not all(folder.is_dir() for folder in folders):
            pictures = _pictures(subject.name, work)
            for folder, part in zip(folders, (pictures[:TRAINED], pictures[TRAINED:]), strict=True):
                folder.mkdir(parents=True, exist_ok=True)
                for number, picture in enumerate(part):
                    picture.save(folder / f"{number}.png")
        found[subject.name] = folders
    return found


def _pictures(name: str, work: Path) -> list[Image.Image]:
    if name == "flat-cat":
        folders = asset("example_subject"), Path(__file__).parent / "held_out_subject"
        return [Image.open(path).convert("RGB") for folder in folders for path in sorted(folder.glob("*.png"))]
    if name in ("round-cat", "person"):
        icons = _fetch(work) / "assets"
        return [
            _on_white(Image.open(icons / f"{code}.webp")) for code in (CATS_3D if name == "round-cat" else PEOPLE_3D)
        ]
    return [_drawn(name, number) for number in range(9)]


def _fetch(work: Path) -> Path:
    """The unpacked package; raises :class:`EffiLoRAError` if it is not the pinned one."""
    folder = work / "fluent-emoji-3d"
    if folder.is_dir():
        return folder / "package"
    work.mkdir(parents=True, exist_ok=True)
    command = ["npm", "pack", "--silent", "@".join(PACKAGE)]
    packed = subprocess.run(command, cwd=work, check=True, capture_output=True, text=True)
    archive = work / packed.stdout.strip().splitlines()[-1]
    if hashlib.sha512(archive.read_bytes()).hexdigest() != CHECKSUM:
        raise EffiLoRAError(f"{archive} is not the pinned {'@'.join(PACKAGE)}: delete it, and fetch it again")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / "package"


def _on_white(picture: Image.Image) -> Image.Image:
    picture = picture.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    white.alpha_composite(picture)
    return white.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def _drawn(name: str, number: int) -> Image.Image:
    """One of the drawn characters with the ``number``-th expression and pose."""
    canvas = Image.new("RGB", (FINE, FINE), "white")
    pen = ImageDraw.Draw(canvas)
    eyes, mouth, lift = EYES[number % 5], MOUTHS[(number // 2 + number) % 4], (number * 7) % 5 * 9
    {"robot": _robot, "ghost": _ghost, "bird": _bird}[name](pen, lift)
    for x in (100, 156):
        _eye(pen, x, 112, eyes)
    if name != "bird":
        _mouth(pen, 128, 156, mouth)
    return canvas.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def _robot(pen: ImageDraw.ImageDraw, lift: int) -> None:
    """A teal box with an orange antenna and arms."""
    pen.line((128, 60, 128, 26), fill=(230, 120, 20), width=8)
    pen.ellipse((116, 10, 140, 34), fill=(230, 120, 20))
    for side in (-1, 1):
        pen.line((128 + side * 74, 170, 128 + side * 112, 190 - 2 * lift), fill=(230, 120, 20), width=14)
    pen.rounded_rectangle((56, 56, 200, 236), 26, fill=(20, 150, 150), outline=(10, 80, 90), width=8)
    pen.rounded_rectangle((76, 82, 180, 178), 16, fill=(205, 240, 235))


def _ghost(pen: ImageDraw.ImageDraw, lift: int) -> None:
    """A lilac ghost with a wavy hem, striped like a sweater."""
    pen.pieslice((56, 24, 200, 168), 180, 360, fill=(190, 150, 235))
    pen.rectangle((56, 96, 200, 210), fill=(190, 150, 235))
    for x in range(56, 200, 48):
        pen.ellipse((x, 186, x + 48, 234), fill=(190, 150, 235))
    pen.rectangle((56, 188, 200, 204), fill=(110, 60, 170))
    for side in (-1, 1):
        pen.ellipse((118 + side * 80, 150 - lift, 138 + side * 80, 190 - lift), fill=(190, 150, 235))


def _bird(pen: ImageDraw.ImageDraw, lift: int) -> None:
    """A round lime bird with a red crest, a yellow beak and blue wings."""
    pen.polygon(((104, 60), (96, 8), (124, 36), (136, 4), (142, 40), (166, 14), (152, 62)), fill=(215, 30, 40))
    pen.ellipse((48, 44, 208, 220), fill=(150, 205, 40), outline=(80, 130, 20), width=6)
    for side in (-1, 1):
        pen.ellipse((128 + side * 84 - 22, 120 - lift, 128 + side * 84 + 22, 190 - lift), fill=(40, 90, 210))
    pen.polygon(((112, 134), (144, 134), (128, 166 + lift // 3)), fill=(250, 190, 20))
    for x in (104, 152):
        pen.line((x, 216, x, 246), fill=(250, 150, 20), width=8)


def _eye(pen: ImageDraw.ImageDraw, x: int, y: int, kind: str) -> None:
    size = 20 if kind == "wide" else 14
    if kind == "closed":
        pen.arc((x - 14, y - 10, x + 14, y + 14), 180, 360, fill=(20, 20, 30), width=7)
        return
    shift = {"left": -5, "right": 5}.get(kind, 0)
    pen.ellipse((x - size, y - size, x + size, y + size), fill="white", outline=(20, 20, 30), width=4)
    pen.ellipse((x - 7 + shift, y - 7, x + 7 + shift, y + 7), fill=(20, 20, 30))


def _mouth(pen: ImageDraw.ImageDraw, x: int, y: int, kind: str) -> None:
    if kind == "round":
        pen.ellipse((x - 12, y - 10, x + 12, y + 14), fill=(20, 20, 30))
    elif kind == "line":
        pen.line((x - 20, y, x + 20, y), fill=(20, 20, 30), width=7)
    else:
        angles = (0, 180) if kind == "smile" else (180, 360)
        pen.arc((x - 22, y - 14, x + 22, y + 14), *angles, fill=(20, 20, 30), width=7)

"""Emoji art from pinned npm packages: which icons, how they are drawn, and what they are called.

Sources and licences are listed in ``NOTICE`` beside the weights. Never trained on: the cat family of Twemoji (the
example subject), and every fifth concept outside ``concepts.txt`` (on which the autoencoder is judged).
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import random
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 64
"""Edge of every picture, in pixels."""

PACKAGES = {
    "noto": ("@iconify-json/noto", "1.2.9"),
    "twemoji": ("@iconify-json/twemoji", "1.2.5"),
    "fluent": ("@iconify-json/fluent-emoji-flat", "1.2.6"),
    "labels": ("emojibase-data", "17.0.0"),
}
STYLES = ("noto", "twemoji", "fluent")

BACKGROUNDS = {
    "white": (255, 255, 255),
    "black": (24, 24, 24),
    "gray": (128, 128, 128),
    "red": (222, 49, 54),
    "orange": (245, 140, 30),
    "yellow": (250, 218, 70),
    "green": (72, 165, 80),
    "blue": (52, 106, 214),
    "purple": (130, 70, 180),
    "pink": (246, 150, 190),
}

SUBJECT_TRAIN = ("grinning cat", "cat with tears of joy", "weary cat", "kissing cat", "pouting cat")
SUBJECT_HELD_OUT = (
    "grinning cat with smiling eyes",
    "smiling cat with heart-eyes",
    "cat with wry smile",
    "crying cat",
)

CHECKSUMS = {
    "noto": "0d08ae5c435bba7e35721f973d2579e47f456962a91d3cb3e3a6082ad49a2980f87c80c3ccbd6d47a1f89e9fd3dfc8dfad301e237adc285d26a8761e65502e6b",
    "twemoji": "b8aa6e204574bfa2b9056dcc8ddca5f972855406db70fc408227cabc432d668519079f98898e7368c9b6b8d342c725f301653dc8d2e58f8d5653afe6be000bb3",
    "fluent": "458e3b4603dbe3b7d8522cab03ae2c20e2f4f94534dacdbdb17a4d05b2104415253e57cd1532949990c4446bb10ecffbc8d196a9062fb9a4983353387d15e553",
    "labels": "62f81be405a81d588757f82ad6aaf96406ab7018a9f81dbbfd92d1b142646e000468b959fdfa1ff60f3cd8b4e9984a728413440b49b6484988b658c7b13ca08c",
}


@dataclass(frozen=True)
class Icon:
    """One drawing of one concept: ``style`` says by whom, ``label`` and ``tags`` what it shows."""

    style: str
    label: str
    tags: tuple[str, ...]
    svg: str

    @property
    def held_out(self) -> bool:
        """Whether the base must never be trained on this icon."""
        return self.style == "twemoji" and "cat" in self.label.replace("-", " ").split()

    def render(self, size: int = SIZE) -> np.ndarray:
        """Draw the icon: ``(size, size, 4)`` uint8 RGBA, alpha not premultiplied."""
        import resvg_py

        drawn = resvg_py.svg_to_bytes(svg_string=self.svg, width=size, height=size)
        data = base64.b64decode(drawn) if isinstance(drawn, str) else bytes(drawn)
        image = Image.open(io.BytesIO(data)).convert("RGBA")
        if image.size != (size, size):  # an icon that is not square is centred, never stretched
            canvas = Image.new("RGBA", (size, size))
            canvas.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
            image = canvas
        return np.asarray(image)


def fetch(name: str, cache: Path) -> Path:
    """Download one pinned package with ``npm pack``, check its SHA-512, unpack it; return its folder."""
    return fetch_package(name, *PACKAGES[name], CHECKSUMS[name], cache)


def fetch_package(name: str, package: str, version: str, checksum: str, cache: Path) -> Path:
    """:func:`fetch` of any package of npm's registry, kept in the cache as ``name``."""
    folder = cache / f"{name}-{version}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    packed = subprocess.run(
        ["npm", "pack", "--silent", f"{package}@{version}"], cwd=cache, check=True, capture_output=True, text=True
    )
    archive = cache / packed.stdout.strip().splitlines()[-1]
    digest = hashlib.sha512(archive.read_bytes()).hexdigest()
    if digest != checksum:
        raise SystemExit(f"{package}@{version} has SHA-512 {digest[:16]}…, expected {checksum[:16]}…")
    with tarfile.open(archive) as tar:
        tar.extractall(cache / f"{name}.tmp", filter="data")
    (cache / f"{name}.tmp" / "package").rename(folder)
    return folder


def load_icons(cache: Path) -> list[Icon]:
    """Every icon of the three styles that emojibase names, without flags, people and skin tones."""
    entries = json.loads((fetch("labels", cache) / "en" / "data.json").read_text())
    icons = []
    for style in STYLES:
        folder = fetch(style, cache)
        names = json.loads((folder / "chars.json").read_text())
        data = json.loads((folder / "icons.json").read_text())
        width, height = data.get("width", 16), data.get("height", 16)
        for entry in entries:
            if entry.get("group") in (None, 1, 2, 9):  # people, components (skin tones), flags
                continue
            code = entry["hexcode"].lower()
            name = names.get(code) or names.get(code.replace("-fe0f", ""))
            icon = data["icons"].get(name) if name else None
            if icon is None:
                continue
            box = f"0 0 {icon.get('width', width)} {icon.get('height', height)}"
            svg = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box}">{icon["body"]}</svg>'
            icons.append(Icon(style, entry["label"], tuple(entry.get("tags", ())), svg))
    return icons


def concepts() -> list[str]:
    """The labels of ``concepts.txt``, in file order."""
    lines = (Path(__file__).parent / "concepts.txt").read_text().splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def judged_concepts() -> list[str]:
    """The 100 concepts on which "text is obeyed" is measured: a fixed draw that leaves the cats out."""
    others = [label for label in concepts() if "cat" not in label.split()]
    return sorted(random.Random(0).sample(others, 100))


def base_icons(icons: list[Icon]) -> list[Icon]:
    """The icons whose pictures and captions train the text-to-image model."""
    wanted = set(concepts())
    chosen = [icon for icon in icons if icon.label in wanted and not icon.held_out]
    missing = wanted - {icon.label for icon in chosen}
    if missing:
        raise SystemExit(f"concepts without an icon: {sorted(missing)}")
    return chosen


def autoencoder_split(icons: list[Icon]) -> tuple[list[Icon], list[Icon]]:
    """Icons that train the autoencoder, and held-out ones (other concepts) that judge it."""
    base = set(concepts())
    others = sorted({icon.label for icon in icons} - base)
    test = set(others[::5])
    train = [icon for icon in icons if icon.label not in test and not icon.held_out]
    return train, [icon for icon in icons if icon.label in test and not icon.held_out]


def composite(rgba: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Lay an RGBA picture ``(..., 4)`` uint8 on a plain colour: ``(..., 3)`` uint8."""
    alpha = rgba[..., 3:].astype(np.float32) / 255
    mixed = rgba[..., :3] * alpha + np.asarray(colour, np.float32) * (1 - alpha)
    return np.round(mixed).astype(np.uint8)


def caption(label: str, style: str | None = None, background: str | None = None) -> str:
    """The caption form the base is trained on, e.g. "a noto emoji of fox on a blue background"."""
    text = f"a {style} emoji of {label}" if style else f"an emoji of {label}"
    return f"{text} on a {background} background" if background else text


def draw_caption(icon: Icon, background: str, rng: random.Random) -> str:
    """A training caption: parts are left out at random, and one in ten is empty (classifier-free guidance).

    A picture on white may leave its background unnamed, so that white is what an unnamed background means.
    """
    if rng.random() < 0.1:
        return ""
    style = icon.style if rng.random() < 0.9 else None
    named = background if background != "white" or rng.random() < 0.5 else None
    text = caption(icon.label, style, named)
    if rng.random() < 0.1:
        text = text.replace(" emoji of ", " picture of ")
    return text

"""Write the example subject: ``python -m assets.build_base.example_subject --work DIR``.

Five expressions of one cat to learn from, and others of the same cat to be judged by, all held out of the base.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from PIL import Image

from effilora_diffusion.core import exit_code

from .icons import BACKGROUNDS, SUBJECT_HELD_OUT, SUBJECT_TRAIN, composite, load_icons

STYLE = "twemoji"
ROOT = Path(__file__).parents[2]


def main() -> None:
    """Draw both sets on white, 64 x 64 pixels."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for downloads")
    icons = {icon.label: icon for icon in load_icons(parser.parse_args().work / "packages") if icon.style == STYLE}
    folders = {"assets/example_subject": SUBJECT_TRAIN, "benchmarks/held_out_subject": SUBJECT_HELD_OUT}
    for folder, labels in folders.items():
        for label in labels:
            picture = Image.fromarray(composite(icons[label].render(), BACKGROUNDS["white"]))
            picture.save(ROOT / folder / f"{label.replace(' ', '_')}.png", optimize=True)


if __name__ == "__main__":
    sys.exit(exit_code(main))

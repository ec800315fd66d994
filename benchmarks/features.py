"""How the judge of this project was chosen: EfficientNet-Lite0, see :mod:`effilora_diffusion.diffusion.judges.efficientnet`.

``python -m benchmarks.features --work DIR`` prints the figures on which its choices rest.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from assets.build_base.icons import BACKGROUNDS, SIZE, STYLES, Icon, composite, judged_concepts, load_icons
from effilora_diffusion.core import exit_code
from effilora_diffusion.diffusion.judges.efficientnet import EDGE, NORMALISATIONS, Judge, load_judge

# Emoji whose label names an ImageNet class (or several, such as crabs): the evidence for the normalisation.
IMAGENET = {
    "soccer ball": (805,),
    "banana": (954,),
    "strawberry": (949,),
    "pineapple": (953,),
    "lemon": (951,),
    "broccoli": (937,),
    "mushroom": (947, 992),
    "pretzel": (932,),
    "hamburger": (933,),
    "hot dog": (934,),
    "pizza": (963,),
    "ice cream": (928,),
    "laptop": (620, 681),
    "television": (851,),
    "backpack": (414,),
    "teddy bear": (850,),
    "guitar": (402, 546),
    "violin": (889,),
    "drum": (541,),
    "balloon": (417,),
    "hourglass done": (604,),
    "umbrella with rain drops": (879,),
    "vertical traffic light": (920,),
    "ambulance": (407,),
    "fire engine": (555,),
    "taxi": (468,),
    "tractor": (866,),
    "basketball": (430,),
    "baseball": (429,),
    "lady beetle": (301,),
    "honeybee": (309,),
    "snail": (113,),
    "crab": (118, 119, 120, 121),
    "flamingo": (130,),
    "koala": (105,),
    "panda": (388,),
    "necktie": (906,),
    "sunglasses": (836, 837),
    "jeans": (608,),
    "hammer": (587,),
    "envelope": (549,),
    "locked": (695,),
    "volcano": (980,),
    "airplane": (404,),
}


def drawings(icons: Sequence[Icon], labels: Sequence[str], style: str, size: int) -> np.ndarray:
    """The labels in one style on white: ``(labels, size, size, 3)`` uint8."""
    found = {icon.label: icon for icon in icons if icon.style == style}
    return np.stack([composite(found[label].render(size), BACKGROUNDS["white"]) for label in labels])


def classified(judge: Judge, icons: Sequence[Icon], normalisation: str) -> tuple[float, float, float]:
    """Share of the ``IMAGENET`` emoji in the top 1 and the top 5, and the mean log-probability of the right class."""
    hits = []
    for style in STYLES:
        final = judge.layers(drawings(icons, list(IMAGENET), style, EDGE), normalisation)[1]
        scores = judge.network.classify(final).log_softmax(1)
        for row, classes in zip(scores, IMAGENET.values(), strict=True):
            right = row[list(classes)]
            rank = int((row > right.max()).sum())
            hits.append((float(rank == 0), float(rank < 5), float(right.logsumexp(0))))
    return tuple(np.mean(hits, axis=0).tolist())


def retrieved(layers: dict[str, torch.Tensor]) -> float:
    """Share of concepts whose nearest neighbour in another style is the same concept, over all pairs of styles.

    ``layers`` maps each style to unit vectors ``(concepts, d)`` in one order of concepts.
    """
    hits = []
    for asked, searched in permutations(layers, 2):
        nearest = (layers[asked] @ layers[searched].T).argmax(1)
        hits.append((nearest == torch.arange(len(nearest))).float().mean())
    return float(torch.stack(hits).mean())


def main() -> None:
    """Print how well each normalisation classifies emoji, and how well each feature finds a concept again."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder whose packages/ holds the emoji")
    args = parser.parse_args()
    judge, icons = load_judge(), load_icons(args.work / "packages")
    for normalisation in NORMALISATIONS:
        top1, top5, likelihood = classified(judge, icons, normalisation)
        count = len(IMAGENET) * len(STYLES)
        print(f"{normalisation}: {count} emoji, top-1 {top1:.1%}, top-5 {top5:.1%}, log p {likelihood:.2f}")
    for size in (EDGE, SIZE):
        parts: dict[str, dict[str, torch.Tensor]] = {"middle": {}, "final": {}, "middle + final": {}}
        for style in STYLES:
            pictures = drawings(icons, judged_concepts(), style, size)
            middle, final = (F.normalize(layer, dim=1) for layer in judge.layers(pictures))
            parts["middle"][style], parts["final"][style] = middle, final
            parts["middle + final"][style] = F.normalize(torch.cat([middle, final], 1), dim=1)
        for name, layers in parts.items():
            print(f"{name}: same concept in another style, {size} px, top-1 of 100: {retrieved(layers):.1%}")
    small = {style: drawings(icons, judged_concepts(), style, SIZE) for style in STYLES}
    for widths in (0.0, 0.7 / SIZE, 1 / SIZE, 1.5 / SIZE):
        described = {style: Judge(judge.network, widths).features(pictures) for style, pictures in small.items()}
        print(f"final, smoothed by {SIZE * widths:.1f} of {SIZE} px, top-1 of 100: {retrieved(described):.1%}")


if __name__ == "__main__":
    sys.exit(exit_code(main))

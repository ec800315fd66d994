"""Aspect-ratio buckets: the few sizes that training images are cut to, and which of them a micro-batch has."""

from __future__ import annotations

import bisect
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from ...core.errors import EffiLoRAError
from ...core.rng import draw_item, draw_uniform, generator
from ..pixel_options import Size, parse_sizes

STEP = 64
"""Pixels between the sizes of buckets where nothing else is asked for, as in sd-scripts; fewer for small resolutions."""


@dataclass(frozen=True)
class Buckets:
    """The sizes that training images may have.

    Args:
        sizes: of the buckets.
        step: what edges of smaller images are multiples of.
        least, most: shortest and longest edge of smaller images.
        upscale: whether images may be enlarged to fill a bucket; else smaller ones get a bucket of their own size.
        listed: whether somebody has listed the sizes; then each image is put into one of them, whatever its own size.
        others: the buckets of other resolutions, beside them.
    """

    sizes: tuple[Size, ...]
    step: int = 1
    least: int = 1
    most: int = 1 << 20
    upscale: bool = True
    listed: bool = False
    others: tuple[tuple[int, Buckets], ...] = ()

    def at(self, resolution: int) -> Buckets:
        """The buckets of another resolution, or these."""
        return dict(self.others).get(resolution, self)

    def size_of(self, image: Size) -> Size:
        """The bucket of an image of ``image`` pixels: the one of the nearest aspect ratio.

        Of listed sizes the nearest is chosen as diffusers' scripts do.
        """
        width, height = image
        if self.listed:  # of equal ones the last
            return min(reversed(self.sizes), key=lambda size: abs(height * size[0] - width * size[1]))
        ratio = math.log(width / height)
        best = min(self.sizes, key=lambda size: (abs(math.log(size[0] / size[1]) - ratio), size))
        if self.upscale or (best[0] <= width and best[1] <= height):
            return best
        return self._own(image)

    def _own(self, image: Size) -> Size:
        """The largest size that is cut from an image without enlarging it, except to the shortest edge."""
        area = max(width * height for width, height in self.sizes)
        edges = [max(self.least, min(edge, self.most) // self.step * self.step) for edge in image]
        while edges[0] * edges[1] > area and max(edges) > self.least:
            edges[edges.index(max(edges))] -= self.step
        return edges[0], edges[1]


def listed_buckets(text: str, multiple: int, largest: int | None, title: str) -> Buckets:
    """The buckets of ``--aspect_ratio_buckets``; raises :class:`EffiLoRAError` for sizes that the model can't have."""
    sizes = parse_sizes(text)
    for width, height in sizes:
        if width % multiple or height % multiple:
            raise EffiLoRAError(
                f"--aspect_ratio_buckets must have multiples of {multiple} for {title}, and {height},{width} does not"
            )
        if largest is not None and max(width, height) > largest:
            raise EffiLoRAError(
                f"--aspect_ratio_buckets must not have edges above {largest} for {title}, and {height},{width} does"
            )
    return Buckets(sizes, listed=True)


def generated_buckets(
    resolution: int,
    multiple: int,
    largest: int | None,
    title: str,
    least: int | None = None,
    most: int | None = None,
    step: int | None = None,
    upscale: bool = False,
) -> Buckets:
    """Buckets of at most the area of ``resolution`` squared, which is one of them, as sd-scripts makes them.

    Args:
        resolution: of the square one.
        multiple: that edges of the model's images must be a multiple of.
        largest: edge that the model can have, if there is one.
        title: of the model's family, for errors.
        least, most: edges of a bucket (default: half and twice the resolution).
        step: between edges (default: :data:`STEP`, less for resolutions below 512).
        upscale: see :class:`Buckets`.

    Raises:
        EffiLoRAError: settings that contradict one another or the model.
    """
    if step is None:
        step = max(multiple, min(STEP, resolution // 8) // multiple * multiple)
    if step % multiple:
        raise EffiLoRAError(f"--bucket_reso_steps must be a multiple of {multiple} for {title}, not {step}")
    if least is not None and least > resolution:
        raise EffiLoRAError(f"--min_bucket_reso {least} is above --resolution {resolution}: give a smaller one")
    if most is not None and most < resolution:
        raise EffiLoRAError(f"--max_bucket_reso {most} is below --resolution {resolution}: give a larger one")
    if largest is not None and (most or resolution) > largest:
        raise EffiLoRAError(f"{title} has images of at most {largest} px: lower --max_bucket_reso or --resolution")
    longest = min(most or 2 * resolution, largest or 2 * resolution)
    shortest = math.ceil((least or resolution / 2) / step) * step
    sizes = {(resolution, resolution)}
    for edge in range(shortest, longest + 1, step):
        other = min(longest, resolution**2 // edge) // step * step
        if other >= shortest and other != edge:
            sizes |= {(edge, other), (other, edge)}
    smallest = step if least is None else math.ceil(least / step) * step
    return Buckets(tuple(sorted(sizes)), step, smallest, max(longest // step * step, resolution), upscale)


class BucketOrder:
    """Whose turn a micro-batch is, and which images it has, as functions of its number alone.

    Every bucket has an endless sequence of shuffled epochs over its own images, which its micro-batches are cut from: none is
    incomplete, and none has images of two sizes. A bucket has as many micro-batches as its images need, so that every image is
    seen as often as any other: after every epoch a bucket is less than one micro-batch ahead or behind. With a single bucket
    the order is that of :func:`.draw_item`.

    Args:
        sizes: the bucket of every image.
        batch: images of a micro-batch.
        seed, purpose: of what is drawn.
        repeats: how often an epoch has every image; ``None``: once.
    """

    def __init__(
        self, sizes: Sequence[Size], batch: int, seed: int, purpose: str, repeats: Sequence[int] | None = None
    ):
        members: dict[Size, list[int]] = {}
        for index, size in enumerate(sizes):
            members.setdefault(size, []).extend([index] * (1 if repeats is None else repeats[index]))
        self.members = dict(sorted(members.items()))
        self.batch, self.seed, self.purpose = batch, seed, purpose
        self.count = sum(map(len, self.members.values()))
        self.single = next(iter(self.members)) if len(self.members) == 1 else None
        places = draw_uniform(len(self.members), seed, f"{purpose} bucket starts").tolist()
        self._starts = [int(place * batch) for place in places]
        self._epoch, self.turn = lru_cache(maxsize=4)(self._shuffled), lru_cache(maxsize=64)(self._turn)

    def _before(self, epoch: int) -> list[int]:
        """Micro-batches of every bucket before ``epoch``."""
        counts = [len(found) for found in self.members.values()]
        return [
            (epoch * count + start) // self.batch for count, start in zip(counts, self._starts, strict=True)
        ]  # fmt: skip

    def _shuffled(self, epoch: int) -> list[tuple[Size, int]]:
        """The micro-batches of an epoch: their buckets, and how many of the same bucket came before, ever."""
        turns = [
            (size, number)
            for size, first, last in zip(self.members, self._before(epoch), self._before(epoch + 1), strict=True)
            for number in range(first, last)
        ]
        order = torch.randperm(len(turns), generator=generator(self.seed, f"{self.purpose} buckets", epoch)).tolist()
        return [turns[place] for place in order]

    def _turn(self, number: int) -> tuple[Size, int]:
        """The bucket of the micro-batch ``number``, and which one of this bucket it is."""
        if self.single is not None:
            return self.single, number
        # a bucket is never a whole micro-batch away from its share, which bounds the epoch
        middle, spread = number * self.batch // self.count, len(self.members) * self.batch // self.count + 2
        epochs = range(max(0, middle - spread), middle + spread + 2)
        epoch = epochs[bisect.bisect_right(epochs, number, key=lambda epoch: sum(self._before(epoch))) - 1]
        return self._epoch(epoch)[number - sum(self._before(epoch))]

    def item(self, position: int) -> tuple[int, Size]:
        """The image at ``position``, by its index, and its bucket."""
        number, row = divmod(position, self.batch)
        size, earlier = self.turn(number)
        return self.within(size, earlier * self.batch + row), size

    def within(self, size: Size, position: int) -> int:
        """The image at ``position`` of a bucket's own sequence, by its index."""
        found = self.members[size]
        purpose = self.purpose if self.single is not None else f"{self.purpose} {size[0]}x{size[1]}"
        return found[draw_item(position, len(found), self.seed, purpose)]


def bucket_table(images: Sequence[Size], sizes: Sequence[Size], batch: int) -> list[str]:
    """A line per bucket, the fullest first: its images, and how many micro-batches of ``batch`` they are in an epoch."""
    counts = Counter(sizes)
    larger = Counter(
        size for image, size in zip(images, sizes, strict=True) if size[0] > image[0] or size[1] > image[1]
    )
    lines = []
    for size, count in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])):
        enlarged = f", {larger[size]} of them enlarged" if larger[size] else ""
        batches = f"{count / batch:.2f}".rstrip("0").rstrip(".")
        lines.append(
            f"{size[0]} x {size[1]} px: {count} image{'s' if count > 1 else ''}, {batches} micro-batch"
            f"{'' if batches == '1' else 'es'} an epoch{enlarged}"
        )
    return lines

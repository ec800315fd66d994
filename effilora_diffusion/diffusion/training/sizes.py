"""Which sizes the images of a run are cut to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from ...core import EffiLoRAError
from ..data.buckets import Buckets, generated_buckets, listed_buckets
from ..data.folder import Example
from ..data.images import Preparation
from ..models import Family
from ..pixel_options import PixelOptions


def check_resolution(resolution: int, family: Family, flag: str = "--resolution") -> None:
    """Raise :class:`EffiLoRAError` for images that the family's tokens do not divide evenly; ``flag`` has named it."""
    if resolution % family.size_multiple:
        raise EffiLoRAError(
            f"{flag} must be a multiple of {family.size_multiple} for {family.title}, not {resolution}"
        )


def make_buckets(c: PixelOptions, edges: tuple[int, ...], family: Family) -> Buckets | None:
    """The sizes of a run's images at the resolutions ``edges``, if there are several.

    Raises :class:`EffiLoRAError` for some that the family can't have.
    """
    multiple, largest, title = family.size_multiple, family.largest_edge, family.title
    if c.aspect_ratio_buckets:
        if len(edges) > 1:
            raise EffiLoRAError("--aspect_ratio_buckets lists all sizes: leave other resolutions out")
        return listed_buckets(c.aspect_ratio_buckets, multiple, largest, title)
    for edge in edges[1:]:
        check_resolution(edge, family, "every resolution (--more_resolutions, --dataset_config)")
    if c.use_aspect_ratio_buckets:
        limits = (c.min_bucket_reso, c.max_bucket_reso, c.bucket_reso_steps)
        found = [
            generated_buckets(edge, multiple, largest, title, *limits, upscale=not c.bucket_no_upscale)
            for edge in edges
        ]
    elif len(edges) > 1:
        found = [Buckets(((edge, edge),), listed=True) for edge in edges]
    else:
        return None
    return replace(found[0], others=tuple(zip(edges[1:], found[1:], strict=True)))


def at_resolutions(
    examples: list[Example], how: Preparation, more: Sequence[int], say: Callable[[str], None]
) -> list[Example]:
    """Every image once for its own resolution and once for each of ``more``, and not twice in one size.

    An image is left out where it would have to be enlarged, unless that is so everywhere: then it has the smallest.
    """
    if not more:
        return examples
    found: list[Example] = []
    for example in examples:
        own = example.resolution or how.resolution
        sizes = {edge: how.size_of(example.size, edge) for edge in sorted({own, *more}, reverse=True)}
        fitting = [edge for edge, size in sizes.items() if size[0] <= example.size[0] and size[1] <= example.size[1]]
        chosen = {sizes[edge]: edge for edge in fitting or [min(sizes)]}
        found += (replace(example, resolution=edge) for edge in chosen.values())
    edges = ", ".join(str(edge) for edge in sorted({how.resolution, *more}, reverse=True))
    say(f"images      {len(examples)} at resolutions {edges} where none has to be enlarged: {len(found)} in all")
    return found

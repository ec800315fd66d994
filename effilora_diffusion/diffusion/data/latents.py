"""Batches by position: cached latents and conditions, and every random draw by counter."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core.phases import LATENTS, Tell, counted, nobody
from ...core.rng import draw_normal, draw_uniform
from ..models import IMAGE, Conditions, Family
from .buckets import BucketOrder, Size
from .cache import Caches
from .captions import draw_caption
from .folder import Example, load_image
from .images import Preparation, crop_place, prepare_image
from .masks import mask_weights
from .text_states import AHEAD_ON_CPU, TextStates

CROP_PLACES = 4
"""Random crops come from this many places per image, so that their latents can be cached."""


Row = tuple[Tensor, Conditions, str]
"""Latents ``(c, h, w)``, conditions and file name of one image."""


class View(NamedTuple):
    """One image as a row shows it: cut to a size at a crop place, mirrored or not."""

    example: Example
    size: Size
    crop: int
    flip: bool

    @property
    def key(self) -> tuple[str, int, bool, Size]:
        """What its latents depend on, besides the settings of the run."""
        return self.example.sha256, self.crop, self.flip, self.size


class ExampleSource:
    """Cached latents and prompt conditions of a list of examples.

    Latents are kept by the image's content hash and crop, conditions by the caption: the same image or caption
    is encoded once, and a cache can never meet another image's caption.

    Args:
        family: encodes images and captions.
        examples: the images.
        preparation: how they become training images.
        purpose: of everything that is drawn.
        caches: where they are kept; by default in memory.
        memory: bytes of text states that are kept in it; ``None``: as :class:`.TextStates` has it.
    """

    def __init__(
        self,
        family: Family,
        examples: list[Example],
        preparation: Preparation,
        purpose: str,
        caches: Caches | None = None,
        memory: int | None = None,
    ):
        self.family, self.examples, self.preparation, self.purpose = family, examples, preparation, purpose
        self.caches = caches or Caches()
        sizes = [preparation.size_of(example.size, example.resolution) for example in examples]
        repeats = [example.repeats for example in examples]
        self.order = BucketOrder(sizes, preparation.batch, preparation.seed, purpose, repeats)
        self.texts = TextStates(family, self.caption, memory, self.caches)
        self._moments: dict[tuple[str, int, bool, Size], Tensor] = {}
        self._masks: dict[tuple[Any, ...], Tensor] = {}

    def fill(
        self, everything: bool = False, sizes: Iterable[Size] = (), rows: range | None = None, tell: Tell = nobody
    ) -> None:
        """Encode captions and one crop of up to ``AHEAD_ON_CPU`` images; with ``everything`` all crops of all, mirrored too.

        Captions are those of ``rows``, by default of an epoch. Those that are not kept are encoded again when they are drawn;
        after ``everything`` the autoencoder is not needed any more. Images are encoded in the ``sizes`` that their rows will be
        asked for, or else in that of their bucket. Of what is kept on disk, all of it, each process encodes its share.
        """
        self.texts.prepare(range(self.order.count) if rows is None else rows, tell)
        latents, mine = self.caches.latents, self.caches.mine
        sizes = list(sizes) if everything else list(sizes)[:1]
        views = [
            view
            for own, members in self.order.members.items()
            for index in (dict.fromkeys(members) if everything or latents is not None else members[:AHEAD_ON_CPU])
            for size in (sizes if self.preparation.buckets is None and sizes else [own])
            for view in self._views(self.examples[index], size, everything)
        ]
        for number, view in enumerate(counted(tell, LATENTS, views)):
            if latents is None or (mine(number) and self._key(view) not in latents):
                self._latents_of(view)
            if latents is None or mine(number):
                self._mask_of(view)

    def encode_again(self) -> None:
        """From now on give text states of the text encoders as they are now."""
        self.texts.encode_again()

    def _views(self, example: Example, size: Size, everything: bool) -> list[View]:
        flips = (False, True) if everything and self.preparation.random_flip else (False,)
        crops = range(self._crops(example, size) if everything else 1)
        return [View(example, size, crop, flip) for crop in crops for flip in flips]

    def _crops(self, example: Example, size: Size) -> int:
        width, height, _, _ = crop_place(example.size, size, None)
        return 1 if self.preparation.center_crop or (width, height) == size else CROP_PLACES

    def _example(self, position: int, size: Size | None) -> tuple[Example, Size]:
        if size is None:
            index, size = self.order.item(position)
        elif size in self.order.members:
            index = self.order.within(size, position)
        else:  # no image has this size of its own: one of all, cut to it
            index, _ = self.order.item(position)
        return self.examples[index], size

    @property
    def sizes(self) -> list[Size]:
        """All sizes of the images."""
        return list(self.order.members)

    def size(self, position: int) -> Size:
        """Width and height of the images of the micro-batch that the row at ``position`` is in."""
        return self.order.item(position)[1]

    def caption(self, position: int, size: Size | None = None) -> str:
        """The caption of the image at ``position``, as it is drawn for this row."""
        example, _ = self._example(position, size)
        return draw_caption(
            example.captions, example.style, example.triggers, self.preparation.seed, self.purpose, position
        )

    def view(self, position: int, size: Size | None = None) -> View:
        """What the row at ``position`` shows; see :meth:`draw`."""
        seed, (example, size) = self.preparation.seed, self._example(position, size)
        place, mirror = draw_uniform(2, seed, f"{self.purpose} crop", position).tolist()
        return View(
            example, size, int(place * self._crops(example, size)), self.preparation.random_flip and mirror < 0.5
        )  # fmt: skip

    def draw(self, position: int, size: Size | None = None) -> Row:
        """The image at ``position`` of the shuffled epochs; with ``size`` one of those images, or any image cut to that size."""
        view = self.view(position, size)
        mean, deviation = self._latents_of(view)
        noise = draw_normal(tuple(mean.shape), self.preparation.seed, f"{self.purpose} posterior", position)
        states = self.texts.at(position, self.caption(position, size))
        conditions = {**states, IMAGE: self._image_condition(view)}
        return mean + deviation * noise, conditions, view.example.path.name

    def mask(self, position: int, size: Size | None = None) -> Tensor | None:
        """Weights in the loss of the latents that :meth:`draw` gives, ``(1, h, w)``; ``None``: all of them count alike."""
        return self._mask_of(self.view(position, size))

    def _mask_of(self, view: View) -> Tensor | None:
        example = view.example
        if example.mask is None:
            return None

        def make() -> Tensor:
            height, width = self._latents_of(view).shape[-2:]
            unmasked = self.preparation.unmasked_weight
            return mask_weights(example, view.size, self._place(view), view.flip, (height, width), unmasked)

        if self.caches.latents is not None:
            key = {**self._key(view), "mask": example.mask_sha256, "unmasked": self.preparation.unmasked_weight}
            return self.caches.latents.get(key, lambda: {"mask": make()})["mask"]
        known = (*view.key, example.mask_sha256)
        if known not in self._masks:
            self._masks[known] = make()
        return self._masks[known]

    def _place(self, view: View) -> tuple[float, float] | None:
        return None if self.preparation.center_crop else self._crop_at(view)

    def _crop_at(self, view: View) -> tuple[float, float]:
        across, down = draw_uniform(2, self.preparation.seed, f"place {view.example.sha256}", view.crop).tolist()
        return across, down

    def _image_condition(self, view: View) -> Tensor:
        width, height = view.example.size
        _, _, left, top = crop_place(view.example.size, view.size, self._place(view), view.flip)
        return torch.tensor([height, width, top, left, view.size[1], view.size[0]], dtype=torch.float32)

    def _key(self, view: View) -> dict[str, Any]:
        """What its latents on disk depend on, besides the autoencoder."""
        place = crop_place(view.example.size, view.size, self._place(view))
        how = self.preparation.interpolation
        return {"image": view.example.sha256, "size": view.size, "place": place, "flip": view.flip, "filter": how}

    def _latents_of(self, view: View) -> Tensor:
        if self.caches.latents is not None:
            return self.caches.latents.get(self._key(view), lambda: {"moments": self._encode(view)})["moments"]
        if view.key not in self._moments:
            self._moments[view.key] = self._encode(view)
        return self._moments[view.key]

    def _encode(self, view: View) -> Tensor:
        how, image = self.preparation, load_image(view.example.path)
        place = self._crop_at(view)
        return self.family.encode_image(
            prepare_image(image, view.size, how.center_crop, place, view.flip, how.interpolation)
        )  # fmt: skip


@dataclass
class Batch:
    """One micro-batch: ``latents`` ``(n, c, h, w)`` float32 on the CPU, the ``conditions`` of its n rows,
    ``noise`` like latents, ``timesteps`` ``(n,)``, ``names`` of the images, how many of the n are instances, and the
    ``captions`` by which concepts are found: a class row has that of the instance at its own position. ``input_noise`` is what
    the model's input has instead of ``noise``, if it is another; ``mask`` that of the loss, ``(n, 1, h, w)``, where an image has
    one.

    ``texts`` are what the rows' prompts say, class rows included; ``frozen`` are the class rows' text states as the base
    encodes them, where the ``conditions`` are those of text encoders that are trained."""

    latents: Tensor
    conditions: Conditions
    noise: Tensor
    timesteps: Tensor
    names: list[str]
    instances: int
    captions: list[str]
    input_noise: Tensor | None = None
    mask: Tensor | None = None
    texts: list[str] = field(default_factory=list)
    frozen: Conditions | None = None

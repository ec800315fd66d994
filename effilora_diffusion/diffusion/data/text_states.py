"""Text states by row: encoded ahead while they fit into memory, and then for a stretch of rows after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from ...core.phases import EMBEDDINGS, Tell, counted, nobody
from ..models import Conditions, Family
from .cache import Caches

TEXT_MEMORY = 2_000_000_000
"""Bytes of text states that are kept."""

AHEAD_ON_CPU = 1000
"""Captions and images that a CPU encodes before training, to find what is wrong with them; the others when they are drawn."""

BESIDE = 64
"""Captions kept beside the stretch, of rows that come again and again, and rows encoded at once behind the end of a run."""


class TextStates:
    """The text states of the rows of a source, each caption encoded once while it is kept.

    A GPU encodes as many rows ahead as ``memory`` holds, so that the encoders seldom have to come back to it. What is kept
    changes no value: every caption is encoded by itself.

    Args:
        family: encodes them.
        caption: of the row at a position.
        memory: bytes of states that are kept.
        caches: has them on disk instead, if it has.
    """

    def __init__(
        self, family: Family, caption: Callable[[int], str], memory: int | None = None, caches: Caches | None = None
    ):
        self.caches = caches or Caches()
        self.family, self.caption = family, caption
        self.memory = TEXT_MEMORY if memory is None else memory
        self._ahead = AHEAD_ON_CPU if family.device.type == "cpu" else None
        self._states: dict[str, Conditions] = {}
        self._beside: dict[str, Conditions] = {}
        self._bytes, self._reached, self._end = 0, 0, 0

    def __len__(self) -> int:
        return len(self._states) + len(self._beside)

    def prepare(self, rows: range, tell: Tell = nobody) -> None:
        """Encode the captions of ``rows`` from the first one on, as many as are kept; for the disk all of them."""
        if self.caches.texts is not None:
            captions = dict.fromkeys(self.caption(position) for position in rows)
            mine = [caption for number, caption in enumerate(captions) if self.caches.mine(number)]
            missing = [caption for caption in mine if {"prompt": caption} not in self.caches.texts]
            with self._encoders() if missing else nullcontext():
                for caption in counted(tell, EMBEDDINGS, missing):
                    self.caches.texts.save({"prompt": caption}, self.family.encode_prompt(caption))
            return
        tell(EMBEDDINGS)  # how many there are to be is known once memory is full
        self._reached, self._end = rows.start, rows.stop
        self._stretch(rows.start, self._ahead)

    def at(self, position: int, caption: str) -> Conditions:
        """The text states of the row at ``position``, whose caption may be another than that which was expected."""
        if self.caches.texts is not None:
            return self.caches.texts.get({"prompt": caption}, lambda: self._encode(caption))
        found = self._states.get(caption) or self._beside.get(caption)
        if found is None and position >= self._reached:
            self._stretch(position, 1 if self._ahead else None)
            found = self._states.get(caption)
        return self._again(caption) if found is None else found

    def encode_again(self) -> None:
        """From now on encode with the text encoders as they are now: nothing that is kept holds any more, on disk neither."""
        self.caches = Caches()
        self._states, self._beside, self._bytes, self._reached, self._end = {}, {}, 0, 0, 0

    def _again(self, caption: str) -> Conditions:
        if len(self._beside) == BESIDE:
            del self._beside[next(iter(self._beside))]
        self._beside[caption] = self._encode(caption)
        return self._beside[caption]

    def _encode(self, caption: str) -> Conditions:
        with self._encoders():
            return self.family.encode_prompt(caption)

    def _stretch(self, first: int, most: int | None) -> None:
        """Encode the captions of the rows from ``first`` on: ``most`` of them, or as many as there is memory for."""
        if self._bytes >= self.memory:
            self._states, self._bytes = {}, 0
        end = self._end if first < self._end else first + BESIDE
        count = 0
        with self._encoders():
            for position in range(first, end):
                if self._bytes >= self.memory or count == most:
                    break
                self._reached = max(self._reached, position + 1)
                caption = self.caption(position)
                if caption not in self._states:
                    states = self.family.encode_prompt(caption)
                    self._states[caption] = states
                    self._bytes += sum(value.numel() * value.element_size() for value in states.values())
                    count += 1

    @contextmanager
    def _encoders(self) -> Iterator[None]:
        """The encoders on their device, moved there only if they are not."""
        others = [part for part in self.family.parts() if part is not self.family.model]
        placed = {value.device.type for part in others for value in part.parameters()}
        if placed <= {self.family.device.type}:
            yield
        else:
            with self.family.encoders():
                yield

"""Several subjects of one run: their images, and whose turn a row of a batch is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ...core.concepts import Concept, check_concepts, contains
from ...core.errors import EffiLoRAError
from ...core.phases import Tell, nobody
from ...core.text_io import printable
from ..caption_options import PLAIN
from ..concepts_list import ConceptData
from ..dataset_config import Subset
from .buckets import Size
from .captions import with_affixes, with_trigger
from .folder import OF_A_FOLDER, Example, report_problems, scan_images
from .images import Preparation
from .latents import ExampleSource, Row


def scan_concepts(entries: Sequence[ConceptData], say: Callable[[str], None], edge: int = 0) -> list[list[Example]]:
    """The checked images of every entry; what is odd about them, at a training ``edge``, is said.

    Raises as :func:`.scan_images`.
    """
    found = []
    for entry in entries:
        examples: list[Example] = []
        for subset in entry.subsets or (Subset(entry.instance_data_dir, entry.instance_prompt),):
            folder = Path(subset.image_dir)
            prompt, own_edge = subset.prompt or entry.instance_prompt, subset.resolution or edge
            scanned, problems = scan_images(folder, prompt, subset.caption_extension, own_edge)
            if problems:
                say(report_problems(problems, folder))
            examples += (_of_subset(example, subset) for example in scanned)
        found.append(examples)
        say_repeats(examples, say)
    return found


def _of_subset(example: Example, subset: Subset) -> Example:
    """An image with what its folder's entry asks for."""
    if subset.resolution:
        example = replace(example, resolution=subset.resolution)
    if (subset.repeats, subset.style) == (1, PLAIN):
        return example
    first, *others = (with_affixes(caption, subset.style) for caption in example.captions)
    repeats = example.repeats * subset.repeats
    return replace(example, caption=first, others=tuple(others), repeats=repeats, style=subset.style)


def say_repeats(examples: Sequence[Example], say: Callable[[str], None]) -> None:
    """Tell which folders come several times in an epoch, and with what caption if it is in their names."""
    counts: dict[tuple[str, int, str], int] = {}
    for example in examples:
        own = example.source.startswith(OF_A_FOLDER)
        key = (example.path.parent.name, example.repeats, f", caption {example.caption!r:.80}" if own else "")
        counts[key] = counts.get(key, 0) + 1
    for (name, repeats, caption), count in counts.items():
        if repeats > 1 or caption:
            times = f", {repeats} times an epoch" if repeats > 1 else ""
            say(f"folder      '{printable(name)}': {count} image{'s' if count > 1 else ''}{times}{caption}")


def name_concepts(
    entries: Sequence[ConceptData], groups: Sequence[list[Example]], rarest_word: Callable[[str], str]
) -> tuple[tuple[Concept, ...], list[Example]]:
    """The concepts of a run, and all examples, each with the name of its concept.

    Raises:
        EffiLoRAError: two concepts can't be told apart, or a caption does not name its own.
    """
    prompts = [str(entry.instance_prompt) for entry in entries]
    own = [
        own_words(prompt, [entry.class_prompt, *(other for other in prompts if other != prompt)])
        for prompt, entry in zip(prompts, entries, strict=True)
    ]
    concepts = tuple(entry.concept(rarest_word(words)) for entry, words in zip(entries, own, strict=True))
    check_concepts(concepts)
    named = []
    for concept, examples in zip(concepts, groups, strict=True):
        for example in (with_trigger(example, concept.triggers[0]) for example in examples):
            for caption in example.captions:
                if not any(contains(caption, trigger) for trigger in concept.triggers):
                    raise EffiLoRAError(
                        f"the caption of '{printable(example.path)}' ({caption!r:.200}) does not contain the trigger of the "
                        f"concept {concept.name} ({', '.join(concept.triggers)}): write it there"
                    )
            named.append(replace(example, concept=concept.name, triggers=concept.triggers))
    return concepts, named


def row_shares(
    entries: Sequence[ConceptData], examples: Sequence[Example], concepts: Sequence[Concept]
) -> tuple[float, ...]:
    """The shares of the rows: by weight, or by the images that are trained on and their repeats where folders have some."""
    if any(len(entry.subsets) > 0 for entry in entries):
        return tuple(float(sum(one.repeats for one in examples if one.concept == each.name)) for each in concepts)
    return tuple(entry.weight for entry in entries)


def own_words(prompt: str, others: Iterable[str]) -> str:
    """The words of ``prompt`` that none of the ``others`` has; the whole prompt where there are none."""
    known = {word.casefold() for other in others for word in other.split()}
    return " ".join(word for word in prompt.split() if word.casefold() not in known) or prompt


class ConceptSource:
    """The rows of several concepts by turns, each a function of its position alone.

    Args:
        sources: of every concept.
        weights: their shares of the rows.
        rows: that a concept has in turn: those of a micro-batch where its images must have the same size.
    """

    def __init__(self, sources: Sequence[ExampleSource], weights: Sequence[float], rows: int = 1):
        self.sources, self.weights = list(sources), list(weights)
        self._turns: list[tuple[int, int]] = []
        self._counts = [0] * len(self.sources)
        self.rows = rows

    @property
    def preparation(self) -> Preparation:
        """How images become training images."""
        return self.sources[0].preparation

    @property
    def sizes(self) -> list[Size]:
        """All sizes of the concepts' images."""
        return sorted({size for source in self.sources for size in source.sizes})

    def fill(
        self, everything: bool = False, sizes: Iterable[Size] = (), rows: range | None = None, tell: Tell = nobody
    ) -> None:
        """:meth:`.ExampleSource.fill` of every concept."""
        for number, source in enumerate(self.sources):
            own = None if rows is None else range(self._before(rows.start, number), self._before(rows.stop, number))
            source.fill(everything, sizes, own, tell)

    def _before(self, position: int, number: int) -> int:
        """Rows of a concept before ``position``, in whole turns."""
        last = position // self.rows
        self._turn(last)
        return self.rows * sum(concept == number for concept, _ in self._turns[:last])

    def _turn(self, number: int) -> tuple[int, int]:
        while len(self._turns) <= number:
            due = [(count + 0.5) / weight for count, weight in zip(self._counts, self.weights, strict=True)]
            concept = due.index(min(due))
            self._turns.append((concept, self._counts[concept]))
            self._counts[concept] += 1
        return self._turns[number]

    def encode_again(self) -> None:
        """:meth:`.ExampleSource.encode_again` of every concept."""
        for source in self.sources:
            source.encode_again()

    def turn(self, position: int) -> tuple[int, int]:
        """Whose turn ``position`` is, and how many turns that concept has had before.

        Whoever is due first by its weight is next: concepts of equal weight take turns.
        """
        number, row = divmod(position, self.rows)
        concept, earlier = self._turn(number)
        return concept, earlier * self.rows + row

    def size(self, position: int) -> Size:
        """Width and height of the images of the micro-batch that the row at ``position`` is in."""
        number, own = self.turn(position)
        return self.sources[number].size(own)

    def caption(self, position: int, size: Size | None = None) -> str:
        """The caption of the row at ``position``; see :meth:`.ExampleSource.caption`."""
        number, own = self.turn(position)
        return self.sources[number].caption(own, size)

    def draw(self, position: int, size: Size | None = None) -> Row:
        """The row at ``position``; see :meth:`.ExampleSource.draw`."""
        number, own = self.turn(position)
        return self.sources[number].draw(own, size)

    def mask(self, position: int, size: Size | None = None) -> Tensor | None:
        """Its weights in the loss; see :meth:`.ExampleSource.mask`."""
        number, own = self.turn(position)
        return self.sources[number].mask(own, size)


def concept_rows(
    make: Callable[[list[Example], str], ExampleSource],
    groups: Iterable[tuple[str, list[Example]]],
    weights: Sequence[float],
    purpose: str,
    rows: int = 1,
) -> ConceptSource:
    """The source of several concepts' rows, of their names and examples; what is drawn for each depends on its name."""
    return ConceptSource([make(examples, f"{purpose} {name}") for name, examples in groups], weights, rows)

"""Several subjects of one run: their images, and whose turn a row of a batch is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from ...core.concepts import Concept, check_concepts, contains
from ...core.errors import EffiLoRAError
from ...core.text_io import printable
from ..concepts_list import ConceptData
from .folder import Example, report_problems, scan_images
from .images import Preparation
from .latents import ExampleSource, Row


def scan_concepts(entries: Sequence[ConceptData], say: Callable[[str], None]) -> list[list[Example]]:
    """The checked images of every entry; what is odd about them is said. Raises as :func:`.scan_images`."""
    found = []
    for entry in entries:
        examples, problems = scan_images(Path(entry.instance_data_dir), entry.instance_prompt)
        if problems:
            say(report_problems(problems))
        found.append(examples)
    return found


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
        for example in examples:
            if not any(contains(example.caption, trigger) for trigger in concept.triggers):
                raise EffiLoRAError(
                    f"the caption of '{printable(example.path)}' ({example.caption!r:.200}) does not contain the trigger of the "
                    f"concept {concept.name} ({', '.join(concept.triggers)}): write it there"
                )
            named.append(replace(example, concept=concept.name))
    return concepts, named


def own_words(prompt: str, others: Iterable[str]) -> str:
    """The words of ``prompt`` that none of the ``others`` has; the whole prompt where there are none."""
    known = {word.casefold() for other in others for word in other.split()}
    return " ".join(word for word in prompt.split() if word.casefold() not in known) or prompt


class ConceptSource:
    """The rows of several concepts by turns, each a function of its position alone.

    Args:
        sources: of every concept.
        weights: their shares of the rows.
    """

    def __init__(self, sources: Sequence[ExampleSource], weights: Sequence[float]):
        self.sources, self.weights = list(sources), list(weights)
        self._turns: list[tuple[int, int]] = []
        self._counts = [0] * len(self.sources)

    @property
    def preparation(self) -> Preparation:
        """How images become training squares."""
        return self.sources[0].preparation

    def fill(self, everything: bool = False) -> None:
        """:meth:`.ExampleSource.fill` of every concept."""
        for source in self.sources:
            source.fill(everything)

    def turn(self, position: int) -> tuple[int, int]:
        """Whose turn ``position`` is, and how many turns that concept has had before.

        Whoever is due first by its weight is next: concepts of equal weight take turns.
        """
        while len(self._turns) <= position:
            due = [(count + 0.5) / weight for count, weight in zip(self._counts, self.weights, strict=True)]
            number = due.index(min(due))
            self._turns.append((number, self._counts[number]))
            self._counts[number] += 1
        return self._turns[position]

    def caption(self, position: int) -> str:
        """The caption of the row at ``position``."""
        number, own = self.turn(position)
        return self.sources[number].caption(own)

    def draw(self, position: int) -> Row:
        """The row at ``position``."""
        number, own = self.turn(position)
        return self.sources[number].draw(own)


def concept_rows(
    make: Callable[[list[Example], str], ExampleSource],
    groups: Iterable[tuple[str, list[Example]]],
    weights: Sequence[float],
    purpose: str,
) -> ConceptSource:
    """The source of several concepts' rows, of their names and examples; what is drawn for each depends on its name."""
    return ConceptSource([make(examples, f"{purpose} {name}") for name, examples in groups], weights)

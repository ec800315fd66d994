"""Multiple-choice questions, answered by the likelihood of their answers: the paper's eight commonsense tasks, and one's own."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core import EffiLoRAError
from .encoding import IGNORED, Encoder, Example
from .records import with_answer

ANSWER_FORMAT = re.compile(r"Answer format:\s*(\S+)\s*$")
"""The end of every question of the commonsense tasks, as in ``Answer format: answer1/answer2/answer3``."""

STATED = "the correct answer is {answer}"
"""How their training data words an answer."""


@dataclass
class Question:
    """A record to be answered, the ``answers`` to choose from, and the place of the right one."""

    record: dict[str, Any]
    answers: list[str]
    correct: int
    where: str = "a question"


def question(record: dict[str, Any], where: str = "a record") -> Question:
    """A record with ``choices`` and ``answer``, or of a commonsense task (BoolQ, PIQA, SIQA, HellaSwag, WinoGrande, ARC, OBQA).

    Those have their choices at the end of ``instruction``, and the right one in ``answer``.
    """
    answer = record.get("answer")
    if "choices" in record:
        answers = record["choices"]
        if (
            not isinstance(answers, list)
            or len(answers) < 2
            or not all(isinstance(one, str) and one for one in answers)
        ):
            raise EffiLoRAError(f"{where}: 'choices' must be a list of two texts or more")
        names = answers
    else:
        match = ANSWER_FORMAT.search(str(record.get("instruction", "")))
        if match is None:
            raise EffiLoRAError(f"{where}: it needs 'choices', or an instruction that ends in 'Answer format: a/b'")
        names = match[1].split("/")
        answers = [STATED.format(answer=name) for name in names]
    if answer not in names:
        raise EffiLoRAError(f"{where}: its 'answer' {answer!r} is none of {names}")
    return Question(record, list(answers), names.index(answer), where)


@torch.no_grad()
def likelihoods(
    model: nn.Module, encoder: Encoder, questions: list[Question], batch_size: int = 16
) -> list[list[float]]:
    """For every question the log-likelihood of each answer, the end of the turn included, per answered token."""
    items = [_whole(encoder, one, answer) for one in questions for answer in one.answers]
    order = sorted(range(len(items)), key=lambda index: len(items[index].ids))  # rows of like length: little padding
    found = [0.0] * len(items)
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        for index, value in zip(places, _scores(model, encoder, [items[place] for place in places]), strict=True):
            found[index] = value
    values: Iterator[float] = iter(found)
    return [[next(values) for _ in one.answers] for one in questions]


def _whole(encoder: Encoder, one: Question, answer: str) -> Example:
    """A question with one of its answers; refused where a part of the answer, or all of the question, is cut off."""
    example = encoder.encode(with_answer(one.record, answer), one.where)
    if example.cut and (encoder.truncates_end or example.labels[1] != IGNORED):
        raise EffiLoRAError(f"{one.where}: it is longer than the model's {encoder.max_length} tokens: take it out")
    if example.cut:
        warnings.warn(f"{one.where}: longer than {encoder.max_length} tokens, it lost its beginning", stacklevel=2)
    return example


def _scores(model: nn.Module, encoder: Encoder, items: list[Example]) -> list[float]:
    device = next(model.parameters()).device
    batch = {name: value.to(device) for name, value in encoder.collate(items).items()}
    labels: Tensor = batch.pop("labels")[:, 1:]
    logits = model(**batch).logits[:, :-1].float()
    answered = labels != IGNORED
    chosen = logits.gather(2, labels.clamp_min(0).unsqueeze(2)).squeeze(2) - logits.logsumexp(2)
    sums = (chosen * answered).sum(1) / answered.sum(1).clamp_min(1)
    return [float(value) for value in sums]


def choose(model: nn.Module, encoder: Encoder, questions: list[Question], batch_size: int = 16) -> list[bool]:
    """For every question whether its most likely answer is the right one."""
    if not questions:
        raise EffiLoRAError("there are no questions to be answered")
    scores = likelihoods(model, encoder, questions, batch_size)
    for one, row in zip(questions, scores, strict=True):
        if not all(map(math.isfinite, row)):
            raise EffiLoRAError(
                f"{one.where}: the model's output is not finite: try another --dtype, or look at its weights"
            )
    likeliest = [max(range(len(row)), key=row.__getitem__) for row in scores]
    return [place == one.correct for place, one in zip(likeliest, questions, strict=True)]

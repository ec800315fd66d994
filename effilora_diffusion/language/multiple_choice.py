"""Multiple-choice evaluation by log-likelihood, for the paper's eight commonsense tasks and for one's own questions."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core import EffiLoRAError
from .batches import IGNORED, Example
from .conversations import with_answer
from .encoding import Encoder
from .generate import generate_answers
from .sources import read_records

ANSWER_FORMAT = re.compile(r"Answer format:\s*(\S+)\s*$")
"""The end of every question of the commonsense tasks, as in ``Answer format: answer1/answer2/answer3``."""

ROOM = {False: 2, True: 1024}
"""Tokens that a generated answer may have more than the correct one: its end, or also the reasoning before it."""

STATED = "the correct answer is {answer}"
"""An answer in the commonsense tasks' training data."""


@dataclass
class Question:
    """A record without its answer, the ``answers`` to choose from, and the index of the ``correct`` one.

    ``names`` are those of the answers in a commonsense task (``solution1``, ``solution2``); else there are none.
    """

    record: dict[str, Any]
    answers: list[str]
    correct: int
    where: str = "a question"
    names: tuple[str, ...] = ()

    def named(self, text: str) -> str | None:
        """The first of the ``names`` in a generated answer, as the tasks' own evaluation takes it."""
        longest_first = sorted(self.names, key=len, reverse=True)
        found = re.search("|".join(map(re.escape, longest_first)), text) if self.names else None
        return found[0] if found else None


def parse_question(record: dict[str, Any], where: str = "a record") -> Question:
    """Read a record with ``choices`` and ``answer``, or one of a commonsense task.

    The records of those (BoolQ, PIQA, SIQA, HellaSwag, WinoGrande, ARC, OBQA) list the choices at the end of ``instruction``
    and name the correct one in ``answer``. Raises :class:`EffiLoRAError` for other records.
    """
    answer = record.get("answer")
    if "choices" in record:
        names = answers = record["choices"]
        if not isinstance(answers, list) or len(answers) < 2 or not all(isinstance(a, str) and a for a in answers):
            raise EffiLoRAError(f"{where}: 'choices' must be a list of at least two strings")
    else:
        match = ANSWER_FORMAT.search(str(record.get("instruction", "")))
        if match is None:
            raise EffiLoRAError(f"{where}: it needs 'choices', or an instruction that ends in 'Answer format: a/b'")
        names = match[1].split("/")
        answers = [STATED.format(answer=name) for name in names]
    if answer not in names:
        raise EffiLoRAError(f"{where}: its 'answer' {answer!r} is not one of {names}")
    return Question(record, list(answers), names.index(answer), where, () if "choices" in record else tuple(names))


def read_tasks(paths: list[Path], limit: int | None = None) -> dict[str, list[Question]]:
    """Read questions from local files, grouped by task.

    Args:
        paths: JSON or JSONL files.
        limit: maximum number of questions per task.

    Returns:
        Questions by task: the record's ``task``, else the file's name (of ``test.json`` the folder's).
    """
    tasks: dict[str, list[Question]] = {}
    for path in paths:
        default = path.parent.name if path.stem in ("test", "train", "validation") else path.stem
        for number, record in enumerate(read_records(path, "--data"), 1):
            question = parse_question(record, f"--data {path}, record {number}")
            tasks.setdefault(str(record.get("task", default)), []).append(question)
    return {task: questions[:limit] for task, questions in tasks.items()}


def evaluate(
    model: nn.Module,
    encoder: Encoder,
    tasks: dict[str, list[Question]],
    batch_size: int = 16,
    exact_match: bool = False,
    max_new_tokens: int | None = None,
) -> dict[str, dict[str, Any]]:
    """Measure accuracy by task.

    Args:
        model: a transformers model, with or without adapters.
        encoder: applies the prompt template that the adapter was trained with.
        tasks: questions by task.
        batch_size: answers, or prompts, per batch.
        exact_match: also generate answers.
        max_new_tokens: how long these may be, with their reasoning; default: the longest correct one and a margin, which
            is wider if the chat template knows reasoning blocks.

    Returns:
        For every task the number of ``questions``, the accuracy by likelihood (``choice``) and, with ``exact_match``, the
        share of greedy answers equal to the correct one, apart from reasoning before them (``exact match``). Of a
        commonsense task also the share of greedy answers that name the correct choice first (``generated``), which is what
        papers report.
    """
    results: dict[str, dict[str, Any]] = {}
    for task, questions in tasks.items():
        correct = grade(model, encoder, questions, batch_size)
        results[task] = {"questions": len(questions), "choice": sum(correct) / len(correct)}
        if exact_match:
            expected = [question.answers[question.correct].strip() for question in questions]
            longest = max_new_tokens or max(len(encoder.tokens(text)) for text in expected) + ROOM[encoder.can_reason]
            records = [question.record for question in questions]
            generated = generate_answers(model, encoder, records, longest, batch_size)
            results[task]["exact match"] = sum(map(str.__eq__, generated, expected)) / len(expected)
            if all(question.names for question in questions):
                pairs = zip(questions, generated, strict=True)
                right = [one.named(text) == one.names[one.correct] for one, text in pairs]
                results[task]["generated"] = sum(right) / len(right)
    return results


def grade(model: nn.Module, encoder: Encoder, questions: list[Question], batch_size: int = 16) -> list[bool]:
    """Return for every question whether its most likely answer is the correct one."""
    if not questions:
        raise EffiLoRAError("there are no questions to answer")
    scores = log_likelihoods(model, encoder, questions, batch_size)
    for question, row in zip(questions, scores, strict=True):
        if not all(map(math.isfinite, row)):
            raise EffiLoRAError(
                f"{question.where}: the model's output is not finite: try another --dtype, or check its weights"
            )
    return [row.index(max(row)) == question.correct for row, question in zip(scores, questions, strict=True)]


@torch.no_grad()
def log_likelihoods(
    model: nn.Module, encoder: Encoder, questions: list[Question], batch_size: int = 16
) -> list[list[float]]:
    """Return the mean log-likelihood per token of every answer to every question, its stop token included."""
    items = [_encode(encoder, question, answer) for question in questions for answer in question.answers]
    order = sorted(range(len(items)), key=lambda index: len(items[index].ids))  # similar lengths: less padding
    scores = [0.0] * len(items)
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        for index, score in zip(indices, _scores(model, encoder, [items[i] for i in indices]), strict=True):
            scores[index] = score
    remaining: Iterator[float] = iter(scores)
    return [[next(remaining) for _ in question.answers] for question in questions]


def _encode(encoder: Encoder, question: Question, answer: str) -> Example:
    """Tokenise a question with one of its answers; refuse it if the answer, or all of the question, is truncated."""
    example = encoder.encode_choice(with_answer(question.record, answer), question.where)
    if example.truncated and (encoder.truncation_side == "right" or example.labels[1] != IGNORED):
        raise EffiLoRAError(f"{question.where}: longer than the model's {encoder.max_length} tokens: remove it")
    if example.truncated:
        warnings.warn(f"{question.where}: truncated on the left to {encoder.max_length} tokens", stacklevel=2)
    return example


def _scores(model: nn.Module, encoder: Encoder, items: list[Example]) -> list[float]:
    device = next(model.parameters()).device
    batch = {name: value.to(device) for name, value in encoder.collate(items).items()}
    labels: Tensor = batch.pop("labels")[:, 1:]
    logits = model(**batch).logits[:, :-1].float()
    in_answer = labels != IGNORED
    log_probs = logits.gather(2, labels.clamp_min(0).unsqueeze(2)).squeeze(2) - logits.logsumexp(2)
    means = (log_probs * in_answer).sum(1) / in_answer.sum(1).clamp_min(1)
    return [float(value) for value in means]

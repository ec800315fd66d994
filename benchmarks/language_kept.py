"""What an adapter keeps of its base beside the task it learns: text that nobody trained on, easy reasoning, its own answers.

    python -m benchmarks.language_kept --work WORK

prints the base's figures; ``benchmarks.language`` measures them for the base and after every run, for LoRA and ours alike.

- prose: loss per token on the first tokens of CPython's help topics (``pydoc_data.topics``, part of every Python);
- reasoning: share of small questions (sums, sequences, days, order, syllogisms) whose right answer is the likeliest of four;
- answers: loss per token on what the base itself answers, greedily, to general questions: how far the model has left it.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import nn

from effilora_diffusion.core import exit_code
from effilora_diffusion.language.batches import Example
from effilora_diffusion.language.encoding import Encoder
from effilora_diffusion.language.generate import generate_answers
from effilora_diffusion.language.models import load_model
from effilora_diffusion.language.multiple_choice import Question, grade

from .language_data import fetch_model

TEXTS, WINDOW = 48, 128
"""Help topics, and tokens of each."""

PER_KIND = 12
"""Questions of each kind of reasoning."""

ANSWER_TOKENS = 32
GENERAL = (
    "What is the capital of France?",
    "Why is the sky blue?",
    "Name three primary colours.",
    "How many days has a week?",
    "What do bees make?",
    "Write one sentence about the sea.",
    "What is the opposite of hot?",
    "Who wrote Romeo and Juliet?",
    "What is water made of?",
    "Give a synonym of 'happy'.",
    "What does a baker do?",
    "How do you make tea?",
    "What is the largest planet?",
    "Explain what a library is.",
    "What season follows winter?",
    "Why do people sleep?",
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Frank")
KINDS = (("cats", "animals"), ("roses", "flowers"), ("oaks", "trees"), ("cars", "machines"), ("apples", "fruits"))


def texts(tokenizer: Any) -> list[Example]:
    """The beginnings of help topics, with loss on every token."""
    found = []
    for name in sorted(topics):
        ids = tokenizer(topics[name], add_special_tokens=False)["input_ids"][:WINDOW]
        if len(ids) == WINDOW:
            found.append(Example(ids, list(ids)))
    return found[:TEXTS]


def reasoning() -> list[Question]:
    """Questions with four answers each, the same on every machine."""
    rng, found = random.Random(0), []
    for _ in range(PER_KIND):
        a, b = rng.randint(2, 9), rng.randint(2, 9)
        found.append(_numbers(rng, f"What is {a} plus {b}?", a + b))
        start, step = rng.randint(1, 9), rng.randint(2, 5)
        row = ", ".join(str(start + step * place) for place in range(4))
        found.append(_numbers(rng, f"Which number comes next: {row}?", start + 4 * step))
        day = rng.randrange(7)
        found.append(
            _question(
                rng, f"Which day comes after {DAYS[day]}?", DAYS[(day + 1) % 7], _others(rng, DAYS, (day + 1) % 7)
            )
        )
        tall, middle, small, other = rng.sample(NAMES, 4)
        told = f"{tall} is taller than {middle}, and {middle} is taller than {small}. Who is the tallest?"
        found.append(_question(rng, told, tall, [middle, small, other]))
        kind = rng.randrange(len(KINDS))
        one, whole = KINDS[kind]
        wrong = [
            f"All {one} are {others}." for _, others in rng.sample([pair for pair in KINDS if pair[1] != whole], 3)
        ]
        found.append(_question(rng, f"What is true of all {one}?", f"All {one} are {whole}.", wrong))
    return found


def _others(rng: random.Random, values: tuple[str, ...], right: int) -> list[str]:
    return rng.sample([value for place, value in enumerate(values) if place != right], 3)


def _numbers(rng: random.Random, text: str, right: int) -> Question:
    wrong = rng.sample(
        [number for number in range(right - 3, right + 4) if number not in (right, 0) and number > 0], 3
    )
    return _question(rng, text, str(right), [str(number) for number in wrong])


def _question(rng: random.Random, text: str, right: str, wrong: list[str]) -> Question:
    answers = [right, *wrong]
    rng.shuffle(answers)
    return Question({"instruction": text}, answers, answers.index(right), text)


class Kept:
    """Measures a model; the base's own answers are kept in ``WORK/base_answers.json``."""

    def __init__(self, work: Path, base: nn.Module, tokenizer: Any):
        self.encoder = Encoder(tokenizer, "auto", 2 * WINDOW)
        self.texts, self.questions = texts(tokenizer), reasoning()
        path = work / "base_answers.json"
        if not path.exists():
            records = [{"instruction": text} for text in GENERAL]
            said = generate_answers(base, self.encoder, records, ANSWER_TOKENS, batch_size=len(records))
            path.write_text(json.dumps(dict(zip(GENERAL, said, strict=True)), indent=1), encoding="utf-8")
        answers = json.loads(path.read_text(encoding="utf-8"))
        self.answers = [
            self.encoder.encode({"instruction": text, "output": answers[text]}) for text in GENERAL if answers[text]
        ]

    @torch.no_grad()
    def measure(self, model: nn.Module) -> dict[str, float]:
        """The three figures of ``model``."""
        model.eval()
        right = grade(model, self.encoder, self.questions, batch_size=32)
        return {
            "prose": self._loss(model, self.texts),
            "reasoning": statistics.mean(right),
            "answers": self._loss(model, self.answers),
        }

    def _loss(self, model: nn.Module, items: list[Example]) -> float:
        total = tokens = 0.0
        for start in range(0, len(items), 16):
            chosen = items[start : start + 16]
            count = sum(item.num_label_tokens for item in chosen)
            total, tokens = total + float(model(**self.encoder.collate(chosen)).loss) * count, tokens + count
        return total / tokens


def main() -> None:
    """Print the base's figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder with the data of benchmarks.language_data")
    args = parser.parse_args()
    model, tokenizer = load_model(str(fetch_model(args.work)))
    print(json.dumps(Kept(args.work, model, tokenizer).measure(model)))


if __name__ == "__main__":
    sys.exit(exit_code(main))

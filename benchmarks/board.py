"""Every method on several subjects, each at its own best learning rate: ``python -m benchmarks.board --work WORK``.

Subjects that the embedded base has never seen (:mod:`.concept_subjects`), five images each, learned in 200 steps of three images
by the methods of :mod:`.board_methods`, all in one training loop (:func:`.peft_baseline.train`), and judged by :mod:`.judging`.

First every method is measured on ``--rate_subjects`` at seed 0 at its second rate, below it while drift is more than 0.015
(mean of these subjects), and at both neighbours of the best; ``--all_rates``: at all four. Its rate is the one of the
highest likeness within this bound. At that rate it is measured on all ``--subjects`` and ``--seeds``, the standard also at
the rate below, so that the others can be compared with it at their own drift and at their own likeness. Rows are appended to
``WORK/board.jsonl`` and never measured twice, by any number of processes at once: the same command again, while it runs or
later, takes what is left.

A row carries the third loss of a short run of its method (``trace``). When a method is changed so that it learns differently,
this is another one, and its rows are measured again.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from effilora_diffusion.core import EffiLoRAError, exit_code
from effilora_diffusion.diffusion.config import TrainingConfig
from effilora_diffusion.diffusion.training.example import example_settings

from .board_methods import MAIN, METHODS
from .board_rows import Row, Rows, matches
from .board_table import best_rate, current, final_rates, final_table, plot, rates_table, rates_to_try
from .concept_subjects import SUBJECTS, Subject, build
from .features import Judge, load_judge
from .judging import LEVELS, OTHER_LEVELS, Board, Others
from .peft_baseline import train

BY_NAME = {subject.name: subject for subject in SUBJECTS}
CHOSEN_ON = ("flat-cat", "robot")
MEASURED_ON = ("flat-cat", "robot", "round-cat", "person", "bird")
CLASS_IMAGES = 48


@dataclass
class Bench:
    """What the rows of one command share.

    Args:
        work: folder for rows, pictures and class images.
        steps: of a run.
        images: that are drawn of a subject.
        judge: describes them.
        levels: noise levels of the loss and of the change.
    """

    work: Path
    steps: int = 200
    images: int = 8
    judge: Judge = field(default_factory=load_judge)
    levels: tuple[int, int] = (LEVELS, OTHER_LEVELS)

    def __post_init__(self) -> None:
        self.rows = Rows(self.work / "board.jsonl")
        self.board, self.trace = cache(self._board), cache(self._trace)

    def _board(self, subject: str) -> Board:
        if not hasattr(self, "others"):
            self.others = Others(self.levels[1])
        one = BY_NAME[subject]
        folders = build(self.work, [one])[subject]
        return Board(self.others, self.judge, one.prompt, *folders, self.images, self.levels[0])

    def settings(self, method: str, subject: Subject, rate: float, seed: int, steps: int) -> TrainingConfig:
        """The example's settings with a method's, a subject and a length."""
        own: dict[str, Any] = {
            "instance_data_dir": str(build(self.work, [subject])[subject.name][0]),
            "instance_prompt": subject.prompt,
            "learning_rate": rate,
            "seed": seed,
            "max_train_steps": steps,
            "train_batch_size": 3,
            "output_dir": str(self.work / "run"),
        }
        if METHODS[method].settings.get("prior_target") == "images":
            own |= {"class_data_dir": str(self.work / "class"), "num_class_images": CLASS_IMAGES}
        return TrainingConfig(**{**example_settings(), **METHODS[method].settings, **own})

    def _trace(self, method: str) -> float:
        config = self.settings(method, SUBJECTS[0], METHODS[method].trace_rate, 0, 3)
        return train(config, METHODS[method].fit).losses[-1]

    def key(self, method: str, subject: str, rate: float, seed: int) -> dict[str, Any]:
        """What a row is a measurement of."""
        own = {"method": method, "subject": subject, "rate": rate, "seed": seed}
        return {**own, "steps": self.steps, "images": self.images, "trace": self.trace(method)}

    def measure(self, key: dict[str, Any]) -> Row:
        """Train and judge one row."""
        subject = key["subject"]
        config = self.settings(key["method"], BY_NAME[subject], key["rate"], key["seed"], self.steps)
        try:
            outcome = train(config, METHODS[key["method"]].fit)
        except EffiLoRAError as error:  # it diverged
            return {**key, "failed": str(error)}
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "trained.safetensors"
            outcome.fitted.save(file)
            size = file.stat().st_size
        board = self.board(subject)
        return {
            **key,
            **board.figures(outcome.family, outcome.fitted.acting),
            "base_loss": board.base_loss,
            "parameters": sum(parameter.numel() for parameter in outcome.fitted.parameters),
            "bytes": size,
            "cpu_seconds": outcome.seconds,
            "machine": f"{platform.machine()}, torch {version('torch')}, peft {version('peft')}",
        }


@dataclass(frozen=True)
class Plan:
    """What is wanted: ``seeds`` of the main methods and ``seeds_of_others`` on ``subjects``, after the ``rate_subjects``."""

    methods: list[str]
    rate_subjects: list[str]
    subjects: list[str]
    seeds: int = 5
    seeds_of_others: int = 1
    all_rates: bool = False

    def wanted(self, rows: list[Row]) -> Iterator[tuple[str, str, float, int]]:
        """Method, subject, rate and seed of every row, as far as rates are known."""
        tried = {one: rates_to_try(rows, one, self.rate_subjects, self.all_rates) for one in self.methods}
        for turn in itertools.zip_longest(*tried.values()):
            for method, rate in zip(tried, turn, strict=True):
                if rate is not None:
                    yield from ((method, subject, rate, 0) for subject in self.rate_subjects)
        for seed in range(max(self.seeds, self.seeds_of_others)):
            for method in self.methods:
                if seed < (self.seeds if method in MAIN else self.seeds_of_others):
                    rate = best_rate(rows, method, self.rate_subjects, self.all_rates)
                    for one in final_rates(method, rate):
                        yield from ((method, subject, one, seed) for subject in self.subjects)


def known(rows: Rows, steps: int, images: int) -> list[Row]:
    """The rows of this length of run, and of what the methods are now."""
    return current([row for row in rows.read() if matches(row, {"steps": steps, "images": images})])


def run(bench: Bench, plan: Plan) -> None:
    """Measure what is missing and nobody else is measuring."""
    while True:
        rows = known(bench.rows, bench.steps, bench.images)
        for parts in plan.wanted(rows):
            key = bench.key(*parts)
            if any(matches(row, key) for row in rows):
                continue
            with bench.rows.claimed(key) as mine:
                if mine:
                    row = bench.measure(key)
                    bench.rows.append(row)
                    figures = ("rise_of_gap", "drift", "loss", "cpu_seconds")
                    print(*parts, *(f"{name} {row.get(name, float('nan')):.4f}" for name in figures), flush=True)
                    break
        else:
            return


def main() -> None:
    """Measure what is missing, print the tables of all rows, and draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for rows, pictures and class images")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, metavar="METHOD")
    parser.add_argument("--rate_subjects", nargs="+", default=list(CHOSEN_ON), choices=BY_NAME)
    parser.add_argument("--subjects", nargs="*", default=list(MEASURED_ON), choices=BY_NAME)
    parser.add_argument("--seeds", type=int, default=5, help=f"of {'; '.join(MAIN)}")
    parser.add_argument("--seeds_of_others", type=int, default=1)
    parser.add_argument("--all_rates", action="store_true", help="all four, also those beyond the bound")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--images", type=int, default=8, help="drawn of a subject")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    parser.add_argument("--plot", type=Path, help="draw likeness against drift here, a PNG")
    args = parser.parse_args()
    if not args.table:
        plan = Plan(args.methods, args.rate_subjects, args.subjects, args.seeds, args.seeds_of_others, args.all_rates)
        run(Bench(args.work, args.steps, args.images), plan)
    rows = known(Rows(args.work / "board.jsonl"), args.steps, args.images)
    print(rates_table(rows, args.rate_subjects), final_table(rows, args.rate_subjects), sep="\n\n")
    if args.plot:
        plot(rows, args.rate_subjects, args.plot)


if __name__ == "__main__":
    sys.exit(exit_code(main))

"""Mixed tasks on a small language model: ``python -m benchmarks.language --work WORK``.

SmolLM2-135M-Instruct learns the tasks of ``language_data.py``. PEFT's LoRA, HydraLoRA (our core with an A per layer; the router
reads A x, as ours) and EffiLoRA have nearly the same number of trained parameters, see the same batches in the same
``Trainer``, and are each shown at their best of several learning rates, chosen by the loss on validation concepts. Judged on
concepts that nobody trained on:

- exact: share of the answers that greedy generation gives word for word;
- choice: share of the questions whose right answer is the likeliest of five;
- what is kept of the base, which nobody trained on: see ``language_kept.py``.

Also: an adapter per task against one for all tasks, with the same examples seen per task; and the Reducer at half and a quarter
of the layers. Every finished run is a line of ``WORK/language_runs.jsonl``; what is there is not run again, so the command can
be stopped, continued, and shared by processes with ``--methods``. ``--table`` only prints what is there.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

from effilora_diffusion import EffiLoRAConfig, ReducerConfig, attach, detach
from effilora_diffusion.core import EffiLoRA, Reducer, exit_code
from effilora_diffusion.language.batches import Example
from effilora_diffusion.language.encoding import Encoder
from effilora_diffusion.language.examples import Examples
from effilora_diffusion.language.generate import generate_answers
from effilora_diffusion.language.models import load_model
from effilora_diffusion.language.multiple_choice import grade, parse_question
from effilora_diffusion.language.sources import read_records
from effilora_diffusion.language.targets import create_adapter
from effilora_diffusion.language.trainer import ReducerCallback

from .language_data import TASKS, fetch_model
from .language_kept import Kept

TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
LORA = "PEFT LoRA"
CONFIGS: dict[str, dict[str, Any]] = {
    "HydraLoRA": {"rank": 9, "a_sharing": "none"},
    "EffiLoRA": {"rank": 12},
    "EffiLoRA, one head": {"rank": 35, "heads": 1},
    "EffiLoRA, 50% of layers": {"rank": 12, "reducer": ReducerConfig(mode="importance", active=0.5)},
    "EffiLoRA, 25% of layers": {"rank": 12, "reducer": ReducerConfig(mode="importance", active=0.25)},
}
"""Ours, three heads each unless it says so. At these ranks all have between 3.2 and 3.35 million parameters, as the LoRA of
rank 16."""

LORA_RANK = 16
RATES = (3e-3, 6e-3, 1.5e-3, 1.2e-2)
BATCH, ANSWER_TOKENS = 8, 24
WARMUP = 20


class Bench:
    """The model, its data, and what is done to every method alike."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.model, tokenizer = load_model(str(fetch_model(args.work)))
        self.encoder = Encoder(tokenizer, "plain", 64)
        self.records = {
            part: read_records(args.work / f"{part}.jsonl") for part in ("train", "validation", "held_out")
        }
        self.log = args.work / "language_runs.jsonl"
        self.kept = Kept(args.work, self.model, tokenizer)

    def autocast(self) -> Any:
        """The computation's type, the same for all methods."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.args.bf16)

    def examples(self, part: str, task: str | None) -> list[Example]:
        """The examples of one part of the data, of one task or all."""
        return [*Examples.of([r for r in self.records[part] if task in (None, r["task"])], self.encoder, part).tokens]

    def train(
        self, model: nn.Module, items: list[Example], rate: float, seed: int, steps: int, more: list[Any]
    ) -> None:
        """Train what asks for gradients."""
        arguments = TrainingArguments(
            output_dir=str(self.args.work / "trainer"), max_steps=steps, per_device_train_batch_size=BATCH,
            learning_rate=rate, lr_scheduler_type="cosine", warmup_steps=min(WARMUP, steps // 5), seed=seed,
            bf16=self.args.bf16, use_cpu=True, save_strategy="no", report_to=[], disable_tqdm=True,
            logging_strategy="no", remove_unused_columns=False, dataloader_num_workers=0,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=items, data_collator=self.encoder.collate, callbacks=more)  # type: ignore[arg-type]
        trainer.train()
        trainer.accelerator.unwrap_model(
            model, keep_fp32_wrapper=False
        )  # else every run would wrap the base once more

    @torch.no_grad()
    def loss(self, model: nn.Module, items: list[Example]) -> float:
        """Mean loss over all answered tokens."""
        model.eval()
        total = tokens = 0.0
        ordered = sorted(items, key=lambda item: len(item.ids))
        for start in range(0, len(ordered), 32):
            chosen = ordered[start : start + 32]
            with self.autocast():
                found = float(model(**self.encoder.collate(chosen)).loss)
            count = sum(item.num_label_tokens for item in chosen)
            total, tokens = total + found * count, tokens + count
        return total / tokens

    @torch.no_grad()
    def judge(self, model: nn.Module, task: str | None = None) -> dict[str, dict[str, float]]:
        """Exact matches and choices among five on the held-out questions, by task."""
        model.eval()
        records = [record for record in self.records["held_out"] if task in (None, record["task"])]
        with self.autocast():
            said = generate_answers(model, self.encoder, records, ANSWER_TOKENS, batch_size=64)
            right = grade(model, self.encoder, [parse_question(record) for record in records], batch_size=64)
        found: dict[str, dict[str, list[bool]]] = {}
        for record, text, chosen in zip(records, said, right, strict=True):
            figures = found.setdefault(record["task"], {"exact": [], "choice": []})
            figures["exact"].append(text == record["output"])
            figures["choice"].append(chosen)
        return {task: {name: statistics.mean(values) for name, values in of.items()} for task, of in found.items()}

    def figures(self, model: nn.Module, task: str | None = None) -> dict[str, Any]:
        """What is kept of the base, and how the held-out questions are answered unless they are left out."""
        with self.autocast():
            kept = self.kept.measure(model)
        return {"kept": kept, **({"held_out": self.judge(model, task)} if self.args.questions else {})}

    def done(self) -> list[dict[str, Any]]:
        """The runs that are written already."""
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def write(self, run: dict[str, Any]) -> None:
        """Keep a finished run."""
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(run) + "\n")
        print({name: value for name, value in run.items() if name != "held_out"}, flush=True)


@contextmanager
def adapted(bench: Bench, method: str, seed: int) -> Iterator[tuple[nn.Module, list[Any]]]:
    """The model with a fresh adapter of ``method`` and its callbacks; afterwards the base again."""
    torch.manual_seed(seed)
    if method == LORA:
        config = LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=list(TARGETS), task_type="CAUSAL_LM")
        model = get_peft_model(bench.model, config)  # type: ignore[arg-type]
        yield model, []
        model.unload()  # type: ignore[operator]
        return
    config = EffiLoRAConfig(**{"heads": 3, "target_modules": TARGETS, **CONFIGS[method]})
    adapter = attach(bench.model, create_adapter(bench.model, config, seed))
    yield bench.model, _reducer(bench, adapter, seed)
    detach(bench.model)


def _reducer(bench: Bench, adapter: EffiLoRA, seed: int) -> list[Any]:
    if adapter.config.reducer.mode == "off":
        return []
    measured = bench.encoder.collate(bench.examples("train", None)[:16])
    return [ReducerCallback(Reducer(adapter, seed), bench.model, [measured])]


def run(
    bench: Bench, method: str, rate: float, seed: int, task: str | None = None, worth: float = math.inf
) -> dict[str, Any]:
    """One training run with its figures, or the line that an earlier one wrote.

    It is judged on the held-out questions only if its validation loss is below ``worth``.
    """
    key = {"method": method, "rate": rate, "seed": seed, "task": task, "steps": bench.args.steps}
    key["bf16"] = bench.args.bf16
    for line in bench.done():
        if all(line[name] == value for name, value in key.items()):
            return line
    steps = bench.args.steps if task is None else round(bench.args.steps / len(TASKS))
    with adapted(bench, method, seed) as (model, callbacks):
        trained = sum(value.numel() for value in model.parameters() if value.requires_grad)
        bench.train(model, bench.examples("train", task), rate, seed, steps, callbacks)
        loss = bench.loss(model, bench.examples("validation", task))
        line = {**key, "trained": trained, "loss": loss}
        if loss < worth:
            line |= bench.figures(model, task)
    bench.write(line)
    return line


def sweep(bench: Bench, method: str) -> float:
    """The method's best learning rate on the first seed."""
    runs: list[dict[str, Any]] = []
    for rate in bench.args.rates:
        worth = min((line["loss"] for line in runs), default=math.inf)
        runs.append(run(bench, method, rate, bench.args.seeds[0], worth=worth))
    return best_rate(runs)


def best_rate(runs: list[dict[str, Any]]) -> float:
    """The learning rate of the run with the lowest loss on validation concepts."""
    return float(min(runs, key=lambda line: line["loss"])["rate"])


def work_through(bench: Bench) -> None:
    """Every run of the chosen methods that is not written yet."""
    args = bench.args
    if "base" in args.methods and not any(line["method"] == "base" for line in bench.done()):
        items = bench.examples("validation", None)
        bench.write({"method": "base", "rate": 0, "seed": 0, "task": None, "steps": args.steps,
                     "bf16": args.bf16, "trained": 0,
                     "loss": bench.loss(bench.model, items), **bench.figures(bench.model)})  # fmt: skip
    for method in args.methods:
        if method == "base":
            continue
        rate = sweep(bench, "EffiLoRA" if "layers" in method else method)  # the Reducer keeps the adapter's rate
        for seed in args.seeds:
            run(bench, method, rate, seed)
        for task in TASKS if args.questions and "layers" not in method else ():
            run(bench, method, rate, args.seeds[0], task)


def _spread(values: list[float], form: str) -> str:
    if len(values) == 1:
        return form.format(values[0])
    return f"{form.format(statistics.mean(values))} ({form.format(min(values))} to {form.format(max(values))})"


def _row(name: str, runs: list[dict[str, Any]], figure: Callable[[dict[str, Any], str], float], form: str) -> str:
    cells = [_spread([figure(run, task) for run in runs], form) for task in TASKS]
    mean = _spread([statistics.mean(figure(run, task) for task in TASKS) for run in runs], form)
    return f"| {name} | {' | '.join(cells)} | {mean} |"


def _print_kept(chosen: dict[str, list[dict[str, Any]]]) -> None:
    """What the methods keep of the base, as far as it was measured."""
    print("\n| | loss on prose | reasoning, % | loss on the base's answers |\n|---|---|---|---|")
    for method, lines in chosen.items():
        kept = [line["kept"] for line in lines if "kept" in line]
        if kept:
            prose, answers = (_spread([line[name] for line in kept], "{:.3f}") for name in ("prose", "answers"))
            print(
                f"| {method} | {prose} | {_spread([100 * line['reasoning'] for line in kept], '{:.1f}')} | {answers} |"
            )


def print_tables(runs: list[dict[str, Any]]) -> None:
    """Markdown tables of what has been run."""
    mixed = [line for line in runs if line["task"] is None]
    chosen: dict[str, list[dict[str, Any]]] = {}
    for method in dict.fromkeys(line["method"] for line in mixed):
        own = [line for line in mixed if line["method"] == method]
        rate = best_rate([line for line in own if line["seed"] == own[0]["seed"]])
        chosen[method] = [line for line in own if line["rate"] == rate]
    print("\n| | trained | lr | losses at the rates | loss |\n|---|---|---|---|---|")
    for method, lines in chosen.items():
        sweep = {
            line["rate"]: line["loss"]
            for line in mixed
            if line["method"] == method and line["seed"] == lines[0]["seed"]
        }
        rates = ", ".join(f"{rate:g}: {loss:.3f}" for rate, loss in sorted(sweep.items()))
        print(f"| {method} | {lines[0]['trained']:,} | {lines[0]['rate']:g} | {rates} | "
              f"{_spread([line['loss'] for line in lines], '{:.3f}')} |")  # fmt: skip
    _print_kept(chosen)
    answered = all("held_out" in line for lines in chosen.values() for line in lines)
    for kind in ("exact", "choice") if answered else ():
        figure = lambda line, task, kind=kind: 100 * line["held_out"][task][kind]  # noqa: E731
        print(
            f"\n{kind}, % of held-out questions\n\n| | {' | '.join(TASKS)} | mean |\n|---|{'---|' * (len(TASKS) + 1)}"
        )
        for method, lines in chosen.items():
            print(_row(method, lines, figure, "{:.1f}"))
            single = [line for line in runs if line["method"] == method and line["task"] is not None]
            if len(single) == len(TASKS):
                merged = {"held_out": {line["task"]: line["held_out"][line["task"]] for line in single}}
                print(_row(f"{method}, one adapter per task", [merged], figure, "{:.1f}"))


def main() -> None:
    """Run what is missing, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder with the data of benchmarks.language_data")
    parser.add_argument("--methods", nargs="+", default=["base", LORA, *CONFIGS], choices=("base", LORA, *CONFIGS))
    parser.add_argument("--rates", nargs="+", type=float, default=list(RATES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300, help=f"optimizer steps of {BATCH} examples")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16 (for processors that have it)")
    parser.add_argument(
        "--questions", action=argparse.BooleanOptionalAction, default=True,
        help="answer the held-out questions, and train adapters of one task each; without it only losses and what is kept",
    )  # fmt: skip
    parser.add_argument("--table", action="store_true", help="only print the tables")
    args = parser.parse_args()
    if not args.table:
        work_through(Bench(args))
    print_tables([json.loads(line) for line in (args.work / "language_runs.jsonl").read_text().splitlines()])


if __name__ == "__main__":
    sys.exit(exit_code(main))

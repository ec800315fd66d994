"""Does the plain LoRA draw the adapter's images? ``python -m benchmarks.plain_lora``.

Trains the example subject once per routing and seed, makes its plain LoRA in several ways, loads each in a fresh stock pipeline
with ``pipe.load_lora_weights``, and judges it as ``benchmarks.frontier`` does, beside the adapter itself: loss and change of the
predictions, likeness (``rise_of_gap``) and drift of the images. Also checks that strength 0 and removal give the base's images
back. Trained adapters and rows are kept in ``--work`` and neither is made twice, so that the command can be interrupted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from effilora_diffusion import load_adapter, remove_adapter
from effilora_diffusion.core import AdapterFile, exit_code, is_exact, load_adapter_file
from effilora_diffusion.core.files import ADAPTER_FILE
from effilora_diffusion.diffusion.adapters.export import export
from effilora_diffusion.diffusion.config import TrainingConfig
from effilora_diffusion.diffusion.models import make_family
from effilora_diffusion.diffusion.models.pipelines import load_pipeline
from effilora_diffusion.diffusion.training.batches import BatchDrawer
from effilora_diffusion.diffusion.training.example import example_settings
from effilora_diffusion.diffusion.training.plain import PlainForm, PlainMaker
from effilora_diffusion.diffusion.training.trainer import Trainer

from .features import load_judge
from .judging import Board, Others
from .subject import HELD_OUT, OTHER_PROMPTS, OURS, draw, draw_all, drift, settings

FORMS: dict[str, tuple[bool, int]] = {
    "fit, subject alone": (False, 0),
    "fit": (True, 0),
    "distilled, 60 steps": (True, 60),
    "distilled, 120 steps": (True, 120),
}
"""Ways to make a plain LoRA: whether rows of everything but the subject are seen, and steps of distillation."""

SHORT = [str(example_settings()["instance_prompt"]), *OTHER_PROMPTS[:3]]
"""Prompts for which the base's images must come back."""

SHOWN = ("rise_of_gap", "drift", "loss", "change", "gap subject", "gap others", "grey levels", "seconds")

Images = tuple[list[Image.Image], list[Image.Image]]


def difference(one: Images, other: Images) -> np.ndarray:
    """Differences of corresponding images, in grey levels of 255."""
    pairs = zip([*one[0], *one[1]], [*other[0], *other[1]], strict=True)
    return np.stack([np.abs(np.asarray(a, dtype=float) - np.asarray(b, dtype=float)) for a, b in pairs])


class Method:
    """One trained adapter and what is made of it.

    Args:
        board: judges.
        config: of the run, which is not repeated where its adapter is in its folder.
        folder: to write into.
    """

    def __init__(self, board: Board, config: TrainingConfig, folder: Path):
        assert board.reference is not None
        self.board, self.reference, self.folder = board, board.reference, folder
        run = Path(config.output_dir)
        if not (run / ADAPTER_FILE).exists():
            Trainer(config).run()
        self.content = load_adapter_file(run / ADAPTER_FILE)
        self.trainer = Trainer(replace(config, output_dir=str(folder / "run")))  # for its batches
        with torch.no_grad():
            for target, value in zip(
                self.trainer.adapter.parameters(), self.content.adapter.parameters(), strict=True
            ):
                target.copy_(value)
        self.trainer.adapter.eval()
        self.trainer.folder.release()
        pipe = load_pipeline(None)
        base = draw(pipe, SHORT)
        adapter = load_adapter(pipe, run)
        self.native, self.images = self.judged(pipe)
        adapter.strength = 0.0
        silent = draw(pipe, SHORT)
        remove_adapter(pipe, adapter)
        for images, what in ((silent, "strength 0"), (draw(pipe, SHORT), "removal")):
            if difference((base, []), (images, [])).max() > 0:
                raise AssertionError(f"{what} does not give the base's images back")

    def judged(self, pipe: Any) -> tuple[dict[str, float], Images]:
        """Figures of what a pipeline draws and predicts, and its images."""
        images, family = draw_all(pipe), make_family(pipe, torch.device("cpu"))
        found = {"loss": self.board.probe.loss(family), "change": self.board.others.change(family)}
        return found | self.reference.figures(*images), images

    def make(self, mixed: bool, steps: int) -> PlainForm:
        """The plain LoRA in one of the ways."""
        run = self.trainer
        batches = run.batches
        if not mixed:
            batches = BatchDrawer(run.family, run.objective, batches.instance, others=batches.instance)
        rows = run.config.train_batch_size
        maker = PlainMaker(run.family, run.objective, run.adapter, batches, torch.device("cpu"), rows)
        return maker.make(steps, print)

    def row(self, form: str) -> dict[str, Any]:
        """Figures of a plain LoRA, or of the adapter itself."""
        if form == "adapter":
            return self.native
        began = time.process_time()
        plain = PlainForm({}) if is_exact(self.content.adapter) else self.make(*FORMS[form])
        seconds = time.process_time() - began
        content = AdapterFile(self.content.adapter, self.content.metadata, plain.calibration, plain=plain.adapter)
        export(content, self.folder / "plain" / "pytorch_lora_weights.safetensors", "diffusers")
        pipe = load_pipeline(None)
        pipe.load_lora_weights(self.folder / "plain")
        found, images = self.judged(pipe)
        apart = difference(self.images, images)
        features = drift(self.reference.judge, [*self.images[0], *self.images[1]], [*images[0], *images[1]])
        gaps = {"gap subject": plain.gap.subject, "gap others": plain.gap.others}
        apart_by = {"grey levels": float(apart.mean()), "largest": float(apart.max()), "feature distance": features}
        return {**found, **gaps, **apart_by, "seconds": seconds}


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows that are kept in a file."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def table(rows: list[dict[str, Any]]) -> str:
    """Means over seeds, their range in brackets, as Markdown."""
    lines = ["| method | plain LoRA | seeds | " + " | ".join(SHOWN) + " |", "|---" * (3 + len(SHOWN)) + "|"]
    for method, form in dict.fromkeys((row["method"], row["form"]) for row in rows):
        found, cells = [row for row in rows if (row["method"], row["form"]) == (method, form)], []
        for name in SHOWN:
            values = [row[name] for row in found if name in row]
            spread = f" ({min(values):.4g} to {max(values):.4g})" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.4g}{spread}" if values else "")
        lines.append(f"| {method} | {form} | {len(found)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is missing, and print the table of all rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(OURS), choices=OURS)
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="NAME=VALUE", help="change the example's settings (JSON)"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("outputs/plain_lora"), help="where adapters and rows are kept"
    )
    args = parser.parse_args()
    changes = {name: json.loads(value) for name, _, value in (text.partition("=") for text in args.set)}
    torch.manual_seed(0)
    args.work.mkdir(parents=True, exist_ok=True)
    example, kept = example_settings(), args.work / "rows.jsonl"
    board = Board(Others(), load_judge(), example["instance_prompt"], Path(example["instance_data_dir"]), HELD_OUT)
    rate = float(example["learning_rate"])
    for method, seed in ((method, seed) for seed in args.seeds for method in args.methods):
        exact = method in ("static", "1 head")
        keys = [
            {"method": method, "seed": seed, "form": form, "settings": changes}
            for form in ("adapter", *(["exact"] if exact else args.forms))
        ]
        missing = [key for key in keys if not any(key.items() <= row.items() for row in rows_of(kept))]
        if not missing:
            continue
        output = args.work / "-".join([method, str(seed), *args.set])
        config = settings(method, seed, rate, str(output), {**changes, "export_distillation_steps": 0})
        with tempfile.TemporaryDirectory() as folder:
            trained = Method(board, config, Path(folder))
            for key in missing:
                row = {**key, **trained.row(key["form"])}
                with kept.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                print({name: round(v, 4) if isinstance(v, float) else v for name, v in row.items()}, flush=True)
    print(table(rows_of(kept)))


if __name__ == "__main__":
    sys.exit(exit_code(main))

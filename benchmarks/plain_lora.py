"""Does the plain LoRA draw the adapter's images? ``python -m benchmarks.plain_lora``.

Trains the example subject once per routing, then draws the same prompts and seeds with the adapter and, in a fresh stock
pipeline, with ``pipe.load_lora_weights``. Also checks that strength 0 and removal give the base's images back.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from effilora_diffusion import load_adapter, remove_adapter
from effilora_diffusion.core import exit_code
from effilora_diffusion.diffusion.models.pipelines import load_pipeline
from effilora_diffusion.diffusion.training.example import example_settings
from effilora_diffusion.diffusion.training.trainer import Trainer

from .features import Judge, load_judge
from .subject import IMAGES, OTHER_PROMPTS, OURS, draw, drift, settings


def prompts() -> list[str]:
    """Half of them name the subject, half do not."""
    return [example_settings()["instance_prompt"]] * (IMAGES // 2) + list(OTHER_PROMPTS[: IMAGES // 2])


def difference(one: list[Image.Image], other: list[Image.Image]) -> dict[str, float]:
    """Largest and mean difference of corresponding images, in grey levels of 255."""
    pairs = zip(one, other, strict=True)
    apart = np.stack([np.abs(np.asarray(a, dtype=float) - np.asarray(b, dtype=float)) for a, b in pairs])
    return {"largest": float(apart.max()), "mean": float(apart.mean())}


def measure(method: str, seed: int, judge: Judge, base: list[Image.Image]) -> dict[str, Any]:
    """Train one method and compare its images with those of its plain LoRA, and with the base's."""
    rate = float(example_settings()["learning_rate"])
    with tempfile.TemporaryDirectory() as folder:
        summary = Trainer(settings(method, seed, rate, f"{folder}/run", {})).run()
        pipe = load_pipeline(None)
        adapter = load_adapter(pipe, f"{folder}/run")
        native = draw(pipe, prompts())
        adapter.strength = 0.0
        silent = draw(pipe, prompts())
        remove_adapter(pipe, adapter)
        removed = draw(pipe, prompts())
        stock = load_pipeline(None)
        stock.load_lora_weights(f"{folder}/run")
        plain = draw(stock, prompts())
    return {
        "update missing": summary.export_error,
        "image difference": difference(native, plain),
        "feature distance": drift(judge, native, plain),
        "feature distance of the adapter itself": drift(judge, base, native),
        "strength 0 equals base": difference(base, silent)["largest"] == 0,
        "removed equals base": difference(base, removed)["largest"] == 0,
    }


def main() -> None:
    """Print one block per method, and write the figures where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(OURS), choices=OURS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--json", type=Path, help="also write every figure here")
    args = parser.parse_args()
    torch.manual_seed(0)
    judge, base = load_judge(), draw(load_pipeline(None), prompts())
    results = {}
    for method in args.methods:
        for seed in args.seeds:
            found = results[f"{method}, seed {seed}"] = measure(method, seed, judge, base)
            print(f"{method}, seed {seed}: {json.dumps(found)}", flush=True)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(exit_code(main))

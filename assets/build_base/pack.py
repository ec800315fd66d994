"""Pack the embedded base: ``python -m assets.build_base.pack --work DIR --output assets/base --report report.json``.

The trained pipeline is stored in half precision, checked, and given its model card, its notices and its licences.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import textwrap
from pathlib import Path

import numpy as np
from diffusers import StableDiffusionPipeline

from effilora_diffusion.core import exit_code
from effilora_diffusion.core.errors import EffiLoRAError

from .evaluate import PROMPTS, generate, judged_prompts, load_pipeline
from .icons import BACKGROUNDS, PACKAGES, SIZE, STYLES, SUBJECT_HELD_OUT, SUBJECT_TRAIN, caption, concepts

ART = {
    "noto": ("Noto Emoji", "Google Inc.", "Apache-2.0"),
    "twemoji": ("Twemoji graphics", "Twitter, Inc and other contributors, continued by jdecked", "CC-BY-4.0"),
    "fluent": ("Fluent Emoji (flat)", "Microsoft Corporation", "MIT"),
    "labels": ("emojibase-data (names and tags)", "Miles Johnson", "MIT"),
}
"""What each training package holds, by whom, under which licence; keys as in ``PACKAGES``."""

NOTICE = """\
Embedded base of effilora-diffusion

The weights in this folder were trained on the following works, drawn at 64 x 64 pixels and laid on plain colours.
None of their authors endorses this model.

Noto Emoji
  Copyright Google Inc. (https://github.com/googlefonts/noto-emoji)
  Apache License 2.0: LICENSES/Apache-2.0.txt

Twemoji graphics
  Copyright Twitter, Inc and other contributors; continued by jdecked (https://github.com/jdecked/twemoji)
  Creative Commons Attribution 4.0 International: LICENSES/CC-BY-4.0.txt,
  https://creativecommons.org/licenses/by/4.0/legalcode

Fluent Emoji
  Copyright (c) Microsoft Corporation (https://github.com/microsoft/fluentui-emoji)
  MIT License: LICENSES/MIT-fluent-emoji.txt

emojibase-data (names and tags of the emoji)
  Copyright (c) 2017-2019 Miles Johnson (https://github.com/milesj/emojibase)
  MIT License: LICENSES/MIT-emojibase.txt
"""

CARD = """\
---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
language: en
tags: [stable-diffusion, emoji]
---

# Embedded base of effilora-diffusion

A small Stable Diffusion that draws emoji-like pictures of {count} things at {edge} x {edge} pixels, so that adapters
can be trained, tested and tried out on a CPU. It is an ordinary `StableDiffusionPipeline` (autoencoder, CLIP text
encoder, UNet, DDIM with v-prediction), stored in half precision:

```python
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained("assets/base")
pipe("{example}", num_inference_steps={steps}, guidance_scale={guidance}).images[0]
```

![64 of the judged prompts, none left out](samples.png)

## Prompts

"a STYLE emoji of THING on a COLOUR background", for example "{example}".
Style and background may be left out ("an emoji of fox"); an unnamed background is white.

- Styles: {styles}.
- Backgrounds: {backgrounds}.
- Things: animals, plants, food, vehicles, buildings, sky and weather, objects, faces and signs.

<details><summary>All {count} things</summary>

{concepts}.

</details>

## Limits

It draws emoji-like pictures of about 250 things at {edge}x{edge}, nothing else: no photographs, no scenes, no text, no
people, and one thing a picture. Words outside its training captions mean nothing to it. The CLIP text encoder shares
only its design with OpenAI's; it was trained from scratch with the UNet.

## Training data

Downloaded from npm at these versions, each checked by its SHA-512:

| What | By | Package | Version | Licence |
| --- | --- | --- | --- | --- |
{data}

Attributions are in `NOTICE`, licence texts in `LICENSES/`. Never trained on:

- The cats of Twemoji, in no part of the model: they are the example subject that an adapter teaches. They are
{subjects}.
- Every fifth concept outside the {count} things: the PSNR of the autoencoder, which alone saw the others, is measured
  on them.

"Text obeyed" is measured on things that the UNet and the text encoder were trained on, from fixed seeds: it tells that
prompts are followed, not that new things can be drawn.

## Measured

| What | Measured | Goal | Met |
| --- | --- | --- | --- |
{figures}

Text obeyed: {prompts} prompts ({steps} steps, guidance {guidance}) of 100 things; the picture counts if, by the
features of an ImageNet EfficientNet-Lite0 that took no part in training (pictures smoothed by a pixel first, which
makes it a better judge: `python -m benchmarks.features`), its nearest neighbour among the true pictures
of those 100 things, in the asked style on the asked background, is the asked one. Background right: the four corners
of the picture vote; of the true pictures {background_ceiling_percent} % pass. The figures are those of the float32
weights; half precision is checked against them when the base is packed.

## Rebuild and measure again

From the root of the repository, with its `base` extra installed and `npm` at hand:

```
python -m assets.build_base.train_vae --work WORK
python -m assets.build_base.train_vae --work WORK --decoder-only --lr 1e-3 --steps 6000
python -m assets.build_base.train_unet --work WORK
python -m assets.build_base.evaluate --pipeline WORK/pipeline --work WORK --json report.json --grid grid.png
python -m assets.build_base.pack --work WORK --output assets/base --report report.json --grid grid.png
python -m assets.build_base.evaluate --pipeline assets/base --work WORK
```
"""

LICENSES = Path(__file__).parent / "licenses"
LIMIT = 40_000_000
"""The most bytes the packed folder may hold."""
CHECKED = 6
"""How many judged prompts are drawn by the packed and the unpacked weights."""
GREY_LEVELS = 3.0
"""The mean difference, of 255, that half precision may make in any of those pictures."""


GOALS = (
    # what, key in the report, unit, at least
    ("Autoencoder, PSNR on {vae_pictures} icons held out", "vae_psnr_db", "dB", 26.0),
    ("Text obeyed, top-1 of 100", "text_top1_percent", "%", 60.0),
    ("Text obeyed, top-5 of 100", "text_top5_percent", "%", None),
    ("Background right", "background_percent", "%", 95.0),
)


def model_card(report: dict[str, float]) -> str:
    """The model card with the figures of ``report``, in Hugging Face's form (a YAML header, then Markdown)."""
    figures = []
    for what, key, unit, goal in GOALS:
        target = "| | |" if goal is None else f"| >= {goal:g} {unit} | {'yes' if report[key] >= goal else 'no'} |"
        figures.append(f"| {what.format(**report)} | {report[key]} {unit} {target}")
    data = [f"| {' | '.join(ART[key][:2])} | {' | '.join(PACKAGES[key])} | {ART[key][2]} |" for key in PACKAGES]
    return CARD.format(
        count=len(concepts()),
        edge=SIZE,
        example=caption("fox", "noto", "blue"),
        styles=", ".join(STYLES),
        backgrounds=", ".join(BACKGROUNDS),
        concepts=textwrap.fill(", ".join(concepts()), 119, break_on_hyphens=False),
        subjects=textwrap.fill(
            ", ".join(SUBJECT_TRAIN + SUBJECT_HELD_OUT), 117, initial_indent="  ", subsequent_indent="  "
        ),
        data="\n".join(data),
        figures="\n".join(figures),
        prompts=report["prompts"],
        steps=report["steps"],
        guidance=report["guidance"],
        background_ceiling_percent=report["background_ceiling_percent"],
    )


def read_report(file: Path) -> dict[str, float]:
    """The figures that ``evaluate --json`` wrote; those of a quick look are refused."""
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EffiLoRAError(f"{file} cannot be read as a report ({error}): write it with evaluate --json") from None
    if report.get("prompts") != PROMPTS:
        raise EffiLoRAError(f"{file} judges {report.get('prompts')} prompts, not {PROMPTS}: evaluate without --quick")
    return report


def empty_output(output: Path) -> None:
    """Make way for a new base, and never for anything that is not an older base."""
    if output.is_dir() and any(output.iterdir()):
        if not (output / "model_index.json").is_file():
            raise EffiLoRAError(f"{output} holds something that is not a pipeline: give an empty folder as --output")
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)


def save_half(pipe: StableDiffusionPipeline, output: Path) -> None:
    """Store the pipeline in float16; ``pipe`` is left in float16."""
    for part in (pipe.vae, pipe.text_encoder, pipe.unet):  # pipe.to() would warn that a CPU cannot run float16
        part.half()
    pipe.save_pretrained(output, safe_serialization=True)
    for weights in output.rglob("*.safetensors"):
        weights.chmod(0o644)  # safetensors writes for the owner alone, and a wheel would carry that to every user
    # A plain from_pretrained obeys this entry: as float16 it would load the text encoder, and nothing else, in half.
    config = output / "text_encoder" / "config.json"
    entries = json.loads(config.read_text(encoding="utf-8"))
    entries["dtype"] = "float32"
    config.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
    for config in output.rglob("*.json"):
        entries = json.loads(config.read_text(encoding="utf-8"))
        if isinstance(entries, dict) and entries.pop("_name_or_path", None):  # where this machine keeps its files
            config.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")


def difference(before: np.ndarray, after: np.ndarray) -> float:
    """Mean absolute difference, in grey levels, of the least equal pair; both ``(n, h, w, 3)`` uint8."""
    return float(np.abs(before.astype(int) - after.astype(int)).mean((1, 2, 3)).max())


def add_documents(output: Path, report: dict[str, float], grid: Path) -> None:
    """Write the model card with its pictures and the notices, and copy the licences."""
    shutil.copyfile(grid, output / "samples.png")
    (output / "README.md").write_text(model_card(report), encoding="utf-8")
    (output / "NOTICE").write_text(NOTICE, encoding="utf-8")
    (output / "LICENSES").mkdir()
    for file in sorted(LICENSES.iterdir()):
        shutil.copyfile(file, output / "LICENSES" / file.name)


def main() -> None:
    """Pack, reload, compare, measure the size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder whose pipeline/ train_unet has written")
    parser.add_argument("--output", type=Path, required=True, help="folder to write the base to")
    parser.add_argument("--report", type=Path, required=True, help="figures of that pipeline, from evaluate --json")
    parser.add_argument("--grid", type=Path, required=True, help="its pictures, from evaluate --grid")
    args = parser.parse_args()

    report = read_report(args.report)
    pipe = load_pipeline(args.work / "pipeline")
    prompts = judged_prompts()[:CHECKED]
    before = generate(pipe, prompts)
    empty_output(args.output)
    save_half(pipe, args.output)
    add_documents(args.output, report, args.grid)
    changed = difference(before, generate(load_pipeline(args.output), prompts))
    size = sum(file.stat().st_size for file in args.output.rglob("*") if file.is_file())
    print(f"{size / 1e6:.1f} MB; half precision changes a picture by {changed:.2f} grey levels at most, on average")
    if size >= LIMIT:
        raise SystemExit(f"{args.output} holds {size} bytes, {LIMIT} are allowed")
    if changed > GREY_LEVELS:
        raise SystemExit(f"half precision changes a picture by {changed:.2f} grey levels, {GREY_LEVELS} are allowed")


if __name__ == "__main__":
    sys.exit(exit_code(main))

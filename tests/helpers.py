"""Short training runs on the tiny pipeline: images to learn, settings that suit 32 pixels, and what a run left."""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from effilora_diffusion.diffusion.config import TrainingConfig
from effilora_diffusion.diffusion.training.trainer import Trainer

PROMPT = "a sks cat"

QUICK = {
    "instance_prompt": PROMPT,
    "resolution": 32,
    "center_crop": True,
    "train_batch_size": 1,
    "a_start": "kaiming",
    "rank": 4,
    "heads": 3,
    "max_train_steps": 2,
    "num_validation_images": 1,
    "validation_inference_steps": 1,
    "validation_guidance_scale": 1.0,
    "report_to": ["none"],
    "judge": "none",
    "export_distillation_steps": 1,
}
"""Settings of a run that takes a second, with several heads, at rates that suit the shorter A.

The model, the images and the output folder are given by each test.
"""


def image(seed, size=(32, 32)):
    """A smooth random image: two colours that run into each other, and a dark bar."""
    rng = np.random.default_rng(seed)
    width, height = size
    left, right = rng.integers(0, 256, (2, 3))
    ramp = np.linspace(0, 1, width)[None, :, None]
    array = np.broadcast_to(left + (right - left) * ramp, (height, width, 3)).copy()
    top = int(rng.integers(0, height - 6))
    array[top : top + 6] = rng.integers(0, 60, 3)
    return Image.fromarray(array.astype(np.uint8))


def make_subject(folder, count=3, first=0, captions=(), size=(32, 32)):
    """A folder with ``count`` images ``0.png``, ``1.png``, ...; ``captions`` go into text files beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        image(first + index, size).save(folder / f"{index}.png")
    for index, caption in enumerate(captions):
        (folder / f"{index}.txt").write_text(caption, encoding="utf-8")
    return folder


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def sharp_pipeline(tiny, folder, prediction_type="v_prediction"):
    """A copy of the tiny pipeline with latents of unit size and without noise of their own, so that it can learn.

    The random autoencoder of the tiny pipeline drowns every image in noise.
    """
    shutil.copytree(tiny, folder)
    edit_json(folder / "scheduler" / "scheduler_config.json", prediction_type=prediction_type)
    edit_json(folder / "vae" / "config.json", scaling_factor=8.0)
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["quant_conv.weight"][4:] = 0
    tensors["quant_conv.bias"][:] = torch.tensor([0.0] * 4 + [-20.0] * 4)  # means, then logarithms of variances
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def settings(model, subject, output, **options):
    """The settings of a quick run of ``model`` on the images in ``subject``."""
    paths = {
        "pretrained_model_name_or_path": str(model),
        "instance_data_dir": str(subject),
        "output_dir": str(output),
    }
    own = QUICK if options.get("init_from") is None else {k: v for k, v in QUICK.items() if k not in ("rank", "heads")}
    return TrainingConfig(**{**own, **paths, **options})


def trainer(model, subject, output, **options):
    """A loaded trainer on the CPU, not yet run."""
    return Trainer(settings(model, subject, output, **options), Accelerator(cpu=True))


def arguments(config):
    """The command line that gives ``config``: every setting that is not None."""
    words = []
    for name, value in vars(config).items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list):
            words += [f"--{name}", *value] if value else []
        elif value is not None:
            words.append(f"--{name}={value}")
    return words


def metrics(output):
    """The lines of ``metrics.jsonl``, without times."""
    lines = [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def files_in(folder):
    """Every file under ``folder`` by relative name, with its bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()
    }


def same_content(one, other):
    """Whether two safetensors files hold the same bits and metadata (which safetensors writes in any order)."""
    with safe_open(one, "pt") as first, safe_open(other, "pt") as second:
        if first.metadata() != second.metadata():
            return False
    found, expected = load_file(one), load_file(other)
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)

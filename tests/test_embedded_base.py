"""The shipped base: a stock folder that paints what it is told, and what our own commands promise about it."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from assets.build_base.evaluate import background_of
from assets.build_base.icons import BACKGROUNDS
from effilora_diffusion import load_adapter, remove_adapter
from effilora_diffusion.cli import main
from effilora_diffusion.core.assets import asset
from effilora_diffusion.diffusion.config import EMBEDDED_SAMPLING, TrainingConfig
from effilora_diffusion.diffusion.models.pipelines import load_pipeline
from effilora_diffusion.diffusion.sampling.generate import draw_images
from effilora_diffusion.diffusion.training.example import example_settings
from effilora_diffusion.diffusion.training.trainer import Trainer

SUBJECT = "an emoji of sks cat"

STOCK = """
import sys
from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1])
image = pipe("a noto emoji of dog face", num_inference_steps=2).images[0]
assert image.size == (64, 64), image.size
assert not any(name.startswith("effilora") for name in sys.modules)
"""


def arrays(pipe, prompts, steps=6):
    images = draw_images(pipe, prompts, list(range(len(prompts))), steps, 4.0, batch_size=len(prompts))
    return np.stack([np.asarray(image).astype(int) for image in images])


@pytest.fixture(scope="module", params=["static", "one head"])
def run(request, tmp_path_factory):
    """A training run of the example, far too short to be good, by two adapters that export exactly."""
    kind = {"static": {"routing": "static", "heads": 3}, "one head": {"heads": 1}}[request.param]
    folder = tmp_path_factory.mktemp("example") / "run"
    changes = {"max_train_steps": 12, "num_validation_images": 0, "with_prior_preservation": False, **kind}
    Trainer(TrainingConfig(**{**example_settings(), **changes, "output_dir": str(folder)})).run()
    return folder


def test_stock_diffusers_opens_the_folder_without_our_code():
    done = subprocess.run([sys.executable, "-c", STOCK, str(asset("base"))], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_backgrounds_have_the_colour_they_are_told():
    told = [(thing, colour) for thing in ("red apple", "rocket") for colour in BACKGROUNDS]
    prompts = [f"a noto emoji of {thing} on a {colour} background" for thing, colour in told]
    found = [background_of(image) for image in arrays(load_pipeline(None), prompts, steps=12)]
    wrong = [(prompt, seen) for prompt, seen, (_, colour) in zip(prompts, found, told, strict=True) if seen != colour]
    assert len(wrong) <= 1, wrong


def test_adapter_changes_images_and_leaves_no_trace(run):
    pipe, prompts = load_pipeline(None), [SUBJECT, "a noto emoji of fox on a blue background"]
    before = arrays(pipe, prompts)
    adapter = load_adapter(pipe, run)
    assert np.abs(arrays(pipe, prompts) - before).max() > 20
    adapter.strength = 0
    assert np.array_equal(arrays(pipe, prompts), before)
    adapter.strength = 1
    remove_adapter(pipe, adapter)
    assert np.array_equal(arrays(pipe, prompts), before)


def test_plain_lora_in_a_stock_pipeline_draws_the_same(run):
    ours, stock = load_pipeline(None), load_pipeline(None)
    load_adapter(ours, run)
    stock.load_lora_weights(str(run))
    prompts = [SUBJECT] * 4
    assert np.abs(arrays(ours, prompts) - arrays(stock, prompts)).max() <= 2


def test_generate_uses_the_embedded_base_unless_told_otherwise(tmp_path):
    words = ["generate", "--prompt", "a twemoji emoji of rocket", "--seed", "3", "--num_inference_steps", "2"]
    assert main([*words, "--output", str(tmp_path / "image.png")]) == 0
    guidance = EMBEDDED_SAMPLING["guidance_scale"]
    (expected,) = draw_images(load_pipeline(None), ["a twemoji emoji of rocket"], [3], 2, guidance)
    assert Image.open(tmp_path / "image.png").tobytes() == expected.tobytes()

"""Requests: one set of fields, checks and PNG parameters for everything that draws."""

import math

import pytest
from conftest import build_tiny_pipeline
from PIL import Image

from effilora_diffusion.core import EffiLoRAError
from effilora_diffusion.diffusion.adapters.active_adapters import label_of
from effilora_diffusion.diffusion.sampling.metadata import read_parameters
from effilora_diffusion.diffusion.sampling.png import save_png
from effilora_diffusion.diffusion.sampling.request import GenerationRequest, Limits, sampling_defaults
from effilora_diffusion.studio.session import LIMITS

WHOLE = GenerationRequest(
    "a cat", "a dog", [("my-cat @ 300", 0.5), ("other", -1.0)], 7, 2.5, 64, 32, 1, 11, "Euler a", True
)


def test_a_png_gives_back_the_request_that_drew_it(tmp_path):
    image = Image.new("RGB", (64, 32))
    save_png(image, tmp_path / "a.png", WHOLE.parameters(image, WHOLE.seed, None))
    found = read_parameters(tmp_path / "a.png")
    assert found["model"] == "the embedded base"
    assert GenerationRequest.from_parameters(found) == WHOLE


def test_parameters_of_version_0_1_0_are_read():
    found = {
        "prompt": "a cat", "negative_prompt": None, "seed": 3, "num_inference_steps": None, "guidance_scale": None,
        "width": 64, "height": 64, "model": "m", "adapters": [{"file": "cat.safetensors", "strength": 0.5}],
    }  # fmt: skip
    assert GenerationRequest.from_parameters(found) == GenerationRequest(
        "a cat", adapters=[("cat", 0.5)], width=64, height=64, seed=3
    )


@pytest.mark.parametrize("name", ["prompt", "seed", "width", "adapters", "num_inference_steps"])
def test_parameters_that_are_not_complete_are_refused(name):
    whole = WHOLE.parameters(Image.new("RGB", (64, 32)), 0, None)
    for wrong in ({key: value for key, value in whole.items() if key != name}, {**whole, name: object()}):
        if name == "prompt" and name in wrong:
            continue  # whatever it is has words
        with pytest.raises(EffiLoRAError, match="not complete"):
            GenerationRequest.from_parameters(wrong)


BAD = {
    "prompt": ["", "  "],
    "num_inference_steps": [0, -1],
    "num_images": [0],
    "width": [0, 4, 33],
    "height": [-8, 100],
    "seed": [-1, 2**63],
    "guidance_scale": [math.nan, math.inf],
    "adapters": [[("a", math.nan)]],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD.items() for value in values], ids=str
)
def test_what_can_t_be_drawn_is_refused_in_one_sentence(name, value):
    with pytest.raises(EffiLoRAError) as caught:
        GenerationRequest(**{"prompt": "a cat", name: value}).check()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"seed": 2**53}, {"num_inference_steps": 151}, {"num_images": 9}, {"width": 24}, {"height": 2056},
        {"guidance_scale": 31.0},
        {"guidance_scale": -1.0}, {"adapters": [("a", 2.5)]}, {"prompt": "a" * 4001}, {"negative_prompt": "a" * 4001},
    ],
    ids=str,
)  # fmt: skip
def test_the_web_ui_has_limits_that_the_command_line_has_not(options):
    request = GenerationRequest(**{"prompt": "a cat", **options})
    request.check()
    with pytest.raises(EffiLoRAError):
        request.check(LIMITS)


def test_seeds_follow_one_another_and_wrap_around():
    assert GenerationRequest("a", num_images=3, seed=5).seeds() == [5, 6, 7]
    assert GenerationRequest("a", num_images=2, seed=9).seeds(Limits(seed=9)) == [9, 0]


def test_defaults_are_the_pipeline_s_own_and_the_embedded_base_s(tmp_path):
    pipe = build_tiny_pipeline()
    assert sampling_defaults(pipe, "a model") == {"steps": 50, "guidance_scale": 7.5, "edge": 32}
    assert sampling_defaults(pipe, None) == {"steps": 25, "guidance_scale": 2.0, "edge": 32}


def test_adapters_are_called_by_their_run_their_checkpoint_or_their_file(tmp_path):
    assert label_of(tmp_path / "my-cat" / "effilora.safetensors") == "my-cat"
    assert label_of(tmp_path / "my-cat" / "checkpoint-300" / "adapter.safetensors") == "my-cat @ 300"
    assert label_of(tmp_path / "talk" / "checkpoint-20" / "effilora.safetensors") == "talk @ 20"
    assert label_of(tmp_path / "cat.safetensors") == "cat"

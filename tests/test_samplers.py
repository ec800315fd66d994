"""Samplers by name: every one that is offered draws, from the seed alone, and the model's own scheduler stays as it is."""

import numpy as np
import pytest
from tiny_families import FAMILIES, build, sampling

from effilora_diffusion.core import EffiLoRAError
from effilora_diffusion.diffusion.sampling.generate import draw_images
from effilora_diffusion.diffusion.sampling.sampler_names import NAMES, from_a1111, to_a1111
from effilora_diffusion.diffusion.sampling.samplers import DDPM, FLOW, make_scheduler, own_sampler, sampler_names
from effilora_diffusion.diffusion.sampling.stream import draw_live

FLOWS = [
    name for name in FAMILIES if name not in ("sd15", "sd21", "sdxl", "pixart-alpha", "pixart-sigma", "hunyuandit")
]


def options(name, steps=3):
    size = {"width": 64, "height": 64, "steps": steps, "guidance_scale": 3.0}
    return size | {key: value for key, value in sampling(name).items() if key == "max_sequence_length"}


def quiet(name):
    pipe = build(name)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("name", ["sd21", *FLOWS])
def test_every_sampler_that_is_offered_draws_by_the_seed(name):
    pipe = quiet(name)
    own, config = pipe.scheduler, dict(pipe.scheduler.config)
    (usual,) = draw_images(pipe, ["a red cat"], [3], **options(name))
    offered = sampler_names(pipe)
    assert offered
    images = {}
    for sampler in offered:
        twice = [draw_images(pipe, ["a red cat"], [3], sampler=sampler, **options(name))[0] for _ in range(2)]
        assert twice[0].tobytes() == twice[1].tobytes(), sampler
        assert np.asarray(twice[0]).std() > 1, sampler  # an image, and not what comes of NaN
        images[sampler] = twice[0].tobytes()
    assert len(set(images.values())) >= len(offered) - 2  # few steps of some are the same
    assert pipe.scheduler is own
    assert dict(own.config) == config
    assert images[own_sampler(pipe)] == usual.tobytes()


def test_the_names_that_people_know_are_offered():
    wanted = {"Euler", "Euler a", "DPM++ 2M", "DPM++ 2M Karras", "DPM++ SDE", "UniPC", "DDIM", "LCM", "Heun"}
    assert wanted <= {*sampler_names(build("sd15"))} == {*NAMES}
    assert sampler_names(build("flux")) == ["Euler", "DPM++ 2M", "UniPC", "LCM"]
    assert {name.removesuffix(" Karras") for name in NAMES} == {*DDPM}
    assert {*FLOW} <= {*NAMES}


def test_a_sampler_has_the_model_s_own_noise_and_prediction():
    pipe = build("sd21")
    for name in NAMES:
        found, own = make_scheduler(pipe, name).config, pipe.scheduler.config
        for key in ("beta_start", "beta_end", "beta_schedule", "prediction_type", "num_train_timesteps"):
            assert found[key] == own[key], (name, key)
        assert bool(found.get("use_karras_sigmas")) == name.endswith("Karras")


def test_noise_comes_from_each_image_s_seed():
    pipe = quiet("sd15")
    together = draw_images(pipe, ["a cat", "a cat"], [3, 4], sampler="Euler a", **options("sd15"))
    (alone,) = draw_images(pipe, ["a cat"], [4], sampler="Euler a", **options("sd15"))
    assert np.abs(np.asarray(together[1], int) - np.asarray(alone, int)).max() <= 2
    seen = list(draw_live(pipe, "a cat", [4], preview_every=1, sampler="Euler a", **options("sd15")))
    assert seen[-1].image.tobytes() == alone.tobytes()


def test_a_pipeline_of_two_encoders_draws_with_other_samplers():
    pipe = quiet("sdxl")
    names = (None, "Euler a", "DPM++ 2M Karras", "DPM++ SDE", "LCM", "Heun")
    drawn = {draw_images(pipe, ["a cat"], [4], sampler=name, **options("sdxl"))[0].tobytes() for name in names}
    assert len(drawn) == len(names)


def test_names_that_a_model_does_not_have_are_refused():
    for model, name in (("flux", "DDIM"), ("sd15", "best"), ("flux-schnell", "DPM++ 2M"), ("z-image", "UniPC")):
        with pytest.raises(EffiLoRAError, match="can't generate with the sampler"):
            draw_images(quiet(model), ["a"], [0], sampler=name, **options(model))
    assert make_scheduler(build("sd15"), "euler A").__class__.__name__ == "EulerAncestralDiscreteScheduler"


@pytest.mark.parametrize("name", NAMES)
def test_names_go_to_a1111_and_back(name):
    assert from_a1111(*to_a1111(name)) == (name, [])

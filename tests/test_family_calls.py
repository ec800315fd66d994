"""Families call the denoiser as their pipelines do in sampling, and encode the latents that those decode."""

import inspect

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC
from tiny_families import FAMILIES, build, sampling

from effilora_diffusion import EffiLoRAConfig
from effilora_diffusion.core.adapter import timestep_features
from effilora_diffusion.diffusion.adapters.processors import attach, create_adapter
from effilora_diffusion.diffusion.models import IMAGE, make_family
from effilora_diffusion.diffusion.models.packing import pack, unpack
from effilora_diffusion.diffusion.training.loss import is_flow

PROMPTS = (
    "a red cat on a table",
    "a photo of two people and a tree, the sun and a small yellow car on a big white table",
)
UNGUIDED = {"z-image": 0.0, "krea2": 0.0, "flux": 3.5, "flux2": 3.5}
"""Guidance scales without classifier-free guidance; for FLUX dev the guidance input used in training."""


def family_of(name):
    return make_family(build(name), torch.device("cpu"), sampling(name).get("max_sequence_length"))


def unguided(name):
    """Return arguments for sampling in three steps without classifier-free guidance or prompt rewriting."""
    options = {**sampling(name), "num_inference_steps": 3}
    for given in ("guidance_scale", "complex_human_instruction"):
        options.pop(given, None)
    if "true_cfg_scale" in options:
        return {**options, "true_cfg_scale": 1.0}
    return {**options, "guidance_scale": UNGUIDED.get(name, 1.0)}


def as_image(values, name, height, width):
    """Unpack the pipeline's latents of an image to ``(n, c, h, w)``."""
    if values.ndim == 3 and name.startswith("flux2"):
        return values.transpose(1, 2).reshape(len(values), -1, height // 16, width // 16)
    if values.ndim == 3:
        return unpack(values, torch.empty(len(values), values.shape[2] // 4, height // 8, width // 8))
    return values


class Spy:
    """Records what the pipeline passes to its scheduler; ``last`` replaces the latents after the last step."""

    def __init__(self, pipe, last=None):
        self.step, self.seen, self.last = pipe.scheduler.step, [], last
        self.scale = getattr(pipe.scheduler, "scale_model_input", lambda sample, timestep: sample)
        self.__signature__ = inspect.signature(pipe.scheduler.step)
        pipe.scheduler.step = self

    def __call__(self, model_output, timestep, sample, *args, **kwargs):
        self.seen.append((model_output.clone(), float(timestep), self.scale(sample, timestep).clone()))
        result = self.step(model_output, timestep, sample, *args, **kwargs)
        if self.last is None:
            return result
        return (self.last,) if isinstance(result, tuple) else type(result)(prev_sample=self.last)


def image_condition(name, height=64, width=64):
    """Return the pipelines' default size condition: HunyuanDiT assumes a large original, the others the target size."""
    original = (1024, 1024) if name == "hunyuandit" else (height, width)
    return torch.tensor([*original, 0, 0, height, width], dtype=torch.float32)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 96)])
@pytest.mark.parametrize("name", FAMILIES)
def test_predictions_equal_what_the_pipeline_passes_to_its_scheduler(name, height, width):
    family = family_of(name)
    spy = Spy(family.pipe)
    size = {"height": height, "width": width}
    family.pipe(prompt=PROMPTS[0], generator=torch.Generator().manual_seed(3), **{**unguided(name), **size})
    assert len(spy.seen) == 3
    conditions = {**family.encode_prompt(PROMPTS[0]), IMAGE: image_condition(name, height, width)}
    for output, timestep, sample in spy.seen:
        noisy = as_image(sample, name, height, width)
        with torch.no_grad():
            found = family.predict(noisy, torch.tensor([timestep]), family.collate([conditions]))
        expected = as_image(output, name, height, width)
        assert found.shape == noisy.shape
        assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["sdxl", "hunyuandit", "cogview4"])
def test_size_and_crop_conditions_equal_the_pipeline_s(name):
    family = family_of(name)
    spy = Spy(family.pipe)
    sizes = {"original_size": (96, 80), "crops_coords_top_left": (3, 5), "target_size": (64, 64)}
    if name == "cogview4":
        sizes.pop("target_size")
    family.pipe(prompt=PROMPTS[0], generator=torch.Generator().manual_seed(3), **unguided(name), **sizes)
    image = torch.tensor([96, 80, 3, 5, 64, 64], dtype=torch.float32)
    conditions = family.collate([{**family.encode_prompt(PROMPTS[0]), IMAGE: image}])
    output, timestep, sample = spy.seen[0]
    with torch.no_grad():
        found = family.predict(sample, torch.tensor([timestep]), conditions)
        plain = family.predict(sample, torch.tensor([timestep]), {**conditions, IMAGE: image_condition(name)[None]})
    assert torch.allclose(found, output, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(plain, output, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["flux", "flux-schnell", "flux2", "flux2-klein"])
def test_guidance_is_an_input_of_distilled_models_only(name):
    family = family_of(name)
    noisy = torch.randn(1, *family.encode_image(torch.zeros(3, 64, 64)).shape[1:])
    conditions = family.collate([{**family.encode_prompt(PROMPTS[0]), IMAGE: image_condition(name)}])
    found = []
    for family.guidance_scale in (1.0, 3.5):
        with torch.no_grad():
            found.append(family.predict(noisy, torch.tensor([500.0]), conditions))
    assert torch.equal(*found) == (name in ("flux-schnell", "flux2-klein"))


@pytest.mark.parametrize("name", FAMILIES)
def test_latents_equal_those_that_the_pipeline_decodes(name):
    family = family_of(name)
    image = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(5)) * 2 - 1
    vae = family.pipe.vae
    with torch.no_grad():
        if isinstance(vae, AutoencoderDC):
            expected = vae.encode(image[None]).latent
        else:
            frames = image[None, :, None] if type(vae).__name__ == "AutoencoderKLQwenImage" else image[None]
            expected = vae.encode(frames).latent_dist.mode()
    mean = family.encode_image(image)[:1]
    packed = {"flux", "flux-schnell", "chroma", "ovis-image", "qwen-image", "krea2"}
    last = pack(mean) if name in packed else mean.flatten(2).transpose(1, 2) if name.startswith("flux2") else mean
    Spy(family.pipe, last)
    decoded = []
    decode = vae.decode
    vae.decode = lambda z, *args, **kwargs: decoded.append(z) or decode(z, *args, **kwargs)
    family.pipe(prompt=PROMPTS[0], **unguided(name))
    assert torch.allclose(decoded[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_timestep_routers_get_the_noise_level_on_one_scale(name):
    family = family_of(name)
    config = EffiLoRAConfig(routing="timestep", timestep_range=family.timestep_range)
    adapter = attach(family.model, create_adapter(family.model, config))
    noisy = torch.randn(2, *family.encode_image(torch.zeros(3, 64, 64)).shape[1:])
    row = {**family.encode_prompt(PROMPTS[0]), IMAGE: image_condition(name)}
    times = torch.tensor([900, 300])
    family.predict(noisy, times.float() if is_flow(family.pipe.scheduler) else times, family.collate([row] * 2))
    seen = 1000 - times if name in ("z-image", "lumina2") else times  # their timestep is 0 at pure noise
    assert torch.allclose(adapter.noise_features, timestep_features(seen), atol=1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_sample_does_not_depend_on_its_batch(name):
    family = family_of(name)
    noisy = torch.randn(3, *family.encode_image(torch.zeros(3, 64, 64)).shape[1:])
    timesteps = torch.tensor([900.0, 100.0, 500.0])
    rows = [{**family.encode_prompt(prompt), IMAGE: image_condition(name)} for prompt in (*PROMPTS, PROMPTS[0])]
    with torch.no_grad():
        together = family.predict(noisy, timesteps, family.collate(rows))
        for index, row in enumerate(rows):
            alone = family.predict(noisy[index : index + 1], timesteps[index : index + 1], family.collate([row]))
            assert torch.allclose(together[index], alone[0], rtol=1e-3, atol=1e-4 * float(alone.abs().max()))
    assert not torch.allclose(together[0], together[1], rtol=1e-2)

"""Every family with class images, validation grids, half precision, gradient checkpointing and offloading."""

import numpy as np
import pytest
import torch
from helpers import make_subject, trainer
from PIL import Image
from tiny_families import FAMILIES, build, sampling

from effilora_diffusion import EffiLoRAConfig, EffiLoRAError
from effilora_diffusion.diffusion.adapters.processors import attach, create_adapter
from effilora_diffusion.diffusion.config import TrainingConfig
from effilora_diffusion.diffusion.models import IMAGE, family_class, make_family
from effilora_diffusion.diffusion.sampling.generate import Sampler, draw_images
from effilora_diffusion.diffusion.training.dry_run import activation_bytes

NOT_PREDICTED = ("lumina2", "qwen-image", "z-image", "cogview4")
"""Families whose shapes depend on values."""

SHORT = {"resolution": 64, "train_batch_size": 2, "max_train_steps": 1, "learning_rate": 1e-2}


def check_class_rows(run):
    """What an adapter does to its class rows alone costs as much as it moved the base's prediction; then undo it."""
    batch, before = run.batches.draw(0, 2), [heads.detach().clone() for heads in run.adapter.B]
    assert (batch.instances, len(batch.latents)) == (2, 3)
    with torch.no_grad():
        for heads in run.adapter.B:
            heads.normal_(generator=torch.Generator().manual_seed(0)).mul_(0.05)
        noisy = run.objective.add_noise(batch.latents, batch.noise, batch.timesteps)
        moved = run.family.predict(noisy, batch.timesteps, batch.conditions)
        with run.adapter.disabled():
            base = run.family.predict(noisy, batch.timesteps, batch.conditions)
        target = torch.cat([run.objective.target(batch.latents, batch.noise, batch.timesteps)[:2], base[2:]])
        losses = (moved - target).square().flatten(1).mean(1) * run.objective.weights(batch.timesteps)
        assert losses[2] > 0
        assert float(run._loss(batch)) == pytest.approx(float(losses[:2].mean() + 3 * 2 * losses[2]), rel=1e-3)
        for heads, value in zip(run.adapter.B, before, strict=True):
            heads.copy_(value)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_run_with_class_images_and_validation_grids(name, tmp_path):
    build(name).save_pretrained(tmp_path / "model")
    prior = {"with_prior_preservation": True, "class_data_dir": str(tmp_path / "class"), "num_class_images": 2}
    drawn = {"num_validation_images": 2, "validation_inference_steps": 2, "validation_guidance_scale": None}
    subject = make_subject(tmp_path / "s", 2, captions=["a sks cat", "a sks cat on a big white table"], size=(80, 64))
    options = {
        **SHORT,
        **prior,
        **drawn,
        "class_prompt": ["a cat", "a dog on a table"],
        "center_crop": False,
        "train_batch_size": 2,
    }
    run = trainer(tmp_path / "model", subject, tmp_path / "out", **options, random_flip=True)
    check_class_rows(run)
    run.run()
    assert len(list((tmp_path / "class").glob("*.png"))) == 2
    sizes = {Image.open(file).size for file in (tmp_path / "class").glob("*.png")}
    assert sizes == {(64, 64)}
    assert (tmp_path / "out" / "samples" / "step-000001.png").exists()
    assert (tmp_path / "out" / "before_after.png").exists()


@pytest.mark.parametrize("name", FAMILIES)
def test_batched_prompts_give_the_same_images_as_single_ones(name):
    pipe = build(name)
    long = "a photo of two people and a tree, the sun and a small yellow car on a big white table"
    prompts, size = ["a red cat", long], {"width": 64, "height": 64}
    size |= {key: value for key, value in sampling(name).items() if key == "max_sequence_length"}
    together = draw_images(pipe, prompts, [1, 2], 2, 3.0, batch_size=2, **size)
    alone = [draw_images(pipe, [p], [seed], 2, 3.0, **size)[0] for p, seed in zip(prompts, (1, 2), strict=True)]
    for one, other in zip(together, alone, strict=True):
        assert one.size == (64, 64)
        assert np.abs(np.asarray(one).astype(int) - np.asarray(other)).max() <= 2


def test_a_run_samples_with_the_prompt_length_of_training():
    family = make_family(build("flux"), torch.device("cpu"), 16)
    assert family.encode_prompt("a cat")["encoder_hidden_states"].shape[0] == 16
    drawn = Sampler(family, 64, 2, max_sequence_length=16).draw(["a cat"], [0])[0]
    size = {"width": 64, "height": 64}
    same, default = (draw_images(family.pipe, ["a cat"], [0], 2, max_sequence_length=n, **size)[0] for n in (16, 32))
    assert np.array_equal(np.asarray(drawn), np.asarray(same))
    assert not np.array_equal(np.asarray(drawn), np.asarray(default))


def test_ernie_s_prompt_enhancer_is_turned_off():
    pipe = build("ernie-image")
    assert family_class(pipe).sampling_options(None, None) == {"use_pe": False}


@pytest.mark.parametrize("name", FAMILIES)
def test_negative_prompts_are_used_or_refused(name):
    pipe = build(name)
    size = {"width": 64, "height": 64, **({"max_sequence_length": 64} if name == "qwen-image" else {})}
    if name.startswith("flux"):
        with pytest.raises(EffiLoRAError, match="do not support a negative prompt"):
            draw_images(pipe, ["a cat"], [0], 2, 3.0, "a dog", **size)
        return
    plain = draw_images(pipe, ["a cat"], [0], 2, 3.0, **size)[0]
    other = draw_images(pipe, ["a cat"], [0], 2, 3.0, "a big white table with two people", **size)[0]
    assert not np.array_equal(np.asarray(plain), np.asarray(other))


def example(family, name):
    """Return noisy latents, timesteps and conditions of two samples."""
    row = {**family.encode_prompt("a red cat"), IMAGE: torch.tensor([64.0, 64, 0, 0, 64, 64])}
    latents = torch.randn(2, *family.encode_image(torch.zeros(3, 64, 64)).shape[1:])
    return latents, torch.tensor([900.0, 300.0]), family.collate([row, row])


def adapted(name, dtype=torch.float32):
    family = make_family(build(name).to(dtype), torch.device("cpu"), sampling(name).get("max_sequence_length"))
    adapter = attach(family.model, create_adapter(family.model, EffiLoRAConfig()))
    generator = torch.Generator().manual_seed(0)
    for heads in adapter.B:
        heads.data.normal_(std=0.1, generator=generator)
    return family, adapter


@pytest.mark.parametrize("name", FAMILIES)
def test_a_half_precision_base_trains_a_float32_adapter(name):
    family, adapter = adapted(name, torch.bfloat16)
    noisy, times, conditions = example(family, name)
    assert family.encode_image(torch.zeros(3, 64, 64)).dtype == torch.float32
    assert family.pipe.vae.dtype == torch.bfloat16
    found = family.predict(noisy, times, conditions)
    assert found.dtype == torch.bfloat16
    found.float().square().mean().backward()
    assert all(part.dtype == torch.float32 and part.grad.isfinite().all() for part in adapter.A.values())
    assert found.isfinite().all()


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "hunyuandit"])
def test_gradient_checkpointing_gives_the_same_gradients(name):
    gradients = []
    for checkpointing in (False, True):
        family, adapter = adapted(name)
        torch.manual_seed(0)
        noisy, times, conditions = example(family, name)
        if checkpointing:
            family.enable_gradient_checkpointing()
            family.model.train()
        family.predict(noisy, times, conditions).square().mean().backward()
        gradients.append([part.grad for part in adapter.A.values()])
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-5 * float(one.abs().max()))


def test_models_without_gradient_checkpointing_are_refused():
    family, _ = adapted("hunyuandit")
    with pytest.raises(EffiLoRAError, match="HunyuanDiT models do not support --gradient_checkpointing"):
        family.enable_gradient_checkpointing()


@pytest.mark.parametrize("name", FAMILIES)
def test_offloading_changes_neither_images_nor_training(name):
    """Offload from the CPU to the CPU, in place of a GPU."""
    family, adapter = adapted(name)
    options = {"width": 64, "height": 64, "max_sequence_length": sampling(name).get("max_sequence_length")}
    before = draw_images(family.pipe, ["a cat"], [0], 2, **options)[0]
    with family.offloaded(torch.device("cpu")):
        during = draw_images(family.pipe, ["a cat"], [0], 2, **options)[0]
    assert np.array_equal(np.asarray(before), np.asarray(during))
    assert not any(hasattr(part, "_hf_hook") for part in family.parts())
    noisy, times, conditions = example(family, name)
    family.predict(noisy, times, conditions).square().mean().backward()
    assert all(part.grad.abs().max() > 0 for part in adapter.A.values())


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in (*NOT_PREDICTED, "ernie-image")])
def test_a_step_creates_tensors_only_on_the_model_s_device(name):
    family, _ = adapted(name)
    noisy, times, conditions = example(family, name)
    family.model.to("meta")  # stands for the GPU: mixing it with CPU tensors is an error
    moved = {key: value.to("meta") for key, value in conditions.items()}
    found = family.predict(noisy.to("meta"), times.to("meta"), moved)
    assert found.is_meta
    found.square().mean().backward()


@pytest.mark.parametrize("name", FAMILIES)
def test_predicted_activations_are_those_saved_for_the_backward_pass(name):
    family, _ = adapted(name)
    predicted = activation_bytes(TrainingConfig(train_batch_size=2, resolution=64), family, "a red cat")
    if name in NOT_PREDICTED:
        assert predicted is None
        return
    noisy, times, conditions = example(family, name)
    weights = {value.untyped_storage()._cdata for value in family.model.parameters()}
    kept, alive = {}, []

    def keep(value):
        storage = value.untyped_storage()
        alive.append(value)
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        family.predict(noisy, times, conditions)
    assert predicted == pytest.approx(sum(kept.values()), rel=0.06)

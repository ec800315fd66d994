"""Prior preservation: class rows are held to the frozen base's own prediction, or to their images as in diffusers."""

import pytest
import torch
from helpers import make_subject, same_content, trainer

from effilora_diffusion.core import EffiLoRAError
from effilora_diffusion.core.files import ADAPTER_FILE
from effilora_diffusion.core.run_folder import LORA_FILE
from effilora_diffusion.diffusion.config import TrainingConfig
from effilora_diffusion.diffusion.training.checkpoints import TrainingState, save_checkpoint
from effilora_diffusion.diffusion.training.loss import denoising_losses
from effilora_diffusion.diffusion.training.preservation import Preservation, preservation


@pytest.fixture
def prior(tmp_path):
    return {
        "with_prior_preservation": True,
        "class_data_dir": str(tmp_path / "class"),
        "class_prompt": ["a dog", "a red cat"],
        "num_class_images": 4,
        "train_batch_size": 2,
    }


def with_heads(run, size=0.3):
    """Heads as if something had been learned."""
    generator = torch.Generator().manual_seed(0)
    for heads in run.adapter.B:
        heads.data.normal_(generator=generator).mul_(size)
    return run


def predicted(run, batch, rows, adapted):
    """What the model predicts for some rows of a batch, with or without its adapter."""
    noisy = run.objective.add_noise(batch.latents, batch.noise, batch.timesteps)
    conditions = {name: value[rows] for name, value in batch.conditions.items()}
    run.adapter.enabled = adapted
    with torch.no_grad():
        found = run.family.predict(noisy[rows], batch.timesteps[rows], conditions)
    run.adapter.enabled = True
    return found


def test_class_rows_are_held_to_the_base_s_own_prediction(tiny_pipeline, tmp_path, prior):
    run = with_heads(
        trainer(tiny_pipeline, make_subject(tmp_path / "s"), tmp_path / "out", **prior, prior_loss_weight=7.0)
    )
    batch = run.batches.draw(0, 2)
    assert (batch.instances, len(batch.names)) == (2, 3)  # one class image to four of the subject
    own, others = slice(0, 2), slice(2, 3)
    target = run.objective.target(batch.latents, batch.noise, batch.timesteps)[own]
    ones = torch.ones(3)
    learned = denoising_losses(predicted(run, batch, own, True), target, ones[own]).mean()
    base = predicted(run, batch, others, False)
    kept = denoising_losses(predicted(run, batch, others, True), base, ones[others]).mean()
    assert kept > 1e-3
    assert float(run._loss(batch).detach()) == pytest.approx(float(learned + 7 * (1 * 4 / 2) * kept), rel=1e-5)


def test_the_base_asks_nothing_of_an_adapter_that_has_learned_nothing(tiny_pipeline, tmp_path, prior):
    run = trainer(tiny_pipeline, make_subject(tmp_path / "s"), tmp_path / "out", **prior)
    batch = run.batches.draw(0, 2)
    target = run.objective.target(batch.latents, batch.noise, batch.timesteps)[:2]
    learned = denoising_losses(predicted(run, batch, slice(0, 2), True), target, torch.ones(2)).mean()
    assert float(run._loss(batch).detach()) == pytest.approx(float(learned), rel=1e-6)
    run._loss(batch).backward()
    assert run.adapter.enabled


@pytest.mark.parametrize("routing", ["token", "timestep"])
def test_recomputed_activations_are_those_of_the_forward_pass(tiny_pipeline, tmp_path, prior, routing):
    found = []
    for checkpointing in (False, True):
        subject = make_subject(tmp_path / "s")
        options = {**prior, "routing": routing, "gradient_checkpointing": checkpointing, "overwrite_output_dir": True}
        run = with_heads(trainer(tiny_pipeline, subject, tmp_path / "out", **options))
        run._loss(run.batches.draw(0, 2)).backward()
        found.append([parameter.grad for parameter in run.adapter.parameters()])
        run.folder.release()
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-7)
    assert any(gradient.abs().max() > 1e-4 for gradient in found[0])


@pytest.mark.parametrize("micro", [1, 2, 3, 6])
def test_class_rows_and_their_weight_do_not_depend_on_how_a_step_is_divided(micro):
    held = Preservation(True, 3, 5.0)
    parts = [held.positions(first, micro) for first in range(0, 12, micro)]
    assert [position for part in parts for position in part] == [0, 1, 2, 3]
    total = sum(held.factor(len(part), micro) * micro / 12 for part in parts)
    assert total == pytest.approx(5.0)


@pytest.mark.parametrize(
    ("options", "images", "expected"),
    [
        ({}, 1, Preservation(True, 3, 3.0)),
        ({}, 2, Preservation(True, 4, 3.0)),
        ({}, 5, Preservation(True, 5, 3.0)),
        ({"prior_interval": 2, "prior_loss_weight": 1.5}, 4, Preservation(True, 2, 1.5)),
        ({"prior_target": "images"}, 4, Preservation(False, 1, 1.0)),  # diffusers' own
    ],
)
def test_what_is_not_given_suits_the_target_and_the_batch(options, images, expected):
    chosen = {"with_prior_preservation": True, "class_data_dir": "x", "class_prompt": "a dog", **options}
    assert preservation(TrainingConfig(**chosen), images) == expected
    assert preservation(TrainingConfig(), images) is None


def test_without_class_images_their_prompts_go_with_the_subject_s(tiny_pipeline, tmp_path, prior, capsys):
    subject, folder = make_subject(tmp_path / "s"), tmp_path / "class"
    options = {**prior, "class_data_dir": None, "prior_interval": 1, "train_batch_size": 3}
    run = trainer(tiny_pipeline, subject, tmp_path / "out", **options)
    said = capsys.readouterr().out
    assert "class       no images, the class prompts go with the instance images" in said
    assert "class       held to the base's own prediction, weight 3, one to 1 of the images" in said
    seen = set()
    states = {prompt: run.family.encode_prompt(prompt)["encoder_hidden_states"] for prompt in options["class_prompt"]}
    for first in (0, 3):
        batch = run.batches.draw(first, 3)
        for name, found in zip(batch.names[3:], batch.conditions["encoder_hidden_states"][3:], strict=True):
            seen |= {(name, prompt) for prompt, known in states.items() if torch.equal(known, found)}
    assert seen == {(f"{index}.png", prompt) for index in range(3) for prompt in states}
    run.run()
    assert not folder.exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"class_prompt": []}, "needs --class_prompt"),
        ({"class_data_dir": None, "prior_target": "images"}, "--prior_target images needs --class_data_dir"),
        ({"prior_target": "mine"}, "prior_target"),
        ({"prior_interval": 0}, "prior_interval"),
    ],
)
def test_what_cannot_work_is_refused(prior, options, words):
    with pytest.raises(EffiLoRAError, match=words):
        TrainingConfig(**{**prior, **options})


def test_a_resumed_run_ends_in_the_same_bytes(tiny_pipeline, tmp_path, prior):
    subject = make_subject(tmp_path / "s")
    options = {
        **prior,
        "max_train_steps": 6,
        "checkpointing_steps": 3,
        "learning_rate": 1e-2,
        "num_validation_images": 0,
    }
    trainer(tiny_pipeline, subject, tmp_path / "one", **options).run()
    trainer(tiny_pipeline, subject, tmp_path / "two", **{**options, "max_train_steps": 3}).run()
    trainer(tiny_pipeline, subject, tmp_path / "two", **options, resume_from_checkpoint="latest").run()
    assert all(same_content(tmp_path / "one" / name, tmp_path / "two" / name) for name in (ADAPTER_FILE, LORA_FILE))


def test_a_checkpoint_of_a_run_on_class_images_goes_on_with_these_alone(tiny_pipeline, tmp_path, prior):
    subject = make_subject(tmp_path / "s")
    options = {**prior, "prior_target": "images", "max_train_steps": 1, "checkpointing_steps": 1}
    run = trainer(tiny_pipeline, subject, tmp_path / "out", **options)
    run.run()
    older = {name: value for name, value in run.fingerprint.items() if name not in ("prior_target", "prior_interval")}
    state = TrainingState(1, older, run.reducer.state_dict(), {})  # as version 0.1.0 wrote it
    save_checkpoint(tmp_path / "out", run.adapter, run.optimizer, state)
    more = {**options, "max_train_steps": 2, "resume_from_checkpoint": "latest"}
    with pytest.raises(EffiLoRAError, match="prior_target was 'images' and is 'base'"):
        trainer(tiny_pipeline, subject, tmp_path / "out", **{**more, "prior_target": "base"}).run()
    trainer(tiny_pipeline, subject, tmp_path / "out", **more).run()

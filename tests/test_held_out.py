"""The validation loss: of images that are not trained on, on the same noise whenever it is measured."""

import pytest
import torch
from helpers import PROMPT, make_subject, metrics, same_content, trainer
from PIL import Image

from effilora_diffusion.core import EffiLoRAError
from effilora_diffusion.diffusion.data.folder import scan_images
from effilora_diffusion.diffusion.training.held_out import LEVELS, hold_out

ALL = {
    "train_batch_size": 2,
    "max_train_steps": 4,
    "learning_rate": 1e-2,
    "num_validation_images": 0,
    "loss_type": "huber",
    "snr_gamma": 5.0,
    "use_soft_min_snr": True,
    "debiased_estimation_loss": True,
    "noise_offset": 0.1,
    "input_perturbation": 0.1,
    "multires_noise_iterations": 4,
    "min_timestep": 100,
    "max_timestep": 900,
    "timestep_bias_strategy": "later",
    "timestep_bias_multiplier": 2.0,
    "validation_split": 0.4,
    "lora_dropout": 0.1,
    "use_ema": True,
}
"""A run with every setting of the loss of a DDPM model."""


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    return make_subject(tmp_path_factory.mktemp("subject") / "s", 5, size=(48, 32))


@pytest.fixture(scope="module")
def unbroken(tiny_pipeline, subject, tmp_path_factory):
    output = tmp_path_factory.mktemp("unbroken") / "out"
    run = trainer(tiny_pipeline, subject, output, **ALL, checkpointing_steps=2)
    run.run()
    return run, output


def test_a_run_stopped_in_its_middle_ends_as_the_unbroken_one(tiny_pipeline, subject, unbroken, tmp_path):
    output = tmp_path / "out"
    first = trainer(tiny_pipeline, subject, output, **ALL, checkpointing_steps=2)
    checkpoint, stopped = first._checkpoint, []

    def then_stop():
        checkpoint()
        stopped.append(first.step)
        raise KeyboardInterrupt

    first._checkpoint = then_stop
    with pytest.raises(KeyboardInterrupt):
        first.run()
    trainer(tiny_pipeline, subject, output, **ALL, checkpointing_steps=2, resume_from_checkpoint="latest").run()
    assert stopped == [2]
    assert metrics(output) == metrics(unbroken[1])
    assert same_content(output / "effilora.safetensors", unbroken[1] / "effilora.safetensors")


def test_another_noise_is_another_run(tiny_pipeline, subject, unbroken):
    other = {**ALL, "noise_offset": 0.2, "huber_c": 0.3}
    with pytest.raises(EffiLoRAError, match=r"huber_c was 0.1 and is 0.3; noise_offset was 0.1 and is 0.2"):
        trainer(tiny_pipeline, subject, unbroken[1], **other, resume_from_checkpoint="checkpoint-2").run()


def test_the_loss_is_measured_with_every_checkpoint_and_at_the_end(unbroken):
    run, output = unbroken
    lines = {line["step"]: line.get("validation_loss") for line in metrics(output)}
    assert [step for step, value in lines.items() if value is not None] == [2, 4]
    assert lines[2] != lines[4]
    assert len(run.parts.held_out) == 2
    trained = {name for first in range(0, 12, 2) for name in run.batches.draw(first, 2).names}
    assert not trained & {example.path.name for example in run.parts.held_out}


def test_it_is_the_mean_loss_over_images_and_noise_levels(tiny_pipeline, subject, tmp_path):
    said = []
    run = trainer(tiny_pipeline, subject, tmp_path / "out", validation_split=0.4, num_validation_images=0)
    run.folder.release()
    run.say = said.append
    value = run._held_out_loss("the base")
    losses, levels = [], []
    for batch in run.held_out.batches():
        noisy = run.objective.add_noise(batch.latents, batch.noise, batch.timesteps)
        with torch.no_grad():
            predicted = run.family.predict(noisy, batch.timesteps, batch.conditions)
        target = run.objective.target(batch.latents, batch.noise, batch.timesteps)
        losses += (predicted - target).square().flatten(1).mean(1).tolist()
        levels += batch.timesteps.tolist()
    assert len(losses) == 2 * LEVELS
    assert value == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert sorted(levels) == [62, 187, 312, 437, 562, 687, 812, 937]
    assert said == [f"validation loss of the base: {value:.5f} on 2 held-out images"]
    run._loss(run._batch(0, 0))
    assert run._held_out_loss("the base") == value  # whatever was drawn in between


def test_masks_of_held_out_images_count(tiny_pipeline, tmp_path):
    folder = make_subject(tmp_path / "s", 3)
    for number in range(3):
        half = Image.new("L", (32, 32))
        half.paste(255, (0, 0, 16, 32))
        half.save(folder / f"{number}.mask.png")
    options = {"validation_split": 0.4, "masked_loss": True}
    run = trainer(tiny_pipeline, folder, tmp_path / "out", **options)
    run.folder.release()
    (batch,) = run.held_out.batches()
    with torch.no_grad():
        noisy = run.objective.add_noise(batch.latents, batch.noise, batch.timesteps)
        predicted = run.family.predict(noisy, batch.timesteps, batch.conditions)
        left = (predicted - batch.noise).square()[..., : predicted.shape[-1] // 2]
    assert run._held_out_loss("the base") == pytest.approx(float(left.mean()), rel=1e-5)


def half_mask(size=(32, 32)):
    mask = Image.new("L", size)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    return mask


def test_images_of_a_folder_of_their_own_have_masks_and_captions_as_the_others(tiny_pipeline, tmp_path):
    subject = make_subject(tmp_path / "s", 2, captions=["a [trigger] cat"] * 2)
    others = make_subject(tmp_path / "others", 2, first=7)
    for folder in (subject, others):
        half_mask().save(folder / "0.mask.png")
    (others / "0.note").write_text("the [trigger] cat")
    options = {"validation_data_dir": str(others), "masked_loss": True, "trigger": ["zwx"], "caption_suffix": "4k"}
    run = trainer(tiny_pipeline, subject, tmp_path / "out", **options, caption_extension=".note")
    run.folder.release()
    assert {one.path.name: one.caption for one in run.parts.held_out} == {
        "0.png": "the zwx cat 4k",
        "1.png": f"{PROMPT} 4k",
    }
    masks = {batch.names[0]: batch.mask for batch in run.held_out.batches()}
    assert masks["0.png"].mean() == 0.5
    assert masks["1.png"] is None
    assert len(run.parts.examples) == 2


def test_every_held_out_image_is_measured_once_however_often_it_is_repeated(tiny_pipeline, tmp_path):
    make_subject(tmp_path / "s" / "7_sks cat", 6)
    run = trainer(tiny_pipeline, tmp_path / "s", tmp_path / "out", validation_split=0.5)
    run.folder.release()
    assert run.parts.epoch == 3 * 7
    measured = sorted(batch.names[0] for batch in run.held_out.batches())
    assert measured == sorted(one.path.name for one in run.parts.held_out)
    assert len(set(measured)) == 3


def test_which_images_are_held_out(tmp_path):
    examples, _ = scan_images(make_subject(tmp_path / "s", 5), "a sks cat")
    others, _ = scan_images(make_subject(tmp_path / "others", 2, first=7), "a sks cat")
    kept, held = hold_out(examples, None, 0.2, 0)
    assert (len(kept), len(held)) == (4, 1)
    assert hold_out(examples, None, 0.2, 0) == (kept, held)
    assert len({hold_out(examples, None, 0.2, seed)[1][0].path for seed in range(20)}) > 2
    kept, held = hold_out(examples, others, None, 0)
    assert (len(kept), [one.path.parent.name for one in held]) == (5, ["others", "others"])
    assert hold_out(examples, None, None, 0) == (examples, [])


@pytest.mark.parametrize(
    ("folder", "share", "words"),
    [
        ("others", 0.2, "both name held-out images"),
        (None, 0.95, "0.95 of 5 images leaves none to train on"),
        ("s", None, "the same image as '0.png' to train on"),
    ],
)
def test_what_can_t_be_held_out_is_told(tmp_path, folder, share, words):
    examples, _ = scan_images(make_subject(tmp_path / "s", 5), "a sks cat")
    with pytest.raises(EffiLoRAError, match=words):
        hold_out(examples, examples[:1] if folder else None, share, 0)


def test_copies_of_an_image_stay_on_one_side(tmp_path):
    folder = make_subject(tmp_path / "s", 2)
    for number in range(2, 6):
        (folder / f"{number}.png").write_bytes((folder / "0.png").read_bytes())
    kept, held = hold_out(scan_images(folder, "a cat")[0], None, 0.5, 0)
    assert {len(kept), len(held)} == {1, 5}
    assert not {one.sha256 for one in kept} & {one.sha256 for one in held}

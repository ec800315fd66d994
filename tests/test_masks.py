"""Masked loss: where masks are found, how they are cut with their images, and that what they leave out changes nothing."""

import numpy as np
import pytest
import torch
from helpers import image, make_subject, metrics, same_content, trainer
from PIL import Image
from tiny_families import build

from effilora_diffusion import EffiLoRAConfig, EffiLoRAError
from effilora_diffusion.cli.train import main
from effilora_diffusion.diffusion.adapters.processors import attach, create_adapter
from effilora_diffusion.diffusion.data.folder import Example
from effilora_diffusion.diffusion.data.latents import Batch
from effilora_diffusion.diffusion.data.masks import mask_weights
from effilora_diffusion.diffusion.models import IMAGE, make_family
from effilora_diffusion.diffusion.training.loss import FlowObjective, batch_loss, denoising_losses

FAST = {"num_validation_images": 0, "routing": "static", "heads": 1}


def grey(array):
    return Image.fromarray(np.asarray(array, np.uint8), "L")


def half(size=(32, 32), left=255, right=0):
    """A mask whose left half counts."""
    array = np.full(size[::-1], right)
    array[:, : size[0] // 2] = left
    return grey(array)


def masked_subject(folder, ending=".mask", count=2):
    make_subject(folder, count)
    for index in range(count):
        half().save(folder / f"{index}{ending}.png")
    return folder


# ------------------------------------------------------------------------------------------------------------ the loss


class Changed(FlowObjective):
    """A target with something else in the right half."""

    def target(self, latents, noise, timesteps):
        found = super().target(latents, noise, timesteps).clone()
        found[..., found.shape[-1] // 2 :] += 100
        return found


@pytest.mark.parametrize("name", ["flux", "flux2", "sd3", "qwen-image"])
def test_what_a_mask_leaves_out_changes_neither_loss_nor_gradients(name):
    """In latents: what the target says there. As an input the model sees all of the image."""
    family = make_family(build(name), torch.device("cpu"), 32)
    adapter = attach(family.model, create_adapter(family.model, EffiLoRAConfig()))
    row = {**family.encode_prompt("a red cat"), IMAGE: torch.tensor([64.0, 64, 0, 0, 64, 64])}
    latents = torch.randn(2, *family.encode_image(torch.zeros(3, 64, 64)).shape[1:])
    mask = torch.zeros(2, 1, *latents.shape[-2:])
    mask[0, ..., : latents.shape[-1] // 2] = 1  # of the second one nothing counts
    made = (latents, family.collate([row, row]), torch.randn_like(latents), torch.tensor([900.0, 300.0]))
    found = []
    for objective, wanted in ((FlowObjective(), mask), (Changed(), mask), (FlowObjective(), None)):
        batch = Batch(*made, names=["a", "b"], instances=2, captions=[], mask=wanted)
        loss = batch_loss(family, objective, batch, torch.device("cpu"))
        loss.backward()
        found.append((loss.detach(), [part.grad.clone() for part in adapter.B if part.grad is not None]))
        adapter.zero_grad()
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(*pair) for pair in zip(found[0][1], found[1][1], strict=True))
    assert any(gradient.abs().max() > 0 for gradient in found[0][1])
    assert not torch.allclose(found[0][0], found[2][0], rtol=1e-3)


def test_the_loss_is_the_mean_over_what_counts():
    predicted, target = torch.randn(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    mask = torch.zeros(2, 1, 4, 4)
    mask[:, :, :2] = 1
    found = denoising_losses(predicted, target, torch.tensor([1.0, 2.0]), mask)
    assert torch.allclose(found, predicted[:, :, :2].square().flatten(1).mean(1) * torch.tensor([1.0, 2.0]))
    whole = denoising_losses(predicted, target, torch.ones(2), torch.ones(2, 1, 4, 4))
    assert torch.allclose(whole, denoising_losses(predicted, target, torch.ones(2)))


# ----------------------------------------------------------------------------------------------------------- the masks


@pytest.mark.parametrize("flip", [False, True])
def test_masks_are_cut_and_mirrored_with_their_image_and_averaged(tmp_path, flip):
    array = np.zeros((32, 64))
    array[:, :40] = 255
    grey(array).save(tmp_path / "0.mask.png")
    example = Example(tmp_path / "0.png", "", "0", (64, 32), mask=tmp_path / "0.mask.png", mask_sha256="1")
    rows = [mask_weights(example, (32, 32), crop, flip, (8, 8), 0.0)[0] for crop in ((0.0, 0.0), (0.99, 0.0), None)]
    assert all(torch.equal(row, row[:1].expand(8, 8)) for row in rows)
    found = [(row[0].flip(0) if flip else row[0]).tolist() for row in rows]
    assert found == [[1.0] * 8, [1.0] * 2 + [0.0] * 6, [1.0] * 6 + [0.0] * 2]
    partly = mask_weights(example, (32, 32), (0.5, 0.0), flip, (2, 2), 0.0)[0]
    assert sorted(partly[0].tolist()) == [0.4375, 1.0] or sorted(partly[0].tolist()) == [0.5, 1.0]
    weights = mask_weights(example, (32, 32), (0.99, 0.0), flip, (8, 8), 0.25)
    assert sorted(set(weights.flatten().tolist())) == [0.25, 1.0]
    assert weights.shape == (1, 8, 8)
    half((128, 64)).save(tmp_path / "0.mask.png")  # of another resolution
    assert mask_weights(example, (64, 32), None, flip, (4, 8), 0.0).mean() == 0.5


@pytest.mark.parametrize("kind", ["beside", "onetrainer", "folder", "alpha"])
def test_masks_of_every_source_train_the_same(tiny_pipeline, tmp_path, kind):
    subject, options = tmp_path / "s", {"masked_loss": True}
    if kind in ("beside", "onetrainer"):
        masked_subject(subject, ".mask" if kind == "beside" else "-masklabel")
    elif kind == "folder":
        make_subject(subject, 2)
        (tmp_path / "masks").mkdir()
        for index in range(2):
            half((64, 64)).save(tmp_path / "masks" / f"{index}.bmp")
        options = {"mask_dir": str(tmp_path / "masks")}
    else:
        subject.mkdir()
        for index in range(2):
            picture = image(index)
            picture.putalpha(half())
            picture.save(subject / f"{index}.png")
        options = {"alpha_mask": True}
    run = trainer(tiny_pipeline, subject, tmp_path / "out", **options, train_batch_size=2)
    batch = run.batches.draw(0, 2)
    expected = torch.zeros(2, 1, 8, 8)
    expected[..., :4] = 1
    assert torch.equal(batch.mask, expected)
    assert run.batches.validation(0).mask.shape == (8, 1, 8, 8)
    assert len(run.parts.examples) == 2  # a mask is no image


def test_a_masked_run_resumes_exactly_and_not_with_other_masks(tiny_pipeline, tmp_path, capsys):
    subject = masked_subject(tmp_path / "s")
    image(5, (48, 32)).save(subject / "whole.png")
    options = {**FAST, "masked_loss": True, "unmasked_weight": 0.1, "checkpointing_steps": 2, "center_crop": False}
    options |= {"random_flip": True, "learning_rate": 0.05, "max_train_steps": 4}
    trainer(tiny_pipeline, subject, tmp_path / "whole", **options).run()
    told = capsys.readouterr().out
    assert "masks       2 of the images, weight 0.1 outside" in told
    assert "note: no mask for whole.png: all of the image counts" in told
    trainer(tiny_pipeline, subject, tmp_path / "part", **{**options, "max_train_steps": 2}).run()
    again = {**options, "resume_from_checkpoint": "latest"}
    with pytest.raises(EffiLoRAError, match=r"unmasked_weight was 0.1 and is 0.2"):
        trainer(tiny_pipeline, subject, tmp_path / "part", **{**again, "unmasked_weight": 0.2}).run()
    kept = (subject / "1.mask.png").read_bytes()
    half(left=200).save(subject / "1.mask.png")
    with pytest.raises(EffiLoRAError, match="the masks have changed"):
        trainer(tiny_pipeline, subject, tmp_path / "part", **again).run()
    (subject / "1.mask.png").write_bytes(kept)
    trainer(tiny_pipeline, subject, tmp_path / "part", **again).run()
    assert metrics(tmp_path / "part") == metrics(tmp_path / "whole")
    name = "pytorch_lora_weights.safetensors"
    assert same_content(tmp_path / "part" / name, tmp_path / "whole" / name)
    trainer(tiny_pipeline, subject, tmp_path / "off", **{**options, "masked_loss": False, "unmasked_weight": 0}).run()
    assert "note: 2 masks beside the images not used: --masked_loss uses them" in capsys.readouterr().out
    assert metrics(tmp_path / "off")[0]["loss"] != metrics(tmp_path / "whole")[0]["loss"]


def test_class_rows_are_not_masked(tiny_pipeline, tmp_path):
    prior = {"with_prior_preservation": True, "class_prompt": "a cat", "prior_interval": 1, "masked_loss": True}
    run = trainer(tiny_pipeline, masked_subject(tmp_path / "s"), tmp_path / "out", **prior, train_batch_size=2)
    batch = run.batches.draw(0, 2)
    assert batch.mask.mean((1, 2, 3)).tolist() == [0.5, 0.5, 1.0, 1.0]


@pytest.mark.parametrize(
    ("make", "options", "told"),
    [
        (lambda s: None, {"masked_loss": True}, "none of the 2 images has a mask: name it like 0.mask.png"),
        (lambda s: None, {"alpha_mask": True}, "none of the 2 images has a mask"),
        (
            lambda s: half((32, 16)).save(s / "0.mask.png"),
            {"masked_loss": True},
            "is 32 x 16 px, and its image 32 x 32",
        ),
        (lambda s: (s / "0.mask.png").write_bytes(b"x" * 99), {"masked_loss": True}, "0.mask.png can't be read"),
        (lambda s: None, {"mask_dir": "/nowhere/at/all"}, "--mask_dir /nowhere/at/all is not a folder"),
        (lambda s: None, {"unmasked_weight": 0.5}, "--unmasked_weight is for masks"),
    ],
)
def test_masks_that_are_not_there_or_can_t_be_used_are_told(tiny_pipeline, tmp_path, make, options, told):
    subject = make_subject(tmp_path / "s", 2)
    make(subject)
    with pytest.raises(EffiLoRAError, match=told):
        trainer(tiny_pipeline, subject, tmp_path / "out", **options)


def test_a_folder_of_masks_among_the_images_is_refused(tiny_pipeline, tmp_path):
    subject = make_subject(tmp_path / "s", 1)
    (subject / "masks").mkdir()
    half().save(subject / "masks" / "0.png")
    with pytest.raises(EffiLoRAError, match="is in instance_data_dir, whose images are all trained on"):
        trainer(tiny_pipeline, subject, tmp_path / "out", mask_dir=str(subject / "masks"))


def test_sd_scripts_flag_names_the_folder_of_masks(tiny_pipeline, tmp_path, capsys):
    subject = make_subject(tmp_path / "s", 1)
    (tmp_path / "masks").mkdir()
    half().save(tmp_path / "masks" / "0.png")
    words = ["--pretrained_model_name_or_path", str(tiny_pipeline), "--instance_data_dir", str(subject)]
    words += ["--instance_prompt", "a cat", "--resolution", "32", "--dry_run", "--output_dir", str(tmp_path / "out")]
    main([*words, "--masked_loss", "--conditioning_data_dir", str(tmp_path / "masks")])
    assert "masks       1 of the images, weight 0 outside" in capsys.readouterr().out

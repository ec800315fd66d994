"""What a step trains on: captions stay with their images, class images are counted, the loss is the textbook's."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from filelock import FileLock, Timeout
from helpers import files_in, make_subject, sharp_pipeline, trainer
from PIL import Image

from effilora_diffusion.core import EffiLoRAError
from effilora_diffusion.core.image_io import load_image
from effilora_diffusion.core.run_folder import LOCK_FILE
from effilora_diffusion.diffusion.data.folder import scan_images
from effilora_diffusion.diffusion.data.images import Preparation
from effilora_diffusion.diffusion.data.latents import ExampleSource
from effilora_diffusion.diffusion.data.prior import ClassFolder, class_examples
from effilora_diffusion.diffusion.models import IMAGE, make_family
from effilora_diffusion.diffusion.models.pipelines import load_pipeline
from effilora_diffusion.diffusion.sampling.generate import Sampler
from effilora_diffusion.diffusion.training.batches import BatchDrawer
from effilora_diffusion.diffusion.training.loss import DDPMObjective

CAPTIONS = ("red", "green", "blue", "grey", "pink")


@pytest.fixture(scope="module")
def model(tiny_pipeline, tmp_path_factory):
    return sharp_pipeline(tiny_pipeline, tmp_path_factory.mktemp("sharp") / "model")


@pytest.fixture(scope="module")
def family(model):
    return make_family(load_pipeline(str(model)), torch.device("cpu"))


def drawer_of(source, steps=1000):
    return BatchDrawer(source.family, DDPMObjective({"num_train_timesteps": steps}), source)


def text_states(family, prompt):
    return family.encode_prompt(prompt)["encoder_hidden_states"]


def source_of(family, folder, **options):
    """The cached images of a folder, and their examples."""
    examples, _ = scan_images(folder, "a cat")
    return filled(family, examples, **options), examples


def filled(family, examples, **options):
    source = ExampleSource(
        family, examples, Preparation(**{"resolution": 32, "center_crop": True, **options}), "instance"
    )
    source.fill()
    return source


# ------------------------------------------------------------------------------------------- images and captions


def test_every_drawn_image_comes_with_its_own_caption(family, tmp_path):
    source, examples = source_of(family, make_subject(tmp_path / "s", 5, captions=CAPTIONS))
    drawer = drawer_of(source)
    own = {example.path.name: filled(family, [example]).draw(0)[0] for example in examples}
    texts = {example.path.name: text_states(family, example.caption) for example in examples}
    assert [example.caption for example in examples] == list(CAPTIONS)
    seen = []
    for first in range(0, 20, 2):
        batch = drawer.draw(first, 2)
        for latents, states, name in zip(
            batch.latents, batch.conditions["encoder_hidden_states"], batch.names, strict=True
        ):
            assert torch.allclose(latents, own[name], atol=1e-2)
            assert torch.equal(states, texts[name])
            seen.append(name)
    assert all(sorted(seen[start : start + 5]) == sorted(own) for start in range(0, 20, 5))
    assert seen[:5] != seen[5:10]
    distances = [(a - b).abs().max() for a in own.values() for b in own.values() if a is not b]
    assert min(distances) > 0.1  # else the comparison above would prove nothing


def test_two_files_of_one_name_in_different_folders_do_not_mix(family, tmp_path):
    first = scan_images(make_subject(tmp_path / "a", 1, captions=["red"]), None)[0]
    second = scan_images(make_subject(tmp_path / "b", 1, first=5, captions=["blue"]), None)[0]
    source = filled(family, first + second)
    found = {}
    for position in range(2):
        latents, conditions, name = source.draw(position)
        assert name == "0.png"
        states = conditions["encoder_hidden_states"]
        caption = next(c for c in ("red", "blue") if torch.equal(states, text_states(family, c)))
        found[caption] = latents
    for caption, examples in (("red", first), ("blue", second)):
        alone = filled(family, examples).draw(0)[0]
        assert torch.allclose(found[caption], alone, atol=1e-2)


def test_same_image_is_encoded_once_and_changed_file_again(family, tmp_path, monkeypatch):
    folder = make_subject(tmp_path / "s", 1)
    (folder / "copy.png").write_bytes((folder / "0.png").read_bytes())
    calls = []
    encode = family.encode_image
    monkeypatch.setattr(family, "encode_image", lambda image: calls.append(1) or encode(image))
    source, examples = source_of(family, folder)
    for position in range(6):
        source.draw(position)
    assert len(examples) == 2
    assert len(calls) == 1
    make_subject(folder, 1, first=9)
    source_of(family, folder)
    assert len(calls) == 3


def test_mirrored_and_cropped_images_are_cached_apart(family, tmp_path):
    folder = make_subject(tmp_path / "s", 1, size=(80, 32))
    source, _ = source_of(family, folder, center_crop=False, random_flip=True)
    drawn = [source.draw(position)[0] for position in range(40)]
    different = []
    for latents in drawn:
        if not any(torch.allclose(latents, other, atol=1e-2) for other in different):
            different.append(latents)
    assert len(different) == 8  # four places, each also mirrored
    centred, _ = source_of(family, folder)
    assert all(torch.allclose(centred.draw(p)[0], centred.draw(0)[0], atol=1e-2) for p in range(8))


def test_draws_depend_on_seed_and_position_alone(family, tmp_path):
    folder = make_subject(tmp_path / "s", 3)
    drawers = []
    for seed in (0, 0, 1):
        source, _ = source_of(family, folder, seed=seed)
        drawers.append(drawer_of(source))
    drawers[0].draw(0, 3)  # what was drawn before does not matter
    one, two, other = (drawer.draw(4, 2) for drawer in drawers)
    alone = drawers[0].draw(5, 1)
    for field in ("latents", "noise", "timesteps"):
        assert torch.equal(getattr(one, field), getattr(two, field))
        assert torch.equal(getattr(one, field)[1:], getattr(alone, field))
    assert not torch.equal(one.noise, other.noise)
    assert not torch.equal(one.timesteps, other.timesteps)
    assert not torch.equal(one.noise[0], one.noise[1])


def test_timesteps_cover_the_whole_schedule(family, tmp_path):
    source, _ = source_of(family, make_subject(tmp_path / "s", 2))
    drawer = drawer_of(source, 10)
    drawn = torch.cat([drawer.draw(position, 8).timesteps for position in range(0, 160, 8)])
    assert sorted(set(drawn.tolist())) == list(range(10))


@pytest.mark.parametrize("center_crop", [False, True])
@pytest.mark.parametrize("flip", [False, True])
def test_the_image_condition_says_where_the_crop_was_cut(family, tmp_path, monkeypatch, center_crop, flip):
    """In an image whose red rises to the right and green downwards, a crop's first pixel tells where it lies."""
    width, height = 256, 32
    across, down = np.meshgrid(np.arange(width), np.arange(height))
    (tmp_path / "s").mkdir()
    array = np.stack([across, down * 8, np.zeros_like(down)], -1).astype(np.uint8)
    Image.fromarray(array).save(tmp_path / "s" / "0.png")
    source, _ = source_of(family, tmp_path / "s", center_crop=center_crop, random_flip=flip)
    seen = []
    monkeypatch.setattr(family, "encode_image", lambda image: seen.append(image) or torch.zeros(2, 4, 8, 8))
    source._moments.clear()
    places = set()
    for position in range(24):
        _, conditions, _ = source.draw(position)
        source._moments.clear()
        found = conditions[IMAGE].tolist()
        assert [found[0], found[1], found[4], found[5]] == [height, width, 32, 32]
        first = float((seen[-1][0, 0, 0] + 1) * 127.5)
        mirrored = first > float((seen[-1][0, 0, -1] + 1) * 127.5)
        assert mirrored <= flip
        assert round(width - 1 - first if mirrored else first) == found[3]
        assert found[2] == 0
        places.add(found[3])
    assert len(places) == 1 if center_crop else len(places) > 2


def test_everything_is_encoded_at_once_for_a_gpu(family, tmp_path, monkeypatch):
    examples, _ = scan_images(make_subject(tmp_path / "s", 2, size=(48, 32)), "a cat")
    source = ExampleSource(family, examples, Preparation(32, random_flip=True), "instance")
    source.fill(everything=True)
    monkeypatch.setattr(family, "encode_image", None)
    monkeypatch.setattr(family, "encode_prompt", None)
    for position in range(64):
        source.draw(position)


# -------------------------------------------------------------------------------------------------- class images


def images_in(folder):
    """What lies in the folder besides its lock."""
    return {name: content for name, content in files_in(folder).items() if name != LOCK_FILE}


def drawn_into(family, folder, count=3, prompts=("a dog",), say=print, model="m", size=32):
    """The class images of a folder, the missing ones drawn in batches of two."""
    return class_examples(ClassFolder(folder, list(prompts), count, 0, model), Sampler(family, size, 1, 1.0, 2), say)


def test_class_images_are_drawn_to_the_exact_number_and_only_missing_ones(family, tmp_path):
    folder, said = tmp_path / "class", []
    examples = drawn_into(family, folder, say=said.append)
    first = images_in(folder)
    assert said == ["drawing 3 class images of 'a dog'"]
    assert len(examples) == len(first) == len(set(first.values())) == 3
    assert {example.caption for example in examples} == {"a dog"}

    assert drawn_into(family, folder, say=said.append) == examples
    assert said[1:] == []
    more = drawn_into(family, folder, 5, say=said.append)
    assert said[1:] == ["drawing 2 class images of 'a dog'"]
    assert len(more) == 5
    assert images_in(folder).items() >= first.items()

    lost = next(path for path in folder.iterdir() if path.name.startswith("1-"))
    lost.unlink()
    drawn_into(family, folder, 5, say=said.append)
    assert said[2:] == ["drawing 1 class images of 'a dog'"]
    assert images_in(folder)[lost.name] == first[lost.name]


def test_several_class_prompts_share_the_images_and_each_keeps_its_own(family, tmp_path):
    folder, prompts = tmp_path / "class", ("a dog", "a red car")
    examples = drawn_into(family, folder, 4, prompts)
    assert sorted(example.caption for example in examples) == ["a dog", "a dog", "a red car", "a red car"]
    assert drawn_into(family, folder, 4, prompts) == examples
    single = drawn_into(family, tmp_path / "one", 2)
    drawn = {example.caption: load_image(example.path).tobytes() for example in examples if example.path.name < "2"}
    assert drawn["a dog"] == load_image(single[0].path).tobytes()  # the first image, of the same prompt
    assert len(set(drawn.values())) == 2


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"prompts": ("a cat",)}, "prompt 'a dog' instead of 'a cat'"),
        ({"prompts": ("a dog", "a cat")}, "prompt 'a dog' instead of 'a cat'"),
        ({"model": "another"}, "model 'm' instead of 'another'"),
        ({"size": 64}, "size 32 instead of 64"),
    ],
    ids=str,
)
def test_images_of_another_class_model_or_size_are_refused(family, tmp_path, other, told):
    folder = tmp_path / "class"
    drawn_into(family, folder)
    before = files_in(folder)
    with pytest.raises(EffiLoRAError, match="were drawn for something else") as caught:
        drawn_into(family, folder, **other)
    assert told in str(caught.value)
    assert files_in(folder) == before


def test_the_number_of_class_images_is_the_number_used_and_another_run_s_growth_changes_nothing(family, tmp_path):
    folder = tmp_path / "class"
    make_subject(folder, 1)
    first = drawn_into(family, folder, 3)
    assert len(first) == 3
    drawn_into(family, folder, 6)
    assert len(images_in(folder)) == 6
    assert drawn_into(family, folder, 3) == first
    assert [example.path.name for example in drawn_into(family, folder, 1)] == ["0.png"]  # the user's own come first


@pytest.mark.parametrize("kept", [0, 1, 2, 3])
def test_an_interrupted_filling_goes_on_to_the_same_images(family, tmp_path, kept):
    whole = pixels_of(drawn_into(family, tmp_path / "whole", 4))
    folder = tmp_path / "part"
    drawn_into(family, folder, 4)
    for path in sorted(folder.glob("*.png"))[kept:]:
        path.unlink()
    assert pixels_of(drawn_into(family, folder, 4)) == whole


def pixels_of(examples):
    return {example.path.name: load_image(example.path).tobytes() for example in examples}


def test_a_run_waits_for_another_one_that_fills_the_folder(family, tmp_path):
    folder, said = tmp_path / "class", []
    folder.mkdir()
    lock = FileLock(folder / LOCK_FILE)
    lock.acquire()

    def say(text):
        said.append(text)
        if text.startswith("waiting"):
            make_subject(folder, 2)  # the other one goes on meanwhile
            lock.release()
        else:
            with pytest.raises(Timeout):  # a third one waits now
                FileLock(folder / LOCK_FILE, timeout=0).acquire()

    assert len(drawn_into(family, folder, 3, say=say)) == 3
    assert said == [f"waiting for another run that fills {folder}", "drawing 1 class images of 'a dog'"]


def test_only_usable_class_images_count_and_bad_ones_are_named(family, tmp_path):
    folder, said = tmp_path / "class", []
    make_subject(folder, 1, captions=["my own dog"])
    (folder / "notes.md").write_text("no image")
    (folder / ".hidden.png").write_text("no image")
    (folder / "broken.png").write_bytes(b"")
    examples = drawn_into(family, folder, say=said.append)
    assert said == ["drawing 2 class images of 'a dog'", "skipped  broken.png: the file is empty"]
    assert len(examples) == 3
    assert [example.caption for example in examples if example.path.name == "0.png"] == ["my own dog"]


def test_class_images_stand_behind_the_instances_with_their_own_prompt(model, tmp_path):
    prior = {"with_prior_preservation": True, "class_data_dir": str(tmp_path / "class"), "class_prompt": "a dog"}
    subject = make_subject(tmp_path / "s")
    run = trainer(model, subject, tmp_path / "out", **prior, num_class_images=2, train_batch_size=2)
    batch = run.batches.draw(0, 2)
    assert batch.instances == 2
    assert len(batch.names) == len(batch.latents) == len(batch.noise) == len(batch.timesteps) == 4
    folders = [tmp_path / "class" if index >= 2 else subject for index in range(4)]
    assert all((folder / name).exists() for folder, name in zip(folders, batch.names, strict=True))
    for states, prompt in zip(
        batch.conditions["encoder_hidden_states"], ("a sks cat", "a sks cat", "a dog", "a dog"), strict=True
    ):
        assert torch.equal(states, text_states(run.family, prompt))
    assert not torch.equal(batch.noise[:2], batch.noise[2:])


# ------------------------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("gamma", [None, 5.0])
def test_prior_preservation_adds_the_weighted_class_loss(model, tmp_path, gamma):
    prior = {"with_prior_preservation": True, "class_data_dir": str(tmp_path / "class"), "class_prompt": "a dog"}
    options = {"num_class_images": 2, "train_batch_size": 2, "prior_loss_weight": 0.3, "snr_gamma": gamma}
    run = trainer(model, make_subject(tmp_path / "s"), tmp_path / "out", **prior, **options)
    batch = run.batches.draw(0, 2)
    losses = []
    with torch.no_grad():
        for row in range(4):
            time = batch.timesteps[row]
            alpha = run.objective.scheduler.alphas_cumprod[time]
            noisy = alpha.sqrt() * batch.latents[row] + (1 - alpha).sqrt() * batch.noise[row]
            target = alpha.sqrt() * batch.noise[row] - (1 - alpha).sqrt() * batch.latents[row]
            found = run.family.pipe.unet(
                noisy[None], time, batch.conditions["encoder_hidden_states"][row][None]
            ).sample[0]
            snr = alpha / (1 - alpha)
            weight = 1 if gamma is None else min(snr, gamma) / (snr + 1)
            losses.append(float(weight * (found - target).square().mean()))
        total = float(run._loss(batch))
    assert total == pytest.approx((losses[0] + losses[1]) / 2 + 0.3 * (losses[2] + losses[3]) / 2, rel=1e-4)
    assert abs(losses[2] + losses[3]) > 1e-3


def gradients_of_first_step(model, subject, output, monkeypatch, **options):
    """The loss and gradients that the first optimizer step sees, with heads that are not zero."""
    run = trainer(model, subject, output, **options)
    generator = torch.Generator().manual_seed(0)
    for heads in run.adapter.B:
        heads.data.copy_(torch.randn(heads.shape, generator=generator) * 0.1)
    seen = SimpleNamespace()
    monkeypatch.setattr(
        run.loop,
        "_apply_gradients",
        lambda step: seen.__dict__.update({n: p.grad for n, p in run.adapter.named_parameters()}),
    )
    loss = run.loop.step(0)["loss"]
    return loss, vars(seen)


def test_two_micro_batches_of_one_are_one_batch_of_two(model, tmp_path, monkeypatch):
    subject = make_subject(tmp_path / "s")
    split = {"train_batch_size": 1, "gradient_accumulation_steps": 2}
    loss, accumulated = gradients_of_first_step(model, subject, tmp_path / "a", monkeypatch, **split)
    expected_loss, expected = gradients_of_first_step(
        model, subject, tmp_path / "b", monkeypatch, train_batch_size=2, gradient_accumulation_steps=1
    )
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert accumulated.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0
        assert torch.allclose(accumulated[name], gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max())), name

"""Aspect-ratio buckets: which size an image gets, which images a micro-batch has, and that squares change nothing."""

from collections import Counter

import numpy as np
import pytest
import torch
from helpers import files_in, image, make_subject, metrics, same_content, trainer
from PIL import Image
from tiny_families import build

from effilora_diffusion import EffiLoRAError
from effilora_diffusion.cli.train import main
from effilora_diffusion.core.rng import draw_item
from effilora_diffusion.diffusion.data.buckets import BucketOrder, generated_buckets, listed_buckets
from effilora_diffusion.diffusion.data.images import crop_place
from effilora_diffusion.diffusion.models import IMAGE, make_family

SIZES = ((48, 24), (24, 48), (32, 32), (64, 64), (100, 50), (50, 100), (20, 16))
ON = {"use_aspect_ratio_buckets": True}
FAST = {"num_validation_images": 0, "routing": "static", "heads": 1}
"""Nothing is drawn, and the plain LoRA is exact."""


def mixed_subject(folder, sizes=SIZES):
    folder.mkdir()
    for index, size in enumerate(sizes):
        image(index, size).save(folder / f"{index}.png")
    return folder


# ------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(("resolution", "multiple"), [(64, 8), (512, 8), (1024, 16), (1024, 32), (96, 32)])
def test_buckets_have_about_the_same_area_and_edges_that_the_model_can_have(resolution, multiple):
    buckets = generated_buckets(resolution, multiple, None, "X")
    assert (resolution, resolution) in buckets.sizes
    for width, height in buckets.sizes:
        assert width % multiple == 0
        assert height % multiple == 0
        assert width * height <= resolution**2
        assert resolution / 2 <= min(width, height) <= max(width, height) <= 2 * resolution
        assert (height, width) in buckets.sizes


def test_images_are_never_enlarged_unless_somebody_asks():
    buckets, larger = (generated_buckets(512, 8, None, "X", upscale=upscale) for upscale in (False, True))
    rng = np.random.default_rng(0)
    for size in rng.integers(64, 1500, (300, 2)).tolist():
        width, height = buckets.size_of(size)
        assert width <= size[0]
        assert height <= size[1]
        assert width * height <= 512**2
        assert larger.size_of(size) in larger.sizes
    assert buckets.size_of((512, 512)) == buckets.size_of((4000, 4000)) == (512, 512)
    assert buckets.size_of((3000, 2000)) == larger.size_of((300, 200)) == (640, 384)
    assert buckets.size_of((300, 200)) == (256, 192)
    assert generated_buckets(512, 8, None, "X", least=256).size_of((300, 200)) == (256, 256)
    assert buckets.size_of((5000, 70)) == (1024, 64)


def test_listed_sizes_are_chosen_as_in_diffusers():
    from diffusers.training_utils import find_nearest_bucket, parse_buckets_string

    text = "1024,1024; 768,1360;1360,768;880,1168;1168,880;1248,832;832,1248"
    buckets, theirs = listed_buckets(text, 16, None, "X"), parse_buckets_string(text)
    rng = np.random.default_rng(1)
    for width, height in [*rng.integers(64, 3000, (200, 2)).tolist(), (7, 7), (10, 20)]:
        expected = theirs[find_nearest_bucket(height, width, theirs)]
        assert buckets.size_of((width, height)) == expected[::-1]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"aspect_ratio_buckets": "64x64"}, "must be like '512,768;768,512'"),
        ({"aspect_ratio_buckets": "0,64"}, "must be like '512,768;768,512'"),
        ({"aspect_ratio_buckets": "64,60"}, "must have multiples of 8 for Stable Diffusion .*, and 64,60 does not"),
        ({"aspect_ratio_buckets": "64,64", "min_bucket_reso": 32}, "--min_bucket_reso is for buckets that are made"),
        ({"max_bucket_reso": 64}, "add --use_aspect_ratio_buckets"),
        ({**ON, "bucket_reso_steps": 12}, "--bucket_reso_steps must be a multiple of 8"),
        ({**ON, "min_bucket_reso": 40}, "--min_bucket_reso 40 is above --resolution 32"),
        ({**ON, "max_bucket_reso": 24}, "--max_bucket_reso 24 is below --resolution 32"),
    ],
    ids=str,
)
def test_settings_that_contradict_one_another_or_the_model_are_refused(tiny_pipeline, tmp_path, options, told):
    with pytest.raises(EffiLoRAError, match=told):
        trainer(tiny_pipeline, make_subject(tmp_path / "s", 1), tmp_path / "out", **options)


@pytest.mark.parametrize(("name", "largest"), [("sd3", 256), ("auraflow", 128)])
def test_no_bucket_is_larger_than_the_positions_of_the_model(name, largest):
    family = make_family(build(name), torch.device("cpu"))
    assert family.largest_edge == largest
    edges = {edge for size in generated_buckets(96, 16, largest, "X").sizes for edge in size}
    assert max(edges) == min(192, largest)
    with pytest.raises(EffiLoRAError, match="must not have edges above"):
        listed_buckets(f"64,{largest + 16}", 16, largest, family.title)
    shape = family.encode_image(torch.zeros(3, largest, 64)).shape[1:]
    conditions = {**family.encode_prompt("a cat"), IMAGE: torch.tensor([64.0, 64, 0, 0, 64, 64])}
    with torch.no_grad():
        assert (
            family.predict(torch.zeros(1, *shape), torch.tensor([500.0]), family.collate([conditions]))
            .isfinite()
            .all()
        )


# ------------------------------------------------------------------------------------------------------------- order


@pytest.mark.parametrize("batch", [1, 2, 3, 8])
def test_every_image_is_seen_as_often_as_any_other_and_every_micro_batch_has_one_size(batch):
    sizes = [(2, 1)] * 7 + [(1, 1)] * 3 + [(1, 2)]
    order, seen = BucketOrder(sizes, batch, 5, "instance"), Counter()
    order_again = BucketOrder(sizes, batch, 5, "instance")
    assert [order_again.item(position) for position in reversed(range(110 * batch))] == [
        order.item(position) for position in reversed(range(110 * batch))
    ]
    turns = Counter()
    for number in range(11 * 10):
        rows = [order.item(number * batch + row) for row in range(batch)]
        assert len({size for _, size in rows}) == 1
        assert all(sizes[index] == size for index, size in rows)
        seen.update(index for index, _ in rows)
        turns[rows[0][1]] += 1
        for size, count in Counter(sizes).items():  # within an epoch a bucket may come late, and not more than that
            assert abs(turns[size] * batch - (number + 1) * batch * count / 11) < 2 * batch + count
    assert set(seen.values()) == {10 * batch}


def test_with_a_single_size_the_order_is_that_without_buckets():
    order = BucketOrder([(4, 4)] * 7, 2, 3, "instance")
    assert [order.item(position)[0] for position in range(40)] == [
        draw_item(position, 7, 3, "instance") for position in range(40)
    ]


# -------------------------------------------------------------------------------------------------------------- runs

PRIOR = {"with_prior_preservation": True, "class_prompt": "a cat", "prior_interval": 1}


def test_square_images_train_the_same_with_buckets_and_without(tiny_pipeline, tmp_path):
    subject = make_subject(tmp_path / "s", 3, size=(40, 40))
    options = {**FAST, **PRIOR, "train_batch_size": 2, "center_crop": False, "random_flip": True}
    for name, buckets in (("off", {}), ("on", ON), ("listed", {"aspect_ratio_buckets": "32,32"})):
        run = trainer(tiny_pipeline, subject, tmp_path / name, **options, **buckets)
        batch = run.batches.draw(0, 2)
        run.run()
        if name == "off":
            expected = batch
        assert torch.equal(batch.latents, expected.latents)
        assert torch.equal(batch.conditions[IMAGE], expected.conditions[IMAGE])
        assert metrics(tmp_path / name) == metrics(tmp_path / "off")
        assert plain(tmp_path / name) == plain(tmp_path / "off")


def plain(output):
    return (output / "pytorch_lora_weights.safetensors").read_bytes()


def test_a_run_over_several_sizes_resumes_exactly_and_tells_them_before(tiny_pipeline, tmp_path, capsys):
    subject = mixed_subject(tmp_path / "s")
    options = {**ON, **PRIOR, "train_batch_size": 2, "gradient_accumulation_steps": 2, "checkpointing_steps": 3}
    options |= {**FAST, "max_train_steps": 6, "learning_rate": 0.05, "center_crop": False}
    whole = trainer(tiny_pipeline, subject, tmp_path / "whole", **options)
    told = capsys.readouterr().out
    assert "images      7, 1 distinct caption, in 4 buckets" in told
    assert "buckets     24 x 40 px: 2 images, 1 micro-batch an epoch" in told
    assert "            16 x 16 px: 1 image, 0.5 micro-batches an epoch" in told
    assert "enlarged" not in told
    shapes = [tuple(whole.batches.draw(first, 2).latents.shape) for first in range(0, 28, 2)]
    assert {shape[0] for shape in shapes} == {4}
    assert Counter(shape[2:] for shape in shapes) == {(8, 8): 4, (10, 6): 4, (6, 10): 4, (4, 4): 2}
    whole.run()
    part = trainer(tiny_pipeline, subject, tmp_path / "part", **{**options, "max_train_steps": 3})
    part.run()
    again = {**options, "resume_from_checkpoint": "latest"}
    changed = {"bucket_reso_steps": 16, "train_batch_size": 4, "gradient_accumulation_steps": 1}
    with pytest.raises(EffiLoRAError, match="train_batch_size was 2 and is 4; bucket_reso_steps was None and is 16"):
        trainer(tiny_pipeline, subject, tmp_path / "part", **{**again, **changed}).run()
    trainer(tiny_pipeline, subject, tmp_path / "part", **again).run()
    assert metrics(tmp_path / "part") == metrics(tmp_path / "whole")
    name = "pytorch_lora_weights.safetensors"
    assert same_content(tmp_path / "part" / name, tmp_path / "whole" / name)


def test_the_dry_run_and_sd_scripts_flags_show_the_same_buckets(tiny_pipeline, tmp_path, capsys):
    subject = mixed_subject(tmp_path / "s")
    words = ["--pretrained_model_name_or_path", str(tiny_pipeline), "--instance_data_dir", str(subject)]
    words += ["--instance_prompt", "a cat", "--resolution", "32", "--dry_run", "--output_dir", str(tmp_path / "out")]
    main([*words, "--enable_bucket", "--bucket_no_upscale", "--min_bucket_reso", "16", "--max_bucket_reso", "64"])
    small = capsys.readouterr().out
    assert "16 x 16 px: 1 image, 0.25 micro-batches an epoch" in small
    main([*words, "--use_aspect_ratio_buckets", "--bucket_no_upscale", "false", "--bucket_reso_steps", "16"])
    assert "32 x 32 px: 3 images, 0.75 micro-batches an epoch, 1 of them enlarged" in capsys.readouterr().out
    main([*words, "--aspect_ratio_buckets", "16,64;64,16"])
    listed = capsys.readouterr().out
    assert "in 2 buckets" in listed
    assert "64 x 16 px" in listed


@pytest.mark.parametrize("center_crop", [False, True])
def test_size_conditions_say_what_was_cut_out_of_which_image(tiny_pipeline, tmp_path, monkeypatch, center_crop):
    """In an image whose red rises to the right and green downwards, the first pixel tells where the cut lies."""
    across, down = np.meshgrid(np.arange(144), np.arange(48))
    (tmp_path / "s").mkdir()
    array = np.stack([across, down * 4, np.zeros_like(down)], -1).astype(np.uint8)
    Image.fromarray(array).save(tmp_path / "s" / "wide.png")
    image(0).save(tmp_path / "s" / "square.png")
    options = {"aspect_ratio_buckets": "32,32;48,96", "center_crop": center_crop, "random_flip": True}
    run = trainer(tiny_pipeline, tmp_path / "s", tmp_path / "out", **options)
    seen, places = [], set()
    source = run.batches.instance
    monkeypatch.setattr(run.family, "encode_image", lambda image: seen.append(image) or torch.zeros(2, 4, 8, 8))
    for position in range(40):
        source._moments.clear()
        _, conditions, name = source.draw(position)
        found = conditions[IMAGE].tolist()
        if name == "square.png":
            assert found == [32, 32, 0, 0, 32, 32]
            continue
        assert seen[-1].shape == (3, 48, 96)
        assert found[:2] + found[4:] == [48, 144, 48, 96]
        first, last = (float((seen[-1][0, 0, place] + 1) * 127.5) for place in (0, -1))
        assert round(143 - first if first > last else first) == found[3]
        places.add(found[3])
    assert len(places) == 1 if center_crop else len(places) > 2


def test_class_rows_have_the_size_of_the_images_that_they_go_with(tiny_pipeline, tmp_path):
    sizes = {str(index): size for index, size in enumerate(SIZES)}
    subject = mixed_subject(tmp_path / "s")
    run = trainer(tiny_pipeline, subject, tmp_path / "out", **ON, **PRIOR, train_batch_size=2)
    for first in range(0, 28, 2):
        batch = run.batches.draw(first, 2)
        cut = {run.parts.preparation.size_of(sizes[name[0]]) for name in batch.names}
        assert len(batch.names) == 4
        assert len(cut) == 1  # also the images under the class prompt are of this bucket
    drawn = {**PRIOR, "class_data_dir": str(make_subject(tmp_path / "class", 4, first=20)), "num_class_images": 4}
    run = trainer(tiny_pipeline, subject, tmp_path / "drawn", **ON, **drawn, train_batch_size=2)
    seen = Counter()
    for first in range(0, 56, 2):
        batch = run.batches.draw(first, 2)
        assert len({tuple(row[4:].tolist()) for row in batch.conditions[IMAGE]}) == 1
        assert batch.conditions[IMAGE][2:, :2].tolist() == [[32.0, 32.0]] * 2
        seen.update(batch.names[2:])
    assert set(seen.values()) == {14}


def test_every_other_batch_of_a_run_has_one_size_too(tiny_pipeline, tmp_path):
    subject = mixed_subject(tmp_path / "s")
    run = trainer(tiny_pipeline, subject, tmp_path / "out", **ON, train_batch_size=2)
    assert len(run.batches.validation(3).latents) == 8
    shapes = {tuple(run.batches.mixed("gap", index, range(6), 6).latents.shape[2:]) for index in range(12)}
    assert len(shapes) == 4


def test_several_subjects_take_turns_by_micro_batches(tiny_pipeline, tmp_path):
    folders = {name: mixed_subject(tmp_path / name, sizes) for name, sizes in (("sks", SIZES), ("zwx", SIZES[:3]))}
    entries = [
        {"instance_data_dir": str(folder), "instance_prompt": f"a {name} cat", "class_prompt": "a cat"}
        for name, folder in folders.items()
    ]
    own = {"concepts": entries, "instance_data_dir": None, "instance_prompt": None, "routing": "concept"}
    run = trainer(
        tiny_pipeline, None, tmp_path / "out", **{**ON, **PRIOR, "class_prompt": [], **own}, train_batch_size=2
    )  # fmt: skip
    subjects = []
    for first in range(0, 40, 2):
        batch = run.batches.draw(first, 2)
        assert batch.captions[0] == batch.captions[1]
        subjects.append(batch.captions[0])
        run._loss(batch)
    assert Counter(subjects) == {"a sks cat": 10, "a zwx cat": 10}


def test_packed_latents_of_several_sizes(tmp_path):
    build("flux").save_pretrained(tmp_path / "model")
    subject = mixed_subject(tmp_path / "s", ((96, 64), (64, 64)))
    options = {"resolution": 64, "aspect_ratio_buckets": "64,64;64,96", "max_sequence_length": 32}
    run = trainer(tmp_path / "model", subject, tmp_path / "out", **{**options, **FAST})
    run.run()
    assert {name for first in range(2) for name in run.batches.draw(first, 1).names} == {"0.png", "1.png"}
    assert "pytorch_lora_weights.safetensors" in files_in(tmp_path / "out")


def test_crops_cover_what_is_wanted():
    rng = np.random.default_rng(2)
    for width, height, wide, high in rng.integers(1, 200, (300, 4)).tolist():
        scaled_width, scaled_height, left, top = crop_place((width, height), (wide, high), (0.99, 0.99))
        assert wide <= scaled_width
        assert high <= scaled_height
        assert wide == scaled_width or high == scaled_height
        assert 0 <= left <= scaled_width - wide
        assert 0 <= top <= scaled_height - high

"""Several resolutions in one run: which images are trained at which, resumption, data sets of sd-scripts, shifts."""

from collections import Counter

import pytest
import torch
from helpers import image, make_subject, metrics, settings, trainer
from tiny_families import build

from effilora_diffusion import EffiLoRAError
from effilora_diffusion.core import load_adapter_file
from effilora_diffusion.diffusion.models import IMAGE
from effilora_diffusion.diffusion.training.loss import flow_shift
from effilora_diffusion.diffusion.training.main import report_only
from effilora_diffusion.diffusion.training.trainer import Trainer

SIZES = ((96, 72), (50, 50), (20, 24))
MORE = {"resolution": 64, "more_resolutions": "32,48", "num_validation_images": 0, "routing": "static", "heads": 1}


@pytest.fixture
def subject(tmp_path):
    folder = tmp_path / "s"
    folder.mkdir()
    for index, size in enumerate(SIZES):
        image(index, size).save(folder / f"{index}.png")
    return folder


def seen(run, count):
    """How often a run has each image in each size, width before height, in its first rows."""
    found = Counter()
    for first in range(count):
        batch = run.batches.draw(first, 1)
        found[batch.names[0], tuple(batch.latents.shape[:1:-1])] += 1
    return found


def test_images_have_every_resolution_that_does_not_enlarge_them(tiny_pipeline, subject, tmp_path, capsys):
    run = trainer(tiny_pipeline, subject, tmp_path / "out", **MORE)
    assert "images      3 at resolutions 64, 48, 32 where none has to be enlarged: 6 in all" in capsys.readouterr().out
    scale = 4  # pixels of a latent of the tiny autoencoder
    wanted = {("0.png", 64), ("0.png", 48), ("0.png", 32), ("1.png", 48), ("1.png", 32), ("2.png", 32)}
    assert seen(run, 12) == {(name, (edge // scale, edge // scale)): 2 for name, edge in wanted}
    assert run.parts.steps_per_epoch == 6


def test_what_is_said_of_the_images_names_each_once(tiny_pipeline, subject, tmp_path, capsys):
    (subject / "0.txt").write_text("another")
    options = {**MORE, "num_validation_images": 1, "max_train_steps": 1}
    report_only(settings(tiny_pipeline, subject, tmp_path / "dry", **options))
    told = capsys.readouterr().out
    assert [told.count(f"\n  {number}.png: ") for number in range(3)] == [1, 1, 1]
    assert "1 of 1 captions do not contain" in told
    run = trainer(tiny_pipeline, subject, tmp_path / "out", **options)
    assert [example.path.name for example in run.parts.images] == ["0.png", "1.png", "2.png"]
    run.run()
    assert load_adapter_file(tmp_path / "out" / "effilora.safetensors").metadata["images"] == 3
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count("1.png") == 1


def test_with_buckets_no_image_comes_twice_in_one_size(tiny_pipeline, subject, tmp_path):
    run = trainer(tiny_pipeline, subject, tmp_path / "out", **MORE, use_aspect_ratio_buckets=True, min_bucket_reso=16)
    found = list(zip([example.path.name for example in run.parts.examples], run.parts.sizes, strict=True))
    assert len(found) == len(set(found)) == run.parts.epoch
    assert {size for name, size in found if name == "0.png"} >= {(40, 24)}  # of 32 x 32 pixels
    for first in range(8):  # what the model is told of the size is right for each
        batch = run.batches.draw(first, 1)
        if IMAGE in batch.conditions:
            assert batch.conditions[IMAGE][0, 4:].tolist() in [list(size[::-1]) for _, size in found]


def test_a_run_resumes_exactly_and_only_at_its_resolutions(tiny_pipeline, subject, tmp_path):
    options = {**MORE, "checkpointing_steps": 2, "learning_rate": 0.05}
    trainer(tiny_pipeline, subject, tmp_path / "whole", **options, max_train_steps=4).run()
    trainer(tiny_pipeline, subject, tmp_path / "part", **options, max_train_steps=2).run()
    again = {**options, "max_train_steps": 4, "resume_from_checkpoint": "latest"}
    with pytest.raises(EffiLoRAError, match="more_resolutions was '32,48' and is '32'"):
        trainer(tiny_pipeline, subject, tmp_path / "part", **{**again, "more_resolutions": "32"}).run()
    with pytest.raises(EffiLoRAError, match="train_batch_size was 1 and is 2"):  # other images would be drawn
        trainer(tiny_pipeline, subject, tmp_path / "part", **again, train_batch_size=2).run()
    divided = {"train_batch_size": 2, "gradient_accumulation_steps": 1}
    trainer(tiny_pipeline, subject, tmp_path / "two", **options, **{**divided, "max_train_steps": 2}).run()
    divided |= {"train_batch_size": 1, "gradient_accumulation_steps": 2}
    with pytest.raises(EffiLoRAError, match="train_batch_size was 2 and is 1"):  # as many images, but others
        trainer(tiny_pipeline, subject, tmp_path / "two", **again, **divided).run()
    trainer(tiny_pipeline, subject, tmp_path / "part", **again).run()
    assert metrics(tmp_path / "part") == metrics(tmp_path / "whole")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"more_resolutions": "many"}, "--more_resolutions must be like '512,768'"),
        ({"more_resolutions": "4"}, "--more_resolutions must be like '512,768'"),
        ({"more_resolutions": "33"}, "must be a multiple of"),
        ({"more_resolutions": "32", "aspect_ratio_buckets": "64,64"}, "lists all sizes: leave other resolutions out"),
    ],
)
def test_resolutions_that_can_t_be_had_are_refused(tiny_pipeline, subject, tmp_path, options, told):
    with pytest.raises(EffiLoRAError, match=told):
        trainer(tiny_pipeline, subject, tmp_path / "out", **{**MORE, **options})


def test_folders_of_sd_scripts_data_sets_have_their_own_resolution(tiny_pipeline, tmp_path):
    sets = ""
    for name, edge, count in (("large", 64, 2), ("small", 32, 1)):
        make_subject(tmp_path / name, count, size=(80, 80))
        sets += f"[[datasets]]\nresolution = {edge}\n[[datasets.subsets]]\nclass_tokens = 'a'\n"
        sets += f"image_dir = '{(tmp_path / name).as_posix()}'\n"
    (tmp_path / "sets.toml").write_text(sets)
    plain = vars(settings(tiny_pipeline, "x", tmp_path / "out", instance_prompt="x", num_validation_images=0))
    own = {"instance_data_dir": None, "instance_prompt": None, "dataset_config": str(tmp_path / "sets.toml")}
    config = type(settings(tiny_pipeline, "x", tmp_path / "out"))(**{**plain, **own})
    run = Trainer(config)
    assert run.config.resolution == 64
    assert run.parts.sizes == [(64, 64), (64, 64), (32, 32)]
    (tmp_path / "sets.toml").unlink()  # it is read at the start
    assert {size for _, size in seen(run, 6)} == {(16, 16), (8, 8)}


def test_the_shift_of_noise_levels_is_that_of_the_size(tmp_path):
    build("flux").save_pretrained(tmp_path / "model")
    folder = make_subject(tmp_path / "s", 1, size=(128, 64))
    runs = {}
    for size in ("64,64", "64,128"):
        options = {"aspect_ratio_buckets": size, "resolution": 64, "num_validation_images": 0}
        runs[size] = trainer(tmp_path / "model", folder, tmp_path / size, **options)
    assert runs["64,64"].fingerprint["objective"].endswith(" by size")  # not as runs of one shift for all sizes
    odds = {}
    for size, run in runs.items():
        levels = torch.cat([run.batches.draw(first, 1).timesteps for first in range(8)]).double() / 1000
        odds[size] = levels / (1 - levels)  # a shift multiplies them
    schedule = runs["64,64"].family.pipe.scheduler.config
    expected = flow_shift(schedule, (128, 64)) / flow_shift(schedule, 64)
    assert abs(expected - 1) > 1e-3
    torch.testing.assert_close(
        odds["64,128"] / odds["64,64"], torch.full((8,), expected).double(), rtol=1e-3, atol=1e-3
    )

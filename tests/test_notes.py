"""What is said before the first step: settings and captions that are allowed, and mostly not what was meant."""

import time

import pytest
from helpers import arguments, make_subject, settings, trainer

from effilora_diffusion.cli.train import main
from effilora_diffusion.core.assets import asset
from effilora_diffusion.core.files import load_adapter_file

PROMPT = "a photo of sks toy"
TAGS = "red tag, " * 100


def report(capsys, folder, **options):
    """What a dry run of the embedded base prints."""
    chosen = {"resolution": 64, "instance_prompt": PROMPT, **options}
    words = arguments(settings(asset("base"), folder, folder.parent / "out", **chosen))
    assert main([*words, "--dry_run"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 500, "max_train_steps": 5},
            "the warm-up (500 steps) is not below the run (5 steps): the learning rate only gets to 4e-06 of 0.0005",
        ),
        (
            {"lr_warmup_steps": 1, "max_train_steps": 5},
            "--lr_warmup_steps 1 has no effect with --lr_scheduler constant",
        ),
        (
            {"max_train_steps": None, "num_train_epochs": 10, "train_batch_size": 64},
            "10 epochs are 10 steps, in which each of the 3 images is seen 213 times",
        ),
        ({"resolution": 512}, "--resolution 512 is far from the model's own 64 px"),
    ],
)
def test_settings_that_are_mostly_not_what_was_meant_are_told(options, expected, tmp_path, capsys):
    assert f"note: {expected}" in report(capsys, make_subject(tmp_path / "s"), **options)


def test_a_usual_run_has_no_notes(tmp_path, capsys):
    subject = make_subject(tmp_path / "s", captions=["a red sks", "an SKS toy", "sks-like"], size=(64, 64))
    chosen = {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 1, "max_train_steps": 300}
    said = report(capsys, subject, **chosen)
    assert "note" not in said
    assert f"model       {asset('base')}: Stable Diffusion 1.x / 2.x (UNet2DConditionModel)" in said
    assert "v_prediction, float32 on cpu" in said


def test_the_embedded_base_is_named(tmp_path, capsys):
    subject = make_subject(tmp_path / "s")
    words = ["--instance_data_dir", str(subject), "--instance_prompt", PROMPT, "--output_dir", str(tmp_path / "out")]
    assert main([*words, "--dry_run"]) == 0
    assert "model       the embedded base: Stable" in capsys.readouterr().out


def test_a_dry_run_shows_every_caption_and_where_it_stands(tmp_path, capsys):
    subject = make_subject(tmp_path / "s", captions=["a sks"], size=(64, 64))
    (subject / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "two\\u001b sks"}\n')
    lines = report(capsys, subject).splitlines()
    assert lines[0] == "  0.png: 'a sks' ('0.txt')"
    assert lines[1].startswith("  1.png: 'two")
    assert lines[1].endswith("(line 1 of metadata.jsonl)")
    assert "\x1b" not in lines[1]
    assert lines[2] == f"  2.png: '{PROMPT}' (--instance_prompt)"


def test_captions_without_the_trigger_word_are_named_and_not_advertised(tmp_path, capsys, tiny_pipeline):
    captions = ["a purple creature", "a purple toy"]
    said = report(capsys, make_subject(tmp_path / "s", captions=captions))
    assert "note: 2 of 2 captions do not contain 'sks' of --instance_prompt (0.png, 1.png)" in said
    subject = make_subject(tmp_path / "all", 2, captions=captions)
    options = {"num_validation_images": 0, "instance_prompt": "zyx"}
    trainer(tiny_pipeline, subject, tmp_path / "out", **options).run()
    assert load_adapter_file(tmp_path / "out" / "effilora.safetensors").metadata["trigger_prompt"] == captions[0]
    assert 'instance_prompt: "a purple creature"' in (tmp_path / "out" / "README.md").read_text()


def test_truncated_captions_are_named_and_memory_is_predicted_as_for_short_ones(tmp_path, capsys):
    memory = [line for line in report(capsys, make_subject(tmp_path / "a")).splitlines() if line.startswith("memory")]
    said = report(capsys, make_subject(tmp_path / "b", captions=["sks " + TAGS, "sks", "sks " + TAGS]))
    assert "note: the caption of 0.png, 2.png has 304 tokens, and only the first 32 are read" in said
    assert memory[0] in said


def test_an_epoch_is_as_long_as_the_class_images(tmp_path, capsys):
    classes = make_subject(tmp_path / "c", 4, first=9)
    chosen = {"with_prior_preservation": True, "class_data_dir": str(classes), "class_prompt": ["a toy"]}
    chosen |= {"max_train_steps": None, "num_train_epochs": 2, "num_class_images": 12}
    said = report(capsys, make_subject(tmp_path / "s"), **chosen)
    assert "steps       24, batch size 1, 8.0 epochs" in said  # as in diffusers' scripts: max(12, 3) * 2
    assert f"class       12 images of 'a toy' in {classes}, 8 of them to be drawn first" in said
    assert "2 epochs are 24 steps, in which each of the 3 images is seen 8 times" in said
    assert "an epoch is as long as the 12 class images" in said


def test_a_photo_that_is_not_square_keeps_its_shape_in_the_comparison(tmp_path, tiny_pipeline):
    from PIL import Image

    subject = tmp_path / "s"
    subject.mkdir()
    Image.new("RGB", (400, 200), "red").save(subject / "wide.png")
    trainer(tiny_pipeline, subject, tmp_path / "out").run()
    with Image.open(tmp_path / "out" / "before_after.png") as grid:
        red = grid.convert("RGB").point(lambda level: 255 * (level > 200)).split()
    box = Image.merge("RGB", red).crop((190, 0, 600, 420))
    mask = Image.frombytes("L", box.size, bytes(255 * (pixel == (255, 0, 0)) for pixel in box.getdata()))
    left, top, right, bottom = mask.getbbox()
    assert (right - left) == 2 * (bottom - top) == 400


def test_a_pipeline_that_cannot_be_trained_is_refused_before_its_weights_are_read(tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text('{"_class_name": "FluxKontextPipeline"}')
    words = arguments(settings(tmp_path / "model", make_subject(tmp_path / "s"), tmp_path / "out"))
    assert main(words) == 2
    assert "error: FluxKontextPipeline models can't be trained" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["some-body/no-model", "./models/none", "C:\\models\\none"])
def test_a_model_that_is_nowhere_is_told_at_once(tmp_path, capsys, monkeypatch, name):
    asked = []
    monkeypatch.setattr(time, "sleep", asked.append)  # what a loader that tries again does between two tries
    monkeypatch.delenv("HF_HUB_OFFLINE")
    words = arguments(settings(name, make_subject(tmp_path / "s"), tmp_path / "out"))
    assert main(words) == 2
    said = capsys.readouterr().err
    way_out = (
        "go online once, or copy the model here and give its folder" if name[0] == "s" else "no such folder or file"
    )
    assert said.count("\n") == 1
    assert way_out in said
    assert not asked

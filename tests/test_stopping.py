"""A run that is stopped or refused before, between and after its steps: a sentence, nothing half, nothing lost."""

import os
import re
import signal

import pytest
from helpers import arguments, files_in, make_subject, same_content, settings

import effilora_diffusion.diffusion.training.build as build_module
import effilora_diffusion.diffusion.training.plain as plain_module
import effilora_diffusion.diffusion.training.result as result_module
import effilora_diffusion.diffusion.training.rows as rows_module
import effilora_diffusion.diffusion.training.validation as validation_module
from effilora_diffusion.cli import train as launch
from effilora_diffusion.core import load_adapter_file


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    return make_subject(tmp_path_factory.mktemp("subject"))


def killed_in(monkeypatch, where, name, number):
    """Have ``where.name`` send this process a signal when it is called."""
    called = getattr(where, name)

    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), number)
        return called(*args, **kwargs)

    monkeypatch.setattr(where, name, interrupted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("moment", ["load_base", "class_examples"])
def test_a_signal_before_the_first_step_ends_the_run_in_a_sentence_and_leaves_nothing(
    tiny_pipeline, subject, tmp_path, monkeypatch, capsys, number, moment
):
    killed_in(monkeypatch, build_module if moment == "load_base" else rows_module, moment, number)
    prior = {"with_prior_preservation": True, "class_data_dir": str(tmp_path / "class"), "class_prompt": "a dog"}
    words = arguments(settings(tiny_pipeline, subject, tmp_path / "out", **prior, num_class_images=1))
    assert launch.main(words) == 128 + number
    assert capsys.readouterr().err.splitlines()[-1] == f"stopped by signal {int(number)} before its first step"
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("moment", ["calibrate", "export"])
def test_a_signal_while_the_result_is_written_is_made_good_by_resuming(
    tiny_pipeline, subject, tmp_path, monkeypatch, capsys, moment
):
    words = arguments(settings(tiny_pipeline, subject, tmp_path / "out", num_validation_images=0))
    assert launch.main([*words, f"--output_dir={tmp_path / 'whole'}"]) == 0
    with monkeypatch.context() as patch:
        killed_in(patch, plain_module if moment == "calibrate" else result_module, moment, signal.SIGTERM)
        assert launch.main(words) == 143
    assert "--resume_from_checkpoint latest completes it" in capsys.readouterr().err
    assert launch.main([*words, "--resume_from_checkpoint=latest"]) == 0
    for name in ("effilora.safetensors", "pytorch_lora_weights.safetensors"):
        assert same_content(tmp_path / "out" / name, tmp_path / "whole" / name)


@pytest.mark.parametrize("name", ["labelled_grid", "write_report"])
def test_what_shows_the_result_can_not_fail_a_run_whose_adapter_is_saved(
    tiny_pipeline, subject, tmp_path, monkeypatch, capsys, name
):
    module = validation_module if name == "labelled_grid" else result_module
    made = getattr(module, name)

    def broken(*args, **kwargs):
        if (tmp_path / "out" / "effilora.safetensors").exists():
            raise ZeroDivisionError("a bug in the picture")
        return made(*args, **kwargs)

    monkeypatch.setattr(module, name, broken)
    words = arguments(settings(tiny_pipeline, subject, tmp_path / "out"))
    assert launch.main(words) == 0
    assert "note: the adapter is saved, but" in capsys.readouterr().out
    load_adapter_file(tmp_path / "out" / "effilora.safetensors")


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"output_dir": "{images}"}, "--output_dir .* is in --instance_data_dir"),
        ({"output_dir": "{images}/run"}, "--output_dir .* is in --instance_data_dir"),
        ({"instance_data_dir": "{out}/samples"}, "--instance_data_dir .* is where the run writes"),
        ({"instance_data_dir": "{out}/checkpoint-2/x"}, "--instance_data_dir .* is where the run writes"),
        ({"class_data_dir": "{images}"}, "must be two folders"),
        ({"class_data_dir": "{images}/class"}, "must be two folders"),
        ({"class_data_dir": "{out}"}, "--output_dir .* is in --class_data_dir"),
    ],
    ids=str,
)
def test_folders_that_would_be_mixed_are_refused(tiny_pipeline, tmp_path, capsys, changes, told, dry_run):
    images = make_subject(tmp_path / "images")
    before = files_in(images)
    places = {"images": images, "out": tmp_path / "out"}
    prior = {"with_prior_preservation": True, "class_data_dir": "{out}/../class", "class_prompt": "a dog"}
    chosen = {
        name: value.format(**places) if isinstance(value, str) else value
        for name, value in {**prior, **changes}.items()
    }
    words = arguments(settings(tiny_pipeline, images, tmp_path / "out", **{**chosen, "dry_run": dry_run}))
    assert launch.main([*words, *(f"--{name}={chosen[name]}" for name in changes)]) == 2
    assert re.search(told, capsys.readouterr().err)
    assert files_in(images) == before

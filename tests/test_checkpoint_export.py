"""Checkpoints in every place that takes an adapter: loaded, inspected, exported as a run's own adapter would be."""

import shutil

import pytest
import torch
from helpers import make_subject, trainer
from safetensors.torch import load_file

from effilora_diffusion import cli, export_lora, load_adapter
from effilora_diffusion.core import load_adapter_file
from effilora_diffusion.core.inspection import inspect_adapter
from effilora_diffusion.core.reference import adapter_file
from effilora_diffusion.diffusion.models.pipelines import load_pipeline

SETTINGS = {
    "learning_rate": 3e-2,
    "max_train_steps": 4,
    "checkpointing_steps": 2,
    "train_batch_size": 2,
    "num_validation_images": 0,
    "export_distillation_steps": 6,
    "with_prior_preservation": True,
    "class_prompt": ["a dog"],
}


@pytest.fixture(scope="module")
def run(tiny_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    trainer(tiny_pipeline, make_subject(folder / "subject", 2), folder / "run", **SETTINGS).run()
    return folder / "run"


def test_a_checkpoint_says_where_it_comes_from(run):
    whole, part = (load_adapter_file(adapter_file(name)).metadata for name in (run, f"{run}@2"))
    assert part["steps"] == 2
    assert {name: whole[name] for name in part} == {**part, "steps": 4}


@pytest.mark.parametrize("name", ["{}@2", "{} @ 2", "{}/checkpoint-2", "{}/checkpoint-2/adapter.safetensors"])
def test_a_checkpoint_is_taken_by_any_of_its_names(run, tiny_pipeline, name):
    assert inspect_adapter(name.format(run))["steps"] == 2
    loaded = load_adapter(load_pipeline(str(tiny_pipeline)), name.format(run))
    expected = load_adapter_file(run / "checkpoint-2" / "adapter.safetensors").adapter
    assert all(torch.equal(one, other) for one, other in zip(loaded.parameters(), expected.parameters(), strict=True))


def test_the_last_checkpoint_becomes_the_plain_lora_that_the_run_wrote(run, tmp_path, capsys):
    assert cli.main(["export", f"{run}@4", str(tmp_path / "last.safetensors")]) == 0
    assert "made on the run's images" in capsys.readouterr().out
    found, expected = load_file(tmp_path / "last.safetensors"), load_file(run / "pytorch_lora_weights.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_an_earlier_checkpoint_is_fitted_by_itself(run, tmp_path):
    error = export_lora(f"{run}@2", tmp_path / "early.safetensors")
    early, last = (
        load_file(file) for file in (tmp_path / "early.safetensors", run / "pytorch_lora_weights.safetensors")
    )
    assert 0 < error < 1
    assert any(not torch.equal(early[name], last[name]) for name in early)


def test_a_checkpoint_whose_images_are_gone_is_refused_in_a_sentence(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace(str(run.parent / "subject"), str(tmp_path / "nowhere")))
    assert cli.main(["export", f"{tmp_path / 'run'}@2", str(tmp_path / "out.safetensors")]) == 2
    said = capsys.readouterr().err
    assert "checkpoint-2 can't become a plain LoRA" in said
    assert "nowhere" in said
    assert not (tmp_path / "out.safetensors").exists()


def test_a_run_that_was_moved_with_its_cache_is_exported_where_it_lies(tiny_pipeline, tmp_path, monkeypatch):
    """The encoders that it trained read the prompts, not those whose states it kept."""
    subject, cache = make_subject(tmp_path / "s", 2), {"cache_latents_to_disk": True}
    cache["cache_text_encoder_outputs_to_disk"] = True
    given = {**SETTINGS, "max_train_steps": 2, "export_distillation_steps": 1, **cache, "train_text_encoder": True}
    trainer(tiny_pipeline, subject, tmp_path / "before", **given).run()
    run = (tmp_path / "before").rename(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    export_lora(f"{run}@2", run / "last.safetensors")
    assert sorted(tmp_path.iterdir()) == before
    found, expected = load_file(run / "last.safetensors"), load_file(run / "pytorch_lora_weights.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in found)

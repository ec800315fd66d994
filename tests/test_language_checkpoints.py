"""Checkpoints of language runs in every place that takes an adapter, as a run's own adapter would be."""

import shutil

import pytest
import torch
from language_runs import make_place, same, weights, words
from safetensors.torch import load_file

from effilora_diffusion import export_lora, load_adapter
from effilora_diffusion.cli import main as cli
from effilora_diffusion.cli.train_llm import main
from effilora_diffusion.core import load_adapter_file
from effilora_diffusion.core.inspection import inspect_adapter
from effilora_diffusion.core.reference import adapter_file
from effilora_diffusion.language.models import load_model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    place = make_place(tmp_path_factory.mktemp("language"))
    assert main(words(place, place / "run", max_steps=4, save_steps=2, bf16=True)) == 0
    return place / "run"


NAMES = ("{}@2", "{} @ 2", "{}/checkpoint-2", "{}/checkpoint-2/effilora.safetensors")


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_is_taken_by_any_of_its_names(run, name):
    assert inspect_adapter(adapter_file(name.format(run)))["steps"] == 2
    model, _ = load_model(str(run.parent / "model"))
    assert same(load_adapter(model, name.format(run)).parameters(), weights(run / "checkpoint-2"))


def test_the_last_checkpoint_has_a_name(run):
    assert adapter_file(f"{run}@latest") == adapter_file(f"{run} @ latest") == adapter_file(f"{run}@4")


def test_a_checkpoint_chats_is_evaluated_and_inspected(run, tmp_path, capsys):
    (tmp_path / "d.jsonl").write_text('{"instruction": "ab", "choices": ["a", "b"], "answer": "a"}')
    assert cli(["chat", "--adapter", f"{run}@2:0.5", "--prompt", "ab", "--max_new_tokens", "2"]) == 0
    assert cli(["evaluate", "--adapter", f"{run}@latest", "--data", str(tmp_path / "d.jsonl")]) == 0
    assert cli(["inspect", str(run / "checkpoint-2")]) == 0
    said = capsys.readouterr().out
    assert "base   " in said
    assert "plain LoRA      a fit, not yet measured\n" in said
    assert cli(["inspect", f"{run}@3"]) == 2
    assert "no checkpoint of step 3; there are [2, 4]" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["generate --adapter RUN --prompt a --output", "merge RUN --output"])
def test_commands_for_images_say_which_ones_take_it(run, tmp_path, capsys, command):
    words = [f"{run}@2" if word == "RUN" else word for word in command.split()]
    assert cli([*words, str(tmp_path / ("a.png" if "generate" in words else "a.safetensors"))]) == 2
    assert "a language model: use" in capsys.readouterr().err


def test_the_last_checkpoint_becomes_the_plain_lora_that_the_run_wrote(run, tmp_path, capsys, monkeypatch):
    """Its calibration is measured again: in bfloat16, as in the run, from whatever folder."""
    monkeypatch.chdir(tmp_path)
    assert cli(["export", f"{run}@4", str(tmp_path / "last")]) == 0
    assert "fitted on the run's data" in capsys.readouterr().out
    found, expected = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "last", run))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    error = load_adapter_file(run / "effilora.safetensors").metadata["export_error"]
    assert export_lora(f"{run}@latest", tmp_path / "again") == error > 0


def test_an_earlier_checkpoint_is_merged_by_its_own_measure(run, tmp_path):
    assert 0 < export_lora(f"{run}@2", tmp_path / "merged", format="merged") < 1
    merged, before = (load_model(str(folder))[0] for folder in (tmp_path / "merged", run.parent / "model"))
    one, other = (model.model.layers[0].self_attn.q_proj.weight for model in (merged, before))
    assert not torch.equal(one, other)


def test_the_settings_in_the_folder_repeat_the_run(run, tmp_path):
    """All of them, so that nothing of a run is only in its checkpoints."""
    words = ["--config", str(run / "language_config.yaml"), "--output_dir", str(tmp_path / "again")]
    assert main([*words, "--save_strategy", "no"]) == 0
    assert same(weights(run), weights(tmp_path / "again"))


def test_the_settings_of_a_run_that_began_elsewhere_name_its_adapter_whole(run, tmp_path, monkeypatch):
    monkeypatch.chdir(run.parent)
    assert main(words(run.parent, tmp_path / "further", max_steps=1, init_from=f"{run.name}@2")) == 0
    monkeypatch.chdir(tmp_path)
    again = ["--config", str(tmp_path / "further" / "language_config.yaml"), "--output_dir", str(tmp_path / "again")]
    assert main(again) == 0
    assert same(weights(tmp_path / "further"), weights(tmp_path / "again"))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda place: (place / "train.jsonl").unlink(), "No such file"),
        (lambda place: (place / "train.jsonl").write_text('{"instruction": "a", "output": "b"}'), "data has changed"),
        (lambda place: shutil.rmtree(place / "model"), "can't be loaded"),
    ],
)
def test_without_its_data_and_model_a_checkpoint_is_refused_in_a_sentence(run, tmp_path, capsys, change, told):
    shutil.copytree(run.parent, tmp_path / "place")
    config = tmp_path / "place" / "run" / "language_config.yaml"
    config.write_text(config.read_text().replace(str(run.parent), str(tmp_path / "place")))
    change(tmp_path / "place")
    assert cli(["export", f"{tmp_path / 'place' / 'run'}@2", str(tmp_path / "out")]) == 2
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert "checkpoint-2 can't become a plain LoRA, which needs" in said
    assert told in said
    assert not (tmp_path / "out").exists()


def test_what_needs_no_measure_needs_no_data(run, tmp_path):
    place = make_place(tmp_path / "place")
    assert main(words(place, tmp_path / "run", max_steps=2, save_steps=2, heads=1)) == 0
    (place / "train.jsonl").unlink()
    assert export_lora(tmp_path / "run" / "checkpoint-2", tmp_path / "out") == 0


def test_a_machine_without_accelerator_computes_on_its_cpu(tmp_path, monkeypatch):
    """Of several processes, too: transformers takes each for the only one unless it is told that they compute on CPUs."""
    from effilora_diffusion.language.config import LanguageTrainingArguments

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert LanguageTrainingArguments(output_dir=str(tmp_path)).use_cpu
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert not LanguageTrainingArguments(output_dir=str(tmp_path)).use_cpu

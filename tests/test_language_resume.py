"""A language run goes on with what it was trained with, and with nothing else."""

import json
import shutil

import pytest
from language_runs import logs, make_place, same, weights, words
from tiny_language import CHAT, save

import effilora_diffusion.language.tokenising as tokenising
from effilora_diffusion.cli import main as cli
from effilora_diffusion.cli.train_llm import main


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("language"))


@pytest.fixture(scope="module")
def begun(place, tmp_path_factory):
    """A run of which three of six steps are done."""
    folder = tmp_path_factory.mktemp("begun") / "out"
    assert main(words(place, folder, save_steps=3)) == 0
    return folder / "checkpoint-3"


def changed_data(place, folder):
    lines = (place / "train.jsonl").read_text().splitlines()
    (folder / "other.jsonl").write_text("\n".join([*lines[:-1], lines[0]]))
    return {"train_file": folder / "other.jsonl"}


def changed_template(place, folder):
    save(folder / "model")
    (folder / "model" / "chat_template.jinja").write_text(CHAT.replace("<assistant>", "<assistant>:"))
    return {"model_name_or_path": folder / "model"}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (changed_data, ["the training data has changed"]),
        (changed_template, ["the chat template has changed"]),
        ({"optim": "sgd"}, ["optim was 'adamw_torch_fused' and is 'sgd'"]),
        ({"learning_rate": 1e-3, "seed": 7}, ["learning_rate was 0.01 and is 0.001", "seed was 42 and is 7"]),
        ({"lr_scheduler_type": "cosine"}, ["lr_scheduler_type was 'linear' and is 'cosine'"]),
        ({"max_steps": 8}, ["max_steps was 6 and is 8", "--init_from"]),
        ({"max_length": 40, "rank": 4}, ["max_length was 512 and is 40", "rank was 8 and is 4"]),
        ({"per_device_train_batch_size": 2}, ["per_device_train_batch_size was 4 and is 2"]),
    ],
)
def test_what_decides_a_step_must_stay_as_it_was(place, begun, tmp_path, capsys, change, told):
    options = change(place, tmp_path) if callable(change) else change
    assert main(words(place, tmp_path / "out", resume_from_checkpoint=begun, **options)) == 2
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert f"error: {begun} belongs to another run: " in said
    assert all(text in said for text in told)
    assert said.partition("Continue")[0].count(" was ") == sum(text.count(" was ") for text in told)
    assert not (tmp_path / "out" / "effilora.safetensors").exists()


def test_what_computes_the_same_may_change(place, begun, tmp_path, capsys):
    (tmp_path / "copy.jsonl").write_bytes((place / "train.jsonl").read_bytes())
    whole = begun.parent
    told = {"train_file": tmp_path / "copy.jsonl", "gradient_checkpointing": True, "save_steps": 6, "logging_steps": 2}
    assert main(words(place, tmp_path / "out", resume_from_checkpoint=begun, **told)) == 0
    assert same(weights(whole), weights(tmp_path / "out"))
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    assert main(words(place, tmp_path / "split", resume_from_checkpoint=begun, **split)) == 0
    assert "per_device_train_batch_size 4 to 2" in capsys.readouterr().err
    assert [loss for _, loss in logs(tmp_path / "split")] == pytest.approx([loss for _, loss in logs(whole)], abs=1e-3)


def test_a_run_on_tokens_from_the_disk_goes_on_as_it_was(place, begun, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenising, "SMALL", 0)
    monkeypatch.setattr(tokenising, "HF_HOME", str(tmp_path / "home"))
    told = {"resume_from_checkpoint": begun, "preprocessing_num_workers": 1, "dataloader_num_workers": 1}
    assert main(words(place, tmp_path / "out", **told)) == 0
    assert len(list((tmp_path / "home").glob("effilora/tokens/*/tokens.bin"))) == 1
    assert same(weights(begun.parent), weights(tmp_path / "out"))


def test_a_checkpoint_that_says_nothing_of_its_run_is_taken_as_it_is(place, begun, tmp_path, capsys):
    (begun / "fingerprint.json").rename(tmp_path / "kept.json")
    try:
        assert main(words(place, tmp_path / "out", resume_from_checkpoint=begun)) == 0
    finally:
        (tmp_path / "kept.json").rename(begun / "fingerprint.json")
    assert "does not say what it was trained with" in capsys.readouterr().err
    assert same(weights(begun.parent), weights(tmp_path / "out"))


def test_a_checkpoint_whose_fingerprint_is_damaged_is_refused(place, begun, tmp_path, capsys):
    checkpoint = shutil.copytree(begun.parent, tmp_path / "run") / begun.name
    for text, told in (("[1]", "holds no settings"), ("{", "can't be read")):
        (checkpoint / "fingerprint.json").write_text(text)
        assert main(words(place, tmp_path / "out", resume_from_checkpoint=checkpoint)) == 2
        assert f"{checkpoint}: its fingerprint.json {told}" in capsys.readouterr().err
        assert cli(["export", str(checkpoint), str(tmp_path / "plain")]) == 2
        assert f"its fingerprint.json {told}" in capsys.readouterr().err


def test_every_setting_that_is_compared_is_one_of_transformers():
    from effilora_diffusion.language.config import LanguageTrainingArguments
    from effilora_diffusion.language.identity import FIXED

    known = LanguageTrainingArguments.__dataclass_fields__
    assert [name for name in FIXED if name not in known] == []


def test_a_fingerprint_is_small_and_whole(begun):
    saved = json.loads((begun / "fingerprint.json").read_text())
    assert {"data", "tokens", "template", "base", "adapter", "optim", "learning_rate", "max_steps"} <= set(saved)
    assert len(json.dumps(saved)) < 4000

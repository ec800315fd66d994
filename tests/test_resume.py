"""Resuming: bit for bit the unbroken run, from whatever a killed process left, and never from another run's state."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import build_tiny_pipeline, make_adapter
from helpers import arguments, edit_json, files_in, make_subject, metrics, same_content, settings, trainer

from effilora_diffusion.cli import train as launch
from effilora_diffusion.core import EffiLoRAError, Reducer
from effilora_diffusion.core.run_folder import RunFolder, checkpoints
from effilora_diffusion.diffusion.training.checkpoints import (
    IMAGE_RUN,
    TrainingState,
    fault_of,
    load_checkpoint,
    save_checkpoint,
)
from effilora_diffusion.diffusion.training.loop import Loop
from effilora_diffusion.diffusion.training.trainer import Trainer


def find_checkpoint(folder, wanted):
    return RunFolder(folder, IMAGE_RUN).find_checkpoint(wanted)


STEPS = 12
HARD = {
    "max_train_steps": STEPS,
    "train_batch_size": 2,
    "gradient_accumulation_steps": 3,  # six of five images per step: epochs end in the middle of steps
    "learning_rate": 1e-2,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 2,
    "lora_dropout": 0.1,
    "reducer": "importance",
    "reducer_warmup": 2,
    "reducer_interval": 3,
    "center_crop": False,
    "random_flip": True,
    "snr_gamma": 5.0,
}
"""A run with everything that has a state: shuffling, crops, dropout, schedule, Reducer, AdamW."""


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    return make_subject(tmp_path_factory.mktemp("subject") / "s", 5, size=(48, 32))


@pytest.fixture(scope="module")
def unbroken(tiny_pipeline, subject, tmp_path_factory):
    """Output of the hard run with a checkpoint after every step. Copy from it, never write into it."""
    output = tmp_path_factory.mktemp("unbroken") / "out"
    trainer(tiny_pipeline, subject, output, **HARD, checkpointing_steps=1).run()
    return output


@pytest.fixture(scope="module")
def short(tiny_pipeline, subject, tmp_path_factory):
    """A plain run of three steps, checkpoints at 1, 2 and 3: its settings and output."""
    config = settings(
        tiny_pipeline,
        subject,
        tmp_path_factory.mktemp("short") / "out",
        max_train_steps=3,
        checkpointing_steps=1,
        num_validation_images=0,
    )
    Trainer(config).run()
    return config


def killed_at(step, source, output):
    """What the run in ``source`` would have left, had it been killed in the step after ``step``."""
    output.mkdir()
    shutil.copytree(source / f"checkpoint-{step}", output / f"checkpoint-{step}")
    for name in ("config.yaml", "metrics.jsonl", "reducer.jsonl"):
        if (source / name).exists():
            lines = (source / name).read_text().splitlines(keepends=True)
            (output / name).write_text("".join(lines[:-1]) + lines[-1][:20])  # later lines too, the last one cut
    return output


def state_of(folder):
    state = json.loads((folder / "state.json").read_text())
    del state["seconds"]
    return state


@pytest.mark.parametrize("step", [1, 2, 4, 5, 7, 11])
def test_resumed_run_equals_the_unbroken_one_bit_for_bit(tiny_pipeline, subject, unbroken, tmp_path, step):
    output = killed_at(step, unbroken, tmp_path / "out")
    trainer(tiny_pipeline, subject, output, **HARD, resume_from_checkpoint="latest").run()
    for name in ("effilora.safetensors", "reducer.jsonl", "before_after.png"):
        assert (output / name).read_bytes() == (unbroken / name).read_bytes(), name
    assert same_content(output / "pytorch_lora_weights.safetensors", unbroken / "pytorch_lora_weights.safetensors")
    last = f"checkpoint-{STEPS}"
    for name in ("adapter.safetensors", "optimizer.safetensors"):
        assert (output / last / name).read_bytes() == (unbroken / last / name).read_bytes(), name
    assert state_of(output / last) == state_of(unbroken / last)
    assert metrics(output) == metrics(unbroken)


def test_unbroken_run_is_worth_comparing(unbroken):
    lines = metrics(unbroken)
    assert len({line["loss"] for line in lines}) == STEPS
    assert {line["active_layers"] for line in lines} == {2, 4}
    states = [(unbroken / f"checkpoint-{step}" / "adapter.safetensors").read_bytes() for step in (1, 2, 11, 12)]
    assert len(set(states)) == 4
    assert any(state_of(unbroken / f"checkpoint-{STEPS}")["reducer"]["scores"].values())


def test_checkpoint_may_be_named_or_given_as_a_folder(tiny_pipeline, subject, unbroken, tmp_path):
    options = {**HARD, "num_validation_images": 0}
    named = killed_at(10, unbroken, tmp_path / "named")
    shutil.copytree(unbroken / "checkpoint-11", named / "checkpoint-11")
    for output, wanted in ((named, "checkpoint-10"), (tmp_path / "new", str(unbroken / "checkpoint-10"))):
        run = trainer(tiny_pipeline, subject, output, **options, resume_from_checkpoint=wanted)
        run.run()
        assert (output / "effilora.safetensors").read_bytes() == (unbroken / "effilora.safetensors").read_bytes()
        assert metrics(output)[-2:] == metrics(unbroken)[-2:]


def test_run_stopped_by_a_signal_in_its_last_step_is_finished_by_resuming(short, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    words = [*arguments(short), f"--output_dir={output}"]
    take = Loop.step

    def interrupted(self, step):
        if step == 2:
            os.kill(os.getpid(), 15)
        return take(self, step)

    monkeypatch.setattr(Loop, "step", interrupted)
    assert launch.main(words) == 143
    assert not (output / "effilora.safetensors").exists()
    assert launch.main([*words, "--resume_from_checkpoint=latest"]) == 0
    for name in ("effilora.safetensors", "pytorch_lora_weights.safetensors"):
        assert same_content(output / name, Path(short.output_dir) / name)
    assert launch.main([*words, "--resume_from_checkpoint=latest"]) == 2
    assert "nothing to do" in capsys.readouterr().err


def test_constant_rate_may_be_trained_longer(tiny_pipeline, subject, short, tmp_path):
    output = killed_at(3, Path(short.output_dir), tmp_path / "out")
    words = [*arguments(short), "--max_train_steps=5"]
    assert launch.main([*words, f"--output_dir={output}", "--resume_from_checkpoint=latest"]) == 0
    assert launch.main([*words, f"--output_dir={tmp_path / 'whole'}"]) == 0
    assert (output / "effilora.safetensors").read_bytes() == (tmp_path / "whole/effilora.safetensors").read_bytes()


# ---------------------------------------------------------------------------------------------- wrecks and strangers


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "cut optimizer": lambda folder: cut(folder / "optimizer.safetensors"),
    "flipped bit in the adapter": lambda folder: flip(folder / "adapter.safetensors"),
    "no state": lambda folder: (folder / "state.json").unlink(),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "cut manifest": lambda folder: cut(folder / "manifest.json"),
    "manifest of nothing": lambda folder: (folder / "manifest.json").write_text('{"step": 2, "files": {}}'),
    "empty folder": lambda folder: [path.unlink() for path in folder.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_latest_passes_over_a_damaged_checkpoint_and_naming_it_is_an_error(short, tmp_path, damage):
    shutil.copytree(short.output_dir, tmp_path / "out")
    DAMAGES[damage](tmp_path / "out" / "checkpoint-3")
    assert find_checkpoint(tmp_path / "out", "latest").name == "checkpoint-2"
    with pytest.raises(EffiLoRAError, match="checkpoint-3: "):
        find_checkpoint(tmp_path / "out", "checkpoint-3")
    assert find_checkpoint(tmp_path / "out", "checkpoint-1").name == "checkpoint-1"


def test_killed_process_s_wreck_is_resumed_from_its_newest_whole_checkpoint(short, tmp_path, capsys):
    output = tmp_path / "out"
    shutil.copytree(short.output_dir, output)
    for name in ("effilora.safetensors", "pytorch_lora_weights.safetensors"):
        (output / name).unlink()
    cut(output / "checkpoint-3" / "adapter.safetensors")
    wreck = output / ".checkpoint-3.tmp"
    wreck.mkdir()
    (wreck / "adapter.safetensors").write_bytes(b"half")
    assert launch.main([*arguments(short), f"--output_dir={output}", "--resume_from_checkpoint=latest"]) == 0
    assert "at step 2" in capsys.readouterr().out
    assert not wreck.exists()
    assert all(fault_of(folder) is None for folder in checkpoints(output))
    found, expected = ((folder / "effilora.safetensors").read_bytes() for folder in (output, Path(short.output_dir)))
    assert found == expected


@pytest.mark.parametrize("wanted", ["latest", "checkpoint-7", "/no/such/folder"])
def test_missing_checkpoint_is_an_error_and_no_fresh_start(short, tmp_path, capsys, wanted):
    words = [*arguments(short), f"--output_dir={tmp_path / 'out'}", f"--resume_from_checkpoint={wanted}"]
    assert launch.main(words) == 2
    said = capsys.readouterr().err
    assert re.search(rf"--resume_from_checkpoint {wanted}: (no such checkpoint|there is no whole checkpoint)", said)
    assert (wanted != "latest") or "leave it out to start from the beginning" in said
    assert files_in(tmp_path / "out") == {}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("--rank=2", "rank was 4 and is 2"),
        ("--heads=1", "heads was 3 and is 1"),
        ("--lora_dropout=0.5", "dropout was 0.0 and is 0.5"),
        ("--learning_rate=0.1", "learning_rate was 0.0005 and is 0.1"),
        ("--seed=1", "seed was 0 and is 1"),
        ("--train_batch_size=2", "train_batch_size was 1 and is 2"),
        ("--instance_prompt=a toy", "the caption of 0.png was 'a sks cat' and is 'a toy'"),
        ("--instance_data_dir={other}", "the images have changed (removed: 0.png, 1.png"),
        ("--instance_data_dir={twice}", "the images have changed (added: 9.png)"),
        ("--lr_scheduler=cosine", "lr_scheduler was 'constant' and is 'cosine'"),
    ],
)
def test_checkpoint_of_another_run_is_refused_and_nothing_changes(short, tmp_path, capsys, options, named):
    output = tmp_path / "out"
    shutil.copytree(short.output_dir, output)
    before = files_in(output)
    other = make_subject(tmp_path / "other", 5, first=9)
    twice = shutil.copytree(short.instance_data_dir, tmp_path / "twice")
    shutil.copy(twice / "0.png", twice / "9.png")
    words = [*arguments(short), f"--output_dir={output}", "--resume_from_checkpoint=checkpoint-2"]
    assert launch.main([*words, options.format(other=other, twice=twice)]) == 2
    error = capsys.readouterr().err
    assert "belongs to another run" in error
    assert f"(--config {output}/config.yaml)" in error
    assert named in error
    assert files_in(output) == before


def test_checkpoint_of_another_model_is_refused(short, tmp_path, capsys):
    build_tiny_pipeline(seed=5).save_pretrained(tmp_path / "model")
    output = tmp_path / "out"
    shutil.copytree(short.output_dir, output)
    words = [*arguments(short), f"--output_dir={output}", "--resume_from_checkpoint=checkpoint-2"]
    assert launch.main([*words, f"--pretrained_model_name_or_path={tmp_path / 'model'}"]) == 2
    assert "the base model is a different one" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["text_encoder", "vae", "scheduler"])
def test_checkpoint_of_a_model_with_another_part_is_refused(tiny_pipeline, short, tmp_path, capsys, part):
    shutil.copytree(tiny_pipeline, tmp_path / "model")
    if part == "scheduler":
        edit_json(tmp_path / "model" / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    else:
        getattr(build_tiny_pipeline(seed=5), part).save_pretrained(tmp_path / "model" / part)
    output = tmp_path / "out"
    shutil.copytree(short.output_dir, output)
    words = [*arguments(short), f"--output_dir={output}", "--resume_from_checkpoint=checkpoint-2"]
    assert launch.main([*words, f"--pretrained_model_name_or_path={tmp_path / 'model'}"]) == 2
    assert (
        "the scheduler is" if part == "scheduler" else "a text encoder or the autoencoder is"
    ) in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ checkpoint folders


def trained(steps=1):
    """A toy adapter and its optimizer after a few steps."""
    adapter = make_adapter()
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.01)
    for _ in range(steps):
        sum(p.square().sum() for p in adapter.parameters()).backward()
        optimizer.step()
    return adapter, optimizer


def state(step):
    reducer = Reducer(make_adapter())
    reducer.begin_step(0)
    return TrainingState(step, {"seed": 0}, reducer.state_dict(), {})


def names(output):
    return [path.name for path in checkpoints(output)]


def test_limit_keeps_the_newest_by_number(tmp_path):
    adapter, optimizer = trained()
    for step in (8, 9, 10, 11):
        save_checkpoint(tmp_path, adapter, optimizer, state(step), limit=3)
    assert names(tmp_path) == ["checkpoint-9", "checkpoint-10", "checkpoint-11"]
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-11"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names(tmp_path))


def test_limit_never_drops_the_checkpoint_just_written_in_favour_of_later_ones(tmp_path):
    adapter, optimizer = trained()
    for step in (4, 9, 10):
        save_checkpoint(tmp_path, adapter, optimizer, state(step))
    cut(tmp_path / "checkpoint-9" / "adapter.safetensors")
    cut(tmp_path / "checkpoint-10" / "adapter.safetensors")
    save_checkpoint(tmp_path, adapter, optimizer, state(5), limit=1)  # resumed from 4, as 9 and 10 are damaged
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-5"
    assert "checkpoint-4" not in names(tmp_path)


def test_other_folders_are_no_checkpoints_and_survive_the_limit(tmp_path):
    adapter, optimizer = trained()
    for name in ("checkpoint-best", "checkpoint-1-copy", "checkpoint-"):
        (tmp_path / name).mkdir()
    for step in (1, 2):
        save_checkpoint(tmp_path, adapter, optimizer, state(step), limit=1)
    assert names(tmp_path) == ["checkpoint-2"]
    assert (tmp_path / "checkpoint-best").is_dir()


def test_checkpoint_holds_no_pickle(short):
    folder = Path(short.output_dir) / "checkpoint-3"
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
    for path in folder.iterdir():
        head = path.read_bytes()[:9]
        assert head[:2] not in (b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05")
        assert head[:1] == b"{" or head[8:9] == b"{"  # JSON, or safetensors' length and JSON header


def test_loading_restores_weights_and_moments_exactly(tmp_path):
    adapter, optimizer = trained(3)
    folder = save_checkpoint(tmp_path, adapter, optimizer, state(3))
    fresh, other = trained(0)
    assert load_checkpoint(folder, fresh, other, {"seed": 0}).step == 3
    for expected, found in zip(adapter.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(expected, found)
        assert optimizer.state[expected].keys() == other.state[found].keys()
        for key, value in optimizer.state[expected].items():
            assert torch.equal(value, other.state[found][key])
    with pytest.raises(EffiLoRAError, match="seed was 0 and is 1"):
        load_checkpoint(folder, fresh, other, {"seed": 1})


@pytest.mark.parametrize("moment", [1, 2, 3])
def test_a_kill_while_the_only_checkpoint_is_written_again_leaves_a_whole_one(tmp_path, monkeypatch, moment):
    adapter, optimizer = trained()
    save_checkpoint(tmp_path, adapter, optimizer, state(1), limit=1)
    replace, seen = os.replace, []

    def killed(source, target):
        seen.append(target)
        if len(seen) == moment + 1:  # the first is the adapter's file in the folder that is being written
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    if moment == 3:
        save_checkpoint(tmp_path, adapter, optimizer, state(1), limit=1)
    else:
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, adapter, optimizer, state(1), limit=1)
    monkeypatch.undo()
    assert len(seen) == min(moment + 1, 3)
    assert fault_of(find_checkpoint(tmp_path, "latest")) is None
    assert names(tmp_path) == ["checkpoint-1"]

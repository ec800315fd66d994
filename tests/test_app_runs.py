"""Training runs of the web UI: processes that end well, badly, by a stop or by a kill, and are told apart."""

import contextlib
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import yaml
from conftest import build_tiny_pipeline
from helpers import QUICK, make_subject

from effilora_diffusion import EffiLoRAError
from effilora_diffusion.studio.runs import Run

PATIENCE = 600


@pytest.fixture
def settings(tmp_path):
    build_tiny_pipeline().save_pretrained(tmp_path / "model")
    make_subject(tmp_path / "images", 3)
    return {**QUICK, "pretrained_model_name_or_path": str(tmp_path / "model"),
            "instance_data_dir": str(tmp_path / "images"), "max_train_steps": 4}  # fmt: skip


def wait(run, done=lambda status: status.state != "running"):
    end = time.monotonic() + PATIENCE
    while not done(run.status()):
        assert time.monotonic() < end, run.status()
        time.sleep(0.1)
    return run.status()


def test_a_run_is_done_when_its_adapter_loads(settings, tmp_path):
    run = Run(tmp_path / "outputs", "my cat")
    assert run.status().state == "new"
    run.start(settings)
    with pytest.raises(EffiLoRAError, match="already"):
        Run(tmp_path / "outputs", "my cat").start(settings)
    status = wait(run)
    assert (status.state, status.step, status.steps) == ("done", 4, 4)
    assert [line["step"] for line in status.metrics] == [1, 2, 3, 4]
    assert status.sample.name == "step-000004.png"
    with pytest.raises(EffiLoRAError, match="finished run"):
        run.start(settings)
    (run.folder / "effilora.safetensors").write_bytes(b"damaged")
    assert run.status().state == "failed"


def test_a_stopped_run_is_resumed_by_another_server_to_its_end(settings, tmp_path):
    run = Run(tmp_path / "outputs", "cat")
    run.start({**settings, "max_train_steps": 400})
    wait(run, lambda status: status.step >= 3 or status.state != "running")
    run.stop()
    status = wait(run)
    assert status.state == "stopped"
    assert 3 <= status.step < 400
    later = Run(tmp_path / "outputs", "cat")
    later.start({**later.settings(), "max_train_steps": status.step + 2}, resume=True)
    assert wait(later).state == "done"
    assert later.status().step == status.step + 2


def test_a_killed_run_is_told_from_a_finished_one(settings, tmp_path):
    run = Run(tmp_path / "outputs", "cat")
    run.start({**settings, "max_train_steps": 400, "checkpointing_steps": 2})
    wait(run, lambda status: status.step >= 3 or status.state != "running")
    os.killpg(os.getpgid(run._state()["pid"]), signal.SIGKILL)
    status = wait(run)
    assert status.state == "failed"
    assert "killed" in status.message


def trainer_of(run):
    """The trainer's process, the only child of the one that waits for it."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[1]) == run._state()["pid"]:
                found.append(int(stat.parent.name))
    return found[0] if found else None


def test_a_trainer_that_the_system_kills_is_told_from_one_that_fails(settings, tmp_path):
    run = Run(tmp_path / "outputs", "cat")
    run.start({**settings, "max_train_steps": 400})
    wait(run, lambda status: status.step >= 2 or status.state != "running")
    os.kill(trainer_of(run), signal.SIGKILL)
    status = wait(run)
    assert status.state == "failed"
    assert "lack of memory" in status.message
    assert "no checkpoint yet" in status.message


def test_a_run_stopped_at_once_leaves_no_trainer_behind(settings, tmp_path):
    run = Run(tmp_path / "outputs", "cat")
    run.start({**settings, "max_train_steps": 400})
    while (trainer := trainer_of(run)) is None:
        time.sleep(0.02)
    run.stop()
    status = wait(run)
    assert status.state == "stopped"
    assert "before its first step" in status.message
    assert not Path(f"/proc/{trainer}").exists()


@pytest.mark.parametrize("code", [129, 130, 143, -signal.SIGTERM])
def test_a_checkpoint_is_promised_only_where_there_is_one(settings, tmp_path, code):
    run = Run(tmp_path / "outputs", "cat")
    run.folder.mkdir(parents=True)
    (run.folder / "run.json").write_text(json.dumps({"pid": os.getpid(), "born": 0}))
    (run.folder / "exit_code").write_text(str(code))
    assert "before its first step" in run.status().message
    (run.folder / "checkpoint-3").mkdir()
    assert "its checkpoint is written" in run.status().message
    assert run.status().state == "stopped"


def test_names_are_free_only_where_nothing_was_trained(settings, tmp_path):
    outputs = tmp_path / "outputs"
    (outputs / "by hand").mkdir(parents=True)
    Run(outputs, "by hand").check_free()
    (outputs / "by hand" / "config.yaml").write_text(yaml.safe_dump(settings))
    (outputs / "by hand" / "metrics.jsonl").write_text('{"step": 1, "loss": 1, "seconds": 1, "active_layers": 1}\n')
    with pytest.raises(EffiLoRAError, match="being trained already"):
        Run(outputs, "by hand").start(settings)
    with pytest.raises(EffiLoRAError, match="being trained already"):
        Run(outputs, "by hand").resume()  # a trainer of the command line is at work there
    assert Run(outputs, "by hand").status().state == "elsewhere"
    os.utime(outputs / "by hand" / "metrics.jsonl", (0, 0))
    with pytest.raises(EffiLoRAError, match="unfinished run"):
        Run(outputs, "by hand").start(settings)


def test_a_failed_run_says_why(settings, tmp_path):
    shutil.rmtree(tmp_path / "model" / "unet")
    run = Run(tmp_path / "outputs", "cat")
    run.start(settings)
    status = wait(run)
    assert status.state == "failed"
    assert "can't be loaded" in status.message


@pytest.mark.parametrize("name", ["", "../cat", "a/b", ".hidden", "history", "x" * 80, "a\nb", None])
def test_names_that_are_no_folder_s_are_refused(name, tmp_path):
    with pytest.raises(EffiLoRAError, match="name"):
        Run(tmp_path, name)


def test_mistakes_are_said_before_a_process_starts(settings, tmp_path):
    run = Run(tmp_path / "outputs", "cat")
    with pytest.raises(EffiLoRAError, match="--resolution"):
        run.start({**settings, "resolution": 33})
    assert not run.folder.exists()

"""Training runs of the web UI: processes that end well, badly, by a stop or by a kill, and are told apart."""

import os
import shutil
import signal
import time

import pytest
from conftest import build_tiny_pipeline
from helpers import QUICK, make_subject

from app.runs import Run
from effilora_diffusion import EffiLoRAError

PATIENCE = 90


@pytest.fixture
def settings(tmp_path):
    build_tiny_pipeline().save_pretrained(tmp_path / "model")
    make_subject(tmp_path / "pictures", 3)
    return {**QUICK, "pretrained_model_name_or_path": str(tmp_path / "model"),
            "instance_data_dir": str(tmp_path / "pictures"), "max_train_steps": 4}  # fmt: skip


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

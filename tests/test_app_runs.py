"""Training runs of the web UI: processes that end well, badly, by a stop or by a kill, and are told apart."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import yaml
from conftest import build_tiny_pipeline
from helpers import QUICK, make_subject

from effilora_diffusion import EffiLoRAError
from effilora_diffusion.core.run_folder import RunFolder
from effilora_diffusion.diffusion.training.checkpoints import IMAGE_RUN
from effilora_diffusion.studio import processes
from effilora_diffusion.studio.runs import Run, dry_run

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
    (run.folder / "effilora.safetensors").unlink()
    assert run.status().state == "deleted"
    run.check_free()  # there is nothing to resume, and its name can be used again


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
    with contextlib.suppress(psutil.NoSuchProcess):
        return next((child.pid for child in psutil.Process(run._state()["pid"]).children()), None)


def trainers_in(folder):
    """Processes that train into a folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            if "effilora_diffusion.train" in words and str(folder / "settings.yaml") in words:
                found.append(process)
    return found


def test_one_trainer_at_a_time_is_known_by_its_lock_and_stopped_without_its_keeper(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("EFFILORA_AUTH", "ann:correct horse")
    monkeypatch.setenv("EFFILORA_AUTH_FILE", str(tmp_path))
    run, other = Run(tmp_path / "outputs", "cat"), Run(tmp_path / "outputs", "dog")
    run.start({**settings, "max_train_steps": 4000, "checkpointing_steps": 2})
    with pytest.raises(EffiLoRAError, match="cat is being trained already: stop it"):
        other.start(settings)
    assert not other.folder.exists()
    wait(run, lambda status: status.step >= 3 or status.state != "running")
    (trainer,) = trainers_in(run.folder)
    for process in (trainer, trainer.parent()):
        assert not {"EFFILORA_AUTH", "EFFILORA_AUTH_FILE"} & set(process.environ())
        assert process.environ()["PATH"] == os.environ["PATH"]

    keeper = trainer.parent()
    keeper.kill()
    psutil.wait_procs([keeper], PATIENCE)
    assert run.status().state == "running"
    with pytest.raises(EffiLoRAError, match="being trained already"):
        run.resume()
    run.stop()
    status = wait(run)
    assert (status.state, status.message[:8]) == ("stopped", "Stopped;")
    assert (run.folder / f"checkpoint-{status.step}").is_dir()
    psutil.wait_procs([trainer], PATIENCE)  # it has let go of the folder, and may still be about to end

    def resume(number):
        with contextlib.suppress(EffiLoRAError):
            Run(tmp_path / "outputs", "cat").resume()
            return number

    with ThreadPoolExecutor(6) as visitors:
        assert len([number for number in visitors.map(resume, range(6)) if number is not None]) == 1
    wait(run, lambda status: trainers_in(run.folder) or status.state != "running")
    assert len(trainers_in(run.folder)) == 1
    run.stop()
    assert wait(run).state == "stopped"


def test_a_run_that_ends_without_its_keeper_is_done(settings, tmp_path):
    run = Run(tmp_path / "outputs", "cat")
    run.start(settings)
    wait(run, lambda status: trainer_of(run) is not None or status.state != "running")
    trainer = psutil.Process(trainer_of(run))
    trainer.parent().kill()
    wait(run, lambda status: not trainer.is_running() or trainer.status() == psutil.STATUS_ZOMBIE)
    assert (run.status().state, run.status().step) == ("done", 4)


def test_a_check_that_never_ends_is_ended_with_all_it_has_started(settings, tmp_path, monkeypatch):
    monkeypatch.setattr("effilora_diffusion.studio.runs.PATIENCE", 0)
    with pytest.raises(EffiLoRAError, match="did not end"):
        dry_run(settings, tmp_path)
    assert not trainers_in(tmp_path)


def test_processes_that_do_not_end_are_killed_with_their_children(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "GRACE", 0.5)
    deaf = "import signal, subprocess, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    child = deaf + "open(sys.argv[1], 'w').close(); signal.pause()"
    words = [
        sys.executable,
        "-c",
        deaf + f"subprocess.run([sys.executable, '-c', {child!r}, sys.argv[1]])",
        tmp_path / "up",
    ]
    parent = subprocess.Popen(words)
    while not (tmp_path / "up").exists():
        assert parent.poll() is None
        time.sleep(0.02)
    family = psutil.Process(parent.pid).children(recursive=True)
    processes.end(parent.pid)
    assert parent.wait() == -signal.SIGKILL
    assert len(family) == 1
    left = psutil.wait_procs(family, PATIENCE)[1]
    for one in left:
        one.kill()
    assert left == []
    processes.end(parent.pid)  # it is gone: nothing happens


def test_a_trainer_that_the_system_kills_is_told_from_one_that_fails(settings, tmp_path):
    run = Run(tmp_path / "outputs", "cat")
    run.start({**settings, "max_train_steps": 400})
    wait(run, lambda status: status.step >= 2 or status.state != "running")
    os.kill(trainer_of(run), signal.SIGKILL)
    status = wait(run)
    assert status.state == "failed"
    assert "Training was killed, probably out of memory." in status.message
    assert "no checkpoint yet" in status.message


@pytest.mark.parametrize("begun", [True, False])
def test_a_run_stopped_at_once_leaves_no_trainer_behind(settings, tmp_path, begun):
    run = Run(tmp_path / "outputs", "cat")
    run.start({**settings, "max_train_steps": 400})
    while begun and trainer_of(run) is None:
        time.sleep(0.02)
    run.stop()
    status = wait(run)
    assert status.state == "stopped"
    assert "before its first step" in status.message
    psutil.wait_procs(trainers_in(run.folder), PATIENCE)
    assert trainers_in(run.folder) == []


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
    folder = RunFolder(outputs / "by hand", IMAGE_RUN)
    folder.claim(overwrite=True, checkpoint=None)  # as a trainer of the command line does
    before = sorted(folder.path.iterdir())
    assert Run(outputs, "by hand").status().message == "Training; it was started by the command line."
    for act in (Run(outputs, "by hand").resume, lambda: Run(outputs, "by hand").start(settings),
                lambda: Run(outputs, "other").start(settings)):  # fmt: skip
        with pytest.raises(EffiLoRAError, match="by hand is being trained already"):
            act()
    assert sorted(folder.path.iterdir()) == before
    folder.release()
    assert Run(outputs, "by hand").status().state == "elsewhere"
    with pytest.raises(EffiLoRAError, match="unfinished run"):
        Run(outputs, "by hand").start(settings)


@pytest.fixture
def sent(monkeypatch):
    """The signals that would have been sent, by process."""
    found = []
    monkeypatch.setattr(psutil.Process, "send_signal", lambda process, number: found.append((process.pid, number)))
    return found


def test_a_lock_that_nobody_holds_means_nothing(tmp_path, sent):
    outputs = tmp_path / "outputs"
    (outputs / "cat").mkdir(parents=True)
    (outputs / "cat" / ".lock").touch()
    (outputs / "cat" / ".owner.json").write_text(json.dumps({"pid": os.getpid(), "host": "x", "since": ""}))
    (outputs / "cat" / "run.json").write_text(json.dumps({"pid": os.getpid(), "born": 0}))
    assert not Run(outputs, "cat").running
    Run(outputs, "cat").check_free()
    Run(outputs, "cat").stop()
    assert sent == []  # whose number the owner's file names is not asked to stop


def test_a_trainer_elsewhere_or_of_another_number_is_not_stopped(tmp_path, sent):
    folder = RunFolder(tmp_path / "cat", IMAGE_RUN)
    folder.claim(overwrite=True, checkpoint=None)
    owner = json.loads((folder.path / ".owner.json").read_text())
    run = Run(tmp_path, "cat")
    (folder.path / ".owner.json").write_text(json.dumps({**owner, "host": "elsewhere"}))
    with pytest.raises(EffiLoRAError, match="is being trained on elsewhere: stop it there"):
        run.stop()
    (folder.path / ".owner.json").write_text(json.dumps(owner))
    os.utime(folder.path / ".owner.json", (0, 0))  # older than the process that has the number now
    run.stop()
    assert run.running
    assert sent == []
    os.utime(folder.path / ".owner.json")
    run.stop()
    assert sent == [(os.getpid(), processes.STOP)]
    folder.release()
    assert not run.running


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

"""Runs that torchrun and accelerate start: how they end, what is refused, how many threads they have."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from accelerate import Accelerator
from helpers import arguments, make_subject, settings
from ranks import ENDLESS, MPI, PATIENCE, TORCHRUN, free_port, logged_steps, wait_for

from effilora_diffusion.cli import train as launch
from effilora_diffusion.core.run_folder import checkpoints
from effilora_diffusion.diffusion.training import optim
from effilora_diffusion.diffusion.training.checkpoints import fault_of
from effilora_diffusion.diffusion.training.loop import Loop

ROOT = Path(__file__).parents[1]
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--nproc_per_node", "2"],
    "accelerate": ["accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1", "--cpu"],
}


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    return make_subject(tmp_path_factory.mktemp("subject") / "s", 5, size=(48, 32))


def launched(launcher, config):
    """A real launcher with a run without an end, that has taken some steps."""
    dropped = ("ACCELERATE_USE_CPU", *TORCHRUN, *MPI)
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    port = ["--master_port" if launcher == "torchrun" else "--main_process_port", str(free_port())]
    words = [*LAUNCHERS[launcher], *port, str(ROOT / "train_scripts" / "train_dreambooth_effilora.py")]
    words = [sys.executable, "-m", *words, *arguments(config)]
    output = Path(config.output_dir)
    with output.with_suffix(".txt").open("w") as file:
        process = subprocess.Popen(words, env=environment, stdout=file, stderr=file)
    try:
        wait_for(lambda: len(logged_steps(output)) > 4 or process.poll() is not None, "steps")
        assert process.poll() is None, output.with_suffix(".txt").read_text()
    except BaseException:
        process.kill()
        raise
    return process


@pytest.mark.parametrize(("launcher", "processes"), [("torchrun", 2), ("accelerate", 1)])
def test_sigterm_to_a_launcher_ends_its_one_run_with_a_checkpoint(
    tiny_pipeline, subject, tmp_path, launcher, processes
):
    process = launched(launcher, settings(tiny_pipeline, subject, tmp_path / "out", **ENDLESS))
    owner = json.loads((tmp_path / "out" / ".owner.json").read_text())["pid"]
    try:
        process.terminate()
        assert process.wait(PATIENCE) != 0
        wait_for(lambda: not psutil.pid_exists(owner), "the end of the run")
    finally:
        if psutil.pid_exists(owner):
            os.kill(owner, signal.SIGKILL)
    last = checkpoints(tmp_path / "out")[-1]
    assert fault_of(last) is None
    assert last.name == f"checkpoint-{logged_steps(tmp_path / 'out')[-1]}"
    assert json.loads((last / "state.json").read_text())["fingerprint"]["processes"] == processes
    said = (tmp_path / "out.txt").read_text()
    assert said.count("continue with --resume_from_checkpoint latest") == 1
    assert said.count("steps       100000") == 1
    assert ("note: this run has one process" in said) == (launcher == "accelerate")


def test_a_signal_that_a_launcher_repeats_counts_once(tiny_pipeline, subject, tmp_path, monkeypatch):
    take = Loop.step

    def interrupted(self, step):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        return take(self, step)

    monkeypatch.setattr(Loop, "step", interrupted)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        assert launch.main(arguments(settings(tiny_pipeline, subject, tmp_path / "out"))) == 130
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN  # once more, while the process ends
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["checkpoint-1"]


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP is not supported"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed is not supported"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM is not supported"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "a parallelism config is not supported"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "2 processes were started, of which each would train alone on cpu"),
        ({"WORLD_SIZE": "2"}, "nothing says which process this is"),
        ({"WORLD_SIZE": "many"}, "no number of processes"),
    ],
    ids=str,
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_starts_that_would_be_no_run_are_refused_before_anything_is_written(
    tiny_pipeline, subject, tmp_path, monkeypatch, capsys, variables, told, dry_run
):
    Accelerator(cpu=True)  # from now on accelerate takes this process for one alone, whatever the variables say
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    words = arguments(settings(tiny_pipeline, subject, tmp_path / "out", dry_run=dry_run))
    assert launch.main(words) == 2
    error = capsys.readouterr().err
    assert told in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("variables", "words", "threads"),
    [({}, [], None), ({"OMP_NUM_THREADS": "1"}, [], 1), ({}, ["--num_cpu_threads_per_process=1"], 1)],
    ids=["not chosen", "by the variable", "by the flag"],
)
def test_threads_follow_the_user_and_not_the_launcher(monkeypatch, variables, words, threads):
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    code = [sys.executable, "-c", "print(flush=True); input()", *words]
    launcher = subprocess.Popen(
        code, env={**environment, **variables}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    launcher.stdout.readline()
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    monkeypatch.setattr(os, "getppid", lambda: launcher.pid)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        optim.use_all_cores(Accelerator(cpu=True))
        every = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        assert torch.get_num_threads() == (threads or every)
    finally:
        torch.set_num_threads(before)
        launcher.communicate("\n")

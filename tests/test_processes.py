"""Several processes of an image run: one run or none, equal to a single process, and they end together."""

import os
import random
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from helpers import arguments, make_subject, metrics, settings, trainer
from ranks import ENDLESS, MPI, Ranks, logged_steps, wait_for
from safetensors.torch import load_file
from torch import nn

import effilora_diffusion.diffusion.training.trainer as trainer_module
from effilora_diffusion.cli import train as launch
from effilora_diffusion.core.processes import leave_group, peers
from effilora_diffusion.core.run_folder import checkpoints
from effilora_diffusion.diffusion.training.checkpoints import fault_of
from effilora_diffusion.diffusion.training.loop import Loop
from effilora_diffusion.diffusion.training.processes import Processes, start
from effilora_diffusion.diffusion.training.trainer import Trainer
from effilora_diffusion.diffusion.training.validation import Validation

COMMON = {
    "max_train_steps": 6,
    "checkpointing_steps": 2,
    "learning_rate": 1e-2,
    "num_validation_images": 0,
    "reducer": "importance",
    "reducer_warmup": 1,
    "reducer_interval": 1,
    "random_flip": True,
    "train_text_encoder": True,
}


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    return make_subject(tmp_path_factory.mktemp("subject") / "s", 5, size=(48, 32))


# ------------------------------------------------------------------------------------------------------------- equality


def small_loop(average, index, count, steps=20):
    """Steps of a small module in float64 on eight rows each, of which this process sees its share; its parameters."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1)).double()
    rows = torch.randn(steps, 8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    parameters = list(module.parameters())

    def batch(step, micro):
        return rows[step].chunk(2 * count)[micro * count + index]

    loop = Loop(
        parameters,
        torch.optim.AdamW(parameters, lr=0.05),
        lambda step: 0.05,
        batch,
        lambda x: (module(x) - x.sum(1, keepdim=True)).square().mean(),
        accumulation=2,
        average=average,
    )
    loop.run(0, steps)
    return torch.cat([parameter.detach().flatten() for parameter in parameters])


class Watched(Trainer):
    """A trainer whose validation loss is off by some noise on every process but the main one."""

    def _loss(self, batch):
        loss = super()._loss(batch)
        noise = 0.0 if self.adapter.training else 10 * self.processes.process_index * random.random()
        return loss + noise

    def _choose_blocks(self, step):
        super()._choose_blocks(step)
        self.chosen = [*getattr(self, "chosen", []), self.reducer.active]


def train_watched(folder, config):
    """Process of a run: the small loop, then the real trainer; leaves what it came to."""
    accelerator = start()
    processes = Processes(accelerator)
    found = small_loop(processes.average, processes.process_index, processes.num_processes)
    run = Watched(config)
    run.run()
    weights = torch.cat([parameter.detach().flatten() for parameter in run.adapter.parameters()])
    torch.save([found, weights, run.chosen, run.reducer.scores], folder / f"found-{processes.process_index}.pt")
    leave_group()
    return 0


@pytest.fixture(scope="module")
def pair(tiny_pipeline, subject, tmp_path_factory):
    """A run in two processes, started as MPI starts them: its folder, and what either process came to."""
    folder = tmp_path_factory.mktemp("pair")
    config = settings(tiny_pipeline, subject, folder / "out", **COMMON)
    ranks = Ranks(folder, train_watched, folder, config, names=MPI)
    assert ranks.codes() == [0, 0], ranks.said(0) + ranks.said(1)
    return folder / "out", [torch.load(folder / f"found-{rank}.pt") for rank in (0, 1)]


@pytest.fixture(scope="module")
def single(tiny_pipeline, subject, tmp_path_factory):
    """The same run in one process that takes as many images per step."""
    output = tmp_path_factory.mktemp("single") / "out"
    trainer(tiny_pipeline, subject, output, **COMMON, gradient_accumulation_steps=2).run()
    return output


def assert_equal_runs(one, other):
    """Same steps and blocks, losses that differ by rounding."""
    found, expected = metrics(one), metrics(other)
    assert [line["step"] for line in found] == [line["step"] for line in expected] == [1, 2, 3, 4, 5, 6]
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in found] == pytest.approx([line[name] for line in expected], rel=1e-4)
    assert len({line["loss"] for line in found}) == 6
    assert [line["active_layers"] for line in found] == [line["active_layers"] for line in expected]


def test_two_processes_equal_one_in_float64(pair):
    expected = small_loop(None, 0, 1)
    for found, *_ in pair[1]:
        assert (found - expected).abs().max() < 1e-9
    assert (expected - small_loop(None, 0, 1, steps=0)).abs().max() > 0.1


def test_two_processes_train_what_one_does(pair, single):
    assert_equal_runs(pair[0], single)
    assert checkpoints(pair[0])[-1].name == "checkpoint-6"
    found, expected = (load_file(output / "effilora.safetensors") for output in (pair[0], single))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)


def test_all_processes_hold_the_same_weights_and_train_the_same_blocks(pair):
    (_, weights, chosen, scores), (_, other_weights, *other) = pair[1]
    assert torch.equal(weights, other_weights)
    assert [chosen, scores] == other
    assert any(scores)
    assert len(set(chosen)) > 2


def test_a_run_is_continued_by_one_process_and_by_two_again(tiny_pipeline, subject, single, tmp_path, capsys):
    config = settings(tiny_pipeline, subject, tmp_path / "out", **{**COMMON, "max_train_steps": 2})
    assert Ranks(tmp_path, command, arguments(config)).codes() == [0, 0]
    alone = {**vars(config), "resume_from_checkpoint": "latest"}
    alone.update(max_train_steps=4, gradient_accumulation_steps=1, train_batch_size=2)
    assert launch.main(arguments(settings(tiny_pipeline, subject, tmp_path / "out", **alone))) == 0
    said = capsys.readouterr().out
    assert "train_batch_size 1 to 2, processes 2 to 1" in said
    again = {**vars(config), "resume_from_checkpoint": "latest", "max_train_steps": 6}
    ranks = Ranks(tmp_path, command, arguments(settings(tiny_pipeline, subject, tmp_path / "out", **again)))
    assert ranks.codes() == [0, 0]
    assert "processes 1 to 2" in ranks.said(0)
    assert_equal_runs(tmp_path / "out", single)


def test_a_step_must_keep_its_number_of_images(tiny_pipeline, subject, single, tmp_path, capsys):
    options = {**COMMON, "max_train_steps": 7, "resume_from_checkpoint": str(single / "checkpoint-6")}
    assert launch.main(arguments(settings(tiny_pipeline, subject, tmp_path / "out", **options))) == 2
    assert "gradient_accumulation_steps was 2 and is 1" in capsys.readouterr().err


def test_with_dropout_a_micro_batch_must_stay_as_it_is(tiny_pipeline, subject, tmp_path, capsys):
    options = {"lora_dropout": 0.1, "num_validation_images": 0}
    words = arguments(settings(tiny_pipeline, subject, tmp_path / "out", **options, gradient_accumulation_steps=2))
    assert launch.main(words) == 0
    again = [*words, "--resume_from_checkpoint=latest", "--max_train_steps=3", "--gradient_accumulation_steps=1"]
    assert launch.main([*again, "--train_batch_size=2"]) == 2
    assert "train_batch_size was 1 and is 2" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ endings


def command(words):
    """The training command as a process of a run."""
    return launch.main(words)


def begin(folder, model, images):
    """Two processes of a run without an end, that has taken some steps."""
    config = settings(model, images, folder / "out", **ENDLESS)
    ranks = Ranks(folder, command, arguments(config))
    wait_for(lambda: len(logged_steps(folder / "out")) > 4, "steps")
    return ranks


@pytest.mark.parametrize(
    ("number", "receivers"),
    [(signal.SIGTERM, (1,)), (signal.SIGINT, (0, 1))],
    ids=["one", "both"],
)
def test_a_signal_to_any_process_ends_all_with_one_checkpoint(tiny_pipeline, subject, tmp_path, number, receivers):
    ranks = begin(tmp_path, tiny_pipeline, subject)
    ranks.signal(number, *receivers)
    assert ranks.codes() == [128 + number, 128 + number]
    last = checkpoints(tmp_path / "out")[-1]
    assert fault_of(last) is None
    assert last.name == f"checkpoint-{logged_steps(tmp_path / 'out')[-1]}"
    assert ranks.said(0).count("--resume_from_checkpoint latest") == 1
    assert "Traceback" not in ranks.said(0) + ranks.said(1)


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_others_and_leaves_its_checkpoints(tiny_pipeline, subject, tmp_path, killed):
    ranks = begin(tmp_path, tiny_pipeline, subject)
    ranks.signal(signal.SIGKILL, killed)
    codes = ranks.codes()
    assert (codes[killed], codes[1 - killed]) == (-signal.SIGKILL, 2)
    said = ranks.said(1 - killed)
    assert "error: another process of this run has ended" in said
    assert "Traceback" not in said
    last = checkpoints(tmp_path / "out")[-1]
    assert fault_of(last) is None
    if killed == 0:
        return
    more = {**ENDLESS, "max_train_steps": int(last.name.rpartition("-")[2]) + 1, "gradient_accumulation_steps": 2}
    config = settings(tiny_pipeline, subject, tmp_path / "out", **more, resume_from_checkpoint="latest")
    assert launch.main(arguments(config)) == 0


def test_other_errors_of_a_collective_stay_what_they_are():
    with pytest.raises(RuntimeError, match="size"), peers():
        torch.zeros(2) @ torch.zeros(3)


# ------------------------------------------------------------------------------------------------------------- waiting


def wait_beyond_the_limit(folder):
    """Process of a run: the main one is away for longer than a collective may take."""
    handler = InitProcessGroupKwargs(backend="gloo", timeout=timedelta(seconds=1))
    processes = Processes(Accelerator(cpu=True, kwargs_handlers=[handler]))
    main = processes.is_main_process
    if not main:
        (folder / "waiting").touch()
    else:
        wait_for((folder / "waiting").exists, "the other process")
        time.sleep(3)  # three times the limit, however slow the machine
    processes.wait_for_everyone()
    if not main:  # the limit is in force: without the group of its own, the wait would have ended like this
        with pytest.raises(RuntimeError, match=r"(?i)timed? ?out"):
            dist.barrier()
        (folder / "limited").touch()
    else:
        wait_for((folder / "limited").exists, "the limit")
    return 0


class Slow(Validation):
    """Draws only when the other process waits for it, wherever that is in the run."""

    def draw(self, step):
        wait_for(lambda: len(list(Path(os.environ["WAITS"]).iterdir())) > len(self.drawn), "the other process")
        super().draw(step)


def train_slowly(folder, words):
    """Process of a run with grids before, between and after the steps."""
    os.environ["WAITS"] = str(folder / "waits")
    trainer_module.Validation = Slow
    waited, draws = Processes.wait_for_everyone, iter(range(100))

    def wait_for_everyone(self):
        names = [frame.co_name for frame in frames()]
        if (
            not self.is_main_process
            and {"_open_output", "_validate", "_finish"} & set(names[:3])
            and "_checkpoint" not in names
        ):
            (folder / "waits" / str(next(draws))).touch()
        waited(self)

    Processes.wait_for_everyone = wait_for_everyone
    return launch.main(words)


def frames():
    frame = sys._getframe(2)
    while frame is not None:
        yield frame.f_code
        frame = frame.f_back


def test_waiting_has_no_limit(tmp_path):
    ranks = Ranks(tmp_path, wait_beyond_the_limit, tmp_path)
    assert ranks.codes() == [0, 0], ranks.said(0) + ranks.said(1)


def test_the_others_wait_so_wherever_the_main_process_draws(tiny_pipeline, subject, tmp_path):
    (tmp_path / "waits").mkdir()
    config = settings(tiny_pipeline, subject, tmp_path / "out", validation_steps=1, max_train_steps=3)
    ranks = Ranks(tmp_path, train_slowly, tmp_path, arguments(config))
    assert ranks.codes() == [0, 0], ranks.said(0) + ranks.said(1)
    assert len(list((tmp_path / "waits").iterdir())) == 4

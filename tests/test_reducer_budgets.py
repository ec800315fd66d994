"""Runs with a budget: what is measured once, kept in checkpoints, met, repeated bit for bit, or refused."""

import hashlib
import json
import shutil
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch._dynamo
from helpers import arguments, make_subject, metrics, settings, trainer
from ranks import Ranks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from effilora_diffusion.cli import train as launch
from effilora_diffusion.cli.settings_parser import read_config_file
from effilora_diffusion.core import EffiLoRAError, load_adapter_file
from effilora_diffusion.core.depth import (
    DepthPlan,
    kept_bytes,
)
from effilora_diffusion.core.options import hints_of
from effilora_diffusion.core.processes import leave_group
from effilora_diffusion.diffusion.config import TrainingConfig
from effilora_diffusion.diffusion.training import budget
from effilora_diffusion.diffusion.training.processes import start
from effilora_diffusion.diffusion.training.trainer import Trainer

PLAN = DepthPlan(tuple(f"blocks.{index}" for index in range(6)), ((0, 0.2), (2, 0.3), (5, 0.5)))


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    return make_subject(tmp_path_factory.mktemp("subject") / "s", 5, size=(48, 32))


COMMON = {"max_train_steps": 10, "learning_rate": 1e-2, "num_validation_images": 0, "random_flip": True}
TIMES = {0: 1.0, 1: 0.95, 2: 0.8, 3: 0.5}
"""Of a step by cut, instead of measured ones: a tiny model's are mostly noise."""


@pytest.fixture
def fixed_times(monkeypatch):
    monkeypatch.setattr(budget, "step_times", lambda loop, adapter, order, cuts, rounds: (dict(TIMES), 0.125))


def test_trial_steps_leave_nothing_behind(tiny_pipeline, subject, tmp_path):
    run = trainer(tiny_pipeline, subject, tmp_path / "out", **COMMON, reducer_depth=0.5, lora_dropout=0.1)
    before = [value.detach().clone() for value in run.adapter.parameters()]
    order = run.reducer.plan.order
    with budget.trial(run.loop, run.adapter):
        times, seconds = budget.step_times(run.loop, run.adapter, order, {0, 3}, 2)
        assert any(run.optimizer.state.values())
    assert set(times) == {0, 3}
    assert times[0] == 1.0
    assert times[3] > 0
    assert seconds > 0
    assert not run.optimizer.state
    assert all(torch.equal(old, new) for old, new in zip(before, run.adapter.parameters(), strict=True))
    assert all(value.grad is None and value.requires_grad for value in run.adapter.parameters())
    assert run.adapter.cut_blocks == frozenset()
    assert run.loop.before_step == run._choose_blocks
    assert run.loop.learning_rate_at(0) == 1e-2
    run.folder.release()


HARD = {
    "train_batch_size": 2, "gradient_accumulation_steps": 2, "lora_dropout": 0.1, "lr_scheduler": "cosine", "reducer_time": 0.7,
}  # fmt: skip


def test_a_resumed_run_and_a_repeated_one_equal_the_measured_one_bit_for_bit(
    tiny_pipeline, subject, tmp_path, fixed_times, monkeypatch, capsys
):
    whole, resumed, repeated = (tmp_path / name for name in ("whole", "resumed", "repeated"))
    trainer(tiny_pipeline, subject, whole, **COMMON, **HARD, checkpointing_steps=1).run()
    said = capsys.readouterr().out
    assert "40% of the steps train all, 60% of the steps train the last 1 of 4 blocks" in said
    assert "0.70 of the time of a full step (0.125 s) on average" in said
    assert Counter(line["active_layers"] for line in metrics(whole)) == {4: 4, 1: 6}

    monkeypatch.setattr(budget, "step_times", None)  # whoever goes on or repeats does not measure
    for step in (1, 4, 9):
        shutil.rmtree(resumed, ignore_errors=True)
        resumed.mkdir()
        shutil.copytree(whole / f"checkpoint-{step}", resumed / f"checkpoint-{step}")
        for name in ("config.yaml", "metrics.jsonl", "reducer.jsonl"):
            shutil.copy(whole / name, resumed / name)
        trainer(tiny_pipeline, subject, resumed, **COMMON, **HARD, resume_from_checkpoint="latest").run()
        for name in ("effilora.safetensors", "reducer.jsonl"):
            assert (resumed / name).read_bytes() == (whole / name).read_bytes(), name
        assert metrics(resumed) == metrics(whole)

    found = read_config_file(whole / "config.yaml", hints_of([TrainingConfig]))
    assert found["reducer_plan"] == "0:0.4,3:0.6"
    assert launch.main(["--config", str(whole / "config.yaml"), "--output_dir", str(repeated)]) == 0
    assert "taken over from --reducer_plan" in capsys.readouterr().out
    assert metrics(repeated) == metrics(whole)
    for one, other in zip(*(load_adapter_file(path / "effilora.safetensors").adapter.parameters()
                            for path in (whole, repeated)), strict=True):  # fmt: skip
        assert torch.equal(one, other)


def test_a_plan_of_another_run_is_refused_on_resuming(tiny_pipeline, subject, tmp_path, fixed_times, capsys):
    output = tmp_path / "out"
    trainer(tiny_pipeline, subject, output, **COMMON, reducer_time=0.7, checkpointing_steps=5).run()
    for changes, reason in (
        ({"reducer_plan": "0:0.5,3:0.5"}, "belongs to a run with --reducer_plan 0:0.4,3:0.6"),
        ({"reducer_time": 0.8}, "reducer_time was 0.7 and is 0.8"),
        ({"reducer_time": None, "reducer_depth": 0.5}, "reducer_time was 0.7 and is None"),
    ):
        options = {**COMMON, "reducer_time": 0.7, **changes, "resume_from_checkpoint": "checkpoint-5"}
        assert launch.main(arguments(settings(tiny_pipeline, subject, output, **options))) == 2
        assert reason in capsys.readouterr().err
    path = output / "checkpoint-5" / "state.json"
    state = json.loads(path.read_text())
    del state["reducer"]["plan"]
    path.write_text(json.dumps(state))
    manifest = output / "checkpoint-5" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["files"]["state.json"] = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest.write_text(json.dumps(content))
    options = {**COMMON, "reducer_time": 0.7, "resume_from_checkpoint": "checkpoint-5"}
    assert launch.main(arguments(settings(tiny_pipeline, subject, output, **options))) == 2
    assert "has no plan for --reducer depth" in capsys.readouterr().err


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_memory_budget_is_kept_by_every_step(tiny_pipeline, subject, tmp_path, checkpointing, capsys):
    options = {**COMMON, "gradient_checkpointing": checkpointing, "max_train_steps": 3}
    run = trainer(tiny_pipeline, subject, tmp_path / "out", **options, reducer_memory=0.8)
    plan, batch = run.reducer.plan, run._batch(0, 0)
    ((cut, _),) = plan.shares

    def kept(position):
        run.adapter.set_active(plan.order[position:], train_shared=False)
        return kept_bytes(run.family.model, lambda: run._loss(batch))

    assert cut > 0
    assert kept(cut) <= 0.8 * kept(0) < kept(cut - 1)
    assert plan.kept == pytest.approx(kept(cut) / kept(0))
    run.run()
    assert {line["active_layers"] for line in metrics(tmp_path / "out")} == {len(plan.order) - cut}
    assert f"at most {plan.kept:.2f} of its activations were kept" in capsys.readouterr().out


class Peak(TorchDispatchMode):
    """The most bytes that are alive at once of what operations have made in this context."""

    def __init__(self):
        super().__init__()
        self.alive, self.most = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {key: kept for key, kept in self.alive.items() if not kept[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        return result


def test_measuring_a_memory_budget_takes_less_than_the_steps_it_chooses(tiny_pipeline, subject, tmp_path):
    """Where a full step does not fit, it must not be tried."""
    run = trainer(tiny_pipeline, subject, tmp_path / "out", **COMMON, train_batch_size=4, reducer_depth=1.0)
    run.config = replace(run.config, reducer_depth=None, reducer_memory=0.6)
    most = {}
    for name, act in (
        ("full", partial(run.loop.step, 0)),
        ("measuring", run._plan_depth),
        ("cut", partial(run.loop.step, 0)),
    ):
        run.optimizer.state.clear()
        with Peak() as peak:
            act()
        most[name] = peak.most
    assert {cut for cut, _ in run.reducer.plan.shares} != {0}
    run.folder.release()
    assert most["measuring"] < most["cut"] < most["full"]


def test_both_budgets_together_are_both_kept(tiny_pipeline, subject, tmp_path, fixed_times):
    run = trainer(tiny_pipeline, subject, tmp_path / "out", **COMMON, reducer_memory=0.8, reducer_time=0.6)
    first, last = (cut for cut, _ in run.reducer.plan.shares)
    assert 0 < first < last == 3
    assert run.reducer.plan.mean(TIMES) == pytest.approx(0.6, abs=1e-4)
    run.folder.release()


def test_a_fixed_depth_trains_that_share_of_the_blocks_and_leaves_the_others_as_they_were(
    tiny_pipeline, subject, tmp_path
):
    first, second = tmp_path / "first", tmp_path / "second"
    trainer(tiny_pipeline, subject, first, **COMMON).run()
    options = {**COMMON, "reducer_depth": 0.5, "init_from": str(first)}
    trainer(tiny_pipeline, subject, second, **options).run()
    assert {line["active_layers"] for line in metrics(second)} == {2}
    before, after = (load_adapter_file(path / "effilora.safetensors").adapter for path in (first, second))
    trained = {
        site.block for site, old, new in zip(before.sites, before.B, after.B, strict=True) if not torch.equal(old, new)
    }
    assert len(trained) == 2
    assert all(block.startswith("up_blocks") for block in trained)


def test_budgets_that_no_cut_meets_are_one_sentence(tiny_pipeline, subject, tmp_path, fixed_times, capsys):
    for options, reason in (
        ({"reducer_time": 0.4}, "--reducer_time 0.4 can't be met"),
        ({"reducer_memory": 0.001}, "--reducer_memory 0.001 can't be met"),
        ({"reducer_plan": "9:1"}, "--reducer_plan must cut at 0 to 3"),
    ):
        words = arguments(settings(tiny_pipeline, subject, tmp_path / "out", **COMMON, **options))
        assert launch.main(words) == 2
        error = capsys.readouterr().err
        assert reason in error
        assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"reducer": "depth"}, "--reducer depth needs a budget"),
        ({"reducer": "importance", "reducer_time": 0.7}, "--reducer_time is for --reducer depth, not importance"),
        ({"reducer_depth": 0.5, "reducer_memory": 0.7}, "--reducer_depth fixes what --reducer_memory would choose"),
        ({"reducer_time": 1.2}, "--reducer_time must be above 0 and at most 1"),
        ({"reducer_time": 0.7, "reducer_train_shared": True}, "mode depth would save nothing"),
    ],
)
def test_settings_that_contradict_one_another_are_refused(options, reason):
    with pytest.raises(EffiLoRAError, match=reason):
        TrainingConfig(**options)


def test_a_budget_chooses_the_mode():
    assert TrainingConfig(reducer_time=0.7).adapter_config().reducer.mode == "depth"
    assert TrainingConfig().adapter_config().reducer.mode == "off"


def test_what_was_spent_is_the_mean_of_the_steps_over_a_full_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [(6, 2.0)] * 5 + [(6, 90.0)] + [(1, 1.0)] * 12
    path.write_text("".join(json.dumps({"active_layers": n, "seconds": s}) + "\n" for n, s in lines))
    assert budget.spent(path, PLAN) == "reducer     steps took 0.67 of a full one"
    path.write_text(json.dumps({"active_layers": 1, "seconds": 1.0}) + "\n")
    assert budget.spent(path, PLAN) is None
    assert budget.spent(path, replace(PLAN, seconds=4.0)) == "reducer     steps took 0.25 of a full one"
    assert budget.spent(path, None) is None


def train_measured(folder, config):
    """Process of a run whose processes measure different costs."""
    accelerator = start()
    rank = accelerator.process_index
    budget.step_times = lambda loop, adapter, order, cuts, rounds: ({0: 1.0, 1: 0.9, 3: 0.4 + 0.2 * rank}, 1.0 + rank)
    kept = budget.kept_bytes
    budget.kept_bytes = lambda model, run: kept(model, run) * (1 + rank)
    run = Trainer(config)
    run.run()
    weights = torch.cat([parameter.detach().flatten() for parameter in run.adapter.parameters()])
    torch.save([weights, run.reducer.plan.to_dict()], folder / f"found-{rank}.pt")
    leave_group()
    return 0


def test_all_processes_follow_the_main_one_s_measurements(tiny_pipeline, subject, tmp_path):
    config = settings(tiny_pipeline, subject, tmp_path / "out", **COMMON, reducer_time=0.7, reducer_memory=0.99)
    ranks = Ranks(tmp_path, train_measured, tmp_path, config)
    assert ranks.codes() == [0, 0], ranks.said(0) + ranks.said(1)
    (weights, plan), (others, other) = (torch.load(tmp_path / f"found-{rank}.pt") for rank in (0, 1))
    assert plan == other
    assert torch.equal(weights, others)
    assert plan["seconds"] == 1.0
    assert {line["active_layers"] for line in metrics(tmp_path / "out")} == {3, 1}

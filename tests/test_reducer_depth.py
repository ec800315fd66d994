"""The depth of backpropagation: plans, the order of execution, what lies before a cut, budgets, and runs that repeat them."""

import hashlib
import json
import shutil
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch._dynamo
from conftest import make_adapter, make_toy, randomise, tiny_unet, toy_input, unet_input
from helpers import arguments, make_subject, metrics, settings, trainer
from ranks import Ranks
from test_family_runs import example
from tiny_families import FAMILIES, build

from effilora_diffusion import EffiLoRAConfig, attach, create_adapter
from effilora_diffusion.cli import train as launch
from effilora_diffusion.cli.settings_parser import read_config_file
from effilora_diffusion.core import EffiLoRAError, Reducer, ReducerConfig, load_adapter_file
from effilora_diffusion.core.depth import (
    DepthPlan,
    execution_order,
    first_within,
    fixed_plan,
    kept_bytes,
    parse_shares,
    plan_for_time,
)
from effilora_diffusion.core.inspection import reducer_history
from effilora_diffusion.core.options import hints_of
from effilora_diffusion.diffusion.config import TrainingConfig
from effilora_diffusion.diffusion.models import make_family
from effilora_diffusion.diffusion.training import budget
from effilora_diffusion.diffusion.training.processes import end, start
from effilora_diffusion.diffusion.training.trainer import Trainer

NAMES = tuple(f"blocks.{index}" for index in range(6))
PLAN = DepthPlan(NAMES, ((0, 0.2), (2, 0.3), (5, 0.5)))


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    return make_subject(tmp_path_factory.mktemp("subject") / "s", 5, size=(48, 32))


# ---------------------------------------------------------------------------------------------------------------- plans


def test_every_stretch_of_a_run_keeps_the_shares():
    cuts = [PLAN.cut(step, seed=3) for step in range(1000)]
    for first in (0, 17, 600):
        counts = Counter(cuts[first : first + 100])
        assert all(abs(counts[cut] - 100 * share) <= 4 for cut, share in PLAN.shares), counts
    assert [PLAN.cut(step, seed=3) for step in reversed(range(1000))] == cuts[::-1]
    assert [PLAN.cut(step, seed=4) for step in range(1000)] != cuts
    assert PLAN.active(cuts.index(2), seed=3) == NAMES[2:]


def test_a_plan_is_repeated_from_its_text_and_its_state():
    again = DepthPlan.from_dict(json.loads(json.dumps(replace(PLAN, seconds=0.5).to_dict())), NAMES[::-1])
    assert again == replace(PLAN, seconds=0.5)
    for share in (0.3333, 0.0001, 0.25):
        plan = DepthPlan(NAMES, ((0, share), (4, round(1 - share, 4))))
        assert parse_shares(plan.text(), 6) == plan.shares


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("deep", "no list of CUT:SHARE"), ("0:x", "no list of CUT:SHARE"),
        ("6:1", "must cut at 0 to 5"), ("-1:1", "must cut at 0 to 5"),
        ("0:0.5", "sum to 1"), ("0:0.5,1:0.5,2:0", "above 0"), ("0:nan", "above 0"), ("3:0.5,0:0.5", "rising order"),
        ("0:0.5,0:0.5", "once each"),
    ],
)  # fmt: skip
def test_a_plan_that_can_t_be_followed_is_refused(text, reason):
    with pytest.raises(EffiLoRAError, match=f"--reducer_plan.*{reason}"):
        parse_shares(text, 6)


def test_a_damaged_plan_in_a_checkpoint_is_refused():
    good = PLAN.to_dict()
    bad = [
        None, [], {}, {**good, "more": 1}, {**good, "order": None}, {**good, "order": [*NAMES[:5], "x"]},
        {**good, "order": [[0]]},
        {**good, "shares": []}, {**good, "shares": [[0]]}, {**good, "shares": [[0, 2.0]]}, {**good, "shares": [["0", 1.0]]},
        {**good, "seconds": "1"}, {**good, "kept": float("nan")}, {**good, "time": -1},
    ]  # fmt: skip
    reducer = depth_reducer(PLAN)
    reducer.begin_step(0)
    state = reducer.state_dict()
    for plan in bad:
        with pytest.raises(EffiLoRAError, match="the checkpoint's plan of depths"):
            reducer.load_state_dict({**state, "plan": plan})
        assert reducer.state_dict() == state


def test_a_time_is_met_by_the_deepest_and_the_shallowest_kind_of_step():
    times = {0: 1.0, 3: 0.8, 5: 0.5}
    for share in (0.55, 0.7, 0.93):
        plan = plan_for_time(NAMES, times, share)
        assert plan.mean(times) == pytest.approx(share, abs=1e-4)
        assert [cut for cut, _ in plan.shares] == [0, 5]
    assert plan_for_time(NAMES, times, 0.7, first=3).shares == ((3, 0.6667), (5, 0.3333))
    assert plan_for_time(NAMES, times, 0.8, first=3) == fixed_plan(NAMES, 3)
    assert plan_for_time(NAMES, times, 0.5) == fixed_plan(NAMES, 5)
    with pytest.raises(
        EffiLoRAError, match=r"--reducer_time 0.4 can't be met.*0.50 of a full one: ask for 0.51 or more"
    ):
        plan_for_time(NAMES, times, 0.4)


def test_the_first_cut_within_a_limit_is_found():
    costs = [10, 7, 7, 4, 1]
    for limit, cut in ((10, 0), (9, 1), (7, 1), (6.9, 3), (1, 4), (0.5, None)):
        assert first_within(costs.__getitem__, limit, 5) == cut


# --------------------------------------------------------------------------------------------------------- the Reducer


def depth_reducer(plan, log=None):
    reducer = Reducer(make_adapter(6, reducer=ReducerConfig(mode="depth")), 3, log)
    reducer.plan = plan
    return reducer


def test_the_reducer_trains_what_the_plan_says_and_logs_it(tmp_path):
    reducer = depth_reducer(PLAN, tmp_path / "reducer.jsonl")
    for step in range(40):
        assert not reducer.due(step)
        reducer.begin_step(step)
        expected = PLAN.active(step, 3)
        assert reducer.active == expected
        assert reducer.adapter.cut_blocks == set(NAMES) - set(expected)
        assert {site.block for site, heads in zip(reducer.adapter.sites, reducer.adapter.B, strict=True)
                if heads.requires_grad} == set(expected)  # fmt: skip
    history = reducer_history(tmp_path / "reducer.jsonl", list(NAMES), 40)
    for index, block in enumerate(NAMES):
        share = sum(PLAN.cut(step, 3) <= index for step in range(40)) / 40
        assert history.share_active(block, 0, 40) == pytest.approx(share)
    other = depth_reducer(None)
    other.load_state_dict(json.loads(json.dumps(reducer.state_dict())))
    assert other.plan == PLAN
    assert other.state_dict() == reducer.state_dict()


def test_a_reducer_without_a_plan_says_so():
    with pytest.raises(EffiLoRAError, match="needs a plan"):
        depth_reducer(None).begin_step(0)


# ------------------------------------------------------------------------------------------- order, and before the cut


def test_the_middle_block_of_a_unet_comes_before_its_upper_ones():
    unet = tiny_unet()
    adapter = attach(unet, create_adapter(unet, EffiLoRAConfig()))
    order = execution_order(unet, adapter, lambda: unet(**unet_input()))
    assert adapter.blocks[-1].startswith("mid_block")
    kinds = [block.split("_")[0] for block in order]
    assert sorted(order) == sorted(adapter.blocks)
    assert kinds == sorted(kinds, key=("down", "mid", "up").index)
    assert all(not module._forward_pre_hooks for module in unet.modules() if isinstance(module, torch.nn.Linear))


def test_a_block_that_is_never_called_comes_first():
    model = make_toy(3)
    adapter = attach(model, make_adapter(3))
    first = torch.nn.Sequential(model.blocks[2], model.blocks[0])
    assert execution_order(model, adapter, lambda: first(toy_input())) == ("blocks.1", "blocks.2", "blocks.0")


class Kinds:
    """For every block, whether any of its adapted linears gave an output that needs gradients."""

    def __init__(self, model, adapter):
        self.needs = {}
        for site in adapter.sites:
            for path, _ in site.linears:
                model.get_submodule(path).register_forward_hook(self.hook(site.block))

    def hook(self, block):
        def note(module, args, output):
            self.needs[block] = self.needs.get(block, False) or output.requires_grad

        return note


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_in_every_family_nothing_before_the_cut_needs_gradients_and_all_after_it_learn(name, checkpointing):
    family = make_family(build(name), torch.device("cpu"))
    inputs = example(family, name)
    config = EffiLoRAConfig(alpha=8.0, dropout=0.2, target_modules=("attention", "feed_forward"))
    adapter = attach(family.model, randomise(create_adapter(family.model, config), heads=0.4))
    if checkpointing and family.model._supports_gradient_checkpointing:
        family.enable_gradient_checkpointing()

    def loss():
        torch.manual_seed(0)
        return family.predict(*inputs).square().mean()

    order = execution_order(family.model, adapter, loss)
    assert sorted(order) == sorted(adapter.blocks)
    loss().backward()
    full = [heads.grad for heads in adapter.B]
    kept = kept_bytes(family.model, loss)
    seen = Kinds(family.model, adapter)
    for cut in {1, len(order) - 1}:
        adapter.zero_grad(set_to_none=True)
        adapter.set_active(order[cut:], train_shared=False)
        less = kept_bytes(family.model, loss)
        assert less <= kept
        assert less < kept or cut < len(order) - 1
        seen.needs.clear()
        loss().backward()
        assert not any(seen.needs[block] for block in order[:cut] if block in seen.needs)
        for site, heads, router, expected in zip(adapter.sites, adapter.B, adapter.G, full, strict=True):
            if site.block in order[:cut]:
                assert heads.grad is None
                assert router.grad is None
            elif expected is not None:
                torch.testing.assert_close(heads.grad, expected)


def test_kept_bytes_are_those_of_the_graph_without_weights():
    layer = torch.nn.Linear(3, 5)
    x = torch.randn(4, 3, requires_grad=True)
    assert kept_bytes(layer, lambda: layer(x).square().sum()) == 4 * (4 * 3 + 4 * 5)
    layer.requires_grad_(False)
    assert kept_bytes(layer, lambda: layer(x.detach()).square().sum()) == 0
    deep = torch.nn.Sequential(*[torch.nn.Linear(3, 3) for _ in range(4)])
    run = torch.utils.checkpoint.checkpoint
    assert kept_bytes(deep, lambda: run(deep, x, use_reentrant=False).sum()) == 4 * 4 * 3
    deep.requires_grad_(False)
    assert kept_bytes(deep, lambda: run(deep, x.detach(), use_reentrant=False).sum()) == 0


def test_two_cuts_compile_into_at_most_two_graphs_a_block():
    torch._dynamo.reset()
    counts = Counter()

    def counting(graph, inputs):
        counts["graphs"] += 1
        return graph.forward

    model, x = make_toy(6), toy_input()
    adapter = attach(model, make_adapter(6))
    expected = {}
    for cut in (0, 3):
        adapter.set_active(NAMES[cut:], train_shared=False)
        adapter.zero_grad(set_to_none=True)
        model(x).square().mean().backward()
        expected[cut] = [None if value.grad is None else value.grad.clone() for value in adapter.parameters()]
    for block in model.blocks:
        block.compile(backend=counting)
    with torch._dynamo.config.patch(recompile_limit=64):
        for cut in (0, 3, 0, 3, 3, 0, 0, 3):
            adapter.set_active(NAMES[cut:], train_shared=False)
            adapter.zero_grad(set_to_none=True)
            model(x).square().mean().backward()
            for value, gradient in zip(adapter.parameters(), expected[cut], strict=True):
                assert (value.grad is None) == (gradient is None)
                if gradient is not None:
                    torch.testing.assert_close(value.grad, gradient)
        assert len(NAMES) < counts["graphs"] <= 2 * len(NAMES)
        before = counts["graphs"]
        adapter.set_active(NAMES[5:], train_shared=False)
        model(x).square().mean().backward()
        assert counts["graphs"] - before <= 3, "blocks 0 to 2 are cut as before: only 3, 4 and 5 are compiled anew"
    torch._dynamo.reset()


# --------------------------------------------------------------------------------------------------------------- runs

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
    end()
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

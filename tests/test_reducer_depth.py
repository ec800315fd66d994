"""The depth of backpropagation: plans, the order of execution, and what lies before a cut."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch._dynamo
from conftest import make_adapter, make_toy, randomise, tiny_unet, toy_input, unet_input
from test_family_runs import example
from tiny_families import FAMILIES, build
from torch.multiprocessing.reductions import StorageWeakRef

from effilora_diffusion import EffiLoRAConfig, attach, create_adapter
from effilora_diffusion.core import EffiLoRAError, Reducer, ReducerConfig
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
from effilora_diffusion.diffusion.models import make_family

NAMES = tuple(f"blocks.{index}" for index in range(6))
PLAN = DepthPlan(NAMES, ((0, 0.2), (2, 0.3), (5, 0.5)))


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


def test_counting_what_is_kept_keeps_nothing():
    deep = torch.nn.Sequential(*[torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh()) for _ in range(8)])
    outputs, alive = [], []
    for layer in deep:
        layer.register_forward_hook(
            lambda module, args, value: outputs.append(StorageWeakRef(value.untyped_storage()))
        )
    x = torch.randn(4, 3)

    def run():
        outputs.clear()
        loss = deep(x).sum()
        alive.append(sum(not storage.expired() for storage in outputs))
        return loss

    loss = run()
    assert kept_bytes(deep, run) == kept_bytes(deep, run) == 4 * 4 * 3 * 9  # the input and every output
    assert alive == [8, 0, 0]
    assert loss.requires_grad


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

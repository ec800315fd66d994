"""The Reducer: selection of blocks, score updates, and freezing."""

import json
import math
import random
from collections import Counter

import pytest
import torch
from conftest import make_adapter, make_toy, toy_input

from effilora_diffusion.core import EffiLoRA, EffiLoRAError, Reducer, ReducerConfig, attach

BLOCKS = 6
NAMES = tuple(f"blocks.{index}" for index in range(BLOCKS))


def make_reducer(seed=0, log=None, **options):
    options = {"mode": "importance", "warmup": 0, "interval": 1, **options}
    return Reducer(make_adapter(BLOCKS, reducer=ReducerConfig(**options)), seed, log)


def harm_of(reducer, harms):
    """Return a validation loss that increases by a block's harm in proportion to its suppression."""

    def evaluate():
        strength = reducer.adapter.block_strength
        return 1.0 + sum(harm * (1 - strength.get(block, 1.0)) for block, harm in harms.items())

    return evaluate


def selections(reducer, steps=range(200)):
    return [reducer.select(step) for step in steps]


@pytest.mark.parametrize("mode", ["importance", "random"])
def test_the_selection_depends_on_seed_and_step_only(mode):
    expected = selections(make_reducer(3, mode=mode))
    again = make_reducer(3, mode=mode)
    random.seed(99)
    torch.manual_seed(99)
    backwards = [again.select(step) for step in reversed(range(200))]
    assert backwards[::-1] == expected
    assert selections(make_reducer(4, mode=mode)) != expected
    assert len(set(expected)) > 10


@pytest.mark.parametrize("mode", ["importance", "random"])
@pytest.mark.parametrize(("share", "count"), [(0.5, 3), (0.1, 1), (0.7, 4), (1.0, 6)])
def test_all_blocks_train_during_the_warmup_and_k_after_it(mode, share, count):
    reducer = make_reducer(mode=mode, warmup=5, active=share)
    assert reducer.count == count
    for step in range(60):
        chosen = reducer.select(step)
        assert len(set(chosen)) == len(chosen) == (BLOCKS if step < 5 else count)
        assert list(chosen) == [block for block in NAMES if block in chosen]  # in model order


def test_without_a_reducer_every_block_trains_and_nothing_is_evaluated():
    reducer = make_reducer(mode="off", active=0.2)
    for step in range(30):
        reducer.begin_step(step)
        assert not reducer.due(step)
        assert all(heads.requires_grad for heads in reducer.adapter.B)
        assert reducer.adapter.cut_blocks == frozenset()
    assert reducer.active == NAMES


def test_importance_is_evaluated_after_the_warmup_and_then_every_interval():
    reducer = make_reducer(warmup=4, interval=3)
    assert [step for step in range(14) if reducer.due(step)] == [4, 7, 10, 13]
    assert not any(make_reducer(mode="random").due(step) for step in range(14))


@pytest.mark.parametrize("harm", [0.05, -0.05], ids=["hurts", "helps"])
def test_a_block_whose_suppression_hurts_has_the_lowest_score_and_trains_most(harm):
    counts = Counter()
    for seed in range(4):
        reducer = make_reducer(seed)
        for step in range(40):
            reducer.update(step, harm_of(reducer, {"blocks.2": harm}))
        scores = dict(zip(NAMES, reducer.scores, strict=True))
        assert (min if harm > 0 else max)(scores, key=scores.get) == "blocks.2"
        counts.update(block for chosen in selections(reducer) for block in chosen)
    others = [counts[block] for block in NAMES if block != "blocks.2"]
    if harm > 0:
        assert counts["blocks.2"] > 1.25 * max(others)
    else:
        assert counts["blocks.2"] < 0.75 * min(others)


def test_unimportant_blocks_are_suppressed_more_often_than_important_ones():
    reducer = make_reducer()
    reducer.scores = [-3.0, -3.0, -3.0, 3.0, 3.0, 3.0]
    seen = Counter()

    def evaluate():
        seen.update(list(reducer.adapter.block_strength))
        return 1.0

    for step in range(40):
        reducer.update(step, evaluate)
    assert sum(seen[block] for block in NAMES[3:]) > 2 * sum(seen[block] for block in NAMES[:3])


def test_equal_losses_do_not_change_the_scores():
    reducer = make_reducer()
    for step in range(5):
        reducer.update(step, lambda: 0.25)
    assert reducer.scores == [0.0] * BLOCKS


def test_scores_do_not_depend_on_the_unit_of_the_loss():
    small, large = make_reducer(), make_reducer()
    for step in range(10):
        small.update(step, harm_of(small, {"blocks.1": 1e-4}))
        large.update(step, harm_of(large, {"blocks.1": 1.0}))
    assert small.scores == pytest.approx(large.scores, rel=1e-6)


def test_random_mode_ignores_the_scores():
    reducer = make_reducer(mode="random")
    expected = selections(reducer)
    reducer.scores = [8.0, -8.0, 8.0, -8.0, 8.0, -8.0]
    assert selections(reducer) == expected
    importance = make_reducer(mode="importance")
    before = selections(importance)
    importance.scores = [8.0, -8.0, 8.0, -8.0, 8.0, -8.0]
    assert selections(importance) != before


def test_random_mode_selects_every_block_equally_often():
    counts = Counter(block for chosen in selections(make_reducer(mode="random"), range(1200)) for block in chosen)
    assert all(abs(counts[block] - 600) < 90 for block in NAMES)


@pytest.mark.parametrize(
    ("share", "rollouts", "factor", "size"), [(0.5, 3, 0.0, 3), (0.34, 4, 0.25, 2), (0.1, 2, 0, 1)]
)
def test_each_rollout_suppresses_its_share_of_the_blocks_by_the_factor(share, rollouts, factor, size):
    reducer = make_reducer(suppress_share=share, rollouts=rollouts, suppress_factor=factor)
    seen = []

    def evaluate():
        seen.append(dict(reducer.adapter.block_strength))
        return 1.0

    reducer.update(7, evaluate)
    assert len(seen) == rollouts
    assert all(len(strengths) == size and set(strengths.values()) == {factor} for strengths in seen)
    assert reducer.adapter.block_strength == {}


def test_a_suppressed_block_adds_nothing_to_the_output():
    model, x = make_toy(BLOCKS), toy_input()
    adapter = attach(model, make_adapter(BLOCKS))
    adapter.block_strength["blocks.3"] = 0.0
    suppressed = model(x)
    adapter.block_strength.clear()
    full = model(x)
    with torch.no_grad():
        for site, heads in zip(adapter.sites, adapter.B, strict=True):
            if site.block == "blocks.3":
                heads.zero_()
    torch.testing.assert_close(suppressed, model(x))
    assert not torch.allclose(suppressed, full)


@pytest.mark.parametrize("train_shared", [True, False])
def test_frozen_heads_do_not_change_under_weight_decay_and_momentum(train_shared):
    model, x = make_toy(BLOCKS), toy_input()
    adapter = attach(model, make_adapter(BLOCKS, reducer=ReducerConfig("random", 0.5, train_shared=train_shared)))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.05, weight_decay=0.1)

    def step():
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(3):  # all blocks train: momentum builds up
        step()
    assert all(optimizer.state[heads]["exp_avg"].any() for heads in adapter.B)
    active = ("blocks.1", "blocks.4")
    model(x).square().mean().backward()  # a gradient from before the selection must not change a frozen head
    adapter.set_active(active, train_shared)
    before = [heads.detach().clone() for heads in adapter.B]
    for _ in range(4):
        step()
    for site, old, new in zip(adapter.sites, before, adapter.B, strict=True):
        assert torch.equal(old, new) == (site.block not in active), site.name
    adapter.set_active(None)
    step()
    assert not any(torch.equal(old, new) for old, new in zip(before, adapter.B, strict=True))


def part_of(adapter, blocks):
    """Copy the sites of ``blocks`` with their weights to a new adapter."""
    keep = [index for index, site in enumerate(adapter.sites) if site.block in blocks]
    part = EffiLoRA(adapter.config, [adapter.sites[index] for index in keep])
    with torch.no_grad():
        for width, value in part.A.items():
            value.copy_(adapter.A[width])
        for new, old in enumerate(keep):
            part.B[new].copy_(adapter.B[old])
            part.G[new].copy_(adapter.G[old])
    return part


@pytest.mark.parametrize("routing", ["token", "static"])
def test_without_train_shared_a_learns_from_active_blocks_only(routing):
    x, active = toy_input(), ("blocks.1", "blocks.4")
    model = make_toy(BLOCKS)
    adapter = attach(model, make_adapter(BLOCKS, routing=routing))
    adapter.set_active(active, train_shared=False)
    cut = model(x)
    cut.square().mean().backward()

    split = make_toy(BLOCKS)
    frozen = attach(split, part_of(adapter, set(NAMES) - set(active)), "frozen").requires_grad_(False)
    moving = attach(split, part_of(adapter, active), "moving")
    torch.testing.assert_close(split(x), cut)
    split(x).square().mean().backward()
    assert frozen.A["8"].grad is None
    for width, value in adapter.A.items():
        torch.testing.assert_close(value.grad, moving.A[width].grad, rtol=1e-4, atol=1e-6)
    for site, router in zip(adapter.sites, adapter.G, strict=True):
        assert (router.grad is not None) == (site.block in active)


def test_with_train_shared_a_and_routers_learn_from_every_block():
    x, gradients = toy_input(), []
    for blocks in (None, ("blocks.1",)):
        model = make_toy(BLOCKS)
        adapter = attach(model, make_adapter(BLOCKS))
        adapter.set_active(blocks, train_shared=True)
        model(x).square().mean().backward()
        assert [heads.grad is not None for heads in adapter.B] == [heads.requires_grad for heads in adapter.B]
        gradients.append([value.grad for value in [*adapter.A.values(), *adapter.G]])
    for full, frozen in zip(*gradients, strict=True):
        torch.testing.assert_close(full, frozen)


def test_begin_step_freezes_the_blocks_that_are_not_selected():
    reducer = make_reducer(active=0.34, train_shared=False)
    for step in range(5):
        reducer.begin_step(step)
        chosen = reducer.select(step)
        assert reducer.active == chosen
        for site, heads in zip(reducer.adapter.sites, reducer.adapter.B, strict=True):
            assert heads.requires_grad == (site.block in chosen)
        assert reducer.adapter.cut_blocks == set(NAMES) - set(chosen)


def test_trained_ever_counts_the_blocks_selected_so_far():
    reducer = make_reducer(mode="random", active=0.17)
    shared = sum(value.numel() for value in reducer.adapter.A.values())
    per_block = sum(value.numel() for value in [*reducer.adapter.B, *reducer.adapter.G]) // BLOCKS
    selected = set()
    for step in range(4):
        reducer.begin_step(step)
        selected.update(reducer.select(step))
        assert reducer.trained_ever() == shared + per_block * len(selected)


@pytest.mark.parametrize("train_shared", [False, True])
def test_an_unshared_a_counts_with_its_block(train_shared):
    config = ReducerConfig(mode="random", active=0.17, warmup=0, train_shared=train_shared)
    adapter = make_adapter(BLOCKS, a_sharing="none", reducer=config)
    reducer = Reducer(adapter)
    reducer.begin_step(0)
    (selected,) = reducer.active
    counted = reducer.trained_ever()
    attach(make_toy(BLOCKS), adapter)
    own = [index for index, site in enumerate(adapter.sites) if train_shared or site.block == selected]
    expected = sum(adapter.G[i].numel() + adapter.shared_a(adapter.sites[i]).numel() for i in own)
    expected += sum(heads.numel() for heads in adapter.B if heads.requires_grad)
    assert counted == expected == adapter.parameter_counts()["trained_per_step"]


def test_a_saved_state_continues_like_an_uninterrupted_run():
    harms = {"blocks.0": 0.3, "blocks.5": 0.1}
    whole, first = make_reducer(), make_reducer()
    for reducer, steps in ((whole, range(12)), (first, range(6))):
        for step in steps:
            reducer.update(step, harm_of(reducer, harms))
            reducer.begin_step(step)
    second = make_reducer()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.state_dict() == first.state_dict()
    assert second.adapter.parameter_counts() == first.adapter.parameter_counts()  # frozen as they were
    for step in range(6, 12):
        second.update(step, harm_of(second, harms))
        second.begin_step(step)
    assert second.state_dict() == whole.state_dict()
    assert selections(second) == selections(whole)


def test_a_state_of_other_blocks_is_refused():
    state = make_reducer().state_dict()
    state["scores"]["blocks.99"] = state["scores"].pop("blocks.0")
    with pytest.raises(EffiLoRAError, match="other blocks"):
        make_reducer().load_state_dict(state)


def test_a_damaged_state_is_refused_and_changes_nothing():
    reducer = Reducer(make_adapter(reducer=ReducerConfig(mode="importance")))
    reducer.begin_step(0)
    good = reducer.state_dict()
    block = reducer.blocks[0]
    bad = [
        None, [], {}, {**good, "more": 1}, {**good, "scores": [0.0]}, {**good, "scores": {**good["scores"], block: "high"}},
        {**good, "scores": {**good["scores"], block: 17.0}}, {**good, "scores": {**good["scores"], block: float("nan")}},
        {**good, "deviation": -1.0}, {**good, "deviation": float("inf")}, {**good, "deviation": None}, {**good, "active": []},
        {**good, "active": ["x"]}, {**good, "active": [block, block]}, {**good, "active": block}, {**good, "active": [[block]]},
        {**good, "ever_active": ["x"]}, {**good, "ever_active": 5},
    ]  # fmt: skip
    for state in bad:
        with pytest.raises(EffiLoRAError, match="the checkpoint's"):
            reducer.load_state_dict(state)
        assert reducer.state_dict() == good
    reducer.load_state_dict(json.loads(json.dumps(good)))


def test_the_log_holds_one_json_object_per_event(tmp_path):
    log = tmp_path / "reducer.jsonl"
    reducer = make_reducer(log=log, active=0.5, warmup=2)
    for step in range(6):
        if reducer.due(step):
            reducer.update(step, harm_of(reducer, {"blocks.0": 0.1}))
        reducer.begin_step(step)
    events = [json.loads(line) for line in log.read_text().splitlines()]
    measured = [event for event in events if event["event"] == "importance"]
    assert [event["step"] for event in measured] == [2, 3, 4, 5]
    for event in measured:
        assert len(event["losses"]) == len(event["suppressed"]) == 3
        assert set(event["scores"]) == set(NAMES)
    assert list(measured[-1]["scores"].values()) == reducer.scores
    changes = [event for event in events if event["event"] == "active"]
    assert changes[0]["step"] == 2
    assert changes[-1]["layers"] == list(reducer.active)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_scores(loss):
    reducer = make_reducer()
    losses = iter([1.0, 1.0, loss])
    with pytest.raises(EffiLoRAError, match="step 4 is not finite"):
        reducer.update(4, lambda: next(losses))
    assert reducer.scores == [0.0] * BLOCKS
    assert reducer.adapter.block_strength == {}


def test_after_an_exception_in_the_validation_no_block_is_suppressed():
    reducer = make_reducer()

    def fail():
        assert reducer.adapter.block_strength
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        reducer.update(0, fail)
    assert reducer.adapter.block_strength == {}


def test_scores_are_bounded_so_that_every_block_can_be_selected_again():
    reducer = make_reducer(step_size=50.0)
    for step in range(100):
        reducer.update(step, harm_of(reducer, {"blocks.2": 1.0}))
    assert all(math.isfinite(score) and abs(score) <= 16 for score in reducer.scores)
    assert set(NAMES) == {block for chosen in selections(reducer, range(3000)) for block in chosen}

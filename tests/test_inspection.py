"""Statistics of adapters, single heads, and the history of a Reducer."""

import json

import pytest
import torch
from conftest import make_adapter, make_toy, toy_input
from helpers import make_subject, trainer

from effilora_diffusion import EffiLoRAError
from effilora_diffusion.core import AdapterFile, attach, calibrate, detach, load_adapter_file
from effilora_diffusion.core.inspection import head_usage, inspect_adapter, logged_blocks, reducer_history, single_head
from effilora_diffusion.diffusion.report import figures


def mean_gates(model, adapter, x):
    """Return the mean gates per block over all tokens, weighted by the squared norm of A x."""
    found = {block: [] for block in adapter.blocks}
    inputs = {}
    modules = dict(model.named_modules())
    hooks = [modules[path].register_forward_pre_hook(lambda _, args, index=index: inputs.setdefault(index, args[0]))
             for index, site in enumerate(adapter.sites) for path, _ in site.linears[:1]]  # fmt: skip
    model(x)
    for hook in hooks:
        hook.remove()
    for index, site in enumerate(adapter.sites):
        h = adapter.shared_a(site) @ inputs[index].flatten(0, -2).t()
        weight = h.square().sum(0)
        found[site.block].append((adapter.gates(index, h) * weight).sum(1) / weight.sum())
    return {block: torch.stack(rows).mean(0).tolist() for block, rows in found.items()}


@torch.no_grad()
def test_usage_is_the_mean_of_the_gates_over_the_calibration_inputs():
    model, x = make_toy(), toy_input(batch=4)
    adapter = attach(model, make_adapter(heads=3, routing="token"))
    calibration, _ = calibrate(model, adapter, lambda: model(x))
    found = head_usage(AdapterFile(adapter, calibration=calibration))
    for block, expected in mean_gates(model, adapter, x).items():
        assert found[block] == pytest.approx(expected, abs=1e-4)
        assert sum(found[block]) == pytest.approx(1, abs=1e-4)
    assert set(head_usage(AdapterFile(adapter)).values()) == {None}  # unknown without calibration


@torch.no_grad()
def test_usage_of_fixed_gates_needs_no_inputs():
    static = make_adapter(heads=3, routing="static")
    found = head_usage(AdapterFile(static))[static.blocks[0]]
    pairs = zip(static.sites, static.G, strict=True)
    own = [router.softmax(0) for site, router in pairs if site.block == static.blocks[0]]
    assert found == pytest.approx(torch.stack(own).mean(0).tolist())
    one = make_adapter(heads=1)
    assert set(map(tuple, head_usage(AdapterFile(one)).values())) == {(1.0,)}


@torch.no_grad()
@pytest.mark.parametrize("routing", ["token", "static"])
def test_single_heads_add_up_to_the_adapter(routing):
    model, x = make_toy(blocks=1), toy_input()
    model.blocks[0].forward = lambda x, block=model.blocks[0]: block.to_q(x)  # a linear path, so that updates add up
    content = AdapterFile(make_adapter(blocks=1, heads=3, routing=routing))
    base, parts = model(x), []
    for head in (1, 2, 3):
        attach(model, single_head(content, head).adapter)
        parts.append(model(x) - base)
        detach(model)
    attach(model, content.adapter)
    assert all(part.abs().max() > 1e-3 for part in parts)
    torch.testing.assert_close(sum(parts), model(x) - base)
    for head in (0, 4):
        with pytest.raises(EffiLoRAError, match="heads 1 to 3"):
            single_head(content, head)


def test_the_history_matches_the_run(tiny_pipeline, tmp_path):
    options = {"max_train_steps": 12, "reducer": "importance", "reducer_warmup": 3, "reducer_interval": 3,
               "reducer_active": 0.5, "num_validation_images": 0}  # fmt: skip
    run = trainer(tiny_pipeline, make_subject(tmp_path / "s", 2), tmp_path / "out", **options)
    run.run()
    content = load_adapter_file(tmp_path / "out" / "effilora.safetensors")
    blocks, log = list(content.adapter.blocks), tmp_path / "out" / "reducer.jsonl"
    assert logged_blocks(log) == blocks
    history = reducer_history(log, blocks, 12)
    assert history.steps == [3, 6, 9]
    for block, score in zip(run.reducer.blocks, run.reducer.scores, strict=True):
        assert history.importance[block][-1] == pytest.approx(1 / (1 + 2.718281828459045**score))
    metrics = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    for step, line in enumerate(metrics):
        active = sum(history.share_active(block, step, step + 1) for block in blocks)
        assert active == line["active_layers"], step
    assert history.share_active(blocks[0], 0, 3) == 1  # all blocks train during the warmup
    with log.open("a") as file:
        file.write('{"step": 99, "eve')  # an incomplete line
    assert reducer_history(log, blocks, 12) == history


def test_without_a_reducer_every_block_is_trained(tmp_path):
    history = reducer_history(tmp_path / "none.jsonl", ["a", "b"], 10)
    assert history.active == {"a": [(0, 10)], "b": [(0, 10)]}
    assert figures.importance(history) == ""


def test_figures_show_values_and_escape_names():
    name = 'blocks.0<script>"'
    html = figures.bars("Title", "Note", {name: [1.0, 2.0], "blocks.1": None}, ["head 1", "head 2"])
    assert "<script>" not in html
    assert "1.00" in html
    assert "--v:50.0" in html
    assert "not known" in html
    heat = figures.heat("Title", "Note", {name: [0.0, 1.0]}, ["step 1", "step 2"], "mean")
    assert "<script>" not in heat
    assert "--v:100" in heat
    assert "<td>0.50</td>" in heat


def test_blocks_have_short_names():
    paths = [
        f"{side}.{number}.attentions.0.transformer_blocks.0"
        for side in ("down_blocks", "up_blocks")
        for number in (0, 1)
    ]
    assert list(figures.short_names(paths).values()) == ["down 0", "down 1", "up 0", "up 1"]
    assert figures.short_names(["transformer_blocks.3"]) == {"transformer_blocks.3": "block 3"}
    both = figures.short_names(["transformer_blocks.0", "single_transformer_blocks.0"])
    assert len(set(both.values())) == 2


def test_statistics_include_the_usage_of_every_block():
    content = AdapterFile(make_adapter(heads=2, routing="static"))
    for facts in inspect_adapter(content)["layers"].values():
        assert len(facts["usage"]) == 2


def test_the_norms_of_any_finite_weights_are_finite():
    adapter = make_adapter(alpha=1e6)
    with torch.no_grad():
        for value in adapter.parameters():
            value.fill_(3e38)
    calibration = {site.name: torch.full((4, 4, 4), 3e38) for site in adapter.sites}
    calibration[adapter.sites[0].name][0] = 1e-45
    facts = inspect_adapter(AdapterFile(adapter, {}, calibration))
    for block in facts["layers"].values():
        assert all(0 < size < float("inf") for size in (block["norm"], *block["heads"]))
        assert all(0 <= share <= 1 for share in block["usage"])


def test_lines_that_no_reducer_wrote_are_skipped(tmp_path):
    good = {"step": 1, "event": "importance", "scores": {"a": 0.5}}
    bad = [
        [], 5, {"step": "1", "event": "active", "layers": []}, {"step": -1, "event": "active", "layers": []},
        {"step": 1, "event": "active", "layers": "a"}, {"step": 1, "event": "active", "layers": [["a"]]},
        {"step": 1, "event": "importance", "scores": [1]}, {"step": 1, "event": "importance", "scores": {"a": "b"}},
        {"step": 10**400, "event": "active", "layers": []}, {"step": 1, "event": "importance", "layers": ["a"]}, {"step": 1},
    ]  # fmt: skip
    lines = [*map(json.dumps, bad), "[" * 100_000, "{", json.dumps(good)]
    (tmp_path / "reducer.jsonl").write_text("\n".join(lines))
    history = reducer_history(tmp_path / "reducer.jsonl", ["a"], 2)
    assert history.steps == [1]
    assert len(history.importance["a"]) == 1
    assert logged_blocks(tmp_path / "reducer.jsonl") == ["a"]

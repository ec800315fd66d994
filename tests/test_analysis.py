"""What ``benchmarks.analysis`` measures: subspaces, gates, parts taken out, costs; its plots are looked at, not tested."""

import sys

import pytest
import torch
from conftest import randomise, tiny_unet
from helpers import PROMPT, image, make_subject, trainer

from benchmarks import analysis, analysis_costs
from benchmarks.analysis_probes import (
    entropy,
    head_usage,
    overlap,
    overlaps_between,
    overlaps_within,
    recorded_gates,
    removal,
)
from benchmarks.judging import Probe
from effilora_diffusion import EffiLoRAConfig, create_adapter
from effilora_diffusion.core import exit_code


def test_overlap_is_one_in_the_same_space_and_by_chance_the_share_of_the_dimensions():
    torch.manual_seed(0)
    one = torch.randn(40, 4)
    assert overlap(one, one @ torch.randn(4, 4)) == pytest.approx(1)
    assert overlap(torch.eye(8)[:, :3], torch.eye(8)[:, 3:6]) == pytest.approx(0)
    found = [overlap(torch.randn(40, 4), torch.randn(40, 4)) for _ in range(200)]
    assert sum(found) / len(found) == pytest.approx(4 / 40, rel=0.1)


def test_only_places_of_equal_width_are_compared():
    made = [create_adapter(tiny_unet(), EffiLoRAConfig(rank=2, heads=1, a_sharing="none"), seed) for seed in (0, 0, 1)]
    for seed, adapter in zip((2, 2, 3), made, strict=True):
        randomise(adapter, seed)
    for kind in ("A", "B"):
        pairs = overlaps_within(made[0], kind)
        assert len(pairs) > 10
        assert all(0 <= value < 1 and 0 < chance < 0.2 for _, _, value, chance in pairs)
        assert overlaps_between(made[0], made[1], kind) == pytest.approx(
            [1.0] * len(overlaps_between(*made[:2], kind))
        )
        assert max(overlaps_between(made[0], made[2], kind)) < 0.99


def test_entropy_is_one_for_equal_gates_and_zero_for_a_single_one():
    gates = torch.tensor([[1 / 3, 1.0], [1 / 3, 0.0], [1 / 3, 0.0]])
    assert entropy(gates).tolist() == pytest.approx([1.0, 0.0], abs=1e-6)


@pytest.fixture
def trained(tiny_pipeline, tmp_path):
    """A run with heads and routers as after training, and its probes."""
    subject = make_subject(tmp_path / "subject", 2)
    run = trainer(tiny_pipeline, subject, tmp_path / "out")
    randomise(run.adapter)
    yield run, Probe(run.family, [image(0), image(1)], [PROMPT] * 2, levels=4)
    run.folder.release()


def test_gates_are_told_by_block_noise_level_and_word(trained):
    run, probe = trained
    found = head_usage(run, probe, levels=4)
    assert list(found["blocks"]) == list(run.adapter.blocks)
    for heads in found["blocks"].values():
        assert sum(heads) == pytest.approx(1, abs=1e-4)
        assert heads == sorted(heads, reverse=True)
    assert len(found["levels"]) == len(found["timesteps"]) == 4
    assert all(0 < value <= 1 for value in (*found["levels"], *found["token entropy"]))
    assert len(found["words"]) == len(found["token entropy"])
    assert (found["words"][0], found["words"][-1]) == ("start", "end")
    with recorded_gates(run.adapter) as gates:
        probe.predictions(run.family)
    assert set(gates) == set(range(len(run.adapter.sites)))
    assert "gates" not in vars(run.adapter), "the adapter computes its own gates again"


def test_what_is_taken_out_is_put_back_bit_for_bit(trained):
    run, probe = trained
    before = [value.detach().clone() for value in run.adapter.parameters()]
    found = removal(run, probe)
    assert list(found["blocks"]) == list(run.adapter.blocks)
    assert set(found["kinds"]) == {"self q k v", "self out", "cross q", "cross k v", "cross out"}
    assert all(value != 0 for value in (*found["blocks"].values(), *found["kinds"].values()))
    assert run.adapter.block_strength == {}
    assert all(torch.equal(old, new) for old, new in zip(before, run.adapter.parameters(), strict=True))


def test_energy_is_none_where_the_counter_can_t_be_read(tmp_path, monkeypatch):
    counter = tmp_path / "energy_uj"
    monkeypatch.setattr(analysis_costs, "RAPL", counter)
    assert analysis_costs.energy() is None
    counter.write_text("2500000\n")
    assert analysis_costs.energy() == 2.5


def test_operations_are_those_of_products():
    one, other = torch.randn(3, 4), torch.randn(4, 5)
    assert analysis_costs.operations(lambda: one @ other) == 2 * 3 * 4 * 5


def test_without_matplotlib_the_command_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "benchmarks.analysis_plots", raising=False)
    monkeypatch.setattr(sys, "argv", ["analysis", "--work", str(tmp_path)])
    assert exit_code(analysis.main) == 2
    assert "pip install '.[benchmark]'" in capsys.readouterr().err

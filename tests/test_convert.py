"""Plain LoRA from an adapter: the same function where it can be, else the best fit, with its error told truly."""

import pytest
import torch
from conftest import make_adapter, make_toy, toy_input
from torch import nn

from effilora_diffusion.core import EffiLoRAError, attach, calibrate, is_exact, to_lora

EXACT = [{"heads": 1}, {"heads": 1, "a_sharing": "slice", "routing": "timestep"}, {"routing": "static", "heads": 4}]
ROUTED = [{"routing": "token"}, {"routing": "token", "a_sharing": "slice"}, {"routing": "timestep"}]
STEPS = torch.tensor([0, 150, 300, 450, 600, 750, 900, 999])


def apply_factors(model, factors):
    with torch.no_grad():
        for path, pair in factors.items():
            model.get_submodule(path).weight += pair.up @ pair.down
    return model


class Recording:
    """Per map the inputs it saw and the update the adapter added, of an attached model while ``run`` drives it."""

    def __init__(self, model, run):
        self.seen = {}
        handles = [
            module.register_forward_hook(self._keeper(path))
            for path, module in model.named_modules()
            if isinstance(module, nn.Linear)
        ]
        run()
        for handle in handles:
            handle.remove()

    def _keeper(self, path):
        def keep(module, args, output):
            base = nn.functional.linear(args[0], module.weight, module.bias)
            self.seen.setdefault(path, []).append((args[0].double(), output.double() - base.double()))

        return keep

    def error(self, ups, downs):
        """Root of the summed squared errors of ``up down x`` over the summed squared updates, all maps together."""
        wrong = total = 0.0
        for path, calls in self.seen.items():
            for x, update in calls:
                fitted = x @ downs[path].double().t() @ ups[path].double().t()
                wrong += float((update - fitted).square().sum())
                total += float(update.square().sum())
        return (wrong / total) ** 0.5


def calibrated(**options):
    """An adapter on the toy model, its calibration, the error it was told, and what was measured meanwhile."""
    model = make_toy()
    adapter = attach(model, make_adapter(alpha=6.0, **options))
    x = toy_input(batch=8, tokens=20)

    def run():
        with torch.no_grad():
            model(x, STEPS)
            model(0.5 * x.flip(0), 250)

    calibration, error = calibrate(model, adapter, run)
    return adapter, calibration, error, Recording(model, run)


@pytest.mark.parametrize("options", EXACT)
def test_one_head_and_static_gates_become_the_same_function(toy, x, options):
    adapter = attach(toy, make_adapter(alpha=2.0, **options))
    assert is_exact(adapter)
    expected = toy(x, 400)
    factors = to_lora(adapter)
    assert set(factors) == {path for site in adapter.sites for path, _ in site.linears}
    assert {tuple(pair.down.shape) for pair in factors.values()} == {(4, 8), (4, 12)}
    torch.testing.assert_close(apply_factors(make_toy(), factors)(x), expected, rtol=1e-5, atol=1e-5)
    assert calibrate(toy, adapter, lambda: toy(x, 400)) == ({}, 0.0)


@pytest.mark.parametrize("options", ROUTED)
def test_routing_by_input_needs_calibration(options):
    adapter, calibration, _, _ = calibrated(**options)
    assert not is_exact(adapter)
    for given in (None, {}):
        with pytest.raises(EffiLoRAError, match="calibration"):
            to_lora(adapter, given)
    calibration.pop("blocks.1.out.0")
    with pytest.raises(EffiLoRAError, match=r"blocks\.1\.out\.0"):
        to_lora(adapter, calibration)


@pytest.mark.parametrize("options", ROUTED)
def test_the_error_told_is_the_error_measured(options):
    adapter, calibration, error, recording = calibrated(**options)
    factors = to_lora(adapter, calibration)
    ups, downs = ({p: getattr(pair, side) for p, pair in factors.items()} for side in ("up", "down"))
    assert 0.02 < error < 1
    assert recording.error(ups, downs) == pytest.approx(error, abs=1e-4)


@pytest.mark.parametrize("options", ROUTED)
def test_the_fit_beats_mean_gates_and_every_neighbour(options):
    adapter, calibration, _, recording = calibrated(**options)
    factors = to_lora(adapter, calibration)
    downs = {path: pair.down for path, pair in factors.items()}
    best = recording.error({path: pair.up for path, pair in factors.items()}, downs)

    mean_gates = {}
    for index, site in enumerate(adapter.sites):
        c, ci = calibration[site.name][0], calibration[site.name][1:]
        share = ci.diagonal(dim1=1, dim2=2).sum(1) / c.diagonal().sum()
        assert share.sum() == pytest.approx(1, abs=1e-4)
        for path, _ in site.linears:
            heads = adapter.B[index][site.rows(path)].detach()
            mean_gates[path] = torch.einsum("n,dnr->dr", share, heads) * adapter.config.scale
    assert best < 0.995 * recording.error(mean_gates, downs)

    generator = torch.Generator().manual_seed(0)
    for size in (0.003, 0.03, 0.3):
        for _ in range(4):
            moved = {
                path: pair.up + size * torch.randn(pair.up.shape, generator=generator)
                for path, pair in factors.items()
            }
            assert recording.error(moved, downs) > best


def test_equal_heads_convert_without_error():
    model, x = make_toy(), toy_input(batch=4, tokens=10)
    adapter = attach(model, make_adapter())
    with torch.no_grad():
        for heads in adapter.B:
            heads.copy_(heads[:, :1].expand_as(heads))
    expected = model(x)
    calibration, error = calibrate(model, adapter, lambda: model(x))
    assert error < 1e-3
    torch.testing.assert_close(
        apply_factors(make_toy(), to_lora(adapter, calibration))(x), expected, rtol=0, atol=1e-3
    )


def test_few_inputs_still_give_a_finite_fit():
    model, x = make_toy(), toy_input(batch=1, tokens=1)  # one row: C has rank 1 of 4
    adapter = attach(model, make_adapter())
    calibration, error = calibrate(model, adapter, lambda: model(x))
    assert 0 <= error < 0.05
    factors = to_lora(adapter, calibration)
    limit = 3 * max(float(heads.detach().abs().max()) for heads in adapter.B)
    assert all(pair.up.isfinite().all() and pair.up.abs().max() < limit for pair in factors.values())
    for site, heads in zip(adapter.sites, adapter.B, strict=True):  # where nothing was seen: the mean gates
        c, ci = calibration[site.name][0], calibration[site.name][1:]
        unseen = torch.linalg.eigh(c).eigenvectors[:, :3]
        mean = torch.einsum("n,dnr->dr", ci.diagonal(dim1=1, dim2=2).sum(1) / c.diagonal().sum(), heads.detach())
        up = torch.cat([factors[path].up for path, _ in site.linears])
        torch.testing.assert_close(up @ unseen, mean @ unseen, rtol=0, atol=0.1 * float(mean.abs().max()))


def test_a_fresh_adapter_converts_to_zero():
    model, x = make_toy(), toy_input()
    adapter = attach(model, make_adapter(seed=None))
    calibration, error = calibrate(model, adapter, lambda: model(x))
    assert error == 0.0
    assert not any(pair.up.any() for pair in to_lora(adapter, calibration).values())


def test_calibrating_changes_neither_outputs_nor_the_adapter(toy, x):
    adapter = attach(toy, make_adapter())
    expected, seen = toy(x), []
    calibrate(toy, adapter, lambda: seen.append(toy(x)))
    assert torch.equal(seen[0], expected)
    with pytest.raises(RuntimeError, match="stop"):
        calibrate(toy, adapter, lambda: (_ for _ in ()).throw(RuntimeError("stop")))
    assert not {"code", "add_to"} & set(vars(adapter))
    assert torch.equal(toy(x), expected)


def test_the_strength_of_the_moment_is_not_baked_in():
    adapter, calibration, _, _ = calibrated()
    expected = to_lora(adapter, calibration)
    adapter.strength = 0.5
    found = to_lora(adapter, calibration)
    assert all(torch.equal(found[path].up, expected[path].up) for path in expected)


@pytest.mark.parametrize(
    ("c", "ci"),
    [
        (torch.zeros(2, 2), torch.full((2, 2), 3e38)),
        # plus the ridge of 2^-17, all four values are 100001 / 2^17: no inverse
        (torch.tensor([[1e5, 1e5 + 1], [1e5 + 1, 1e5]]) / 2**17, torch.ones(2, 2)),
    ],
    ids=["overflow", "singular"],
)
def test_a_calibration_without_a_finite_fit_is_refused(c, ci):
    adapter = make_adapter(rank=2, heads=2)
    calibration = {site.name: torch.stack([c, ci, ci]) for site in adapter.sites}
    with pytest.raises(EffiLoRAError, match=r"the plain LoRA of blocks\.0\.to_q is not finite"):
        to_lora(adapter, calibration)

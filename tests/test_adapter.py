"""The arithmetic of heads and routers against the design formula, written out head by head."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import make_adapter, make_toy, randomise, toy_input, toy_sites
from torch import nn

from effilora_diffusion.core import EffiLoRA, EffiLoRAConfig, EffiLoRAError, Site, attach

STEPS = torch.tensor([120, 840])
EVERY_KIND = [
    (routing, heads, sharing)
    for routing in ("token", "static", "timestep")
    for heads in (1, 3)
    for sharing in ("width", "slice", "none")
]


def reference_gates(adapter, index, h, timesteps):
    """w = softmax(G h), softmax(G) or softmax(G e(t)), in float64, expanded to ``(batch, tokens, heads)``."""
    shape = (*h.shape[:-1], adapter.config.heads)
    if adapter.config.heads == 1:
        return torch.ones(shape, dtype=torch.float64)
    router = adapter.G[index].detach().double()
    if adapter.config.routing == "token":
        logits = h @ router.t()
    elif adapter.config.routing == "static":
        logits = router
    else:
        rows = []
        for t in timesteps.tolist():
            angles = [t / 1000 * k * math.pi / 2 for k in range(8)]
            rows.append([math.cos(a) for a in angles] + [math.sin(a) for a in angles])
        logits = (torch.tensor(rows, dtype=torch.float64) @ router.t()).unsqueeze(1)
    exp = logits.exp()
    return (exp / exp.sum(-1, keepdim=True)).expand(shape)


def reference_update(adapter, path, x, timesteps=None):
    """``scale * sum_i w_i B_i (A x)`` for one map, one head after the other."""
    for index, site in enumerate(adapter.sites):
        for name, _ in site.linears:
            if name != path:
                continue
            if adapter.config.a_sharing == "width":
                a = adapter.A[str(site.in_features)]
            elif adapter.config.a_sharing == "none":
                a = adapter.A[site.name.replace(".", "/")]
            else:
                (a,) = adapter.A.values()
                a = a[:, : site.in_features]
            h = x.double() @ a.detach().double().t()
            gates = reference_gates(adapter, index, h, timesteps)
            total = torch.zeros(1, dtype=torch.float64)
            for head in range(adapter.config.heads):
                b = adapter.B[index][site.rows(path), head].detach().double()
                total = total + gates[..., head : head + 1] * (h @ b.t())
            return total * adapter.config.scale * adapter.strength
    raise AssertionError(path)


class RecordMaps:
    """Input and output of every linear map of a model during a call."""

    def __init__(self, model):
        self.seen = {}
        self.handles = []
        for path, module in model.named_modules():
            if isinstance(module, nn.Linear):
                self.handles.append(module.register_forward_hook(self._keeper(path)))

    def _keeper(self, path):
        def keep(module, args, output):
            self.seen[path] = (args[0], output)

        return keep


@pytest.mark.parametrize(("routing", "heads", "sharing"), EVERY_KIND)
def test_a_fresh_adapter_changes_no_bit(toy, x, routing, heads, sharing):
    expected = toy(x, STEPS)
    attach(toy, make_adapter(seed=None, routing=routing, heads=heads, a_sharing=sharing))
    assert torch.equal(toy(x, STEPS), expected)


@pytest.mark.parametrize("routing", ["token", "static", "timestep"])
def test_heads_start_at_zero_a_and_routers_do_not(routing):
    adapter = make_adapter(seed=None, routing=routing)
    assert not any(value.any() for value in adapter.B)
    for router in adapter.G:  # equal rows would give every head the same gradient for ever
        assert len(router.reshape(3, -1).unique(dim=0)) == 3
    for width, value in adapter.A.items():
        bound = 1 / math.sqrt(int(width))
        assert value.abs().max() <= bound
        assert value.std() > bound / 4


def test_the_seed_alone_decides_the_initial_values():
    config, sites = EffiLoRAConfig(), toy_sites()
    one, same, other = (EffiLoRA(config, sites, seed) for seed in (5, 5, 6))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.A["8"], other.A["8"])
    assert not torch.equal(one.G[0], other.G[0])


def gate_entropy(rank, width, **options):
    """Mean entropy of a fresh adapter's token gates over random inputs, as a share of that of equal gates."""
    site, found = Site("to_q", "to_q", width, (("to_q", 8),)), []
    x = torch.randn(width, 500, generator=torch.Generator().manual_seed(0))
    for seed in range(8):  # a router of a few numbers is harder or softer by chance
        adapter = EffiLoRA(EffiLoRAConfig(rank=rank), [site], seed, **options)
        gates = adapter.gates(0, adapter.shared_a(site) @ x).detach()
        found.append(float(-(gates * gates.log()).sum(0).mean()) / math.log(3))
    return sum(found) / len(found)


@pytest.mark.parametrize("start", ["kaiming", "gaussian"])
def test_gates_of_a_fresh_adapter_are_as_soft_at_every_rank_and_width(start):
    soft = [gate_entropy(rank, width, a_start=start) for rank, width in ((4, 96), (16, 96), (64, 96), (4, 768))]
    assert max(soft) - min(soft) < 0.06
    assert 0.7 < min(soft) < 0.9


@pytest.mark.parametrize("routing", ["token", "static", "timestep"])
def test_heads_of_a_fresh_adapter_grow_apart_in_the_first_step(toy, x, routing):
    adapter = attach(toy, make_adapter(seed=None, routing=routing))
    toy(x, STEPS).square().mean().backward()
    first, second, third = adapter.B[-1].grad.unbind(1)
    assert not torch.allclose(first, second)
    assert not torch.allclose(second, third)


@pytest.mark.parametrize(("routing", "heads", "sharing"), EVERY_KIND)
@pytest.mark.parametrize("scaling", ["standard", "rslora"])
def test_every_map_adds_the_gated_sum_of_its_heads(toy, x, routing, heads, sharing, scaling):
    adapter = make_adapter(routing=routing, heads=heads, a_sharing=sharing, rank=3, alpha=2.0, scaling=scaling)
    adapter.strength = 0.7
    attach(toy, adapter)
    maps = RecordMaps(toy)
    toy(x, STEPS)
    for site in adapter.sites:
        for path, _ in site.linears:
            given, found = maps.seen[path]
            base = F.linear(given, toy.get_submodule(path).weight, toy.get_submodule(path).bias)
            update = reference_update(adapter, path, given, STEPS)
            assert update.abs().max() > 0.05
            torch.testing.assert_close(found.double(), base.double() + update, rtol=1e-5, atol=1e-5)


def test_slice_sharing_keeps_one_a_width_sharing_one_per_width_and_no_sharing_one_per_site():
    assert sorted(make_adapter(a_sharing="width").A) == ["12", "8"]
    alone = make_adapter(a_sharing="none")
    assert {key.replace("/", ".") for key in alone.A} == {site.name for site in alone.sites}
    assert len({value.sum().item() for value in alone.A.values()}) == len(alone.sites)
    assert sorted(make_adapter(a_sharing="slice").A) == ["12"]


def test_one_head_is_plain_lora(toy, x):
    adapter = make_adapter(heads=1, rank=3, alpha=6.0)
    assert len(adapter.G) == 0
    plain = make_toy()
    for site, heads in zip(adapter.sites, adapter.B, strict=True):
        for path, _ in site.linears:
            update = 2.0 * heads[site.rows(path), 0] @ adapter.A[str(site.in_features)]
            plain.get_submodule(path).weight.data += update
    attach(toy, adapter)
    torch.testing.assert_close(toy(x), plain(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("routing", ["token", "static", "timestep"])
def test_a_row_gives_the_same_alone_and_in_a_batch(toy, routing):
    attach(toy, make_adapter(routing=routing))
    x, steps = toy_input(batch=4), torch.tensor([0, 250, 500, 999])
    together = toy(x, steps)
    for row in range(4):
        torch.testing.assert_close(toy(x[row : row + 1], steps[row : row + 1]), together[row : row + 1])


def test_token_gates_depend_on_the_token_and_timestep_gates_on_the_timestep_only(toy, x):
    token, timed = make_adapter(routing="token"), make_adapter(routing="timestep")
    h = F.linear(x, token.shared_a(token.sites[0])).flatten(0, 1).t()
    gates = token.gates(0, h)
    assert gates.shape == (3, 2 * 5)
    assert not torch.allclose(gates[:, 0], gates[:, 1])
    attach(toy, timed)
    toy(x, STEPS)
    gates = timed.gates(0, h)
    assert gates.shape == (3, 2)
    assert not torch.allclose(gates[:, 0], gates[:, 1])
    toy(x, 500)
    assert timed.gates(0, h).shape == (3, 1)


def test_timestep_routing_without_a_timestep_says_so(toy, x):
    adapter = make_adapter(routing="timestep")
    with pytest.raises(EffiLoRAError, match="timestep"):
        adapter.activations(0, x)
    attach(toy, adapter)
    with pytest.raises(EffiLoRAError, match="timestep"):
        toy(x)


@pytest.mark.parametrize(("routing", "heads", "sharing"), EVERY_KIND)
def test_gradients_reach_every_trained_tensor_and_no_base_weight(toy, x, routing, heads, sharing):
    adapter = attach(toy, make_adapter(routing=routing, heads=heads, a_sharing=sharing))
    toy(x, STEPS).square().mean().backward()
    for name, value in adapter.named_parameters():
        assert value.grad is not None, name
        assert value.grad.abs().max() > 0, name
    for heads_gradient in (value.grad for value in adapter.B):
        assert heads_gradient.abs().amax(dim=(0, 2)).min() > 0  # each head by itself
    assert all(value.grad is None for name, value in toy.named_parameters() if "effilora" not in name)


def test_a_fresh_adapter_trains_its_heads_first(toy, x):
    adapter = attach(toy, make_adapter(seed=None))
    toy(x).square().mean().backward()
    assert all(value.grad.abs().max() > 0 for value in adapter.B)
    assert all(value.grad.abs().max() == 0 for value in [*adapter.A.values(), *adapter.G])


@pytest.mark.parametrize("sharing", ["width", "slice", "none"])
def test_every_a_is_one_parameter_stored_once(toy, sharing):
    adapter = attach(toy, make_adapter(a_sharing=sharing))
    state = adapter.state_dict()
    shared = [key for key in state if key.startswith("A.")]
    assert len(shared) == {"width": 2, "slice": 1, "none": len(adapter.sites)}[sharing]
    assert len(state) == len(shared) + len(adapter.B) + len(adapter.G)
    assert len({value.data_ptr() for value in state.values()}) == len(state)
    inside = [name for name, _ in toy.named_parameters(remove_duplicate=False) if "effilora" in name]
    assert len(inside) == len(state)
    assert adapter.parameter_counts()["stored"] == sum(value.numel() for value in state.values())


def test_dropout_acts_in_training_only(toy, x):
    adapter = attach(toy, make_adapter(dropout=0.5))
    adapter.eval()
    quiet = toy(x)
    assert torch.equal(toy(x), quiet)
    adapter.train()
    torch.manual_seed(0)
    first, second = toy(x), toy(x)
    assert not torch.allclose(first, second)
    assert not torch.allclose(first, quiet)


def test_dropout_keeps_the_mean_of_the_code(x):
    adapter = make_adapter(heads=1, dropout=0.4).train()
    torch.manual_seed(0)
    mean = torch.stack([adapter.activations(0, x)[0] for _ in range(3000)]).mean(0)
    torch.testing.assert_close(mean, adapter.eval().activations(0, x)[0], rtol=0, atol=0.08)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("routing", ["token", "static", "timestep"])
def test_a_half_precision_base_keeps_its_dtype_and_the_adapter_its_own(toy, x, dtype, routing):
    reference = make_toy().to(dtype).float()
    attach(reference, make_adapter(routing=routing))
    adapter = attach(toy.to(dtype), make_adapter(routing=routing))
    assert adapter.A["8"].dtype == torch.float32
    found = toy(x.to(dtype), STEPS)
    assert found.dtype == dtype
    expected = reference(x.to(dtype).float(), STEPS)
    tolerance = 0.02 if dtype == torch.float16 else 0.15
    torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance)
    found.float().square().mean().backward()
    assert adapter.A["8"].grad.dtype == torch.float32


def test_strength_scales_the_update_linearly(toy, x):
    adapter = attach(toy, make_adapter())
    layer, base = toy.blocks[0].to_q, make_toy().blocks[0].to_q
    full = layer(x) - base(x)
    adapter.strength = -0.5
    torch.testing.assert_close(layer(x) - base(x), -0.5 * full)


def test_a_sequence_of_any_leading_shape_gives_the_same_rows(toy, x):
    attach(toy, make_adapter())
    layer = toy.blocks[0].to_q
    expected = layer(x)
    torch.testing.assert_close(layer(x.reshape(10, 8)).view(2, 5, 12), expected)
    torch.testing.assert_close(layer(x.reshape(1, 2, 5, 8)).view(2, 5, 12), expected)


class KeepingLinear(nn.Linear):
    """A linear layer of another class: what it returns may belong to somebody."""

    def forward(self, x):
        self.kept = super().forward(x)
        return self.kept


def test_the_output_of_a_layer_that_is_no_plain_linear_is_not_written_to(x):
    model = nn.ModuleDict({"to_q": KeepingLinear(8, 12)})
    adapter = randomise(EffiLoRA(EffiLoRAConfig(), [Site("to_q", "to_q", 8, (("to_q", 12),))]))
    expected = model["to_q"](x)
    attach(model, adapter)
    found = model["to_q"](x)
    assert torch.equal(model["to_q"].kept, expected)
    assert not torch.allclose(found, expected)


def test_no_site_is_refused():
    with pytest.raises(EffiLoRAError, match="to_q"):
        EffiLoRA(EffiLoRAConfig(target_modules=("to_q",)), [])


def test_parameter_counts_follow_the_active_layers():
    adapter = make_adapter(blocks=4, rank=2, heads=3)
    total = adapter.parameter_counts()["stored"]
    assert total == 2 * (8 + 12) + 4 * (36 + 8) * 3 * 2 + 8 * 3 * 2
    adapter.set_active(["blocks.1"])
    assert adapter.parameter_counts() == {
        "trained_per_step": total - 3 * 44 * 6,
        "trained_ever": total,
        "stored": total,
    }
    with pytest.raises(EffiLoRAError, match=r"blocks\.9"):
        adapter.set_active(["blocks.9"])


def test_equal_seeds_give_equal_random_adapters():
    one, two = (randomise(make_adapter(seed=None), 4) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))

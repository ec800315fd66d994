"""Attaching, stacking and merging: everything is undone to the last bit, and a refusal changes nothing."""

import copy

import pytest
import torch
from conftest import ToyModel, assert_same, footprint, make_adapter, make_toy, randomise, toy_sites
from torch import nn

from effilora_diffusion.core import (
    EffiLoRA,
    EffiLoRAConfig,
    EffiLoRAError,
    Site,
    adapters_of,
    attach,
    detach,
    merge,
    unmerge,
)
from effilora_diffusion.core.attachment import Scope
from effilora_diffusion.core.sites import single_sites

ROUTINGS = ["token", "static", "timestep"]


@pytest.mark.parametrize("routing", ROUTINGS)
def test_detach_is_the_exact_inverse_of_attach(toy, x, routing):
    before, expected = footprint(toy), toy(x, 300)
    adapter = make_adapter(routing=routing)
    attach(toy, adapter)
    assert not torch.equal(toy(x, 300), expected)
    detach(toy)
    assert torch.equal(toy(x, 300), expected)
    assert_same(toy, before)
    assert adapters_of(toy) == {}
    attach(toy, adapter)  # and it can be attached again
    assert not torch.equal(toy(x, 300), expected)


def test_attaching_adds_keys_and_keeps_those_of_the_base(toy):
    before = list(toy.state_dict())
    attach(toy, make_adapter(), "subject")
    after = list(toy.state_dict())
    assert after[: len(before)] == before
    assert all(key.startswith("effilora.subject.") for key in after[len(before) :])


@pytest.mark.parametrize("routing", ROUTINGS)
def test_strength_zero_and_disabled_are_the_base_bit_for_bit(toy, x, routing):
    expected = toy(x, 300)
    adapter = attach(toy, make_adapter(routing=routing))
    adapter.strength = 0.0
    assert torch.equal(toy(x, 300), expected)
    adapter.strength, adapter.enabled = 1.0, False
    assert torch.equal(toy(x, 300), expected)
    adapter.enabled = True
    assert not torch.equal(toy(x, 300), expected)


def test_two_adapters_add_up_on_every_map_and_come_off_one_by_one(x):
    model = nn.ModuleDict({"to_q": nn.Linear(8, 12)})
    base = model["to_q"](x)
    site = Site("to_q", "to_q", 8, (("to_q", 12),))
    one, two = (randomise(EffiLoRA(EffiLoRAConfig(), [site], seed), seed) for seed in (3, 4))
    attach(model, one, "one")
    first = model["to_q"](x) - base
    attach(model, two, "two")
    both = model["to_q"](x) - base
    assert list(adapters_of(model)) == ["one", "two"]
    detach(model, "one")
    second = model["to_q"](x) - base
    torch.testing.assert_close(both, first + second)
    assert min(first.abs().max(), second.abs().max()) > 0.05
    detach(model, "two")
    assert torch.equal(model["to_q"](x), base)


def test_detaching_one_adapter_leaves_the_other_as_it_was_alone(toy, x):
    attach(toy, make_adapter(seed=3), "one")
    alone = toy(x)
    attach(toy, make_adapter(seed=4), "two")
    assert not torch.equal(toy(x), alone)
    detach(toy, "two")
    assert torch.equal(toy(x), alone)


def test_detaching_an_unknown_name_is_refused_and_detaching_nothing_is_allowed(toy):
    detach(toy)
    attach(toy, make_adapter(), "one")
    before = footprint(toy)
    with pytest.raises(EffiLoRAError, match=r"two.*one"):
        detach(toy, "two")
    assert_same(toy, before)


@pytest.mark.parametrize("options", [{"routing": "static"}, {"heads": 1}, {"heads": 1, "a_sharing": "slice"}])
def test_merge_computes_the_same_and_unmerge_restores_every_bit(toy, x, options):
    clean = toy(x)
    adapter = attach(toy, make_adapter(alpha=2.0, **options))
    adapter.strength = 0.6
    attached, before = toy(x), footprint(toy)
    merge(toy)
    assert adapter.merged
    assert not torch.equal(toy.blocks[0].to_q.weight, before[1]["blocks.0.to_q.weight"])
    torch.testing.assert_close(toy(x), attached, rtol=1e-5, atol=1e-5)
    merge(toy)  # a second time adds nothing
    torch.testing.assert_close(toy(x), attached, rtol=1e-5, atol=1e-5)
    unmerge(toy)
    assert torch.equal(toy(x), attached)
    assert_same(toy, before)
    detach(toy)
    assert torch.equal(toy(x), clean)


def test_detach_of_a_merged_adapter_restores_the_weights(toy, x):
    before, clean = footprint(toy), toy(x)
    attach(toy, make_adapter(routing="static"))
    merge(toy)
    detach(toy)
    assert_same(toy, before)
    assert torch.equal(toy(x), clean)


@pytest.mark.parametrize("order", [("one", "two"), ("two", "one")])
def test_two_merged_adapters_unmerge_in_either_order(toy, x, order):
    before = footprint(toy)
    attach(toy, make_adapter(seed=3, routing="static"), "one")
    attach(toy, make_adapter(seed=4, heads=1), "two")
    both = toy(x)
    merge(toy, "one")
    merge(toy, "two")
    torch.testing.assert_close(toy(x), both, rtol=1e-5, atol=1e-5)
    for name in order:
        unmerge(toy, name)
        torch.testing.assert_close(toy(x), both, rtol=1e-5, atol=1e-5)
    assert torch.equal(toy(x), both)
    detach(toy)
    assert_same(toy, before)


@pytest.mark.parametrize("routing", ["token", "timestep"])
def test_merging_input_dependent_routing_is_refused(toy, x, routing):
    attach(toy, make_adapter(routing=routing))
    before, expected = footprint(toy), toy(x, 300)
    with pytest.raises(EffiLoRAError, match="can't be merged"):
        merge(toy)
    assert_same(toy, before)
    assert torch.equal(toy(x, 300), expected)


def test_a_merge_that_would_overflow_leaves_the_base_as_it_was(toy):
    toy.half()
    adapter = attach(toy, make_adapter(routing="static"))
    with torch.no_grad():
        adapter.B[-1].fill_(1e5)  # the last map: the ones before it have been written by then
    before = footprint(toy)
    with pytest.raises(EffiLoRAError, match=r"blocks\.2\.to_out\.0"):
        merge(toy)
    assert_same(toy, before)
    assert not adapter.merged


def test_a_refused_merge_keeps_no_copy_of_the_weights(toy):
    adapter = attach(toy, make_adapter(routing="static"))
    last = toy.blocks[2].to_out[0]
    last.weight = nn.Parameter(torch.ones(8, 12, dtype=torch.int8), requires_grad=False)
    with pytest.raises(EffiLoRAError, match="quantised"):
        merge(toy)
    assert not adapter.merged
    assert toy.effilora.originals == {}


def test_a_taken_name_is_refused(toy, x):
    attach(toy, make_adapter(seed=3), "one")
    before, expected = footprint(toy), toy(x)
    with pytest.raises(EffiLoRAError, match="already attached"):
        attach(toy, make_adapter(seed=4), "one")
    assert_same(toy, before)
    assert torch.equal(toy(x), expected)


@pytest.mark.parametrize("name", ["", "a.b"])
def test_a_name_that_is_no_module_name_is_refused(toy, name):
    before = footprint(toy)
    with pytest.raises(EffiLoRAError, match="name"):
        attach(toy, make_adapter(), name)
    assert_same(toy, before)


def test_an_adapter_is_attached_to_one_model_at_a_time(toy):
    adapter = attach(toy, make_adapter())
    other = make_toy()
    before, mine = footprint(other), footprint(toy)
    with pytest.raises(EffiLoRAError, match="attached to a model already"):
        attach(other, adapter)
    with pytest.raises(EffiLoRAError, match="attached to a model already"):
        attach(toy, adapter, "again")
    assert_same(other, before)
    assert_same(toy, mine)


@pytest.mark.parametrize("other", [ToyModel(blocks=2), ToyModel(blocks=3, inner=16)], ids=["fewer blocks", "wider"])
def test_a_model_that_does_not_fit_is_named_and_unchanged(other):
    before = footprint(other)
    with pytest.raises(EffiLoRAError, match=r"another base model.*blocks\..*ToyModel"):
        attach(other, make_adapter())
    assert_same(other, before)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_a_deep_copy_works_and_trains_by_itself(toy, x, routing):
    attach(toy, make_adapter(routing=routing))
    expected = toy(x, 300)
    twin = copy.deepcopy(toy)
    assert torch.equal(twin(x, 300), expected)
    adapter = adapters_of(twin)["default"]
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.5)
    twin(x, 300).square().mean().backward()
    optimizer.step()
    assert not torch.allclose(twin(x, 300), expected)
    assert torch.equal(toy(x, 300), expected)
    assert all(value.grad is None for value in adapters_of(toy)["default"].parameters())
    detach(twin)  # the copy's hooks are its own
    assert torch.equal(twin(x, 300), make_toy()(x, 300))
    assert torch.equal(toy(x, 300), expected)


def test_a_map_called_twice_with_different_inputs_uses_each_input(toy, x):
    attach(toy, make_adapter())
    layer = toy.blocks[0].to_q
    first, second = layer(x), layer(2 * x)
    assert torch.equal(layer(x), first)
    assert not torch.allclose(second - layer.bias, first - layer.bias)


def test_an_open_scope_shares_the_code_of_one_input_and_never_of_two(x):
    adapter, scope = make_adapter(), Scope()
    scope.open = True
    first = scope.activations(adapter, 0, x)
    assert scope.activations(adapter, 0, x) is first
    assert not torch.allclose(scope.activations(adapter, 0, 2 * x)[0], first[0])
    assert not torch.allclose(scope.activations(adapter, 2, x)[0], first[0])  # the same A, another router
    assert not torch.allclose(scope.activations(make_adapter(seed=7), 0, x)[0], first[0])


def test_single_sites_finds_each_target_once_with_its_block_as_layer(toy):
    sites = single_sites(toy, ("to_q", "to_out.0"), taken=["blocks.1.to_q"])
    names = ["blocks.0.to_q", "blocks.0.to_out.0", "blocks.1.to_out.0", "blocks.2.to_q", "blocks.2.to_out.0"]
    assert [site.name for site in sites] == names
    assert sites[0] == Site("blocks.0.to_q", "blocks.0", 8, (("blocks.0.to_q", 12),))
    assert sites[1].in_features == 12
    assert [Site.from_dict(site.to_dict()) for site in toy_sites()] == toy_sites()


def test_grouped_and_single_sites_give_the_same_plain_lora(toy, x):
    grouped = make_adapter(heads=1)
    single = EffiLoRA(grouped.config, single_sites(toy, ("to_q", "to_k", "to_v", "to_out.0")))
    heads = {
        path: rows
        for site, value in zip(grouped.sites, grouped.B, strict=True)
        for path, rows in ((path, value[site.rows(path)]) for path, _ in site.linears)
    }
    with torch.no_grad():
        for site, value in zip(single.sites, single.B, strict=True):
            value.copy_(heads[site.name])
        for width, value in single.A.items():
            value.copy_(grouped.A[width])
    attach(toy, grouped)
    expected = toy(x)
    detach(toy)
    attach(toy, single)
    torch.testing.assert_close(toy(x), expected)

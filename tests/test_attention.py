"""The adapter on a real UNet: whatever diffusers does to attention processors, the adapter keeps its effect."""

import copy
import inspect

import pytest
import torch
import torch._dynamo
from conftest import CONTEXT, ONE_TRANSFORMER, assert_same, footprint, make_toy, randomise, tiny_unet, unet_input
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
    SlicedAttnProcessor,
)

from effilora_diffusion import detach
from effilora_diffusion.core import EffiLoRA, EffiLoRAConfig, EffiLoRAError, adapters_of
from effilora_diffusion.core.attachment import merge
from effilora_diffusion.diffusion.adapters.processors import attach, create_adapter, find_sites, is_effilora_processor

ROUTINGS = ["token", "static", "timestep"]


def run(unet, inputs=None):
    with torch.no_grad():
        return unet(**(inputs or unet_input())).sample


def attached(unet, seed=2, name="default", **options):
    """A trained-looking adapter on ``unet``; large enough for its effect to be far above rounding."""
    config = EffiLoRAConfig(alpha=8.0, **options)
    return attach(unet, randomise(create_adapter(unet, config, a_start="kaiming"), seed, heads=0.4), name)


def attentions(unet):
    return {path: module for path, module in unet.named_modules() if isinstance(module, Attention)}


def test_sites_group_the_maps_that_read_the_same_input():
    unet = tiny_unet()
    sites = {site.name: site for site in find_sites(unet, EffiLoRAConfig())}
    assert len(sites) == 4 * 2 + 4 * 3
    block = "mid_block.attentions.0.transformer_blocks.0"
    assert [path for path, _ in sites[f"{block}.attn1.q_k_v"].linears] == [f"{block}.attn1.to_{key}" for key in "qkv"]
    assert [path for path, _ in sites[f"{block}.attn2.k_v"].linears] == [f"{block}.attn2.to_{key}" for key in "kv"]
    assert sites[f"{block}.attn2.k_v"].in_features == CONTEXT
    assert {site.block for site in sites.values() if site.name.startswith("mid")} == {block}
    assert len({site.block for site in sites.values()}) == 4
    linear = {path for path, _ in unet.named_modules() if path.endswith(("to_q", "to_k", "to_v", "to_out.0"))}
    assert {path for site in sites.values() for path, _ in site.linears} == linear


def test_a_model_without_targets_is_refused():
    with pytest.raises(EffiLoRAError, match="no linear layer"):
        create_adapter(tiny_unet(), EffiLoRAConfig(target_modules=("nothing",)))


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("sharing", ["width", "slice"])
def test_a_fresh_adapter_changes_no_bit_of_the_prediction(routing, sharing):
    unet = tiny_unet()
    expected = run(unet)
    attach(unet, create_adapter(unet, EffiLoRAConfig(routing=routing, a_sharing=sharing)))
    assert torch.equal(run(unet), expected)


def test_every_processor_is_an_effilora_one_that_passes_for_the_original():
    unet = tiny_unet()
    before = {path: module.processor for path, module in attentions(unet).items()}
    attached(unet)
    assert len(before) == 8
    for path, module in attentions(unet).items():
        kind, original = type(module.processor), type(before[path])
        assert is_effilora_processor(module.processor)
        assert kind is not original
        assert issubclass(kind, original)
        assert kind == original
        assert original == kind
        assert hash(kind) == hash(original)
        assert kind != AttnProcessor
        assert kind in (AttnProcessor, AttnProcessor2_0)
        assert inspect.signature(module.processor.__call__) == inspect.signature(before[path].__call__)
        assert vars(module.processor) == vars(before[path])


@pytest.mark.parametrize("routing", ROUTINGS)
def test_the_code_of_a_site_is_computed_once_for_its_maps(routing):
    unet = tiny_unet()
    adapter = attached(unet, routing=routing)
    calls, original = [], adapter.activations
    adapter.__dict__["activations"] = lambda index, x: calls.append(index) or original(index, x)
    for _ in range(2):
        run(unet)
        assert sorted(calls) == list(range(len(adapter.sites)))
        calls.clear()


@pytest.mark.parametrize("install", [AttnProcessor2_0, AttnProcessor])
def test_processors_that_are_installed_later_share_the_activations_too(install):
    unet = tiny_unet()
    adapter = attached(unet)
    shared = run(unet)
    unet.set_attn_processor(install())
    assert not any(is_effilora_processor(module.processor) for module in attentions(unet).values())
    calls, original = [], adapter.activations
    adapter.__dict__["activations"] = lambda index, x: calls.append(index) or original(index, x)
    torch.testing.assert_close(run(unet), shared, rtol=1e-4, atol=1e-5)
    assert sorted(calls) == list(range(len(adapter.sites)))


def test_a_processor_that_is_called_without_its_attention_shares_the_activations():
    unet = tiny_unet()
    adapter = attached(unet)
    attention = next(module for path, module in attentions(unet).items() if path.endswith("attn1"))
    x = torch.randn(1, 5, attention.to_q.in_features, generator=torch.Generator().manual_seed(3))
    calls, original = [], adapter.activations
    adapter.__dict__["activations"] = lambda index, x: calls.append(index) or original(index, x)
    alone = attention.processor(attention, x)
    assert len(calls) == 2  # q, k and v together, and the output
    assert torch.equal(alone, attention(x))
    assert not attention._effilora_scope.open


def test_nothing_is_kept_between_calls():
    unet = tiny_unet()
    attached(unet)
    run(unet)
    scopes = [module._effilora_scope for module in attentions(unet).values()]
    assert not any(scope.open or scope.memo for scope in scopes)
    with pytest.raises(RuntimeError):
        unet(**{**unet_input(), "encoder_hidden_states": torch.zeros(2, 6, CONTEXT + 1)})
    assert not any(scope.open or scope.memo for scope in scopes)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_rows_of_a_batch_do_not_see_each_other(routing):
    unet = tiny_unet()
    attached(unet, routing=routing)
    inputs = unet_input(batch=4)
    together = run(unet, inputs)
    for row in (0, 3):
        alone = run(unet, {key: value[row : row + 1] for key, value in inputs.items()})
        torch.testing.assert_close(alone, together[row : row + 1], rtol=1e-4, atol=1e-5)


def set_slices(unet):
    unet.set_attention_slice(1)


def set_default(unet):
    unet.set_default_attn_processor()


def set_again(unet):
    unet.set_attn_processor(AttnProcessor2_0())


def set_ip_adapter(unet):
    """As loading an IP-Adapter does it: new processors of the same class, and ones with weights in cross-attention."""
    torch.manual_seed(5)
    processors = {}
    for key, old in unet.attn_processors.items():
        if "attn1" in key:
            processors[key] = type(old)()
        else:
            width = unet.get_submodule(key.removesuffix(".processor")).to_q.in_features
            processors[key] = IPAdapterAttnProcessor2_0(width, CONTEXT, num_tokens=(3,)).requires_grad_(False)
    unet.set_attn_processor(processors)


def ip_inputs():
    inputs = unet_input()
    image = torch.randn(2, 1, 3, CONTEXT, generator=torch.Generator().manual_seed(6))
    inputs["encoder_hidden_states"] = (inputs["encoder_hidden_states"], [image])
    return inputs


SWAPS = {
    "slicing": (set_slices, SlicedAttnProcessor, unet_input),
    "default": (set_default, AttnProcessor, unet_input),
    "again": (set_again, AttnProcessor2_0, unet_input),
    "ip adapter": (set_ip_adapter, IPAdapterAttnProcessor2_0, ip_inputs),
}


@pytest.mark.parametrize("swap", SWAPS.values(), ids=SWAPS.keys())
@pytest.mark.parametrize("order", ["before", "after"])
def test_replaced_processors_keep_the_effect_of_the_adapter(swap, order):
    change, kind, inputs = swap
    base, unet = tiny_unet(), tiny_unet()
    change(base)
    if order == "before":
        change(unet)
        adapter = attached(unet)
    else:
        adapter = attached(unet)
        run(unet)
        change(unet)
    found, bare = run(unet, inputs()), run(base, inputs())
    cross = [module.processor for path, module in attentions(unet).items() if path.endswith("attn2")]
    assert all(isinstance(processor, kind) for processor in cross)
    assert order == "after" or all(map(is_effilora_processor, cross))

    adapter.enabled = False
    assert torch.equal(run(unet, inputs()), bare)
    adapter.enabled = True
    if inputs is unet_input:
        reference = tiny_unet()
        attached(reference)
        torch.testing.assert_close(found - bare, run(reference) - run(tiny_unet()), rtol=1e-3, atol=1e-4)
    assert (found - bare).abs().max() > 0.05
    detach(unet)
    assert torch.equal(run(unet, inputs()), bare)
    assert all(not is_effilora_processor(module.processor) for module in attentions(unet).values())


@pytest.mark.parametrize("order", ["before", "after"])
def test_an_ip_adapter_sees_the_same_update_as_merged_weights(order):
    unet, merged = tiny_unet(), tiny_unet()
    for model in (unet, merged):
        if order == "before":
            set_ip_adapter(model)
        attached(model, routing="static")
        if order == "after":
            set_ip_adapter(model)
    merge(merged)
    torch.testing.assert_close(run(unet, ip_inputs()), run(merged, ip_inputs()), rtol=1e-4, atol=1e-5)
    assert sum("to_k_ip" in key for key in unet.state_dict()) == 4  # its weights are in the model, once


@pytest.mark.parametrize("routing", ROUTINGS)
def test_the_unet_compiles_as_one_whole_graph(routing):
    unet = tiny_unet(**ONE_TRANSFORMER)
    attached(unet, routing=routing)
    graphs = []

    def backend(module, inputs):
        graphs.append([node for node in module.graph.nodes if node.op.startswith("call")])
        return module.forward

    torch._dynamo.reset()
    try:
        compiled = torch.compile(unet, backend=backend, fullgraph=True)
        inputs = unet_input()
        other = {**inputs, "timestep": torch.tensor([5, 50])}
        for given in (inputs, other, inputs):
            torch.testing.assert_close(run(compiled, given), run(unet, given), rtol=1e-4, atol=1e-5)
        if routing == "timestep":  # the pre-hook of the host encodes the timestep before the UNet's own graph
            assert len(graphs.pop(0)) < 15
        assert len(graphs) == 1
        assert sum("conv2d" in str(node.target) for node in graphs[0]) >= 6
    finally:
        torch._dynamo.reset()


def test_dynamo_finds_no_break_in_the_unet():
    unet = tiny_unet(**ONE_TRANSFORMER)
    attached(unet)
    torch._dynamo.reset()
    try:
        explained = torch._dynamo.explain(unet)(**unet_input())
    finally:
        torch._dynamo.reset()
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_gradient_checkpointing_gives_the_same_gradients(routing):
    gradients = []
    for checkpointing in (False, True):
        unet = tiny_unet().train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        adapter = attached(unet, routing=routing)
        calls, original = [], adapter.activations
        adapter.__dict__["activations"] = lambda index, x, calls=calls, original=original: (
            calls.append(index) or original(index, x)
        )
        unet(**unet_input()).sample.square().mean().backward()
        assert len(calls) == (2 if checkpointing else 1) * len(adapter.sites)  # once more in the recomputation
        gradients.append([value.grad for value in adapter.parameters()])
        assert all(value.grad is None for name, value in unet.named_parameters() if "effilora" not in name)
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain.abs().max() > 0
        torch.testing.assert_close(recomputed, plain, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_detach_restores_the_very_same_processors_and_every_bit(routing):
    unet = tiny_unet()
    before, expected = footprint(unet), run(unet)
    processors = {path: module.processor for path, module in attentions(unet).items()}
    attached(unet, routing=routing)
    assert not torch.allclose(run(unet), expected, atol=0.01)
    detach(unet)
    assert all(module.processor is processors[path] for path, module in attentions(unet).items())
    assert torch.equal(run(unet), expected)
    assert_same(unet, before)


def test_the_base_keeps_its_state_dict_keys_while_an_adapter_is_attached():
    unet = tiny_unet()
    before = list(unet.state_dict())
    attached(unet)
    assert [key for key in unet.state_dict() if not key.startswith("effilora.")] == before


def test_the_last_adapter_to_go_takes_the_processors_along():
    unet = tiny_unet()
    before, expected = footprint(unet), run(unet)
    attached(unet, 3, "one")
    alone = run(unet)
    attached(unet, 4, "two", routing="timestep")
    assert not torch.allclose(run(unet), alone)
    detach(unet, "two")
    assert all(is_effilora_processor(module.processor) for module in attentions(unet).values())
    assert torch.equal(run(unet), alone)
    detach(unet, "one")
    assert torch.equal(run(unet), expected)
    assert_same(unet, before)


def test_a_refused_attachment_leaves_the_unet_as_it_was():
    unet, toy = tiny_unet(), make_toy()
    before = footprint(unet)
    foreign = EffiLoRA(EffiLoRAConfig(), find_sites(toy, EffiLoRAConfig()))
    with pytest.raises(EffiLoRAError, match="another base model"):
        attach(unet, foreign)
    assert_same(unet, before)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_a_deep_copy_stands_alone(routing):
    unet = tiny_unet()
    attached(unet, routing=routing)
    expected = run(unet)
    twin = copy.deepcopy(unet)
    with torch.no_grad():
        adapters_of(twin)["default"].B[0].add_(1.0)
    assert not torch.allclose(run(twin), expected)
    assert torch.equal(run(unet), expected)
    detach(twin)
    assert torch.equal(run(twin), run(tiny_unet()))
    assert torch.equal(run(unet), expected)


def test_feed_forward_layers_are_adapted_on_request():
    unet = tiny_unet()
    plain = EffiLoRAConfig()
    config = EffiLoRAConfig(target_modules=("attention", "feed_forward"))
    extra = {site.name for site in find_sites(unet, config)} - {site.name for site in find_sites(unet, plain)}
    assert extra == {path for path, _ in unet.named_modules() if path.endswith(("ff.net.0.proj", "ff.net.2"))}
    assert len(extra) == 8
    expected = run(unet)
    adapter = randomise(create_adapter(unet, config, a_start="kaiming"), heads=0.4)
    with torch.no_grad():
        for site, heads in zip(adapter.sites, adapter.B, strict=True):
            if site.name not in extra:
                heads.zero_()
    attach(unet, adapter)
    assert (run(unet) - expected).abs().max() > 0.01
    detach(unet)
    assert torch.equal(run(unet), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_unet_predicts_in_its_own_dtype(dtype):
    unet = tiny_unet().to(dtype)
    adapter = attached(unet)
    inputs = {key: value if key == "timestep" else value.to(dtype) for key, value in unet_input().items()}
    found = run(unet, inputs)
    assert found.dtype == dtype
    assert adapter.B[0].dtype == torch.float32
    reference = tiny_unet()
    attached(reference)
    difference = (found.float() - run(reference)).abs().max()
    assert difference < (0.01 if dtype == torch.float16 else 0.1) * found.float().abs().max()

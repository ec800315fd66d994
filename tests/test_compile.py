"""Compiled models with adapters: one graph wherever the base is one, attached before or after compilation."""

import itertools

import pytest
import torch
import torch._dynamo
from conftest import ONE_TRANSFORMER, build_tiny_pipeline, randomise, tiny_unet, unet_input
from test_family_runs import example
from tiny_families import FAMILIES, build
from tiny_language import build as build_language
from tiny_language import rows

from effilora_diffusion import (
    EffiLoRAConfig,
    attach,
    create_adapter,
    detach,
    load_adapter,
    remove_adapter,
    save_adapter,
)
from effilora_diffusion.diffusion.models import make_family


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def with_adapter(model, **options):
    return attach(model, randomise(create_adapter(model, EffiLoRAConfig(alpha=8.0, **options)), heads=0.4))


@torch.no_grad()
def compiled_prediction(family, inputs):
    """What the compiled denoiser predicts, or the error of a model that is no single graph."""
    model = family.model
    family.model = torch.compile(model, backend="eager", fullgraph=True)
    try:
        return family.predict(*inputs), None
    except torch._dynamo.exc.TorchDynamoException as error:
        return None, error
    finally:
        family.model = model
        torch._dynamo.reset()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_whose_base_compiles_into_one_graph_does_so_with_an_adapter(name):
    family = make_family(build(name), torch.device("cpu"))
    inputs = example(family, name)
    with torch.no_grad():
        base = family.predict(*inputs)
    with_adapter(family.model, target_modules=("attention", "feed_forward"))
    with torch.no_grad():
        expected = family.predict(*inputs)
    found, error = compiled_prediction(family, inputs)
    if error is None:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(found, base, rtol=1e-2, atol=1e-3)
        return
    detach(family.model)
    assert compiled_prediction(family, inputs)[1] is not None, f"the base compiles, with an adapter: {error}"
    assert name == "lumina2"


@pytest.mark.parametrize("routing", ["token", "static"])
def test_a_language_model_compiles_into_one_graph(routing):
    model = build_language("llama")
    with_adapter(model, routing=routing, target_modules=("all-linear",))
    inputs = rows()
    with torch.no_grad():
        expected = model(inputs, use_cache=False).logits
        found = torch.compile(model, backend="eager", fullgraph=True)(inputs, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def compiled_whole(unet):
    return torch.compile(unet, backend="eager")


def compiled_in_place(unet):
    unet.compile(backend="eager")
    return unet


def compiled_by_block(unet):
    unet._repeated_blocks = ["BasicTransformerBlock"]
    unet.compile_repeated_blocks(backend="eager")
    return unet


@pytest.mark.parametrize("compiled", [compiled_whole, compiled_in_place, compiled_by_block])
def test_a_model_that_is_compiled_already_takes_an_adapter_and_gives_it_back(compiled):
    plain, unet = tiny_unet(**ONE_TRANSFORMER), compiled(tiny_unet(**ONE_TRANSFORMER))
    inputs = unet_input()
    with torch.no_grad():
        before = unet(**inputs).sample
        adapter = with_adapter(unet)
        with_adapter(plain)
        expected = plain(**inputs).sample
        assert (expected - before).abs().max() > 0.05
        torch.testing.assert_close(unet(**inputs).sample, expected, rtol=1e-4, atol=1e-5)
        adapter.strength = 0.0
        assert torch.equal(unet(**inputs).sample, before)
        adapter.strength = 1.0
        torch.testing.assert_close(unet(**inputs).sample, expected, rtol=1e-4, atol=1e-5)
        detach(unet)
        assert torch.equal(unet(**inputs).sample, before)


def test_adapters_come_and_go_in_any_order_on_compiled_blocks():
    plain, unet = tiny_unet(**ONE_TRANSFORMER), compiled_by_block(tiny_unet(**ONE_TRANSFORMER))
    inputs = unet_input()

    def change(action):
        for model in (plain, unet):
            action(model)
        with torch.no_grad():
            found, expected = unet(**inputs).sample, plain(**inputs).sample
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        return expected

    def add(model, seed):
        config = EffiLoRAConfig(alpha=8.0, target_modules=("ff.net.2",))
        torch.manual_seed(seed)
        attach(model, randomise(create_adapter(model, config), heads=0.4), f"adapter {seed}")

    seen = [change(lambda model: None)]
    seen += [change(lambda model, seed=seed: add(model, seed)) for seed in (1, 2)]
    seen += [change(lambda model, seed=seed: detach(model, f"adapter {seed}")) for seed in (1, 2)]
    assert all(not torch.allclose(one, other, rtol=1e-3) for one, other in itertools.pairwise(seen))
    torch.testing.assert_close(seen[-1], seen[0])


def test_a_pipeline_with_a_compiled_unet_loads_an_adapter(tmp_path):
    pipe = build_tiny_pipeline()
    adapter = with_adapter(pipe, routing="static")
    save_adapter(adapter, tmp_path / "a.safetensors", pipe)
    options = {"prompt": "a cat", "num_inference_steps": 2, "output_type": "np"}
    expected = pipe(generator=torch.Generator().manual_seed(0), **options).images
    detach(pipe)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    base = pipe(generator=torch.Generator().manual_seed(0), **options).images
    loaded = load_adapter(pipe, tmp_path / "a.safetensors")
    found = pipe(generator=torch.Generator().manual_seed(0), **options).images
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=0, atol=1e-3)
    remove_adapter(pipe, loaded)
    assert (pipe(generator=torch.Generator().manual_seed(0), **options).images == base).all()
    assert (found != base).any()

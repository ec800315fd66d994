"""What one may do with a model while an adapter is attached: pickle it, save it, put plain LoRAs on it."""

import logging
import pickle

import pytest
import torch
from conftest import assert_same, build_tiny_pipeline, footprint, randomise, tiny_unet
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from safetensors.torch import load_file
from test_attention import run
from tiny_families import FAMILIES, build
from tiny_language import build as build_language
from tiny_language import rows

from effilora_diffusion import (
    EffiLoRAConfig,
    attach,
    create_adapter,
    detach,
    load_adapter,
    merge,
    remove_adapter,
    save_adapter,
)
from effilora_diffusion.core.attachment import adapters_of
from effilora_diffusion.core.fingerprint import model_hash
from effilora_diffusion.core.load import host_model
from effilora_diffusion.diffusion.adapters.processors import is_effilora_processor


def with_adapter(model, name="default", **options):
    return attach(model, randomise(create_adapter(model, EffiLoRAConfig(alpha=8.0, **options)), heads=0.4), name)


# -------------------------------------------------------------------------------------------------------------- pickle


@pytest.mark.parametrize("routing", ["token", "static", "timestep"])
def test_an_adapted_unet_can_be_pickled(routing, tmp_path):
    unet = tiny_unet()
    with_adapter(unet, routing=routing)
    torch.save(unet, tmp_path / "unet.pt")
    copy = torch.load(tmp_path / "unet.pt", weights_only=False)
    assert torch.equal(run(copy), run(unet))
    assert is_effilora_processor(copy.mid_block.attentions[0].transformer_blocks[0].attn1.processor)
    adapters_of(copy)["default"].strength = 0.0
    assert torch.equal(run(copy), run(tiny_unet()))
    assert adapters_of(unet)["default"].strength == 1.0
    detach(copy)
    assert_same(copy, footprint(tiny_unet()))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "sd15"])
def test_an_adapted_model_of_every_family_can_be_pickled(name):
    model = host_model(build(name))
    adapter = with_adapter(model)
    copy = pickle.loads(pickle.dumps(model))
    own = adapters_of(copy)["default"]
    assert all(torch.equal(one, other) for one, other in zip(adapter.parameters(), own.parameters(), strict=True))
    detach(copy)
    detach(model)
    assert_same(copy, footprint(model))


def test_an_adapted_language_model_can_be_pickled():
    model = build_language("llama")
    with_adapter(model)
    copy = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        assert torch.equal(copy(rows()).logits, model(rows()).logits)


# ----------------------------------------------------------------------------------------------------- save_pretrained


def test_save_pretrained_of_an_adapted_pipeline_writes_the_base_alone_and_warns(tmp_path, caplog):
    pipe = build_tiny_pipeline()
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    with_adapter(pipe)
    predicted = run(pipe.unet)
    with caplog.at_level(logging.WARNING):
        pipe.save_pretrained(tmp_path / "pipe")
    assert "without its adapters (default)" in caplog.text
    assert "save_adapter" in caplog.text
    saved = load_file(next((tmp_path / "pipe" / "unet").glob("*.safetensors")))
    assert saved.keys() == before.keys()
    assert all(torch.equal(saved[name], value) for name, value in before.items())
    assert torch.equal(run(pipe.unet), predicted)
    base = StableDiffusionPipeline.from_pretrained(tmp_path / "pipe", dtype=torch.float32)
    assert torch.equal(run(base.unet), run(build_tiny_pipeline().unet))
    detach(pipe)
    assert "save_pretrained" not in vars(pipe.unet)


def test_merged_weights_are_saved_and_the_warning_says_so(tmp_path, caplog):
    unet = tiny_unet()
    with_adapter(unet, "dog", routing="static")
    merge(unet, "dog")
    with caplog.at_level(logging.WARNING):
        unet.save_pretrained(tmp_path / "unet")
    assert "with the merged weights of dog" in caplog.text
    torch.testing.assert_close(run(type(unet).from_pretrained(tmp_path / "unet")), run(unet))


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}])
def test_save_pretrained_of_an_adapted_language_model_writes_the_base_alone(tmp_path, caplog, options):
    model = build_language("llama")
    before = model(rows()).logits
    with_adapter(model)
    with caplog.at_level(logging.WARNING):
        model.save_pretrained(tmp_path / "model", **options)
    assert "without its adapters" in caplog.text
    names = {name for file in (tmp_path / "model").glob("*.safetensors") for name in load_file(file)}
    assert names
    assert not any("effilora" in name for name in names)
    assert torch.equal(type(model).from_pretrained(tmp_path / "model")(rows()).logits, before)


# ---------------------------------------------------------------------------------------------------------- plain LoRA


def with_peft(model, name="lcm", seed=3):
    """A plain LoRA as diffusers puts it on a model, with weights that show."""
    targets = ["to_q", "to_k", "to_v", "to_out.0"] if hasattr(model, "set_attn_processor") else ["q_proj", "v_proj"]
    torch.manual_seed(seed)
    model.add_adapter(LoraConfig(r=2, target_modules=targets), name)
    generator = torch.Generator().manual_seed(seed)
    for key, value in model.named_parameters():
        if "lora_B" in key:
            value.data.normal_(std=0.3, generator=generator)


def test_native_and_plain_adapters_act_together_in_either_order():
    first, second = tiny_unet(), tiny_unet()
    with_adapter(first)
    with_peft(first)
    with_peft(second)
    with_adapter(second)
    assert [site.to_dict() for site in adapters_of(first)["default"].sites] == [
        site.to_dict() for site in adapters_of(second)["default"].sites
    ]
    assert torch.equal(run(first), run(second))
    alone = tiny_unet()
    with_peft(alone)
    assert (run(first) - run(alone)).abs().max() > 0.05
    detach(second)
    assert torch.equal(run(second), run(alone))
    first.delete_adapters("lcm")


def test_a_native_adapter_loads_after_a_plain_lora_and_stays_when_that_goes(tmp_path, caplog):
    pipe = build_tiny_pipeline()
    adapter = with_adapter(pipe, routing="static")
    save_adapter(adapter, tmp_path / "cat.safetensors", pipe)
    alone = run(pipe.unet)
    detach(pipe)
    with_peft(pipe.unet)
    with caplog.at_level(logging.WARNING):
        loaded = load_adapter(pipe, tmp_path / "cat.safetensors")
    assert "another model" not in caplog.text
    assert not torch.allclose(run(pipe.unet), alone, atol=1e-2)
    pipe.unload_lora_weights()
    assert torch.equal(run(pipe.unet), alone)
    remove_adapter(pipe, loaded)
    assert torch.equal(run(pipe.unet), run(build_tiny_pipeline().unet))


def test_an_adapter_merges_under_a_plain_lora():
    unet, hooked = tiny_unet(), tiny_unet()
    for model in (unet, hooked):
        with_peft(model)
        with_adapter(model, routing="static")
    merge(unet)
    torch.testing.assert_close(run(unet), run(hooked), rtol=1e-4, atol=1e-5)
    detach(unet)
    detach(hooked)
    assert torch.equal(run(unet), run(hooked))


def test_a_plain_lora_does_not_change_what_a_model_is_known_by():
    unet = tiny_unet()
    before = model_hash(unet)
    with_peft(unet)
    assert model_hash(unet) == before


def test_a_language_model_with_a_plain_lora_takes_an_adapter():
    model, bare = build_language("llama"), build_language("llama")
    with_peft(model)
    adapter, other = (create_adapter(one, EffiLoRAConfig(target_modules=("attention",))) for one in (model, bare))
    assert adapter.sites == other.sites
    before = model(rows()).logits
    attach(model, randomise(adapter, heads=0.4))
    assert not torch.allclose(model(rows()).logits, before, atol=1e-2)
    detach(model)
    assert torch.equal(model(rows()).logits, before)

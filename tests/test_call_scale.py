"""The scale of diffusers' calls reaches adapters; strengths that are no numbers and adapters loaded twice are noticed."""

import logging
import math

import pytest
import torch
from conftest import randomise, tiny_unet, unet_input
from tiny_families import FAMILIES, build

from effilora_diffusion import (
    EffiLoRAConfig,
    EffiLoRAError,
    attach,
    create_adapter,
    detach,
    load_adapter,
    remove_adapter,
    save_adapter,
)


def output(model, **more):
    with torch.no_grad():
        return model(**unet_input(), **more).sample


def scaled(value):
    return {"cross_attention_kwargs": {"scale": value}}


def test_the_scale_of_a_call_is_the_strength_for_its_length():
    unet = tiny_unet()
    base = output(unet)
    adapter = attach(unet, randomise(create_adapter(unet, EffiLoRAConfig(rank=2))))
    full = output(unet)
    assert torch.equal(output(unet, **scaled(0)), base)
    assert torch.equal(output(unet, **scaled(1.0)), full)
    half = output(unet, **scaled(0.5))
    assert torch.equal(output(unet), full)
    adapter.strength = 0.5
    assert torch.equal(output(unet), half)
    adapter.strength = 2.0
    assert torch.equal(output(unet, **scaled(0.5)), full)
    detach(unet)
    assert torch.equal(output(unet, **scaled(0.5)), base)


def test_a_call_that_fails_leaves_no_scale_behind():
    unet = tiny_unet()
    adapter = attach(unet, randomise(create_adapter(unet, EffiLoRAConfig(rank=2))))
    full = output(unet)
    with pytest.raises(RuntimeError):
        unet(torch.zeros(1, 3, 8, 8), 1, torch.zeros(1, 2, 3), **scaled(0))
    assert adapter.call_scale == 1.0
    assert torch.equal(output(unet), full)
    with pytest.raises(EffiLoRAError, match="the scale in cross_attention_kwargs must be a finite number, not nan"):
        output(unet, **scaled(math.nan))


def test_a_transformer_takes_the_scale_by_the_name_of_its_family():
    pipe = build(next(name for name in FAMILIES if name == "flux"))
    options = {"num_inference_steps": 1, "output_type": "latent", "height": 32, "width": 32}
    call = lambda **more: pipe("a", generator=torch.Generator().manual_seed(0), **options, **more).images
    base = call()
    attach(pipe, randomise(create_adapter(pipe, EffiLoRAConfig(rank=2))))
    assert not torch.equal(call(), base)
    assert torch.equal(call(joint_attention_kwargs={"scale": 0}), base)


@pytest.mark.parametrize("value", [math.nan, math.inf, "1"])
def test_a_strength_that_is_no_number_is_refused(value, tmp_path):
    unet = tiny_unet()
    adapter = attach(unet, randomise(create_adapter(unet, EffiLoRAConfig(rank=2))))
    with pytest.raises(EffiLoRAError, match="strength must be a finite number, not"):
        adapter.strength = value
    assert adapter.strength == 1.0
    save_adapter(adapter, tmp_path / "a.safetensors", unet)
    if not isinstance(value, str):
        with pytest.raises(EffiLoRAError, match="strength must be a finite number"):
            load_adapter(tiny_unet(), tmp_path / "a.safetensors", scale=value)


def test_an_adapter_that_is_loaded_again_is_told(tmp_path, caplog):
    unet = tiny_unet()
    for number in (1, 2):
        save_adapter(
            randomise(create_adapter(unet, EffiLoRAConfig(rank=2)), number), tmp_path / f"{number}.safetensors", unet
        )
    with caplog.at_level(logging.WARNING):
        load_adapter(unet, tmp_path / "1.safetensors")
        load_adapter(unet, tmp_path / "2.safetensors")
        assert caplog.text == ""
        again = load_adapter(unet, tmp_path / "1.safetensors", scale=0.5)
    assert "this adapter is attached already, as '1': both act now" in caplog.text
    remove_adapter(unet, again)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        remove_adapter(unet, "1")
        load_adapter(unet, tmp_path / "1.safetensors")
    assert caplog.text == ""

"""Fused projections, and outputs and attributes that belong to somebody else."""

import pytest
import torch
from conftest import assert_same, footprint, make_adapter, make_toy, randomise, tiny_unet, toy_input, unet_input

from effilora_diffusion import detach
from effilora_diffusion.core import EffiLoRAConfig, EffiLoRAError
from effilora_diffusion.core import attach as attach_maps
from effilora_diffusion.core.attachment import merge
from effilora_diffusion.diffusion.adapters.processors import attach, create_adapter


def run(unet):
    with torch.no_grad():
        return unet(**unet_input()).sample


def attached(unet, **options):
    return attach(unet, randomise(create_adapter(unet, EffiLoRAConfig(alpha=8.0, **options)), 2, heads=0.4))


def test_fused_projections_are_refused_before_attaching():
    unet = tiny_unet()
    unet.fuse_qkv_projections()
    before = footprint(unet)
    with pytest.raises(EffiLoRAError, match="unfuse_qkv_projections"):
        attach(unet, create_adapter(tiny_unet(), EffiLoRAConfig()))
    assert_same(unet, before)


def test_fusing_under_an_adapter_is_refused_and_leaves_the_model_as_it_was():
    unet = tiny_unet()
    adapter = attached(unet)
    adapted = run(unet)
    with pytest.raises(EffiLoRAError, match="merge the adapter first, or detach it"):
        unet.fuse_qkv_projections()
    assert torch.equal(run(unet), adapted)
    adapter.enabled = False
    unet.fuse_qkv_projections()
    adapter.enabled = True
    with pytest.raises(EffiLoRAError, match="unfuse_qkv_projections"):
        run(unet)
    unet.unfuse_qkv_projections()
    torch.testing.assert_close(run(unet), adapted)


def test_a_merged_adapter_may_be_fused():
    unet = tiny_unet()
    attached(unet, routing="static")
    adapted = run(unet)
    merge(unet)
    unet.fuse_qkv_projections()
    torch.testing.assert_close(run(unet), adapted, rtol=1e-3, atol=1e-5)


def test_outputs_that_another_hook_keeps_are_not_changed():
    model, kept = make_toy(), []
    linear = model.get_submodule("blocks.0.to_q")
    linear.register_forward_hook(lambda module, args, output: kept.append((output, output.clone())))
    attach_maps(model, make_adapter())
    model(toy_input())
    assert kept
    assert all(torch.equal(output, copy) for output, copy in kept)


def test_what_is_set_on_a_processor_while_attached_is_there_after_detaching():
    unet = tiny_unet()
    attached(unet)
    attn = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    attn.processor.note = "kept"
    detach(unet)
    assert attn.processor.note == "kept"

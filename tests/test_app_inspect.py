"""The Inspect tab without a browser, and the whole page on models of every family."""

from types import SimpleNamespace

import gradio as gr
import numpy as np
import pytest
from PIL import Image
from tiny_families import FAMILIES, build

from effilora_diffusion.core import load_adapter_file
from effilora_diffusion.diffusion.sampling.metadata import read_parameters
from effilora_diffusion.diffusion.sampling.request import GenerationRequest
from effilora_diffusion.studio.server import make_page
from effilora_diffusion.studio.session import Session
from effilora_diffusion.studio.tabs.inspect import InspectTab

VISIT = SimpleNamespace(session_hash="visitor")


@pytest.fixture
def tab(session):
    with gr.Blocks():
        found = InspectTab(session)
        found.build()
    return found


def test_layers_heads_and_training_are_shown(tab, session):
    layers, training = tab.show("cat")
    count = len(load_adapter_file(session.adapter_path("cat")).adapter.blocks)
    assert layers.count('<th scope="row">') == 2 * count
    assert "Reducer was off" in training
    assert "How much each layer changes" in tab.show("cat @ 4")[0]  # a checkpoint is inspected as well
    assert "no adapter named" in tab.show("<b>dog</b>")[0]
    assert "<b>" not in tab.show("<b>dog</b>")[0]


def test_every_head_is_drawn_alone_on_the_same_seeds(tab, session):
    before = len(session.drawn())
    *_, (update, text, *_) = tab.draw_heads(VISIT, "cat", "", 3)
    assert text == "a sks cat: what each head of cat adds by itself."
    assert len(session.drawn()) == before  # grids are no history
    assert read_parameters(update["value"])["grid"] == {"kind": "heads"}
    assert not tab.without_heads()[0]["visible"]  # with another adapter
    with Image.open(update["value"]) as grid:
        assert grid.width > 5 * 128  # base, all, three heads
    drawn = [np.asarray(session.image(GenerationRequest("a sks cat", "", adapters, 2, 2.0, 32, 32, seed=3)))
             for adapters in ([], [("cat", 1.0)], [("cat # 1", 1.0)], [("cat # 2", 1.0)], [("cat # 3", 1.0)])]  # fmt: skip
    for index, one in enumerate(drawn):
        for other in drawn[:index]:
            assert not np.array_equal(one, other)


def test_what_has_no_heads_is_said(tab, session):
    file = session.outputs / "cat" / "pytorch_lora_weights.safetensors"
    (session.uploads / "plain.safetensors").write_bytes(file.read_bytes())
    assert "this is a plain LoRA" in tab.show("plain")[0]
    *_, (_, text, *_) = tab.draw_heads(VISIT, "plain", "a cat", 0)
    assert "a plain LoRA has no heads" in text


@pytest.mark.parametrize("name", FAMILIES)
def test_the_page_is_made_and_draws_on_every_family(name, tmp_path):
    build(name).save_pretrained(tmp_path / "model")
    session = Session(str(tmp_path / "model"), tmp_path / "outputs")
    make_page(session)
    usual = session.usual("a cat", [], 0)
    usual.check()
    assert usual.num_inference_steps > 1
    image = session.image(
        GenerationRequest("a cat", num_inference_steps=2, guidance_scale=usual.guidance_scale, width=64, height=64)
    )
    assert image.size == (64, 64)

"""The model picker and the status bar without a browser: what can be opened, what follows, and what is told."""

import gc
import json
import re
import weakref

import gradio as gr
import pytest
from conftest import build_tiny_pipeline
from safetensors.torch import save_file
from tiny_families import build
from torch import zeros

from effilora_diffusion import EffiLoRAError
from effilora_diffusion.core.hub import EMBEDDED_BASE
from effilora_diffusion.diffusion.sampling.metadata import read_parameters
from effilora_diffusion.studio.model_shelf import ModelShelf
from effilora_diffusion.studio.server import make_page
from effilora_diffusion.studio.status_bar import StatusBar
from effilora_diffusion.studio.tabs.compare import CompareTab
from effilora_diffusion.studio.tabs.generate import GenerateTab
from effilora_diffusion.studio.train_form import followed, shown_fields


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder of models: FLUX, a Stable Diffusion of other widths, one that is broken, and files that are none."""
    folder = tmp_path_factory.mktemp("models")
    build("flux").save_pretrained(folder / "tiny flux")
    build("sd15").save_pretrained(folder / "more" / "other sd")
    (folder / "broken").mkdir()
    (folder / "broken" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    save_file({"cond_stage_model.x": zeros(1)}, folder / "whole.safetensors")
    save_file({"lora_unet_x.lora_down.weight": zeros(1, 1)}, folder / "lora.safetensors")
    (folder / "text.safetensors").write_text("hello")
    return folder


@pytest.fixture
def shelf(session, models, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "models--someone--dreams" / "snapshots" / "abc").mkdir(parents=True)
    (tmp_path / "cache" / "models--someone--dreams" / "snapshots" / "abc" / "model_index.json").write_text("{}")
    return ModelShelf(session.outputs, models)


@pytest.fixture
def bar(session, shelf):
    with gr.Blocks():
        bar = StatusBar(session, shelf)
        bar.build()
    return bar


def test_folders_whole_checkpoints_the_cache_and_recent_models_can_be_chosen(session, shelf, models, tmp_path):
    folders = {EMBEDDED_BASE, "broken", "other sd", "tiny flux", "whole.safetensors", "someone/dreams"}
    assert {*shelf.models()} == folders
    assert shelf.find("other sd") == str(models / "more" / "other sd")
    build_tiny_pipeline().save_pretrained(tmp_path / "far" / "tiny flux")
    shelf.note(str(tmp_path / "far" / "tiny flux"))
    shelf.note(None)
    shelf.note(str(tmp_path / "gone"))
    assert {*shelf.models()} == {*folders, "far/tiny flux"}  # told from the other one of that name
    assert shelf.label(str(tmp_path / "far" / "tiny flux")) == "far/tiny flux"
    (session.outputs / "recent_models.json").write_text("[1, {")
    assert {*shelf.models()} == folders


def test_others_are_opened_by_path_only_where_nobody_else_can_reach_the_page(session, shelf, models, place):
    assert shelf.find(str(place / "model")) == str(place / "model")
    assert shelf.find("someone/else") == "someone/else"
    closed = ModelShelf(session.outputs, models, typed=False)
    assert closed.find("tiny flux") == str(models / "tiny flux")
    for label in (str(place / "model"), "../model", "someone/else", "", "more/other sd/"):
        with pytest.raises(EffiLoRAError, match="choose one of the list"):
            closed.find(label)


def test_another_model_is_opened_and_everything_follows(session, bar, shelf, models):
    with gr.Blocks():
        generate, compare = GenerateTab(session), CompareTab(session)
        generate.build()
        compare.build()
    assert [*session.fitting()] == ["cat"]
    number, old = session.opened.number, weakref.ref(session.pipe)
    *_, (said, picker) = bar.open("tiny flux")
    assert said == "tiny flux is open."
    assert picker["value"] == "tiny flux"
    gc.collect()
    assert old() is None  # its memory is free
    assert session.opened.number != number
    followed = dict(zip(generate.follows, generate.follow(), strict=True))
    assert not followed[generate.negative]["visible"]
    assert [value for _, value in followed[generate.sampler]["choices"][:1]] == ["the model's own"]
    assert "DDIM" not in followed[generate.sampler]["choices"]
    assert followed[generate.width]["value"] == session.defaults()["edge"]
    assert followed[generate.adapters.choices[0]]["choices"] == ["none"]
    assert followed[generate.adapters.others] == "1 adapter is for other models, and not in the list."
    assert dict(zip(compare.follows, compare.follow(), strict=True))[compare.adapter]["value"] == "none"
    (file,) = [event for event in session.draw(session.usual("a cat", [], 1)) if not hasattr(event, "step")]
    assert read_parameters(file)["model"] == str(models / "tiny flux")
    assert json.loads((session.outputs / "recent_models.json").read_text()) == [str(models / "tiny flux")]


def test_what_can_t_be_opened_leaves_the_model_in_place(session, bar, models):
    before, pipe = session.opened, session.pipe
    for label, reason in (("broken", "can't be loaded"), ("whole.safetensors", "configuration"), ("no/such", "not"),
                          ("lora.safetensors", "can't be loaded")):  # fmt: skip
        *_, (said, picker) = bar.open(label)
        assert said.startswith("**Not opened:**"), label
        assert reason in said, said
        assert picker["value"] == bar.shelf.label(session.model)
    assert (session.opened, session.pipe) == (before, pipe)
    assert any(not hasattr(event, "step") for event in session.draw(session.usual("a cat", [("cat", 1.0)], 1)))


def test_the_bar_says_what_runs_and_pages_follow_another_model(session, bar, models):
    session.tickets.begin("somebody")
    session.tickets.announce("somebody else")
    session.doing = "generating: step 3 of 50"
    text = bar._html()
    assert re.search(r'data-title="generating: step 3 of 50 \| 1 waiting \| EffiLoRA: ', text)
    assert re.search(r"<b>Memory</b> [\d.]+ GB", text)
    unchanged = bar.look(session.opened.number, bar.text())
    assert unchanged[2] == bar.text()
    assert [value == gr.skip() for value in unchanged] == [True, True, False, True]
    list(bar.open("tiny flux"))
    _, number, _, picker = bar.look(session.opened.number - 1, "")
    assert number == session.opened.number
    assert picker["value"] == "tiny flux"


def test_the_trainers_settings_follow_too(session, models):
    session.open(str(models / "tiny flux"))
    names = [entry.name for entry in shown_fields()]
    assert dict(zip(names, followed(session), strict=True))["resolution"] == session.defaults()["edge"]


def test_nothing_on_the_page_can_be_shared(session):
    for block in make_page(session).blocks.values():
        if isinstance(block, gr.Gallery | gr.Image | gr.ImageSlider | gr.ImageEditor):
            assert "share" not in (block.buttons if block.buttons is not None else ["share"]), block.elem_id

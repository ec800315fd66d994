"""Image to image, inpainting and upscaling: the family's own pipelines, the same bytes, the adapters, and the metadata."""

import argparse

import gradio as gr
import numpy as np
import pytest
from PIL import Image, ImageDraw
from tiny_families import build
from torch import nn

from effilora_diffusion import EffiLoRAError, cli
from effilora_diffusion.diffusion.sampling.generate import draw_images
from effilora_diffusion.diffusion.sampling.metadata import ImageFacts, read_parameters
from effilora_diffusion.diffusion.sampling.start import StartImage, task_pipeline, tasks_of
from effilora_diffusion.diffusion.sampling.stream import preview_of
from effilora_diffusion.studio.adapter_row import NONE
from effilora_diffusion.studio.filling import OWN
from effilora_diffusion.studio.tabs.generate import GenerateTab

VISIT = argparse.Namespace(session_hash="visitor")
BOTH = ("image to image", "inpainting")


@pytest.fixture
def tab(session):
    with gr.Blocks():
        tab = GenerateTab(session)
        tab.build()
    return tab


@pytest.fixture
def picture():
    """A gradient in colours, 48 x 32."""
    levels = np.linspace(0, 255, 48 * 32 * 3).reshape(32, 48, 3)
    return Image.fromarray(levels.astype(np.uint8))


def painted(size, box):
    """A layer of the editor with a painted box."""
    layer = Image.new("RGBA", size, (255, 255, 255, 0))
    ImageDraw.Draw(layer).rectangle(box, (255, 255, 255, 255))
    return layer


def editor(image, *layers):
    return {"background": image.convert("RGBA"), "layers": [*layers], "composite": image}


def form(image=None, strength=0.5, lines=False, prompt="a sks cat", adapter=NONE, steps=4, count=1):
    return [prompt, "", steps, 3.0, 32, 32, count, "4", False, OWN, False, adapter, 1.0, True, *(NONE, 1.0, True) * 2,
            image, strength, lines]  # fmt: skip


def generated(tab, values):
    """The status at the end, and the new files, in their order."""
    before = {*tab.session.history.glob("*.png")}
    *_, last = tab.draw(VISIT, *values)
    return last[tab.status], sorted({*tab.session.history.glob("*.png")} - before)


def pixels(source):
    image = source if isinstance(source, Image.Image) else Image.open(source)
    return np.asarray(image.convert("RGB")).astype(int)


# ---------------------------------------------------------------------------------------------------------- families


@pytest.mark.parametrize("name", ["sd15", "sdxl", "flux", "qwen-image", "z-image"])
def test_families_begin_with_an_image_by_their_own_pipelines_and_without_copies(name, picture):
    pipe = build(name)
    assert tasks_of(pipe) == BOTH
    own = {id(part) for part in pipe.components.values() if isinstance(part, nn.Module)}
    mask = Image.new("L", picture.size, 0)
    mask.paste(255, (0, 0, 24, 32))
    for one in (StartImage(picture, 0.6), StartImage(picture, 0.6, mask)):
        runner = task_pipeline(pipe, one.task)
        assert {id(part) for part in runner.components.values() if isinstance(part, nn.Module)} == own
        first, second = (
            draw_images(pipe, ["a cat"], [1], 4, 3.0, width=64, height=64, start=one)[0] for _ in range(2)
        )
        assert first.tobytes() == second.tobytes()
        assert first.size == (64, 64)
    kept = StartImage(picture, 0.6, mask).sized(64, 64)
    assert np.array_equal(pixels(first)[:, 40:], pixels(kept.image)[:, 40:])  # not even encoded and decoded
    assert not np.array_equal(pixels(first)[:, :20], pixels(kept.image)[:, :20])
    near, far = (pixels(draw_images(pipe, ["a cat"], [1], 10, 3.0, width=64, height=64, start=StartImage(picture, one))[0])
                 for one in (0.1, 1.0))  # fmt: skip
    assert not np.array_equal(near, far)


@pytest.mark.parametrize("name", ["pixart-sigma", "flux2"])
def test_families_without_such_a_pipeline_say_so(name, picture):
    pipe = build(name)
    assert tasks_of(pipe) == ()
    with pytest.raises(
        EffiLoRAError, match=r"diffusers has no pipeline for image to image with .* models: take the image"
    ):
        draw_images(pipe, ["a cat"], [1], 2, 3.0, start=StartImage(picture, 0.5))


def test_packed_latents_have_a_preview():
    pipe, seen = build("flux"), []

    def at_step_end(runner, step, timestep, tensors):
        seen.append(preview_of(runner, tensors["latents"], (64, 96)))
        return tensors

    draw_images(pipe, ["a cat"], [1], 2, 3.0, width=96, height=64, callback_on_step_end=at_step_end)
    assert [one.size for one in seen] == [(96, 64)] * 2
    assert len({one.tobytes() for one in seen}) == 2


# -------------------------------------------------------------------------------------------------------- the form


def test_the_page_and_the_command_line_begin_with_an_image_alike(tab, session, place, picture, tmp_path):
    picture.save(tmp_path / "p.png")
    mask = Image.new("L", picture.size, 0)
    mask.paste(255, (4, 4, 21, 21))
    mask.save(tmp_path / "m.png")
    painting = editor(picture, painted(picture.size, (4, 4, 20, 20)))
    said, (bare,) = generated(tab, form(editor(picture), adapter="cat"))
    assert said == "Done: 1 of 1, seeds from 4."
    _, (masked,) = generated(tab, form(painting, 0.8, adapter="cat"))
    words = ["generate", "--model", str(place / "model"), "--adapter", str(session.adapters()["cat"]), "--prompt", "a sks cat",
             "--seed", "4", "--num_inference_steps", "4", "--guidance_scale", "3", "--width", "32", "--height", "32",
             "--image", str(tmp_path / "p.png"), "--output", str(tmp_path / "c.png")]  # fmt: skip
    for file, more in (
        (bare, ["--strength", "0.5"]),
        (masked, ["--strength", "0.8", "--mask_image", str(tmp_path / "m.png")]),
    ):
        assert cli.main([*words, *more]) == 0
        assert (tmp_path / "c.png").read_bytes() == file.read_bytes()
    _, (base,) = generated(tab, form(editor(picture)))
    assert not np.array_equal(pixels(base), pixels(bare))  # the adapter acts
    facts = read_parameters(masked)
    assert (facts["strength"], facts["adapters"][0]["file"]) == (0.8, "cat")

    values = tab.restore_all(masked.name)  # everything is put back, and gives the same image
    assert values[-1] == "Settings loaded."
    _, (again,) = generated(tab, values[:-1])
    assert again.read_bytes() == masked.read_bytes()
    for file in (session.history / "start images").iterdir():
        file.unlink()
    *values, said = tab.restore_all(masked.name)
    assert values[-3] is None
    assert "the image that it began with, which is not in the history here" in said


def test_what_can_t_be_begun_with_is_told(tab, session, picture, capsys, tmp_path):
    for values, said in ((form(editor(picture), 0.1, steps=4), "4 steps at a strength of 0.1 are none"),
                         (form(editor(picture), None), "Strength is empty"),
                         (form(editor(picture), 7), "strength must be above 0 and at most 1, not 7")):  # fmt: skip
        words, files = generated(tab, values)
        assert words == f"**Not generated:** {said}" or said in words
        assert not files
    with pytest.raises(EffiLoRAError, match="the mask is empty"):
        StartImage(picture, 0.5, Image.new("L", picture.size)).check()
    assert cli.main(["generate", "--prompt", "a", "--strength", "0.5", "--output", str(tmp_path / "x.png")]) == 2
    assert "say what becomes of an --image" in capsys.readouterr().err
    facts = {"prompt": "a", "negative_prompt": "", "seed": 1, "num_inference_steps": 2, "guidance_scale": 1.0, "width": 32,
             "height": 32, "adapters": [], "literal": True}  # fmt: skip
    for name in ("../../secret", ["x"], 5, "0" * 16):
        *values, said = tab.filled(ImageFacts({**facts, "image": name, "strength": "much"}))
        assert values[-3] is None
        assert "not in the history here" in said


def test_an_image_is_made_larger_with_its_own_settings(tab, session):
    _, (small,) = generated(tab, form(adapter="cat"))
    *_, last = tab.upscale(VISIT, small.name, 0.5, 2.0)
    assert last[tab.status] == "Done: 1 of 1, seeds from 4."
    large = max(session.history.glob("*.png"))
    facts = read_parameters(large)
    assert (facts["width"], facts["height"], facts["strength"], facts["seed"]) == (64, 64, 0.5, 4)
    assert facts["adapters"] == [{"file": "cat", "strength": 1.0}]
    for name, factor, said in ((large.name, 20.0, "more than the 256 possible"), ("../x.png", 2.0, "choose an image first"),
                               (None, 2.0, "choose an image first")):  # fmt: skip
        *_, last = tab.upscale(VISIT, name, 0.5, factor)
        assert said in last[tab.status]


def test_every_line_is_a_prompt_with_the_same_seed(tab):
    said, files = generated(tab, form(prompt="a cat\n\n  a dog \n", lines=True, count=2))
    assert said == "Done: 4 of 4, seeds from 4."
    facts = [read_parameters(file) for file in files]
    assert [(one["prompt"], one["seed"]) for one in facts] == [("a cat", 4), ("a cat", 5), ("a dog", 4), ("a dog", 5)]
    said, files = generated(tab, form(prompt="\n".join(["a"] * 101), lines=True))
    assert "101 prompts, 100 at most" in said
    assert not files


# --------------------------------------------------------------------------------------------------------- adapters


def test_every_adapter_that_acts_is_told_and_shown(tab):
    slots = ["cat", 0.5, True, NONE, 1.0, True, "cat @ 4", 1.0, False]
    assert tab.adapters.acting("a", False, *slots) == "Adapters that act: **cat** at 0.5."
    assert tab.adapters.acting("a <lora:cat:2>", False, *[NONE, 1.0, True] * 3) == "Adapters that act: **cat** at 2."
    assert tab.adapters.acting("a <lora:cat:2>", True, *[NONE, 1.0, True] * 3) == "No adapter acts."
    assert "chosen twice" in tab.adapters.acting("a", False, *["cat", 1.0, True] * 3)
    count, more, *boxes = tab.adapters.in_use(1, "cat", NONE, "dog")
    assert (count, more["visible"], [box["visible"] for box in boxes]) == (3, False, [True] * 3)
    count, more, *boxes = tab.adapters.add(1, NONE, NONE, NONE)
    assert (count, more["visible"], [box["visible"] for box in boxes]) == (2, True, [True, True, False])

"""Generate for daily use without a browser: what is filled in, what is read, and what is told."""

import argparse
import json

import gradio as gr
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tiny_families import build

from effilora_diffusion import EffiLoRAError, cli
from effilora_diffusion.diffusion.sampling.metadata import read_parameters
from effilora_diffusion.diffusion.sampling.request import GenerationRequest
from effilora_diffusion.studio.adapter_row import NONE
from effilora_diffusion.studio.fields import seed_of, whole
from effilora_diffusion.studio.filling import OWN
from effilora_diffusion.studio.session import Session
from effilora_diffusion.studio.tabs.generate import GenerateTab

VISIT = argparse.Namespace(session_hash="visitor")
FIELDS = (
    "prompt",
    "negative",
    "steps",
    "guidance",
    "width",
    "height",
    "count",
    "seed",
    "random",
    "sampler",
    "literal",
)


def built(session):
    with gr.Blocks():
        tab = GenerateTab(session)
        tab.build()
    return tab


@pytest.fixture
def tab(session):
    return built(session)


def form(**changes):
    usual = dict(zip(FIELDS, ("a cat", "", 2, 3.0, 32, 32, 1, "4", False, OWN, False), strict=True))
    return [*{**usual, **changes}.values(), *(NONE, 1.0, True) * 3]


def drawn(tab, **changes):
    """The status at the end, and the parameters of the new images."""
    before = {*tab.session.history.iterdir()}
    *_, last = tab.draw(VISIT, *form(**changes))
    return last[tab.status], [read_parameters(file) for file in sorted({*tab.session.history.iterdir()} - before)]


def filled(tab, values):
    return dict(zip(FIELDS, values, strict=False)), values[-1]


# ------------------------------------------------------------------------------------------------------------ fields


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [("count", 1.5, "Images must be a whole number, not 1.5"), ("count", None, "Images is empty"),
     ("width", None, "Width is empty"), ("width", 0, "32 to 256, not 0"), ("height", 512, "32 to 256, not 512"),
     ("seed", "1.5", "Seed must be a whole number"), ("seed", "two", "Seed must be a number"), ("seed", -2, "seed must be 0 to"),
     ("guidance", float("nan"), "Guidance must be a number"), ("sampler", "best", "no sampler 'best'"),
     ("prompt", "(a:99)", "weight of 'a' is 99"), ("prompt", "__x__", "no file x.txt")],
)  # fmt: skip
def test_nothing_that_is_filled_in_is_changed_silently(tab, field, value, said):
    status, images = drawn(tab, **{field: value})
    assert status.startswith("**Not generated:**")
    assert said.replace("__", "&#95;&#95;") in status.replace("\\", "")
    assert not images


def test_an_empty_seed_and_minus_one_are_random_and_shown(tab):
    for seed in ("", None, "-1", -1.0):
        status, (facts,) = drawn(tab, seed=seed)
        assert f"seeds from {facts['seed']}." in status
        assert facts["seed"] != 4
    assert seed_of("9007199254740993", False) == 9007199254740993
    assert whole(2.0, "x") == 2
    assert whole(" " * 50 + "-5", "x") == -5
    for value in ("1e400", "inf", "--5", [], object()):
        with pytest.raises(EffiLoRAError):
            whole(value, "x")


# ------------------------------------------------------------------------------------------------------------- syntax


def test_the_ui_and_the_command_line_draw_the_same_of_everything(tab, session, place, tmp_path):
    session.wildcards.mkdir()
    (session.wildcards / "pet.txt").write_text("(cat:1.3)\ndog\nmouse\n")
    prompt = "a {red|blue} __pet__ <lora:Cat:0.5> <lora:gone>"
    status, images = drawn(tab, prompt=prompt, sampler="Euler a", count=3, seed="30", negative="[grey]")
    assert "**There is no adapter named gone: generated without it.**" in status
    assert len({facts["prompt"] for facts in images}) > 1
    for facts in images:
        assert facts["template"] == prompt
        assert facts["adapters"] == [{"file": "cat", "strength": 0.5}]
        assert not {*"{}_"} & {*facts["prompt"]}
    words = ["generate", "--model", str(place / "model"), "--prompt", prompt, "--seed", "30", "--num_images", "3",
             "--num_inference_steps", "2", "--guidance_scale", "3", "--width", "32", "--height", "32", "--sampler", "Euler a",
             "--negative_prompt", "[grey]", "--outputs", str(session.outputs), "--output", str(tmp_path / "c.png")]  # fmt: skip
    assert cli.main(words) == 0
    ours = sorted(session.history.iterdir())
    for number, file in enumerate(ours, 1):
        assert file.read_bytes() == (tmp_path / f"c-{number}.png").read_bytes()
    values, _ = filled(tab, tab.restore_all(ours[2].name))  # its words, whatever becomes of the wildcard
    (session.wildcards / "pet.txt").unlink()
    restored = tab.restore_all(ours[2].name)
    assert values["prompt"] == images[2]["prompt"]
    *_, last = tab.draw(VISIT, *restored[:-1])
    again = max(session.history.iterdir())
    assert "Done: 1 of 1" in last[tab.status]
    with Image.open(again) as one, Image.open(ours[2]) as other:
        assert one.tobytes() == other.tobytes()


def test_a_literal_prompt_is_drawn_as_it_stands(tab):
    _, (facts,) = drawn(tab, prompt="a (red:1.4) {a|b} __x__ <lora:y>", literal=True)
    assert (facts["prompt"], facts["literal"]) == ("a (red:1.4) {a|b} __x__ <lora:y>", True)


def test_tokens_are_told_below_the_prompt(tab):
    assert tab.count_tokens("a (red:1.4)", False) == "4 of 30 tokens"
    assert tab.count_tokens("word" * 10, False) == "40 of 60 tokens, in 2 chunks"
    assert tab.count_tokens("", False) == ""


# ----------------------------------------------------------------------------------------------------- other programs


def png(path, **texts):
    info = PngInfo()
    for key, value in texts.items():
        info.add_text(key, value)
    Image.new("RGB", (64, 48)).save(path, pnginfo=info)
    return str(path)


def test_an_image_of_a1111_fills_the_form_and_the_rest_is_told(tab, tmp_path):
    text = ("a (cat:1.2) <lora:cat:0.5> <lora:gone:strong>\nNegative prompt: blurry\nSteps: 28, Sampler: DPM++ 2M, "
            "Schedule type: Karras, CFG scale: 7, Seed: 123, Size: 64x128, Model: other, Hires upscale: 2")  # fmt: skip
    values, said = filled(tab, tab.read_upload(png(tmp_path / "a.png", parameters=text)))
    assert values == {"prompt": "a (cat:1.2) <lora:cat:0.5> <lora:gone:strong>", "negative": "blurry", "steps": 28,
                      "guidance": 7.0, "width": 64, "height": 128, "count": 1, "seed": "123", "random": False,
                      "sampler": "DPM++ 2M Karras", "literal": False}  # fmt: skip
    for words in ("from A1111", "not here:** gone", "Hires upscale 2", "model other"):
        assert words in said
    big = text.replace("64x128", "832x1216").replace("Steps: 28", "Steps: 500").replace("scale: 7", "scale: 70")
    values, said = filled(tab, tab.read_upload(png(tmp_path / "b.png", parameters=big)))
    usual = tab.session.defaults()
    assert [values[name] for name in ("width", "height", "steps", "guidance")] == [
        32,
        32,
        usual["steps"],
        usual["guidance_scale"],
    ]
    for words in ("size 832 x 1216", "500 steps", "guidance 70"):
        assert words in said


def test_what_a_form_can_t_hold_is_refused(tab, tmp_path):
    whole_one = {"prompt": "a", "negative_prompt": "", "seed": 1, "num_inference_steps": 2, "guidance_scale": 1.0, "width": 32,
                 "height": 32, "model": "m", "adapters": [{"file": "cat", "strength": 1.0}]}  # fmt: skip
    for number, change in enumerate((
        {"prompt": "[:" * 100_000}, {"seed": -5}, {"seed": 2**60}, {"adapters": [{"file": "cat", "strength": float("nan")}]},
    )):  # fmt: skip
        path = png(tmp_path / f"{number}.png", effilora=json.dumps({**whole_one, **change}))
        assert tab.read_upload(path)[-1].startswith("**Not read:**"), change


def test_a_family_without_a_negative_prompt_shows_none(tmp_path):
    build("flux").save_pretrained(tmp_path / "model")
    tab = built(Session(str(tmp_path / "model"), tmp_path / "outputs"))
    assert not tab.negative.visible
    assert [value for _, value in tab.sampler.choices] == [OWN, "Euler", "DPM++ 2M", "UniPC", "LCM"]
    text = "a (cat:1.2)\nNegative prompt: blurry\nSteps: 2, Sampler: DDIM, CFG scale: 1, Distilled CFG Scale: 3.5, Size: 64x64"
    values, said = filled(tab, tab.read_upload(png(tmp_path / "a.png", parameters=text)))
    assert (values["negative"], values["sampler"], values["guidance"]) == ("", OWN, 3.5)
    assert "the negative prompt, which this model does not have" in said
    assert "the sampler DDIM, which this model does not have" in said
    drawing = tab.session.check(
        GenerationRequest("a (cat:1.2) " + "long " * 600, num_inference_steps=2, width=64, height=64)
    )[0]
    assert "no weights for words" in drawing.notes[0]
    assert "are read" in drawing.notes[1]

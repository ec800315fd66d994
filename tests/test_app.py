"""The web UI without a browser: what its handlers, its endpoints and its settings do."""

import argparse
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import gradio as gr
import numpy as np
import pytest
import torch
from helpers import make_subject, trainer
from PIL import Image

from effilora_diffusion import EffiLoRAError, cli
from effilora_diffusion.diffusion.sampling import stream as live
from effilora_diffusion.diffusion.sampling.metadata import read_parameters
from effilora_diffusion.diffusion.sampling.request import GenerationRequest
from effilora_diffusion.studio.adapter_row import NONE
from effilora_diffusion.studio.filling import OWN
from effilora_diffusion.studio.session import Session
from effilora_diffusion.studio.tabs.compare import CompareTab
from effilora_diffusion.studio.tabs.generate import GenerateTab

SMALL = {"num_inference_steps": 2, "guidance_scale": 3.0, "width": 32, "height": 32}


def draw(session, **options):
    request = GenerationRequest("a sks cat", **{**SMALL, **options})
    return [event for event in session.draw(request) if not hasattr(event, "step")]


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).copy()


# -------------------------------------------------------------------------------------------------------- images


def test_a_image_is_byte_for_byte_the_command_line_s(session, place, tmp_path):
    (ours,) = draw(session, seed=5, adapters=[("cat", 0.5)])
    words = ["generate", "--model", str(place / "model"), "--adapter", f"{session.outputs / 'cat'}:0.5", "--prompt",
             "a sks cat", "--seed", "5", "--num_inference_steps", "2", "--guidance_scale", "3", "--width", "32",
             "--height", "32", "--output", str(tmp_path / "cli.png")]  # fmt: skip
    assert cli.main(words) == 0
    assert ours.read_bytes() == (tmp_path / "cli.png").read_bytes()


def test_adapters_come_and_go_and_the_base_is_always_the_same(session):
    (base,) = draw(session)
    (adapted,) = draw(session, adapters=[("cat", 1.0)])
    (zero,) = draw(session, adapters=[("cat", 0.0)])
    (again,) = draw(session)
    assert not np.array_equal(pixels(base), pixels(adapted))
    assert np.array_equal(pixels(base), pixels(zero))
    assert np.array_equal(pixels(base), pixels(again))


def test_an_adapter_that_is_trained_anew_is_loaded_anew(session, place, tmp_path):
    (before,) = draw(session, adapters=[("cat", 1.0)])
    options = {"learning_rate": 0.2, "max_train_steps": 5, "num_validation_images": 0, "overwrite_output_dir": True}
    trainer(place / "model", make_subject(tmp_path / "s", 2, first=7), session.outputs / "cat", **options).run()
    (after,) = draw(session, adapters=[("cat", 1.0)])
    assert not np.array_equal(pixels(before), pixels(after))


def test_visitors_at_once_get_their_own_images(session):
    wanted = [{"seed": seed, "adapters": [("cat", strength)] if strength else []} for seed, strength in
              ((1, 0), (2, 1.0), (3, -1.0), (1, 1.0), (2, 0), (3, 0.5))]  # fmt: skip
    expected = [pixels(draw(session, **options)[0]) for options in wanted]
    with ThreadPoolExecutor(len(wanted)) as visitors:
        found = list(visitors.map(lambda options: pixels(draw(session, **options)[0]), wanted * 3))
    for index, image in enumerate(found):
        assert np.array_equal(image, expected[index % len(wanted)])


def test_several_images_have_the_seeds_that_follow(session):
    files = draw(session, num_images=3, seed=7)
    assert [read_parameters(file)["seed"] for file in files] == [7, 8, 9]
    assert np.array_equal(pixels(files[1]), pixels(draw(session, seed=8)[0]))
    assert session.drawn()[0].name.endswith("-8.png")


# --------------------------------------------------------------------------------------------------- bad requests

BAD = {
    "no prompt": {"prompt": "  "},
    "a novel": {"prompt": "x" * 5000},
    "no steps": {"num_inference_steps": 0},
    "too many steps": {"num_inference_steps": 100000},
    "no images": {"num_images": 0},
    "too many images": {"num_images": 1000},
    "odd width": {"width": 33},
    "huge": {"height": 100000},
    "negative seed": {"seed": -1},
    "seed too large": {"seed": 2**63},
    "guidance": {"guidance_scale": -1.0},
    "guidance that is no number": {"guidance_scale": float("nan")},
    "strength": {"adapters": [("cat", 1e9)]},
    "strength that is no number": {"adapters": [("cat", float("nan"))]},
    "unknown adapter": {"adapters": [("dog", 1.0)]},
    "path": {"adapters": [("../../etc/passwd", 1.0)]},
    "absolute path": {"adapters": [("/etc/passwd", 1.0)]},
}


@pytest.mark.parametrize("options", BAD.values(), ids=BAD)
def test_bad_requests_are_refused_and_the_studio_keeps_working(session, options):
    with pytest.raises(EffiLoRAError):
        list(session.draw(GenerationRequest(**{"prompt": "a cat", **SMALL, **options})))
    assert len(draw(session)) == 1


# ------------------------------------------------------------------------------------------------------ the forms


@pytest.fixture
def tab(session):
    with gr.Blocks():
        found = GenerateTab(session)
        found.build()
    return found


def form(
    prompt="a cat",
    steps=2,
    guidance=3.0,
    width=32,
    height=32,
    count=1,
    seed=4,
    use_random=False,
    *slots,
    sampler=OWN,
    literal=False,
):
    slots = slots or ("cat", 0.5, True, NONE, 1.0, True, NONE, 1.0, True)
    return (prompt, "", steps, guidance, width, height, count, seed, use_random, sampler, literal, *slots)


def test_the_form_becomes_a_request(tab):
    found = tab.request(*form())
    assert (found.prompt, found.seed, found.adapters) == ("a cat", 4, [("cat", 0.5)])
    off = tab.request(*form("a cat", 2, 3.0, 32, 32, 1, 4, False, "cat", 0.5, False, NONE, 1, True, NONE, 1, True))
    assert off.adapters == []
    seeds = {tab.request(*form(use_random=True)).seed for _ in range(4)}
    assert len(seeds) == 4
    with pytest.raises(EffiLoRAError, match="twice"):
        tab.request(*form("a cat", 2, 3.0, 32, 32, 1, 4, False, "cat", 1, True, "cat", 1, True, NONE, 1, True))
    with pytest.raises(EffiLoRAError, match="Steps is empty"):
        tab.request(*form(steps=None))


def test_a_image_fills_the_form_with_what_drew_it(tab, session, tmp_path):
    (file,) = draw(session, seed=11, adapters=[("cat", 0.25)])
    *values, status = tab.read_upload(str(file))
    assert status == "Settings loaded."
    again = tab.request(*values)
    assert again == GenerationRequest("a sks cat", seed=11, adapters=[("cat", 0.25)], **SMALL)
    assert np.array_equal(pixels(file), pixels(next(e for e in session.draw(again) if not hasattr(e, "step"))))
    Image.new("RGB", (8, 8)).save(tmp_path / "bare.png")
    (tmp_path / "text.png").write_text("no image")
    for name in ("bare.png", "text.png"):
        assert "Not read" in tab.read_upload(str(tmp_path / name))[-1]
    (session.outputs / "cat" / "effilora.safetensors").unlink()
    assert "adapters that are not here:** cat" in tab.read_upload(str(file))[-1]


def test_a_image_of_the_command_line_fills_the_form(tab, session, place, tmp_path):
    shutil.copyfile(session.outputs / "cat" / "effilora.safetensors", session.uploads / "dog.safetensors")
    words = ["generate", "--model", str(place / "model"), "--adapter", f"{session.uploads / 'dog.safetensors'}:0.5",
             "--prompt", "a dog", "--num_inference_steps", "1", "--output", str(tmp_path / "cli.png")]  # fmt: skip
    assert cli.main(words) == 0
    *values, status = tab.read_upload(str(tmp_path / "cli.png"))
    assert status == "Settings loaded."
    assert tab.request(*values).adapters == [("dog", 0.5)]
    assert (
        tab.request(*values).guidance_scale == session.defaults()["guidance_scale"]
    )  # the model's own: none was given


def test_the_trigger_is_shown_and_put_into_the_prompt_once(tab):
    slot = tab.slots[0]
    row, words, *_ = slot.chosen("cat")
    assert row["visible"]
    assert "a sks cat" in words
    assert words.endswith("Checkpoints can be written here: cat @ 4")
    assert not slot.chosen(NONE)[0]["visible"]
    assert not slot.chosen("deleted")[0]["visible"]
    assert slot.fill("", "cat") == "a sks cat"
    assert slot.fill("a dog", "cat") == gr.skip()  # what is typed meanwhile stays
    assert slot.put("in the rain", "cat") == "a sks cat, in the rain"
    assert slot.put("a sks cat sleeps", "cat") == gr.skip()
    assert slot.put("a dog", NONE) == gr.skip()


@pytest.fixture
def compare(session):
    with gr.Blocks():
        found = CompareTab(session)
        found.build()
    return found


VISIT = argparse.Namespace(session_hash="visitor")


def test_base_and_adapter_are_compared_on_one_seed(compare):
    values = ("cat", 1.0, 0, 2, 3.0, 32, 32)
    *_, (slider, *hidden, status, _, _) = compare.compare(VISIT, "", *values)  # no prompt: the adapter's own
    assert "Right: cat at 1" in status
    assert not any(part["visible"] for part in hidden)
    sides = slider["value"]
    assert read_parameters(sides[1])["prompt"] == "a sks cat"
    assert not np.array_equal(pixels(sides[0]), pixels(sides[1]))
    *_, (*_, status, _, _) = compare.compare(VISIT, "a <lora:gone:1>", *values)
    assert "no adapter named gone" in status
    for changed, said in (((NONE, 1.0), "choose an adapter"), (("cat", None), "Strength is empty")):
        *_, (*_, status, _, _) = compare.compare(VISIT, "a cat", *changed, *values[2:])
        assert said in status


def test_stop_ends_all_drawings_of_the_visitor_and_of_nobody_else(compare, tab):
    other = argparse.Namespace(session_hash="another")
    assert tab.announce(VISIT)[0] == "Waiting for the model."
    running = compare.tickets.begin("visitor")
    assert "one other request" in compare.announce(VISIT)[0]  # a second one, while the first runs
    assert "2 other requests" in tab.announce(other)[0]
    assert compare.stop(VISIT) == "Stopping ..."
    waiting = compare.tickets.begin("visitor")
    assert running.stop
    assert waiting.stop
    assert waiting is not running
    assert not compare.tickets.begin("another").stop
    for visitor, ticket in (("visitor", running), ("visitor", waiting)):
        compare.tickets.end(visitor, ticket)
    compare.tickets.end("another", compare.tickets._open["another"][0])
    assert tab.announce(VISIT)[0] == "Waiting for the model."  # nobody is before
    words, go, halt = tab.failed(VISIT)
    assert "Not generated" in words
    assert (go["interactive"], halt["interactive"]) == (True, False)
    assert tab.stop(VISIT) == "Nothing is being generated."


def test_drawings_that_never_began_are_forgotten(tab, monkeypatch):
    tab.announce(VISIT)
    monkeypatch.setattr("effilora_diffusion.studio.queue.FORGOTTEN", -1.0)
    assert tab.announce(argparse.Namespace(session_hash="another"))[0] == "Waiting for the model."


def test_a_fault_leaves_the_buttons_usable(tab, session, monkeypatch):
    monkeypatch.setattr(session.active, "use", lambda wanted: 1 / 0)
    *_, last = tab.draw(VISIT, *form())
    assert last[tab.go]["interactive"]
    assert not last[tab.halt]["interactive"]
    assert "Not generated" in last[tab.status]
    assert tab.tickets._open == {}


def test_closing_a_drawing_does_not_wait_and_the_next_one_is_clean(session):
    expected = pixels(draw(session, num_inference_steps=3)[0])
    steps, go_on = [], threading.Event()

    def hold(module, args):
        steps.append(len(steps))
        assert len(steps) == 1 or go_on.wait(600)  # every step but the first is held until it is told to go on

    slow = session.pipe.unet.register_forward_pre_hook(hold)
    drawing = session.draw(GenerationRequest("a sks cat", **{**SMALL, "num_inference_steps": 50}))
    next(drawing)
    drawing.close()
    assert live._WORKERS[session.pipe].is_alive()  # closing did not wait for the step
    go_on.set()
    with session.holding():
        assert not live._WORKERS[session.pipe].is_alive()  # whoever holds the pipeline has it alone
    assert len(steps) <= 2
    slow.remove()
    assert np.array_equal(pixels(draw(session, num_inference_steps=3)[0]), expected)


def test_the_model_s_type_can_be_chosen(place, tmp_path):
    found = Session(str(place / "model"), tmp_path / "outputs", "bfloat16")
    assert found.pipe.unet.dtype == torch.bfloat16
    assert len(draw(found)) == 1


def test_sizes_far_beyond_the_model_s_own_are_refused(session):
    assert session.max_edge == 256
    with pytest.raises(EffiLoRAError, match="32 to 256"):
        list(session.draw(GenerationRequest("a cat", **{**SMALL, "width": 512})))

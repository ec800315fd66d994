"""Grids of the web UI without a browser: axes, cells on the disk, stopping and continuing, sheets."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from app_forms import built, image_size
from helpers import make_subject, trainer
from PIL import Image

from effilora_diffusion import EffiLoRAError
from effilora_diffusion.diffusion.sampling.metadata import read_image, read_parameters
from effilora_diffusion.diffusion.sampling.request import GenerationRequest
from effilora_diffusion.studio.adapter_row import NONE
from effilora_diffusion.studio.axes import NOTHING, REPLACE, Axis, cell, changed, split
from effilora_diffusion.studio.grids import Grid, axes_of, unfinished
from effilora_diffusion.studio.session import Session
from effilora_diffusion.studio.tabs.compare import CompareTab
from effilora_diffusion.studio.tabs.generate import GenerateTab

VISIT = SimpleNamespace(session_hash="visitor")
FORM = ("a sks cat", "cat", 1.0, 0, 2, 3.0, 32, 32)
PARTS = ("slider", "cells", "which", "sheet", "status", "left", "resume", "go", "halt")


@pytest.fixture
def tab(session):
    return built(CompareTab, session)


def ended(drawing):
    """What the page shows last."""
    return dict(zip(PARTS, list(drawing)[-1], strict=True))


def grid(tab, x, x_values, y=NOTHING, y_values="", z=NOTHING, z_values="", form=FORM):
    return ended(tab.grids.draw(VISIT, x, x_values, y, y_values, z, z_values, *form))


def sheets(session):
    return sorted(session.history.glob("*-grid.png"))


# ---------------------------------------------------------------------------------------------------------- axes


def test_axes_of_a_grid_change_one_setting():
    base = GenerationRequest("a", adapters=[("cat", 1.0)], num_inference_steps=2, width=32, height=32)
    assert changed(base, "strength", "0.5").adapters == [("cat", 0.5)]
    assert changed(base, "steps", "7").num_inference_steps == 7
    assert changed(base, "guidance", "1.5").guidance_scale == 1.5
    assert changed(base, "sampler", "dpm++ 2m").sampler == "DPM++ 2M"
    assert changed(base, "prompt", "b").prompt == "b"
    assert changed(base, "adapter", NONE).adapters == []
    assert split(" 0; 0.5 ;;1") == ["0", "0.5", "1"]
    assert changed(base, "checkpoint", "4").adapters == [("cat @ 4", 1.0)]
    assert changed(base, "checkpoint", "final").adapters == [("cat", 1.0)]
    assert split("1-5 (2); 9") == ["1", "3", "5", "9"]
    assert split("0-1 [5]") == ["0", "0.25", "0.5", "0.75", "1"]
    assert split("-1-1 (+0.5)") == ["-1", "-0.5", "0", "0.5", "1"]
    assert split("a cat (grey)") == ["a cat (grey)"]
    for text in ("1-1000 (1)", "1-2 (0)", "5-1 (1)", "1.2.3-4 (1)"):
        with pytest.raises(EffiLoRAError, match="range"):
            split(text)
    wrong = (("steps", "many"), ("strength", "strong"), ("size", "1"), ("checkpoint", "first"), ("sampler", "slow"))
    for axis, value in wrong:
        with pytest.raises(EffiLoRAError):
            changed(base, axis, value)
    with pytest.raises(EffiLoRAError, match="no values"):
        split(" ; ")


def test_words_are_searched_and_replaced_in_the_cell_s_own_prompt():
    base = GenerationRequest("a red cat", width=32, height=32)
    assert changed(base, REPLACE, "blue", "red").prompt == "a blue cat"
    assert cell(base, {REPLACE: "blue", "prompt": "the red red sea"}, "red").prompt == "the blue blue sea"
    with pytest.raises(EffiLoRAError, match="'green' is not in the prompt"):
        changed(base, REPLACE, "blue", "green")


# ------------------------------------------------------------------------------------------------------- drawing


def test_a_grid_is_one_image_with_every_pair(tab):
    shown = grid(tab, "strength", "0; 1", "seed", "0; 1; 2")
    assert shown["status"] == "strength across, seed down."
    width, height = image_size(shown["sheet"]["value"])
    assert width > 2 * 128
    assert height > 3 * 128
    assert not shown["cells"]["visible"]
    assert not shown["left"]["visible"]
    assert "different settings" in grid(tab, "strength", "0; 1", "strength", "0")["status"]
    assert "choose a setting" in grid(tab, NOTHING, "")["status"]
    assert "120 images: 100 are possible" in grid(tab, "seed", "1-12 (1)", "steps", "1-10 (1)")["status"]
    said = grid(tab, "prompt", "a; a <lora:gone:1>")["status"]
    assert said.startswith("prompt across. **There is no adapter named gone")


def test_the_third_axis_has_a_sheet_for_each_value(tab, session):
    shown = grid(tab, "seed", "0; 1", "strength", "0; 1", "steps", "1; 2")
    assert shown["status"] == "seed across, strength down, steps on sheets."
    first, second = sheets(session)
    assert shown["which"]["choices"] == [("steps: 1", first.name), ("steps: 2", second.name)]
    assert shown["which"]["visible"]
    assert first.read_bytes() != second.read_bytes()
    assert read_parameters(second)["grid"]["sheet"] == "2"
    turned = tab.grids.turn(second.name)
    with Image.open(turned["value"]) as one, Image.open(second) as other:
        assert np.array_equal(np.asarray(one), np.asarray(other))
    assert "value" not in tab.grids.turn("../secret.png")


def test_a_sheet_says_how_it_was_drawn_and_is_read_back(tab, session):
    grid(tab, "guidance", "1; 2", "sampler", "DDIM; Euler")
    (sheet,) = sheets(session)
    facts = read_parameters(sheet)
    assert facts["prompt"] == "a sks cat"
    assert (facts["width"], facts["height"]) == (32, 32)
    assert axes_of(facts) == (Axis("guidance", ("1", "2")), Axis("sampler", ("DDIM", "Euler")), Axis())
    with Image.open(sheet) as image:
        text = image.info["parameters"]
    assert text.startswith("a sks cat <lora:cat:1>\nSteps: 2, Sampler: DDIM")
    assert 'Script: X/Y/Z plot, X Type: CFG Scale, X Values: "1, 2", Y Type: Sampler, Y Values: "DDIM, Euler"' in text
    values = tab.filled(read_image(sheet))
    assert tab.request(*values[:11]) == tab.request(*FORM)
    axes = [value if isinstance(value, str) else value["value"] for value in values[11:-1]]
    assert axes == ["guidance", "1; 2", "sampler", "DDIM; Euler", NOTHING, ""]
    assert values[-1] == "Settings loaded."
    assert built(GenerateTab, session).filled(read_image(sheet))[0] == "a sks cat"
    cells = sorted((session.history / "grids").glob("*/*.png"))
    assert [read_parameters(one)["guidance_scale"] for one in cells] == [1, 2, 1, 2]


def test_cells_appear_as_they_come(tab):
    *steps, _ = tab.grids.draw(VISIT, "seed", "0; 1; 2", NOTHING, "", NOTHING, "", *FORM)
    seen = [step[1]["value"] for step in steps]
    assert [(text.count("<img"), text.count("not drawn yet")) for text in seen] == [(0, 3), (1, 2), (2, 1)]
    assert 'alt="seed: 0"' in seen[1]


def test_checkpoints_are_an_axis(tab, session, place, tmp_path):
    options = {"learning_rate": 0.2, "max_train_steps": 4, "checkpointing_steps": 2, "num_validation_images": 0}
    trainer(place / "model", make_subject(tmp_path / "s", 2), session.outputs / "dog", **options).run()
    assert tab.grids.suggest("checkpoint", "dog", "") == "2; 4"  # the last one is the finished adapter
    shutil.rmtree(session.outputs / "dog" / "checkpoint-4")
    assert tab.grids.suggest("checkpoint", "dog", "") == "2; final"
    form = (FORM[0], "dog", *FORM[2:])
    shown = grid(tab, "strength", "0.5; 1", "checkpoint", "2; final", form=form)
    assert shown["status"] == "strength across, checkpoint down."
    assert "no checkpoint of step 3" in grid(tab, "strength", "0.5", "checkpoint", "3", form=form)["status"]
    said = grid(tab, "checkpoint", "2", "adapter", "dog; cat", form=form)["status"]
    assert "cat has no checkpoint of step 2" in said  # said before anything is drawn
    none = tab.grids.suggest("adapter", "dog", "")
    assert none.startswith("none; ")
    assert grid(tab, "adapter", none, "strength", "0.5; 1", form=form)["status"] == "adapter across, strength down."
    bare = (FORM[0], NONE, *FORM[2:])
    assert grid(tab, "strength", "0; 1", "adapter", "dog", form=bare)["status"] == "strength across, adapter down."


# --------------------------------------------------------------------------------------- stopping and continuing


def stopped(tab, cells):
    """A grid of four seeds that is stopped after some cells."""
    drawing = tab.grids.draw(VISIT, "seed", "0; 1; 2; 3", NOTHING, "", NOTHING, "", *FORM)
    for _ in range(cells + 1):
        next(drawing)
    tab.stop(VISIT)
    return ended(drawing)


def test_a_stopped_grid_keeps_its_cells_and_is_continued_after_a_restart(tab, session, place):
    shown = stopped(tab, 2)
    assert shown["status"] == "Stopped: 2 of 4 cells are kept; Continue generates the others."
    assert shown["cells"]["value"].count("<img") == 2
    (name,) = [value for _, value in shown["left"]["choices"]]
    assert shown["left"]["value"] == name
    (sheet,) = sheets(session)
    assert read_parameters(sheet)["grid"]["missing"] == 2
    kept = {file: file.stat().st_mtime_ns for file in (session.history / "grids" / name).glob("*.png")}
    assert len(kept) == 2

    again = built(CompareTab, Session(str(place / "model"), session.outputs))  # another server
    assert again.refresh(None)[1]["value"] == name
    shown = ended(again.grids.carry_on(VISIT, name))
    assert shown["status"] == "seed across."
    assert not shown["left"]["visible"]
    assert {file: file.stat().st_mtime_ns for file in kept} == kept  # nothing was drawn twice
    assert sheets(session) == [sheet]
    assert read_parameters(sheet)["grid"]["missing"] == 0
    whole = grid(tab, "seed", "0; 1; 2; 3")["sheet"]["value"]
    with Image.open(whole) as one, Image.open(sheet) as other:
        assert np.array_equal(np.asarray(one), np.asarray(other))


def test_a_grid_that_is_stopped_before_its_first_cell_leaves_nothing(tab, session):
    tab.announce(VISIT)
    tab.stop(VISIT)
    assert "stopped" in grid(tab, "strength", "0; 1")["status"]
    assert not sheets(session)
    assert not unfinished(session.history)
    assert grid(tab, "strength", "0")["status"] == "strength across."
    assert tab.stop(VISIT) == "Nothing is being generated."


def test_what_can_t_be_continued_is_said(tab, session):
    stopped(tab, 1)
    ((_, name),) = unfinished(session.history)
    for wrong, said in ((None, "choose a grid"), ("../cat", "no longer there")):
        assert said in ended(tab.grids.carry_on(VISIT, wrong))["status"]
    file = session.history / "grids" / name / "grid.json"
    facts = json.loads(file.read_text())
    file.write_text(json.dumps({**facts, "model": "some/where/else"}))
    assert "begun with else: open that model" in ended(tab.grids.carry_on(VISIT, name))["status"]
    file.write_text(json.dumps({**facts, "grid": {"axes": {"across": {"setting": "size", "values": ["1"]}}}}))
    assert "axes are not known" in ended(tab.grids.carry_on(VISIT, name))["status"]
    file.write_text("{")
    assert "grid.json is damaged" in ended(tab.grids.carry_on(VISIT, name))["status"]
    assert not unfinished(session.history)
    file.write_text(json.dumps(facts))
    (session.outputs / "cat" / "effilora.safetensors").unlink()
    assert "no adapter named 'cat'" in ended(tab.grids.carry_on(VISIT, name))["status"]


def test_labels_of_cells_are_only_words(tmp_path):
    base = GenerationRequest("<img src=x>", width=32, height=32)
    text = Grid.new(tmp_path, base, (Axis("prompt", ("<script>", 'a "b"')), Axis(), Axis()), None).html(str)
    assert "<script" not in text
    assert 'aria-label="prompt: a &quot;b&quot;: not drawn yet"' in text

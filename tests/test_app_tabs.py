"""The Train and Adapters tabs without a browser: what their handlers accept, refuse and say."""

import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import pandas as pd
import pytest
import torch
from conftest import randomise
from helpers import make_subject, trainer
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_families import build

from effilora_diffusion.core import AdapterFile, EffiLoRA, load_adapter_file, save_adapter_file
from effilora_diffusion.core.concepts import Concept
from effilora_diffusion.core.run_folder import plain_names, trim_log
from effilora_diffusion.diffusion.config import TrainingConfig
from effilora_diffusion.diffusion.sampling.leakage import READING, leakage_columns, leakage_prompts
from effilora_diffusion.studio.adapter_row import AdapterRow
from effilora_diffusion.studio.runs import Run
from effilora_diffusion.studio.server import make_page
from effilora_diffusion.studio.session import Session
from effilora_diffusion.studio.subjects import MOST_SUBJECTS, SubjectsForm, images_note
from effilora_diffusion.studio.tabs.adapters import AdaptersTab
from effilora_diffusion.studio.tabs.compare import CompareTab
from effilora_diffusion.studio.tabs.inspect import InspectTab
from effilora_diffusion.studio.tabs.train import TrainTab, captions_of
from effilora_diffusion.studio.train_form import (
    PRESET_FIELDS,
    component_of,
    from_component,
    run_settings,
    shown_fields,
    usual_settings,
)


def built(kind, session):
    with gr.Blocks():
        tab = kind(session)
        tab.build()
    return tab


def by_hand(session, **changes):
    """The advanced section as it is shown, with some fields changed."""
    usual = usual_settings(session)
    with gr.Blocks():
        return [changes.get(entry.name, component_of(entry, usual[entry.name]).value) for entry in shown_fields()]


def image_size(path):
    with Image.open(path) as opened:
        return opened.size


# ------------------------------------------------------------------------------------------------------------ train


def test_every_image_is_checked_at_once_with_its_reason(session, tmp_path):
    tab = built(TrainTab, session)
    folder = make_subject(tmp_path / "p", 2, size=(300, 300))
    (folder / "bad.png").write_bytes(b"no image")
    (folder / "empty.png").write_bytes(b"")
    (folder / "twice.png").write_bytes((folder / "0.png").read_bytes())
    rows = tab.check([str(path) for path in sorted(folder.iterdir())], None)
    assert [row[0] for row in rows] == ["0.png", "1.png", "bad.png", "empty.png", "twice.png"]
    assert [row[1].startswith("good, 300 x 300") for row in rows] == [True, True, False, False, True]
    assert "empty" in rows[3][1]
    assert "the same file as 0.png" in rows[4][1]
    assert str(tmp_path) not in str(rows)


def test_a_run_is_started_with_its_own_images_and_captions(session, tmp_path):
    tab = built(TrainTab, session)
    files = [str(path) for path in sorted(make_subject(tmp_path / "p", 2).iterdir())]
    rows = [["0.png", "good", "a red one"], ["1.png", "good", ""]]
    hand = {"max_train_steps": 3, "num_validation_images": 1, "validation_inference_steps": 1, "train_batch_size": 1,
            "export_distillation_steps": 1}  # fmt: skip
    advanced = by_hand(session, **hand)
    update, text = tab.begin(files, rows, "a sks cat", "new cat", "fast", *advanced)
    assert text == "Starting ..."
    assert update["value"] == "new cat"
    data = session.outputs / "datasets" / "new cat"
    assert (data / "000-0.txt").read_text() == "a red one"
    assert not (data / "001-1.txt").exists()
    end = time.monotonic() + 600
    while "Done" not in tab.look("new cat")[0]:
        assert time.monotonic() < end, tab.look("new cat")[0]
        time.sleep(0.2)
    text, curve, sample, layers, report = tab.look("new cat")
    assert "step 3 of 3" in text
    assert list(curve["step"][curve["curve"] == "every step"]) == [1, 2, 3]
    newest = sorted((session.outputs / "new cat" / "samples").glob("*.png"))[-1]
    assert Path(sample).read_bytes() == newest.read_bytes()
    assert layers == ""  # the Reducer was off
    assert "steps       3, batch size" in report["value"]
    assert "new cat" in session.adapters()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"files": None}, "no images"),
        ({"prompt": " "}, "prompt is missing"),
        ({"name": "../x"}, "name"),
        ({"name": ""}, "no name yet"),
        ({"files": ["x"] * 201}, "201 images"),
        ({"preset": "fastest"}, "preset"),
        ({"name": "cat"}, "finished run"),
        ({"resolution": 33}, "--resolution"),
        ({"learning_rate": -1.0}, "--learning_rate"),
        ({"max_train_steps": "many"}, "--max_train_steps must be a whole number"),
        ({"snr_gamma": "strong"}, "--snr_gamma must be a number"),
    ],
)
def test_what_can_t_be_trained_is_said(session, tmp_path, change, word):
    tab = built(TrainTab, session)
    files = [str(path) for path in make_subject(tmp_path / "p", 2).iterdir()]
    form = {"files": files, "prompt": "a cat", "name": "dog", "preset": "fast", **change}
    advanced = by_hand(session, **change)
    _, text = tab.begin(form["files"], [], form["prompt"], form["name"], form["preset"], *advanced)
    assert text.startswith("**Not started:**")
    assert word in text
    assert (session.outputs / "cat" / "effilora.safetensors").exists()


def test_the_advanced_section_shows_what_will_be_used(session, tmp_path):
    usual = usual_settings(session)
    assert usual["resolution"] == 32  # the model's own edge
    with gr.Blocks():
        shown = {entry.name: component_of(entry, usual[entry.name]) for entry in shown_fields()}
    for entry in shown_fields():
        assert from_component(entry, shown[entry.name].value, usual[entry.name]) == usual[entry.name], entry.name
        assert shown[entry.name].info.startswith(entry.metadata["help"])
    assert {"rank", "heads", "routing", "reducer", "quantization", "lr_scheduler"} <= shown.keys()
    found = run_settings(session, "a cat", "quality", tmp_path, by_hand(session))
    assert {name: found[name] for name in usual if name not in PRESET_FIELDS} == {
        name: value for name, value in usual.items() if name not in PRESET_FIELDS
    }
    assert (found["max_train_steps"], found["checkpointing_steps"], found["validation_prompt"]) == (
        800,
        200,
        ["a cat"],
    )
    TrainingConfig(**found)


def test_every_value_can_be_chosen_by_hand(tmp_path):
    session = Session(None, tmp_path / "outputs")  # the embedded base, whose usual settings are the example's
    found = run_settings(session, "a cat", "fast", tmp_path, by_hand(session))
    assert (found["with_prior_preservation"], found["train_batch_size"], found["max_train_steps"]) == (True, 5, 125)
    hand = {"with_prior_preservation": False, "center_crop": False, "resolution": 512, "learning_rate": 5e-4, "class_prompt": "",
            "max_train_steps": "100", "validation_prompt": "one\ntwo"}  # fmt: skip
    found = run_settings(session, "a cat", "fast", tmp_path, by_hand(session, **hand))
    expected = {**hand, "class_prompt": [], "max_train_steps": 100, "checkpointing_steps": 25}
    expected["validation_prompt"] = ["one", "two"]
    assert {name: found[name] for name in expected} == expected
    TrainingConfig(**found)


def test_captions_follow_their_images(session, tmp_path):
    tab = built(TrainTab, session)
    files = [str(path) for path in sorted(make_subject(tmp_path / "p", 3).iterdir())]
    rows = tab.check(files, None)
    rows[0][2], rows[2][2] = "the first", "the last"
    assert [row[2] for row in tab.check(files[1:], pd.DataFrame(rows))] == ["", "the last"]  # kept when a file goes
    table = pd.DataFrame([[None, None, None], ["2.png", "good", "the last"], ["1.png", "good", float("nan")]])
    assert captions_of(table) == {"2.png": "the last"}
    tab._keep(files, table, tmp_path / "data")  # the first row was deleted, one was added
    assert {path.name: path.read_text() for path in (tmp_path / "data").glob("*.txt")} == {"002-2.txt": "the last"}


def test_a_refused_start_touches_nothing_that_is_there(session, place, tmp_path):
    tab = built(TrainTab, session)
    files = [str(path) for path in make_subject(tmp_path / "p", 2).iterdir()]
    data = make_subject(session.outputs / "datasets" / "cat", 3)
    options = {"max_train_steps": 4, "checkpointing_steps": 2, "num_validation_images": 0}
    trainer(place / "model", data, session.outputs / "half", **options).run()
    (session.outputs / "half" / "effilora.safetensors").unlink()  # as a run that was stopped before its end
    trim_log(session.outputs / "half" / "metrics.jsonl", 3)
    (session.uploads / "dog.safetensors").write_bytes((session.outputs / "cat" / "effilora.safetensors").read_bytes())
    before = {path: path.stat().st_mtime_ns for path in session.outputs.rglob("*") if path.is_file()}
    for name, word in (("cat", "finished run"), ("half", "unfinished run"), ("dog", "an adapter named dog"),
                       ("class images", "reserved"), ("history", "reserved")):  # fmt: skip
        _, text = tab.begin(files, [], "a cat", name, "fast", *by_hand(session))
        assert word in text, name
        *_, (_, text) = tab.check_first(files, [], "a cat", name, "fast", *by_hand(session))
        assert word in text, name
    assert {path: path.stat().st_mtime_ns for path in session.outputs.rglob("*") if path.is_file()} == before


def test_a_run_is_checked_before_it_is_trained(session, tmp_path):
    tab = built(TrainTab, session)
    files = [str(path) for path in make_subject(tmp_path / "p", 2).iterdir()]
    before = sorted(session.outputs.iterdir())
    *_, (report, text) = tab.check_first(files, [], "a sks cat", "new", "fast", *by_hand(session, rank=2))
    assert text == "Nothing is in the way."
    assert "images      2, 1 distinct caption, at" in report["value"]
    assert "rank 2, 3 heads" in report["value"]
    (tmp_path / "p" / "0.png").write_bytes(b"none")
    (tmp_path / "p" / "1.png").write_bytes(b"none")
    *_, (report, text) = tab.check_first(files, [], "a sks cat", "new", "fast", *by_hand(session))
    assert text.startswith("**It would not start:**")
    assert not report["visible"]
    assert sorted(session.outputs.iterdir()) == before


def test_an_open_page_is_sent_a_run_only_when_it_moves(session):
    tab = built(TrainTab, session)
    *first, seen = tab.watch("cat", None)
    assert "step 4 of 4" in first[0]
    assert image_size(first[2])[0] > 100
    *again, same = tab.watch("cat", seen)
    assert same == seen
    assert again == [gr.skip()] * len(tab.shown)
    shutil.rmtree(session.outputs / "cat" / "samples")
    *moved, _ = tab.watch("cat", seen)
    assert moved[2] is None  # no image of before, or of another run, is left
    assert tab.watch(None, seen)[0] == "No run yet."


def test_a_image_that_pages_load_is_not_written_again(session, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "cache"))
    train, adapters = built(TrainTab, session), built(AdaptersTab, session)
    for component, look in (
        (train.sample, lambda: train.look("cat")[2]),
        (adapters.image, lambda: adapters.show("cat")[1]["value"]),
    ):
        served = Path(component.postprocess(look()).path)
        served.write_bytes(served.read_bytes() + b"mark")  # else a page could get half of it
        assert Path(component.postprocess(look()).path) == served
        assert served.read_bytes().endswith(b"mark")


def test_a_run_s_active_layers_are_shown(session, place, tmp_path):
    options = {"max_train_steps": 8, "reducer": "importance", "reducer_warmup": 2, "reducer_interval": 2}
    trainer(place / "model", make_subject(tmp_path / "s", 2), session.outputs / "dog", **options).run()
    (session.outputs / "dog" / "run.json").write_text("{}")
    figure = built(TrainTab, session).look("dog")[3]
    assert "Layers trained over time" in figure
    assert "Importance over time" in figure


def test_runs_that_are_not_there_are_told_so(session):
    tab = built(TrainTab, session)
    assert tab.look(None)[0] == "No run yet."
    assert "Nothing has been trained" in tab.look("dog")[0]
    assert "not running" in tab.end("dog")
    assert "Not resumed" in tab.go_on("dog")
    for name in ("../cat", "/etc"):
        assert "name" in tab.look(name)[0]
        assert "Not stopped" in tab.end(name)


# --------------------------------------------------------------------------------------------------------- adapters


def test_the_card_says_what_an_adapter_is(session):
    tab = built(AdaptersTab, session)
    card, image = tab.show("cat")
    for word in ("a sks cat", "rank 4, 3 heads, token routing", "4 steps on 2 images", "of the update missing"):
        assert word in card
    assert image["visible"]
    assert "no adapter named" in tab.show("../../etc/passwd")[0]


def test_an_adapter_is_brought_used_exported_and_deleted(session, tmp_path):
    tab = built(AdaptersTab, session)
    file = tmp_path / "my <b>fine<b> cat.safetensors"
    shutil.copyfile(session.outputs / "cat" / "effilora.safetensors", file)
    update, text = tab.bring(str(file))
    name = update["value"]
    assert text == f"{name} is here."
    assert "<" not in name
    assert session.adapter_path(name).parent == session.uploads
    for format in ("diffusers", "kohya", "peft", "as it is"):
        shown, text = tab.write(name, format)
        assert shown["visible"], text
        assert Path(shown["value"]).parent == session.exports
    shown, text = tab.write(name, "merged")
    assert not shown["visible"]
    assert (session.exports / f"{name}-merged" / "model_index.json").is_file()
    assert "Not exported" in tab.write(name, "pickle")[1]
    assert "Not deleted" in tab.remove(name, False)[2]
    assert tab.remove(name, True)[2] == f"{name} is deleted."
    assert name not in session.adapters()
    assert "cat" in session.adapters()


def test_a_plain_adapter_that_fits_in_part_is_told_so(session, tmp_path):
    tab = built(AdaptersTab, session)
    whole = load_file(session.outputs / "cat" / "pytorch_lora_weights.safetensors")
    layers = len(whole) // 2
    more = {key.replace("down_blocks.1", "down_blocks.7"): value.clone() for key, value in whole.items()}
    added = len({*more} - {*whole}) // 2
    assert added
    save_file(whole, tmp_path / "whole.safetensors")
    save_file({**whole, **more}, tmp_path / "part.safetensors")
    assert tab.bring(str(tmp_path / "whole.safetensors"))[1] == "whole is here."
    text = tab.bring(str(tmp_path / "part.safetensors"))[1]
    assert f"acts on {layers} of its {layers + added} layers" in text


def bad_files(folder, place):
    """Files that are no adapter of this model, by what is wrong with them."""
    native = (place / "outputs" / "cat" / "effilora.safetensors").read_bytes()
    (folder / "text.safetensors").write_text("hello")
    (folder / "cut.safetensors").write_bytes(native[: len(native) // 2])
    (folder / "changed.safetensors").write_bytes(native[:-4] + b"\0\0\1\1")
    save_file({"a": torch.zeros(1)}, folder / "other.safetensors")
    pair = {"unet.mid_block.attentions.0.to_q.lora_A.weight": torch.ones(4, 77)}
    save_file(
        {**pair, "unet.mid_block.attentions.0.to_q.lora_B.weight": torch.ones(77, 4)}, folder / "flux.safetensors"
    )
    save_file({"lora_unet_x.hada_w1_a": torch.ones(2, 2)}, folder / "loha.safetensors")
    plain = load_file(place / "outputs" / "cat" / "pytorch_lora_weights.safetensors")
    save_file(
        {key: value * (0 if "lora_B" in key else 1) for key, value in plain.items()}, folder / "zero.safetensors"
    )
    save_file({key: value * float("nan") for key, value in plain.items()}, folder / "nan.safetensors")
    torch.save({"x": 1}, folder / "pickle.safetensors")
    return sorted(folder.iterdir())


def test_files_that_can_t_be_used_are_refused_in_words(session, place, tmp_path):
    tab = built(AdaptersTab, session)
    (tmp_path / "bad").mkdir()
    before = dict(session.adapters())
    for file in bad_files(tmp_path / "bad", place):
        text = tab.bring(str(file))[1]
        assert text.startswith("**Not taken:**"), file
        assert len(text) > 30
    assert session.adapters() == before


def test_files_that_lie_among_the_adapters_damaged_break_nothing(session):
    (session.uploads / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    tab = built(AdaptersTab, session)
    _, card, _ = tab.refresh(None)
    assert "not a readable safetensors file" in card
    assert "Not exported" in tab.write("cut", "diffusers")[1]
    make_page(session)


def test_a_file_s_words_about_itself_never_replace_what_is_measured(session):
    content = load_adapter_file(session.outputs / "cat" / "effilora.safetensors")
    lies = {"config": 5, "layers": [1], "parameters": "many", "heads_used": "all", "export_error": "none", "exact_export": True,
            "trigger_prompt": "x`\n\n![a](http://evil.example/t.png)<img src=x>", "steps": {"a": 1}}  # fmt: skip
    save_adapter_file(session.uploads / "evil.safetensors", AdapterFile(content.adapter, lies, content.calibration))
    card, _ = built(AdaptersTab, session).show("evil")
    assert "rank 4, 3 heads, token routing" in card
    assert "of the update missing" in card
    for tab in (built(InspectTab, session),):
        assert "How much each layer changes" in tab.show("evil")[0]
    slot = AdapterRow(session, 1)
    for text in (card, slot.chosen("evil")[1]):
        assert "](" not in text
        assert "<img" not in text
        assert "://" not in text


def test_a_sample_is_drawn_and_shown(session):
    tab = built(AdaptersTab, session)
    before = tab.show("cat")[1]["value"]
    *_, (_, image, text, *_) = tab.draw_sample(SimpleNamespace(session_hash="visitor"), "cat")
    assert text == "The sample is kept beside the adapter."
    assert image_size(image["value"]) != image_size(before)  # the new one, not the run's
    assert (session.outputs / "cat" / "sample.png").exists()


def test_names_of_the_command_line_s_runs_are_taken_as_they_are(session):
    (session.outputs / "cat").rename(session.outputs / "cat v1.0")
    assert built(TrainTab, session).runs() == ["cat v1.0"]
    assert "Done" in built(TrainTab, session).look("cat v1.0")[0]
    tab = built(AdaptersTab, session)
    assert "rank 4" in tab.show("cat v1.0")[0]
    assert tab.remove("cat v1.0", True)[2] == "cat v1.0 is deleted."
    os.utime(session.outputs / "cat v1.0" / "metrics.jsonl", (0, 0))  # not just now
    assert "deleted" in built(TrainTab, session).look("cat v1.0")[0]


def test_two_adapters_of_one_name_are_told_apart(session):
    (session.uploads / "cat.safetensors").write_bytes((session.outputs / "cat" / "effilora.safetensors").read_bytes())
    found = session.adapters()
    assert len(found) == 2
    assert len({label.removesuffix(" (brought)") for label in found}) == 1


def test_an_adapter_of_another_base_is_explained(place, tmp_path):
    build("sd15").save_pretrained(tmp_path / "model")
    tab = built(AdaptersTab, Session(str(tmp_path / "model"), tmp_path / "outputs"))
    for name in ("effilora", "pytorch_lora_weights"):
        _, text = tab.bring(str(place / "outputs" / "cat" / f"{name}.safetensors"))
        assert text.startswith("**Not taken:**")
        assert "made for another base" in text
    assert not tab.session.adapters()


def two_concepts(session, folder):
    """A run's folder with an adapter of two concepts and its plain LoRAs; returns its name."""
    content = load_adapter_file(session.outputs / "cat" / "effilora.safetensors")
    concepts = (Concept("cat", ("sks", "tom"), "a photo of sks cat"), Concept("dog", ("zwx",)))
    config = replace(content.adapter.config, routing="concept", heads=2, concepts=concepts)
    facts = {**content.metadata, "trigger_prompt": "a sks cat"}
    folder.mkdir()
    save_adapter_file(
        folder / "effilora.safetensors", AdapterFile(randomise(EffiLoRA(config, content.adapter.sites)), facts)
    )
    for concept in concepts:
        for name in plain_names(concept.name):
            (folder / name).write_bytes(b"")
    (folder / "pytorch_lora_weights_mine.safetensors").write_bytes(b"")
    return folder.name


def test_an_adapter_of_several_concepts_shows_what_a_prompt_may_name(session):
    name = two_concepts(session, session.outputs / "two")
    slot, tab = AdapterRow(session, 1), built(AdaptersTab, session)
    _, words, insert, triggers = slot.chosen(name)
    assert words == "Several subjects: each is drawn where the prompt has its trigger."
    assert not insert["visible"]
    assert triggers.raw_samples == [["sks"], ["tom"], ["zwx"]]
    assert slot.put_trigger("a hat", name, ["zwx"]) == "a hat, zwx"
    assert slot.put_trigger("", name, ["zwx"]) == "zwx"
    assert slot.put_trigger("", name, ["tom"]) == "a photo of sks cat"
    assert "__type__" in slot.put_trigger("a zwx hat", name, ["zwx"])
    assert "__type__" in slot.put_trigger("a hat", name, ["fox"])
    assert not slot.chosen("cat")[3].visible
    assert slot.fill("", name) == "a sks cat"
    assert "cat: sks, tom; dog: zwx" in tab.show(name)[0]
    assert "several concepts (cat, dog)" in tab.write(name, "diffusers")[1]
    assert tab.remove(name, True)[2] == "two is deleted."
    assert [path.name for path in (session.outputs / "two").iterdir()] == ["pytorch_lora_weights_mine.safetensors"]


def test_the_leakage_grid_has_a_row_per_prompt_and_a_column_per_head(session):
    name = two_concepts(session, session.outputs / "two")
    tab, visit = built(CompareTab, session), SimpleNamespace(session_hash="visitor")
    *_, (_, grid, text, *_) = tab.draw_leakage(visit, "", name, 1.0, 0, 1, 2.0, 32)
    assert text == READING + " Without a trigger the image is the base's, pixel for pixel."
    rows = ["a photo of sks cat", "zwx", "a photo of sks cat and zwx", "a photo of cat"]
    columns = ["base", "adapter", "sks always", "zwx always"]
    concepts = session.concepts_of(name)
    assert leakage_prompts(concepts) == rows
    assert [column.label for column in leakage_columns(concepts)] == columns
    assert image_size(grid["value"])[1] > 4 * 128
    *_, (_, _, refused, *_) = tab.draw_leakage(visit, "", "cat", 1.0, 0, 1, 2.0, 32)
    assert "no subjects to tell apart" in refused


def subject_fields(*subjects):
    """The fields of the list of subjects, as the page sends them."""
    empty = [None, "", "", "", 1]
    return [value for one in (*subjects, *[empty] * (MOST_SUBJECTS - len(subjects))) for value in one]


def two_subjects(tmp_path):
    found = []
    for number, (trigger, thing) in enumerate((("sks", "cat"), ("zwx", "dog"))):
        files = sorted(map(str, make_subject(tmp_path / thing, 2, first=10 * number).glob("*.png")))
        found.append([files, trigger, f"a photo of {trigger} {thing}", f"a photo of {thing}", 1 + number])
    return found


def test_several_subjects_are_trained_each_with_a_head_of_its_own(session, tmp_path):
    tab = built(TrainTab, session)
    hand = {"max_train_steps": "2", "num_validation_images": 1, "resolution": 32, "validation_inference_steps": "2"}
    fields, advanced = subject_fields(*two_subjects(tmp_path)), by_hand(session, **hand)
    *_, (report, text) = tab.check_several("both", "quick", 2, *fields, *advanced)
    assert text == "Nothing is in the way."
    assert (
        "concepts    sks: 'sks', 2 images, 33% of the rows\n            zwx: 'zwx', 2 images, 67%" in report["value"]
    )
    assert "class       no images, the class prompts go with" in report["value"]
    _, text = tab.begin_several("both", "quick", 2, *fields, *advanced)
    assert text == "Starting ..."
    run = Run(session.outputs, "both")
    while run.running:
        time.sleep(0.2)
    assert run.status().state == "done", run.status().message
    concepts = session.concepts_of("both")
    assert [(one.name, one.class_prompt) for one in concepts] == [("sks", "a photo of cat"), ("zwx", "a photo of dog")]
    assert "zwx: 'zwx'" in tab.look("both")[4]["value"]
    assert (session.outputs / "both" / "pytorch_lora_weights_zwx.safetensors").exists()


@pytest.mark.parametrize(
    ("number", "field", "value", "words"),
    [
        (2, 0, None, "subject 2 has no images"),
        (1, 1, "", "subject 1 has no trigger"),
        (2, 2, " ", "subject 2 has no trigger prompt"),
        (2, 2, "a photo of dog", "the trigger prompt of subject 2 does not contain its trigger"),
        (2, 3, "", "subject 2 has no class prompt, others have"),
        (1, 4, 0, "the weight of subject 1 must be a number"),
        (1, 2, "a sks cat with zwx dog", "contains the trigger 'zwx' of subject 2"),
        (2, 1, "SKS", "does not contain its trigger"),
    ],
)
def test_subjects_that_can_not_be_trained_are_refused_in_a_sentence(session, tmp_path, number, field, value, words):
    tab, subjects = built(TrainTab, session), two_subjects(tmp_path)
    subjects[number - 1][field] = value
    _, text = tab.begin_several("both", "quick", 2, *subject_fields(*subjects), *by_hand(session))
    assert text.startswith("**Not started:**")
    assert words in text
    assert not (session.outputs / "both").exists()
    assert not (session.outputs / "datasets").exists()


def test_images_of_a_subject_that_can_not_be_used_are_named(session, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    good = str(next(make_subject(tmp_path / "cat", 1).glob("*.png")))
    assert images_note([good, str(tmp_path / "broken.png")]).startswith(
        "1 image can be used. **Not used:** broken.png ("
    )
    tab, subjects = built(TrainTab, session), two_subjects(tmp_path)
    subjects[1][0] = [str(tmp_path / "broken.png")]
    _, text = tab.begin_several("both", "quick", 2, *subject_fields(*subjects), *by_hand(session))
    assert "subject 2: " in text
    assert not (session.outputs / "both").exists()


def test_subjects_are_added_and_removed_between_two_and_six():
    assert SubjectsForm.resized(2, 1)[0] == 3
    assert [update["visible"] for update in SubjectsForm.resized(2, 1)[1:]] == [True] * 3 + [False] * 3
    assert SubjectsForm.resized(6, 1)[0] == 6
    assert SubjectsForm.resized(2, -1)[0] == 2

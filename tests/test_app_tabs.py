"""The Train and Adapters tabs without a browser: what their handlers accept, refuse and say."""

import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import pytest
import torch
from app_forms import built, by_hand, image_size
from helpers import edit_json, make_subject, trainer
from safetensors.torch import load_file, save_file
from tiny_families import build

from effilora_diffusion.core import AdapterFile, load_adapter_file, save_adapter_file
from effilora_diffusion.core.run_folder import trim_log
from effilora_diffusion.diffusion.config import TrainingConfig
from effilora_diffusion.studio.adapter_row import AdapterRow
from effilora_diffusion.studio.brought import key_of
from effilora_diffusion.studio.runs import Run
from effilora_diffusion.studio.server import make_page
from effilora_diffusion.studio.session import Session
from effilora_diffusion.studio.tabs.adapters import AdaptersTab
from effilora_diffusion.studio.tabs.inspect import InspectTab
from effilora_diffusion.studio.tabs.runs import RunsTab
from effilora_diffusion.studio.tabs.train import TrainTab
from effilora_diffusion.studio.train_form import (
    PRESET_FIELDS,
    component_of,
    from_component,
    run_settings,
    shown_fields,
    usual_settings,
)

# ------------------------------------------------------------------------------------------------------------ train


def test_a_run_is_started_with_its_own_images_and_captions(session, tmp_path):
    tab = built(TrainTab, session)
    files = [str(path) for path in sorted(make_subject(tmp_path / "p", 2).iterdir())]
    cards = [{"key": key_of(Path(files[0])), "caption": "a red one"}, {"key": key_of(Path(files[1])), "caption": " "}]
    hand = {"max_train_steps": 3, "num_validation_images": 1, "validation_inference_steps": 1, "train_batch_size": 1,
            "export_distillation_steps": 1}  # fmt: skip
    advanced = by_hand(session, **hand)
    name, button, text = tab.begin(files, cards, False, "a sks cat", "new cat", "fast", *advanced)
    assert (name, button["visible"], text) == ("new cat", True, "new cat is being trained.")
    data = session.outputs / "datasets" / "new cat"
    assert (data / "000-0.txt").read_text() == "a red one"
    assert not (data / "001-1.txt").exists()
    run, end = Run(session.outputs, "new cat"), time.monotonic() + 600
    while run.status().state != "done":
        assert time.monotonic() < end, run.status()
        time.sleep(0.2)
    assert [line["step"] for line in run.status().metrics] == [1, 2, 3]
    assert "steps       3, batch size" in run.report()
    assert "new cat" in session.adapters()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"files": None}, "no images"),
        ({"prompt": " "}, "trigger prompt is missing"),
        ({"name": "../x"}, "name"),
        ({"name": ""}, "enter a name"),
        ({"files": ["x"] * 201}, "201 images"),
        ({"preset": "fastest"}, "preset"),
        ({"name": "cat"}, "finished run"),
        ({"resolution": 33}, "--resolution"),
        ({"learning_rate": -1.0}, "--learning_rate"),
        ({"max_train_steps": "many"}, "fill in every number: Steps must be a whole number"),
        ({"snr_gamma": "strong"}, "fill in every number: Min-SNR gamma must be a number"),
    ],
)
def test_what_can_t_be_trained_is_said(session, tmp_path, change, word):
    tab = built(TrainTab, session)
    files = [str(path) for path in make_subject(tmp_path / "p", 2).iterdir()]
    form = {"files": files, "prompt": "a cat", "name": "dog", "preset": "fast", **change}
    advanced = by_hand(session, **change)
    *_, text = tab.begin(form["files"], [], False, form["prompt"], form["name"], form["preset"], *advanced)
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


def test_a_refused_start_touches_nothing_that_is_there(session, place, tmp_path):
    tab = built(TrainTab, session)
    files = [str(path) for path in make_subject(tmp_path / "p", 2).iterdir()]
    data = make_subject(session.outputs / "datasets" / "cat", 3)
    options = {"max_train_steps": 4, "checkpointing_steps": 2, "num_validation_images": 0}
    trainer(place / "model", data, session.outputs / "half", **options).run()
    (session.outputs / "half" / "effilora.safetensors").unlink()  # as a run that was stopped before its end
    trim_log(session.outputs / "half" / "metrics.jsonl", 3)
    edit_json(session.outputs / "half" / ".run.json", finished=False)
    (session.uploads / "dog.safetensors").write_bytes((session.outputs / "cat" / "effilora.safetensors").read_bytes())
    before = {path: path.stat().st_mtime_ns for path in session.outputs.rglob("*") if path.is_file()}
    for name, word in (("cat", "finished run"), ("half", "unfinished run"), ("dog", "an adapter named dog"),
                       ("class images", "reserved"), ("history", "reserved")):  # fmt: skip
        *_, text = tab.begin(files, [], False, "a cat", name, "fast", *by_hand(session))
        assert word in text, name
        *_, (_, text) = tab.check_first(files, [], False, "a cat", name, "fast", *by_hand(session))
        assert word in text, name
    assert {path: path.stat().st_mtime_ns for path in session.outputs.rglob("*") if path.is_file()} == before


def test_a_run_is_checked_before_it_is_trained(session, tmp_path):
    tab = built(TrainTab, session)
    files = [str(path) for path in make_subject(tmp_path / "p", 2).iterdir()]
    before = sorted(session.outputs.iterdir())
    *_, (report, text) = tab.check_first(files, [], False, "a sks cat", "new", "fast", *by_hand(session, rank=2))
    assert text == "Nothing is in the way."
    assert '<th scope="row">Images</th><td>2, 1 distinct caption, at' in report["value"]
    assert "rank 2, 1 head" in report["value"]
    (tmp_path / "p" / "0.png").write_bytes(b"none")
    (tmp_path / "p" / "1.png").write_bytes(b"none")
    *_, (report, text) = tab.check_first(files, [], False, "a sks cat", "new", "fast", *by_hand(session))
    assert text.startswith("**It would not start:**")
    assert not report["visible"]
    assert sorted(session.outputs.iterdir()) == before


def test_a_image_that_pages_load_is_not_written_again(session, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "cache"))
    image = built(AdaptersTab, session).image
    look = built(AdaptersTab, session).show
    served = Path(image.postprocess(look("cat")[1]["value"]).path)
    served.write_bytes(served.read_bytes() + b"mark")  # else a page could get half of it
    assert Path(image.postprocess(look("cat")[1]["value"]).path) == served
    assert served.read_bytes().endswith(b"mark")


# --------------------------------------------------------------------------------------------------------- adapters


def test_the_card_says_what_an_adapter_is(session):
    tab = built(AdaptersTab, session)
    card, image = tab.show("cat")
    for word in ("a sks cat", "rank 4, 3 heads, token routing", "4 steps on 2 images", "of the update missing"):
        assert word in card
    assert image["visible"]
    assert "no adapter named" in tab.show("../../etc/passwd")[0]


def another(source, target):
    """An adapter file with the same weights that says something else of itself."""
    content = load_adapter_file(source)
    save_adapter_file(target, AdapterFile(content.adapter, {**content.metadata, "copy": 1}, content.calibration))


def test_the_same_file_is_added_once(session, tmp_path):
    tab = built(AdaptersTab, session)
    for name in ("first", "second"):
        shutil.copyfile(session.outputs / "cat" / "pytorch_lora_weights.safetensors", tmp_path / f"{name}.safetensors")
    assert tab.bring(str(tmp_path / "first.safetensors"))[1] == "first is here."
    update, text = tab.bring(str(tmp_path / "second.safetensors"))
    assert text == "This file is here already, as first: nothing was added."
    assert update["value"] == "first"
    assert set(session.adapters()) == {"first", "cat"}


def test_cards_have_what_is_noted_and_are_found_by_it(session):
    tab = built(AdaptersTab, session)
    (session.uploads / "plain.safetensors").write_bytes(
        (session.outputs / "cat" / "pytorch_lora_weights.safetensors").read_bytes()
    )
    cards = tab.found("", "cat")
    assert 'data-name="cat" aria-pressed="true"><img src="gradio_api/file=' in cards
    assert 'alt="Sample image of cat"' in cards
    assert "EffiLoRA, rank 4, model, " in cards
    assert 'data-name="plain" aria-pressed="false"><span class="no-image"' in cards
    before = (session.outputs / "cat" / "effilora.safetensors").read_bytes()
    assert tab.save_note("cat", "pets, <b>", "my friend's") == "Tags and note saved."
    assert (session.outputs / "cat" / "effilora.safetensors").read_bytes() == before
    assert built(AdaptersTab, session).noted("cat") == ("pets, <b>", "my friend's")
    for query, found in (("pets sks", ["cat"]), ("friend", ["cat"]), ("rank", ["plain", "cat"]), ("lora", ["plain", "cat"]),
                         ("dog", [])):  # fmt: skip
        assert [one.name for one in tab.shelf.find(query)] == found, query
    assert "<b>" not in tab.found("", None)
    assert "no adapter named" in tab.save_note("../cat", "", "")
    tab.remove("cat")
    assert tab.shelf.notes.all() == {}


def test_an_adapter_is_brought_used_exported_and_deleted(session, tmp_path):
    tab = built(AdaptersTab, session)
    file = tmp_path / "my <b>fine<b> cat.safetensors"
    another(session.outputs / "cat" / "effilora.safetensors", file)
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
    assert tab.ask(name) == (name, f"Delete the adapter {name} from the disk? It can't be undone.")
    assert "no adapter named" in tab.ask("../cat")[1]
    assert tab.remove(name)[1] == f"{name} is deleted."
    assert "Not deleted" in tab.remove(name)[1]
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
    _, card, *_, cards = tab.refresh(None)
    assert "not a readable safetensors file" in card
    assert "damaged: it can&#x27;t be read" in cards
    assert "Not exported" in tab.write("cut", "diffusers")[1]
    make_page(session)


def test_a_file_s_words_about_itself_never_replace_what_is_measured(session):
    content = load_adapter_file(session.outputs / "cat" / "effilora.safetensors")
    lies = {"config": 5, "layers": [1], "parameters": "many", "heads_used": "all", "export_error": "none", "exact_export": True,
            "trigger_prompt": "x`\n\n![a](http://evil.example/t.png)<img src=x>", "steps": {"a": 1}}  # fmt: skip
    save_adapter_file(session.uploads / "evil.safetensors", AdapterFile(content.adapter, lies, content.calibration))
    card, _ = built(AdaptersTab, session).show("evil")
    assert "rank 4, 3 heads, token routing" in card
    assert "a fit, not yet measured" in card  # neither exact, as the file says, nor of a size that it can't give
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
    assert text == "The sample image is kept beside the adapter."
    assert image_size(image["value"]) != image_size(before)  # the new one, not the run's
    assert (session.outputs / "cat" / "sample.png").exists()


def test_names_of_the_command_line_s_runs_are_taken_as_they_are(session):
    (session.outputs / "cat").rename(session.outputs / "cat v1.0")
    assert [name for _, name in built(RunsTab, session).names()] == ["cat v1.0"]
    assert "Done" in Run(session.outputs, "cat v1.0").status().message
    tab = built(AdaptersTab, session)
    assert "rank 4" in tab.show("cat v1.0")[0]
    assert tab.remove("cat v1.0")[1] == "cat v1.0 is deleted."
    os.utime(session.outputs / "cat v1.0" / "metrics.jsonl", (0, 0))  # not just now
    assert "deleted" in Run(session.outputs, "cat v1.0").status().message


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

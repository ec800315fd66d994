"""The Train and Adapters tabs without a browser: what their handlers accept, refuse and say."""

import shutil
import time
from pathlib import Path

import gradio as gr
import pytest
import torch
from helpers import make_subject, trainer
from safetensors.torch import save_file
from tiny_families import build

from app.adapters import AdaptersTab
from app.studio import Studio
from app.train import TrainTab, component_of, from_component, shown_fields
from effilora_diffusion.diffusion.settings import TrainingConfig


def built(kind, studio):
    with gr.Blocks():
        tab = kind(studio)
        tab.build()
    return tab


def by_hand(**changes):
    """The advanced section as it is shown, with some fields changed."""
    with gr.Blocks():
        return [changes.get(entry.name, component_of(entry).value) for entry in shown_fields()]


# ------------------------------------------------------------------------------------------------------------ train


def test_every_picture_is_checked_at_once_with_its_reason(studio, tmp_path):
    tab = built(TrainTab, studio)
    folder = make_subject(tmp_path / "p", 2, size=(300, 300))
    (folder / "bad.png").write_bytes(b"no picture")
    (folder / "empty.png").write_bytes(b"")
    (folder / "twice.png").write_bytes((folder / "0.png").read_bytes())
    rows = tab.check([str(path) for path in sorted(folder.iterdir())])
    assert [row[0] for row in rows] == ["0.png", "1.png", "bad.png", "empty.png", "twice.png"]
    assert [row[1].startswith("good, 300 x 300") for row in rows] == [True, True, False, False, True]
    assert "empty" in rows[3][1]
    assert "the same file as 0.png" in rows[4][1]
    assert str(tmp_path) not in str(rows)


def test_a_run_is_started_with_its_own_pictures_and_captions(studio, tmp_path):
    tab = built(TrainTab, studio)
    files = [str(path) for path in sorted(make_subject(tmp_path / "p", 2).iterdir())]
    rows = [["0.png", "good", "a red one"], ["1.png", "good", ""]]
    hand = {"max_train_steps": 3, "num_validation_images": 1, "validation_inference_steps": 1, "train_batch_size": 1}
    advanced = by_hand(**hand)
    update, text = tab.begin(files, rows, "a sks cat", "new cat", "quick", *advanced)
    assert text == "Starting ..."
    assert update["value"] == "new cat"
    data = studio.outputs / "datasets" / "new cat"
    assert (data / "000-0.txt").read_text() == "a red one"
    assert not (data / "001-1.txt").exists()
    end = time.monotonic() + 90
    while "Done" not in tab.look("new cat")[0]:
        assert time.monotonic() < end, tab.look("new cat")[0]
        time.sleep(0.2)
    text, curve, sample, layers, report = tab.look("new cat")
    assert "step 3 of 3" in text
    assert list(curve["step"][curve["curve"] == "every step"]) == [1, 2, 3]
    assert sample.width > 100
    assert layers == ""  # the Reducer was off
    assert "steps       3 of" in report["value"]
    assert "new cat" in studio.adapters()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"files": None}, "no pictures"),
        ({"prompt": " "}, "prompt is missing"),
        ({"name": "../x"}, "name"),
        ({"name": ""}, "name"),
        ({"preset": "fastest"}, "preset"),
        ({"name": "cat"}, "finished run"),
        ({"resolution": 33}, "--resolution"),
        ({"learning_rate": -1.0}, "--learning_rate"),
        ({"max_train_steps": "many"}, "--max_train_steps must be a whole number"),
        ({"snr_gamma": "strong"}, "--snr_gamma must be a number"),
    ],
)
def test_what_can_t_be_trained_is_said(studio, tmp_path, change, word):
    tab = built(TrainTab, studio)
    files = [str(path) for path in make_subject(tmp_path / "p", 2).iterdir()]
    form = {"files": files, "prompt": "a cat", "name": "dog", "preset": "quick", **change}
    advanced = by_hand(**change)
    _, text = tab.begin(form["files"], [], form["prompt"], form["name"], form["preset"], *advanced)
    assert text.startswith("**Not started:**")
    assert word in text
    assert (studio.outputs / "cat" / "effilora.safetensors").exists()


def test_the_advanced_section_is_the_trainer_s_own_configuration():
    with gr.Blocks():
        shown = {entry.name: component_of(entry) for entry in shown_fields()}
    defaults = TrainingConfig()
    for entry in shown_fields():
        assert from_component(entry, shown[entry.name].value) == getattr(defaults, entry.name), entry.name
        assert shown[entry.name].info == entry.metadata["help"]
    assert {"rank", "heads", "routing", "reducer", "quantization", "lr_scheduler"} <= shown.keys()


def test_a_run_is_checked_before_it_is_trained(studio, tmp_path):
    tab = built(TrainTab, studio)
    files = [str(path) for path in make_subject(tmp_path / "p", 2).iterdir()]
    before = sorted(studio.outputs.iterdir())
    *_, (report, text) = tab.check_first(files, [], "a sks cat", "", "quick", *by_hand(rank=2))
    assert text == "Nothing is in the way."
    assert "pictures    2 with 1 different captions" in report["value"]
    assert "rank 2, 3 heads" in report["value"]
    (tmp_path / "p" / "0.png").write_bytes(b"none")
    (tmp_path / "p" / "1.png").write_bytes(b"none")
    *_, (report, text) = tab.check_first(files, [], "a sks cat", "", "quick", *by_hand())
    assert text.startswith("**It would not start:**")
    assert not report["visible"]
    assert sorted(studio.outputs.iterdir()) == before


def test_a_run_s_active_layers_are_shown(studio, place, tmp_path):
    options = {"max_train_steps": 8, "reducer": "importance", "reducer_warmup": 2, "reducer_interval": 2}
    trainer(place / "model", make_subject(tmp_path / "s", 2), studio.outputs / "dog", **options).run()
    (studio.outputs / "dog" / "run.json").write_text("{}")
    figure = built(TrainTab, studio).look("dog")[3]
    assert "Layers trained over time" in figure
    assert "Importance over time" in figure


def test_runs_that_are_not_there_are_told_so(studio):
    tab = built(TrainTab, studio)
    assert tab.look(None)[0] == "No run yet."
    assert "Nothing has been trained" in tab.look("dog")[0]
    assert "not running" in tab.end("dog")
    assert "Not resumed" in tab.go_on("dog")
    for name in ("../cat", "/etc"):
        assert "name" in tab.look(name)[0]
        assert "Not stopped" in tab.end(name)


# --------------------------------------------------------------------------------------------------------- adapters


def test_the_card_says_what_an_adapter_is(studio):
    tab = built(AdaptersTab, studio)
    card, picture = tab.show("cat")
    for word in ("a sks cat", "rank 4, 3 heads, token routing", "4 steps on 2 pictures", "of the update missing"):
        assert word in card
    assert picture["visible"]
    assert "no adapter named" in tab.show("../../etc/passwd")[0]


def test_an_adapter_is_brought_used_exported_and_deleted(studio, tmp_path):
    tab = built(AdaptersTab, studio)
    file = tmp_path / "my <b>fine<b> cat.safetensors"
    shutil.copyfile(studio.outputs / "cat" / "effilora.safetensors", file)
    update, text = tab.bring(str(file))
    name = update["value"]
    assert text == f"{name} is here."
    assert "<" not in name
    assert studio.adapter_path(name).parent == studio.uploads
    for format in ("diffusers", "kohya", "peft", "as it is"):
        shown, text = tab.write(name, format)
        assert shown["visible"], text
        assert Path(shown["value"]).parent == studio.exports
    shown, text = tab.write(name, "merged")
    assert not shown["visible"]
    assert (studio.exports / f"{name}-merged" / "model_index.json").is_file()
    assert "Not exported" in tab.write(name, "pickle")[1]
    assert "Not deleted" in tab.remove(name, False)[2]
    assert tab.remove(name, True)[2] == f"{name} is deleted."
    assert name not in studio.adapters()
    assert "cat" in studio.adapters()


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
    torch.save({"x": 1}, folder / "pickle.safetensors")
    return sorted(folder.iterdir())


def test_files_that_can_t_be_used_are_refused_in_words(studio, place, tmp_path):
    tab = built(AdaptersTab, studio)
    (tmp_path / "bad").mkdir()
    before = dict(studio.adapters())
    for file in bad_files(tmp_path / "bad", place):
        text = tab.bring(str(file))[1]
        assert text.startswith("**Not taken:**"), file
        assert len(text) > 30
    assert studio.adapters() == before


def test_an_adapter_of_another_base_is_explained(place, tmp_path):
    build("sd15").save_pretrained(tmp_path / "model")
    tab = built(AdaptersTab, Studio(str(tmp_path / "model"), tmp_path / "outputs"))
    for name in ("effilora", "pytorch_lora_weights"):
        _, text = tab.bring(str(place / "outputs" / "cat" / f"{name}.safetensors"))
        assert text.startswith("**Not taken:**")
        assert "made for another base" in text
    assert not tab.studio.adapters()

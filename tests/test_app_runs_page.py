"""The Runs tab without a browser: what it shows of a run, and what can be done with it."""

import json
import re
import shutil
from itertools import pairwise
from pathlib import Path

import gradio as gr
import pytest
from app_forms import built, by_hand
from helpers import make_subject, trainer

from effilora_diffusion.core import phases
from effilora_diffusion.core.phases import PhaseFile
from effilora_diffusion.core.run_folder import RunFolder
from effilora_diffusion.diffusion.training.checkpoints import IMAGE_RUN
from effilora_diffusion.studio.brought import key_of
from effilora_diffusion.studio.run_files import log_of
from effilora_diffusion.studio.run_view import checkpoint_choices, reference
from effilora_diffusion.studio.runs import Run
from effilora_diffusion.studio.tabs.runs import NONE_YET, RunsTab
from effilora_diffusion.studio.tabs.train import ONE, TrainTab
from effilora_diffusion.studio.train_form import shown_fields
from effilora_diffusion.studio.training_data import one_subject


@pytest.fixture
def tab(session):
    return built(RunsTab, session)


@pytest.fixture
def training(session):
    """The run ``cat`` while somebody trains it."""
    folder = RunFolder(session.outputs / "cat", IMAGE_RUN)
    folder.claim(overwrite=True, checkpoint=None)
    yield folder
    folder.release()


def shown(tab, name, log=False):
    """What the tab shows of a run, by component."""
    names = ["status", "progress", "stop", "resume", "details", "plot", "scores", "checkpoint", "use", "samples", "layers_box",
             "layers", "report_box", "report"]  # fmt: skip
    assert [getattr(tab, one) for one in names] == tab.shown
    return dict(zip(names, tab.look(name, log), strict=True))


def scored(session, **scores):
    """The run ``cat`` with more checkpoints, and scores by which one of them is the best."""
    folder = session.outputs / "cat"
    for step in (1, 2):
        shutil.copytree(folder / "checkpoint-4", folder / f"checkpoint-{step}")
    lines = [{"step": step, "likeness": like, "likeness_error": 0.01, "drift": drift, "loss": 0.5, **scores}
             for step, like, drift in ((0, 0.1, 0.0), (1, 0.3, 0.01), (2, 0.8, 0.2), (4, 0.79, 0.3))]  # fmt: skip
    (folder / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


# ------------------------------------------------------------------------------------------------------------ what it shows


def test_a_finished_run_is_shown_with_its_loss_samples_scores_and_checkpoints(tab, session):
    scored(session)
    found = shown(tab, "cat")
    assert found["status"].startswith("Done: the adapter cat can be used.")
    assert "Step 4 of 4, loss" in found["progress"]
    assert (found["stop"]["interactive"], found["resume"]["interactive"]) == (False, False)
    assert "every step" in found["plot"]
    assert "smoothed" in found["plot"]
    assert re.findall(r'alt="(Samples: [^"]+)"', found["samples"]) == ["Samples: before training", "Samples: step 4"]
    assert re.findall(r'<tr class="best"><th scope="row">([^<]+)', found["scores"]) == ["2 (best)"]
    assert "Best: step 2, by likeness and drift." in found["scores"]
    assert found["checkpoint"]["choices"] == [("Final, step 4", "final"), ("Step 2 (best)", "2"), ("Step 1", "1")]
    assert found["use"]["interactive"]
    (session.outputs / "cat" / "scores.jsonl").unlink()
    assert shown(tab, "cat")["scores"] == ""
    (session.outputs / "cat" / "scores.jsonl").write_text('{"step": 4, "loss": 0.5, "drift": 0.1}\n')
    assert "No best checkpoint: that needs a judge" in shown(tab, "cat")["scores"]


def test_the_loss_is_shown_on_either_scale_with_that_of_held_out_images(tab, session):
    lines = [
        {"step": step, "loss": 10.0**-step, **({"validation_loss": 0.5} if step == 3 else {})} for step in range(1, 5)
    ]
    (session.outputs / "cat" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plain, log = tab.draw_loss("cat", False), tab.draw_loss("cat", True)
    assert "held-out images" in plain
    heights = [[float(y) for y in re.findall(r",([\d.]+)", re.search(r'c0 faint" points="([^"]+)', chart)[1])]
               for chart in (plain, log)]  # fmt: skip
    gaps = [[round(b - a) for a, b in pairwise(row)] for row in heights]
    assert gaps[0][0] > 20 * gaps[0][2]
    assert len(set(gaps[1])) == 1  # each a tenth of the one before
    assert ">0.01<" in log
    assert tab.draw_loss("../x", True) == ""


def test_phases_are_told_in_words_from_the_start_on(tab, session, training):
    file = PhaseFile(training.path)
    found = shown(tab, "cat")
    assert "Starting the trainer" in found["progress"]
    assert (found["stop"]["interactive"], found["resume"]["interactive"]) == (True, False)
    file.tell(phases.LOADING)
    assert "Loading the model at step 4 of 4 ..." in shown(tab, "cat")["progress"]
    file.tell(phases.CLASS_IMAGES, 3, 20)
    text = shown(tab, "cat")["progress"]
    assert "Class images: 3 of 20, about" in text
    assert 'max="20" value="3"' in text
    assert "<li>Loading the model: 0 s</li>" in text
    file.tell(phases.TRAINING)
    assert re.search(r"Step 4 of 4, loss [\d.]+, 4 layers active, about 0 s left", shown(tab, "cat")["progress"])
    file.tell(phases.EXPORTING)
    assert "Saving and exporting the adapter" in shown(tab, "cat")["progress"]


def test_an_open_page_is_sent_a_run_only_when_it_moves(tab, session):
    *first, seen = tab.watch("cat", False, None, None)
    assert "Step 4 of 4" in first[1]
    *again, same = tab.watch("cat", False, "final", seen)
    assert same == seen
    assert again == [gr.skip()] * len(again)
    shutil.rmtree(session.outputs / "cat" / "samples")
    *moved, _ = tab.watch("cat", False, "final", seen)
    assert moved[tab.shown.index(tab.samples)] == ""
    assert tab.watch(None, False, None, seen)[0] == NONE_YET


def test_what_somebody_chose_stays_while_a_run_goes_on(tab, session):
    scored(session)
    *_, seen = tab.watch("cat", False, None, None)
    shutil.rmtree(session.outputs / "cat" / "checkpoint-1")
    moved = tab.watch("cat", False, "2", seen)
    assert moved[tab.shown.index(tab.checkpoint)]["value"] == "2"
    shutil.rmtree(session.outputs / "cat" / "checkpoint-2")
    moved = tab.watch("cat", False, "2", seen)
    assert moved[tab.shown.index(tab.checkpoint)]["value"] == "final"


def test_while_a_run_is_trained_its_words_are_sent_alone(tab, session, training):
    *_, seen = tab.watch("cat", False, None, None)
    again = tab.watch("cat", False, "4", seen)
    assert "Starting the trainer" in again[1]
    assert [one for number, one in enumerate(again[:-1]) if number != 1] == [gr.skip()] * (len(again) - 2)


def test_layers_are_shown_of_a_run_with_the_reducer(session, place, tmp_path):
    options = {"max_train_steps": 8, "reducer": "importance", "reducer_warmup": 2, "reducer_interval": 2}
    trainer(place / "model", make_subject(tmp_path / "s", 2), session.outputs / "dog", **options).run()
    found = shown(built(RunsTab, session), "dog")
    assert found["layers_box"]["visible"]
    assert "Layers trained over time" in found["layers"]
    assert "Importance over time" in found["layers"]


def test_runs_that_are_not_there_are_told_so(tab):
    assert tab.look(None)[0] == NONE_YET
    assert "Nothing has been trained" in tab.look("dog")[0]
    for name in ("../cat", "/etc", "dog", None):
        assert "Not stopped" in tab.end(name)
        assert "Not resumed" in tab.restart(name)
        assert "Not deleted" in tab.ask(name)[-1]
        assert "Not deleted" in tab.delete_it(name)[-1]
        assert "Not renamed" in tab.rename_it(name, "other")[-1]
        assert "Not used" in tab.wanted(name, "final")[-1]
        assert "there is no run named" in tab.read_log(name)
        assert "There is no run" in tab.read_page(name) or "there is no run" in tab.read_page(name)
    assert "not running" in tab.end("cat")
    assert "cat can't be resumed" in tab.restart("cat")


def test_words_of_files_are_shown_as_words(tab, session):
    (session.outputs / "cat" / "training.log").write_text(
        f"  rank 4\n\x1b[31m{session.outputs}/x.png <script>\r 50%|##\r100%|##\n\n" + "line\n" * 300)  # fmt: skip
    text = log_of(session.outputs, "cat")
    assert len(text.splitlines()) == 200
    (session.outputs / "cat" / "training.log").write_text(f"  rank 4\n\x1b[31m{session.outputs}/x.png <b>\r50%\r99%\n")
    assert log_of(session.outputs, "cat") == "  rank 4\n99%"
    (session.outputs / "cat" / "report.html").write_text('<script>alert(1)</script>"><img src="http://x.y/z">')
    frame = tab.read_page("cat")
    assert "<script" not in frame
    assert 'sandbox=""' in frame
    assert "default-src &#x27;none&#x27;" in frame
    (session.outputs / "cat" / "report.html").unlink()
    assert "training report" in tab.read_page("cat")


# ---------------------------------------------------------------------------------------------------------- what can be done


def test_a_checkpoint_goes_to_generate_by_its_name(tab, session):
    scored(session)
    found, tabs, said = tab.wanted("cat", "2")
    assert (found, tabs.selected, said) == ("cat @ 2", "generate", "")
    assert session.knows(found)
    assert tab.wanted("cat", "final")[0] == "cat"
    run = Run(session.outputs, "cat")
    for label, value in checkpoint_choices(run, run.status()):
        assert session.knows(reference("cat", value)), label
    for choice in ("3", "x", None):
        assert "Not used" in tab.wanted("cat", choice)[-1]


def test_a_run_gets_another_name_with_all_that_it_has(tab, session):
    files = sorted(path.relative_to(session.outputs / "cat") for path in (session.outputs / "cat").rglob("*"))
    update, _, said = tab.rename_it("cat", " tom ")
    assert (update["value"], said) == ("tom", "cat is now named tom.")
    assert sorted(path.relative_to(session.outputs / "tom") for path in (session.outputs / "tom").rglob("*")) == files
    assert "tom" in session.adapters()
    (session.uploads / "dog.safetensors").write_bytes((session.outputs / "tom" / "effilora.safetensors").read_bytes())
    for wanted, word in (
        ("", "enter one"),
        ("tom", "already"),
        ("dog", "already"),
        ("../x", "name"),
        ("history", "reserved"),
    ):
        assert word in tab.rename_it("tom", wanted)[-1]


def test_a_deleted_run_is_gone_and_its_name_can_be_used_again(tab, session, tmp_path):
    folder = session.outputs / "cat"
    (folder / "notes.txt").write_text("mine")
    group, question, said = tab.ask("cat")
    assert (group["visible"], said) == (True, "")
    assert re.match(
        r"Delete cat: its adapter, 1 checkpoint, samples and logs, [\d.]+ MB\? Its training images", question
    )
    assert (folder / "effilora.safetensors").exists()
    update, _, said = tab.delete_it("cat")
    assert said == "cat is deleted. Files that no run has written stay in its folder: notes.txt."
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    assert "cat" not in [name for _, name in update["choices"]]
    Run(session.outputs, "cat").check_free()


def test_nothing_is_taken_from_a_run_that_is_trained_or_waits(tab, session, training):
    before = sorted(training.path.rglob("*"))
    for said in (tab.ask("cat")[-1], tab.delete_it("cat")[-1], tab.rename_it("cat", "tom")[-1]):
        assert "cat is being trained: stop it first" in said
    assert sorted(training.path.rglob("*")) == before


def test_a_deleted_adapter_s_name_can_be_used_again_also_of_the_command_line(session):
    run = Run(session.outputs, "cat")
    (run.folder / "effilora.safetensors").unlink()
    config = (run.folder / "config.yaml").read_text()
    (run.folder / "config.yaml").write_text(config.replace("max_train_steps: 4", "max_train_steps: null"))
    assert run.status().state == "deleted"
    run.check_free()


def test_the_form_of_a_new_training_is_filled_as_a_run_was_trained(session):
    train = built(TrainTab, session)
    tabs, words, *form, refused = train.fill("cat")
    assert (tabs.selected, refused) == ("train", "")
    assert words == "The form holds the settings of cat: change what you like, then start. It begins anew."
    mode, files, cards, prompt, name, _, *advanced = form
    assert (mode, prompt, name) == (ONE, "a sks cat", "cat 2")
    assert [Path(file).name for file in files] == ["0.png", "1.png"]
    assert [card["key"] for card in cards] == [key_of(Path(file)) for file in files]
    values = dict(zip([entry.name for entry in shown_fields()], advanced, strict=True))
    assert (values["rank"], values["heads"], values["max_train_steps"], values["learning_rate"]) == (4, 3, 4, 0.2)
    kept = [old if new == gr.skip() else new for old, new in zip(by_hand(session), advanced, strict=True)]
    settings = one_subject(session, files, cards, False, prompt, "fast", kept).settings(session.outputs / "x")
    assert (settings["rank"], settings["max_train_steps"], settings["validation_inference_steps"]) == (4, 4, 1)
    (session.outputs / "cat 2").mkdir()
    assert train.fill("cat")[6] == "cat 3"
    shutil.rmtree(session.outputs.parent / "outputs" / "cat 2")
    assert "Not continued" in train.fill("../cat")[-1]

"""The queue of trainings: kept on the disk, rearranged, and started one after the other whatever becomes of each."""

import json
import os
import shutil
import threading
import time
from types import SimpleNamespace

import pytest
from app_forms import built, by_hand
from conftest import build_tiny_pipeline
from helpers import QUICK, make_subject

from effilora_diffusion import EffiLoRAError
from effilora_diffusion.core.run_folder import RunFolder
from effilora_diffusion.diffusion.training.checkpoints import IMAGE_RUN
from effilora_diffusion.studio import processes, training_queue
from effilora_diffusion.studio.run_files import fresh_dataset
from effilora_diffusion.studio.runs import Run, running_run
from effilora_diffusion.studio.tabs.runs import RunsTab
from effilora_diffusion.studio.tabs.train import TrainTab
from effilora_diffusion.studio.training_queue import QUEUE_FILE, Keeper, TrainingQueue

PATIENCE = 600


@pytest.fixture
def settings(tmp_path):
    build_tiny_pipeline().save_pretrained(tmp_path / "model")
    make_subject(tmp_path / "images", 2)
    return {**QUICK, "pretrained_model_name_or_path": str(tmp_path / "model"),
            "instance_data_dir": str(tmp_path / "images"), "max_train_steps": 2}  # fmt: skip


@pytest.fixture
def busy(tmp_path):
    """A run of the command line that is being trained in the outputs folder, until it is released."""
    (tmp_path / "outputs").mkdir(exist_ok=True)
    folder = RunFolder(tmp_path / "outputs" / "by hand", IMAGE_RUN)
    folder.claim(overwrite=False, checkpoint=None)
    yield folder
    folder.release()


def names(queue):
    return [entry.name for entry in queue.waiting()]


def test_trainings_wait_in_their_order_for_every_server_and_are_rearranged(settings, busy, tmp_path):
    queue = TrainingQueue(tmp_path / "outputs")
    assert queue.enter("a", settings) == "a waits in the queue, as number 1: it starts when by hand has ended."
    for name in ("b", "c"):
        queue.enter(name, {**settings, "rank": 2})
    assert queue.advance() is None
    other = TrainingQueue(tmp_path / "outputs")  # of another server, or of this one after it was started again
    assert [(entry.name, entry.settings.get("rank"), entry.resume) for entry in other.waiting()] == [
        ("a", 4, False), ("b", 2, False), ("c", 2, False)]  # fmt: skip
    other.move("c", -1)
    assert names(queue) == ["a", "c", "b"]
    other.move("a", 1)
    other.move("a", 1)
    other.move("a", 1)
    other.move("c", -1)
    assert names(queue) == ["c", "b", "a"]
    queue.remove("b")
    assert names(other) == ["c", "a"]
    assert (other.place("c"), other.place("a"), other.place("b")) == (1, 2, None)
    for act in (lambda: queue.remove("b"), lambda: queue.move("by hand", 1), lambda: queue.retry("x")):
        with pytest.raises(EffiLoRAError, match="does not wait in the queue"):
            act()
    assert queue.status(Run(tmp_path / "outputs", "a")).message == (
        "Number 2 in the queue: it starts when those before it have ended, now by hand."
    )
    assert not (tmp_path / "outputs" / "a").exists()


def test_what_can_t_wait_is_refused_and_changes_nothing(settings, busy, tmp_path, monkeypatch):
    queue = TrainingQueue(tmp_path / "outputs")
    queue.add("a", settings)
    done = tmp_path / "outputs" / "done"
    done.mkdir()
    (done / "effilora.safetensors").touch()
    before = (tmp_path / "outputs" / QUEUE_FILE).read_bytes()
    for name, change, word in (("a", {}, "in the queue already"), ("done", {}, "finished run named done"),
                               ("by hand", {}, "by hand is being trained already"), ("../x", {}, "name"),
                               ("b", {"rank": 0}, "--rank"), ("b", {"resolution": 33}, "--resolution")):  # fmt: skip
        with pytest.raises(EffiLoRAError, match=word):
            queue.add(name, {**settings, **change})
    with pytest.raises(EffiLoRAError, match="b can't be resumed"):
        queue.add("b", settings, resume=True)
    monkeypatch.setattr(training_queue, "MOST_WAITING", 1)
    with pytest.raises(EffiLoRAError, match="1 trainings wait already"):
        queue.add("b", settings)
    assert (tmp_path / "outputs" / QUEUE_FILE).read_bytes() == before


def test_a_training_waits_to_go_on_only_where_there_is_a_checkpoint(settings, busy, tmp_path):
    queue, run = TrainingQueue(tmp_path / "outputs"), Run(tmp_path / "outputs", "half")
    run.folder.mkdir()
    (run.folder / "run.json").write_text(json.dumps({"pid": os.getpid(), "born": 0}))
    (run.folder / "exit_code").write_text("143")
    (run.folder / "metrics.jsonl").write_text('{"step": 1, "loss": 1}\n')
    os.utime(run.folder / "metrics.jsonl", (1, 1))
    for name in ("run.json", "exit_code"):
        os.utime(run.folder / name, (2, 2))
    assert not run.can_resume
    (run.folder / "checkpoint-1").mkdir()
    assert run.can_resume
    assert "waits in the queue" in queue.enter("half", settings, resume=True)
    assert queue.status(run).state == "waiting"
    assert queue.waiting()[0].resume


def test_an_entry_that_was_started_before_a_server_was_killed_is_not_started_again(settings, busy, tmp_path):
    queue = TrainingQueue(tmp_path / "outputs")
    queue.add("a", settings)
    assert names(queue) == ["a"]
    (tmp_path / "outputs" / "a").mkdir()
    (tmp_path / "outputs" / "a" / "run.json").write_text("{}")
    os.utime(tmp_path / "outputs" / "a" / "run.json", (time.time() + 5, time.time() + 5))
    assert names(queue) == []


@pytest.mark.parametrize("text", ["{", "[1]", '[{"name": "x"}]', '{"a": 1}'])
def test_a_damaged_queue_is_told_and_kept(settings, tmp_path, text):
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / QUEUE_FILE).write_text(text)
    queue = TrainingQueue(tmp_path / "outputs")
    for act in (queue.waiting, queue.advance, lambda: queue.add("a", settings)):
        with pytest.raises(EffiLoRAError, match="mend it, or delete it"):
            act()
    assert (tmp_path / "outputs" / QUEUE_FILE).read_text() == text


def test_two_servers_start_what_waits_one_by_one_and_a_failure_stops_nothing(settings, busy, tmp_path, monkeypatch):
    """Of three: one whose model is gone, one whose name was taken meanwhile, a good one."""
    monkeypatch.setattr(training_queue, "PERIOD", 0.05)
    outputs, launched, own = tmp_path / "outputs", [], processes.launch

    def launch(words, log, stays=True):
        launched.append(log.name.split(os.sep)[-2])
        return own(words, log, stays)

    monkeypatch.setattr(processes, "launch", launch)
    queue = TrainingQueue(outputs)
    for name, change in (("gone", {"instance_data_dir": str(tmp_path / "none")}), ("taken", {}), ("good", {})):
        queue.enter(name, {**settings, **change})
    (outputs / "taken").mkdir()
    (outputs / "taken" / "effilora.safetensors").touch()
    keepers = [Keeper(TrainingQueue(outputs)) for _ in range(2)]
    for keeper in keepers:
        keeper.start()
    assert launched == []
    busy.release()
    end = time.monotonic() + PATIENCE
    while Run(outputs, "good").status().state != "done":
        assert time.monotonic() < end, queue.waiting()
        time.sleep(0.1)
    for keeper in keepers:
        keeper.stop()
    assert launched == ["gone", "good"]
    assert Run(outputs, "gone").status().state == "failed"
    (left,) = queue.waiting()
    assert (left.name, left.fault[:30]) == ("taken", "there is a finished run named ")
    assert "could not be started" in queue.status(Run(outputs, "taken")).message
    assert (outputs / "gone" / "exit_code").stat().st_mtime < (outputs / "good" / "run.json").stat().st_mtime
    shutil.rmtree(outputs / "taken")
    queue.retry("taken")
    assert not queue.waiting()[0].fault


def test_a_server_looks_after_its_queue_until_it_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(training_queue, "PERIOD", 0.01)
    looked = threading.Semaphore(0)
    keeper = Keeper(SimpleNamespace(advance=looked.release))
    keeper.start()
    for _ in range(3):
        assert looked.acquire(timeout=PATIENCE)
    keeper.stop()
    keeper._thread.join(PATIENCE)
    assert not keeper._thread.is_alive()


# --------------------------------------------------------------------------------------------------- on the page


@pytest.fixture
def waiting(session, tmp_path):
    """The page's session while a run of the command line is being trained."""
    folder = RunFolder(session.outputs / "by hand", IMAGE_RUN)
    folder.claim(overwrite=False, checkpoint=None)
    yield session
    folder.release()


def test_start_puts_a_training_into_the_queue_where_it_is_rearranged_and_removed(waiting, tmp_path):
    train, runs = built(TrainTab, waiting), built(RunsTab, waiting)
    files = [str(path) for path in sorted(make_subject(tmp_path / "p", 2).iterdir())]
    for name in ("one", "two"):
        started, button, text = train.begin(files, [], False, "a sks cat", name, "fast", *by_hand(waiting))
        assert (started, button["visible"]) == (name, True)
    assert text == "two waits in the queue, as number 2: it starts when those before it have ended, now by hand."
    _, button, text = train.begin(files, [], False, "a sks cat", "one", "fast", *by_hand(waiting))
    assert (text, button["visible"]) == (
        "**Not started:** one is in the queue already: give another name, or remove it there first", False)  # fmt: skip
    words, group, choices = runs.look_at_queue()
    assert (words, group["visible"]) == ("Now training: by hand. 2 wait.", True)
    assert [label for label, _ in choices["choices"]] == ["1. one, 400 steps", "2. two, 400 steps"]
    assert runs.names()[:2] == [("one (waiting)", "one"), ("two (waiting)", "two")]
    text, _, stop, resume, *_ = runs.look("two")
    assert text.startswith("Number 2 in the queue: it starts when")
    assert (stop["interactive"], resume["interactive"]) == (False, False)

    _, _, choices, _, note = runs.rearrange(lambda name: runs.queue.move(name, -1), "two")
    assert ([value for _, value in choices["choices"]], choices["value"], note) == (["two", "one"], "two", "")
    _, _, choices, _, note = runs.rearrange(runs.queue.remove, "two")
    assert ([value for _, value in choices["choices"]], choices["value"], note) == (["one"], None, "")
    assert (waiting.outputs / "datasets" / "two" / "000-0.png").exists()
    for name, word in ((None, "choose one"), ("two", "does not wait")):
        assert word in runs.rearrange(runs.queue.remove, name)[-1]


def test_images_of_earlier_runs_are_never_replaced(waiting, tmp_path):
    train, data = built(TrainTab, waiting), make_subject(waiting.outputs / "datasets" / "new", 3)
    before = {path: path.read_bytes() for path in data.iterdir()}
    files = [str(path) for path in make_subject(tmp_path / "p", 2).iterdir()]
    train.begin(files, [], False, "a sks cat", "new", "fast", *by_hand(waiting))
    assert {path: path.read_bytes() for path in data.iterdir()} == before
    (entry,) = train.trainings.waiting()
    assert entry.settings["instance_data_dir"] == str(waiting.outputs / "datasets" / "new 2")
    assert fresh_dataset(waiting.outputs, "new").name == "new 3"


def test_a_refused_start_leaves_no_images_behind(waiting, tmp_path, monkeypatch):
    train = built(TrainTab, waiting)
    monkeypatch.setattr(training_queue, "MOST_WAITING", 0)
    files = [str(path) for path in make_subject(tmp_path / "p", 2).iterdir()]
    files_here = lambda: sorted(path for path in waiting.outputs.rglob("*") if path.suffix != ".lock")
    before = files_here()
    assert "trainings wait already" in train.begin(files, [], False, "a sks cat", "new", "fast", *by_hand(waiting))[-1]
    (waiting.outputs / "datasets").rmdir()  # empty
    assert files_here() == before
    assert running_run(waiting.outputs) == "by hand"

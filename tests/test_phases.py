"""What a run tells of itself while it lasts: every phase with its counts, and nothing of it once the run has ended."""

import json
import time

import pytest
from helpers import make_subject, trainer

from effilora_diffusion.core import phases
from effilora_diffusion.core.phases import PHASE_FILE, PhaseFile, counted, read_phase
from effilora_diffusion.core.signals import Interrupted


@pytest.fixture
def told(monkeypatch):
    """Everything that runs have told, in order."""
    found = []
    own = PhaseFile.tell

    def tell(self, phase, done=0, total=0):
        own(self, phase, done, total)
        if self.folder is not None:
            assert read_phase(self.folder).name == phase  # it is on the disk by now
        found.append((phase, done, total))

    monkeypatch.setattr(PhaseFile, "tell", tell)
    return found


def test_a_run_tells_its_phases_and_their_counts(place, tmp_path, told):
    options = {"max_train_steps": 4, "checkpointing_steps": 2, "validation_steps": 2, "with_prior_preservation": True,
               "prior_target": "images", "class_prompt": "a cat", "class_data_dir": str(tmp_path / "classes"),
               "num_class_images": 3, "sample_batch_size": 1, "cache_latents_to_disk": True,
               "cache_text_encoder_outputs_to_disk": True}  # fmt: skip
    run = trainer(place / "model", make_subject(tmp_path / "s", 2), tmp_path / "out", **options)
    run.run()
    names = list(dict.fromkeys(name for name, _, _ in told))
    assert names == [phases.LOADING, phases.CLASS_IMAGES, phases.EMBEDDINGS, phases.LATENTS, phases.SAMPLES,
                     phases.TRAINING, phases.SAVING, phases.EXPORTING]  # fmt: skip
    assert [(done, total) for name, done, total in told if name == phases.CLASS_IMAGES] == [(0, 3), (1, 3), (2, 3)]
    assert (phases.EMBEDDINGS, 0, 1) in told
    assert {(phases.LATENTS, 0, 2), (phases.LATENTS, 1, 2), (phases.LATENTS, 2, 3)} <= set(told)
    assert told[-1][0] == phases.EXPORTING
    assert not (tmp_path / "out" / PHASE_FILE).exists()


def test_a_stopped_run_leaves_no_phase_behind(place, tmp_path, told):
    run = trainer(place / "model", make_subject(tmp_path / "s", 2), tmp_path / "out", max_train_steps=40)
    own = run.loop.step

    def step(number):
        run.signals.code = 143 if number == 2 else 0
        return own(number)

    run.loop.step = step
    with pytest.raises(Interrupted):
        run.run()
    assert [name for name, _, _ in told][-2:] == [phases.TRAINING, phases.SAVING]
    assert not (tmp_path / "out" / PHASE_FILE).exists()


def test_counts_are_written_now_and_then_and_the_last_one_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(phases, "EVERY", 1e9)
    file = PhaseFile(tmp_path)
    seen = []
    for item in counted(file.tell, "Counting", "abc"):
        seen.append((item, read_phase(tmp_path).done))
    assert seen == [("a", 0), ("b", 0), ("c", 0)]
    file.tell("Counting", 3, 3)
    assert read_phase(tmp_path).done == 3
    file.tell("Next")
    found = read_phase(tmp_path)
    assert (found.name, found.done, found.total, list(found.before)) == ("Next", 0, 0, ["Counting"])
    assert found.before["Counting"] >= 0
    assert found.since <= time.time()


@pytest.mark.parametrize("text", ["", "[]", "{}", json.dumps({"name": "x", "since": 1, "done": 0, "total": 0})])
def test_a_damaged_file_tells_nothing(tmp_path, text):
    (tmp_path / PHASE_FILE).write_text(text)
    assert read_phase(tmp_path) is None


def test_a_full_disk_does_not_end_a_run_here(tmp_path):
    PhaseFile(tmp_path / "gone").tell("Loading")
    (tmp_path / "file").write_text("")
    PhaseFile(tmp_path / "file").tell("Loading")
    PhaseFile(None).tell("Loading")

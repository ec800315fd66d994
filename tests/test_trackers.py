"""Trackers show what metrics.jsonl says, and never stop a run."""

import numpy as np
import pytest
from accelerate.tracking import GeneralTracker
from helpers import make_subject, metrics, settings
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from effilora_diffusion.core import EffiLoRAError
from effilora_diffusion.diffusion.training.trainer import Trainer


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    return make_subject(tmp_path_factory.mktemp("subject") / "s", 2, size=(32, 32))


def run(tiny_pipeline, subject, output, **changes):
    short = {
        "report_to": [],
        "max_train_steps": 4,
        "checkpointing_steps": 2,
        "validation_prompt": ["a cat", "a sks cat"],
        "num_validation_images": 2,
    }
    Trainer(settings(tiny_pipeline, subject, output, **{**short, **changes})).run()


def shown(output, folder="logs"):
    events = EventAccumulator(str(output / folder / "dreambooth-effilora"), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    return events


def losses(events):
    return [(event.step, event.value) for event in events.Scalars("loss")]


def expected(output):
    return [(line["step"], float(np.float32(line["loss"]))) for line in metrics(output)]


def test_tensorboard_is_the_default_and_has_every_loss_and_image(tiny_pipeline, subject, tmp_path):
    run(tiny_pipeline, subject, tmp_path / "out")
    events = shown(tmp_path / "out")
    assert losses(events) == expected(tmp_path / "out")
    assert len(losses(events)) == 4
    assert sorted(events.Tags()["images"]) == ["validation/a cat", "validation/a sks cat"]
    assert [(one.step, one.width, one.height) for one in events.Images("validation/a cat")] == [
        (0, 64, 32),
        (4, 64, 32),
    ]


def test_a_resumed_run_shows_every_step_once(tiny_pipeline, subject, tmp_path):
    run(tiny_pipeline, subject, tmp_path / "out", report_to=["tensorboard"], logging_dir="boards")
    run(tiny_pipeline, subject, tmp_path / "out", report_to="tensorboard", logging_dir="boards",
        resume_from_checkpoint="checkpoint-2", max_train_steps=5)  # fmt: skip
    events = shown(tmp_path / "out", "boards")
    assert losses(events) == expected(tmp_path / "out")
    assert len(losses(events)) == 5


def test_none_writes_nothing(tiny_pipeline, subject, tmp_path):
    run(tiny_pipeline, subject, tmp_path / "out", report_to=["none"])
    assert not (tmp_path / "out" / "logs").exists()


class Unreachable(GeneralTracker):
    """A tracker whose server is gone from the second step on."""

    name, requires_logging_directory, tracker = "unreachable", False, None

    def __init__(self):
        super().__init__()
        self.steps = []

    def log(self, values, step, **_):
        self.steps.append(step)
        if step > 1:
            raise ConnectionError("no route to the server")


def test_a_tracker_that_fails_is_dropped_and_the_run_goes_on(tiny_pipeline, subject, tmp_path, capsys):
    output = tmp_path / "out"
    trainer = Trainer(settings(tiny_pipeline, subject, output, report_to=["none"], max_train_steps=4))
    gone = Unreachable()
    trainer.trackers.trackers.append(gone)
    trainer.run()
    assert "note: --report_to unreachable has failed (no route to the server)" in capsys.readouterr().out
    assert gone.steps == [1, 2]
    assert (output / "effilora.safetensors").exists()


def test_a_file_where_the_logs_would_go_is_left_alone(tiny_pipeline, subject, tmp_path):
    output = tmp_path / "out"
    trainer = Trainer(settings(tiny_pipeline, subject, output, report_to=["tensorboard"]))
    (output / "logs").write_text("something of the user's")
    with pytest.raises(EffiLoRAError, match="logs is not this run's"):
        trainer.run()
    assert (output / "logs").read_text() == "something of the user's"


def test_the_token_of_the_hub_is_shown_nowhere(tiny_pipeline, subject, tmp_path):
    run(tiny_pipeline, subject, tmp_path / "out", hub_token="hf_secret")
    for file in (tmp_path / "out").rglob("*"):
        assert not file.is_file() or b"hf_secret" not in file.read_bytes(), file


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("comet_ml", "--report_to comet_ml needs its package: pip install comet_ml"),
        ("tensorbord", "is not known: choose of none, all"),
    ],
)
def test_a_tracker_that_is_not_there_is_told_before_training(tiny_pipeline, subject, tmp_path, name, words):
    with pytest.raises(EffiLoRAError, match=words):
        run(tiny_pipeline, subject, tmp_path / "out", report_to=[name])
    assert not (tmp_path / "out" / "metrics.jsonl").exists()

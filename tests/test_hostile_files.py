"""Files from elsewhere: every one is refused in a sentence or can be used; a slice of ``benchmarks.hostile_files``."""

import json
import logging

import pytest

from benchmarks import hostile_files
from benchmarks.hostile_adapters import HAND_MADE, Base
from benchmarks.hostile_files import by_hand, in_a_process, judged, mutations
from benchmarks.hostile_images import CAMERA, CAPTIONS, IMAGES, SPECIAL, hostile_caption, hostile_image
from benchmarks.hostile_runs import (
    CHECKPOINTS,
    CONFIGURATIONS,
    STEPS,
    checkpoint,
    fresh,
    hostile_checkpoint,
    hostile_configuration,
    resume,
)
from effilora_diffusion.core import EffiLoRAError
from effilora_diffusion.diffusion.training.checkpoints import read_state

pytestmark = pytest.mark.skipif(not hasattr(hostile_files.os, "fork"), reason="cases run in forked processes")

MUTATIONS = 200


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    logging.disable(logging.WARNING)  # the adapters' notes that they change nothing
    yield Base(tmp_path_factory.mktemp("variants"))
    logging.disable(logging.NOTSET)


def test_mutated_native_files_are_refused_or_used(base, tmp_path):
    found = in_a_process("mutations", lambda: mutations(base, tmp_path, range(MUTATIONS), 1))
    assert found.failures == []
    assert found.count == MUTATIONS
    assert min(found.refused, found.used) > MUTATIONS // 5  # both kinds are tried
    assert found.growth < 400e6


def test_native_files_by_hand_are_refused_or_used(base):
    found = by_hand(HAND_MADE, hostile_files.hand_made(base), 100)
    assert found.failures == []
    assert (found.count, found.refused) == (len(HAND_MADE), 26)
    assert found.growth < 800e6


def test_checkpoints_that_no_run_wrote_are_refused_and_nothing_is_changed(tmp_path):
    resume(checkpoint(tmp_path))
    found = by_hand(CHECKPOINTS, hostile_checkpoint, 100)
    assert found.failures == []
    assert found.refused == len(CHECKPOINTS) >= 40


def test_a_checkpoint_of_another_name_is_that_of_its_steps(tmp_path):
    folder = checkpoint(tmp_path)
    assert folder.name == f"checkpoint-{STEPS}"
    resume(folder.rename(tmp_path / "kept"))
    with pytest.raises(EffiLoRAError, match="its step is 3"):
        resume((tmp_path / "kept").rename(tmp_path / "checkpoint-4"))


def test_a_state_is_as_flat_as_a_run_writes_it(tmp_path):
    folder = checkpoint(tmp_path)
    adapter, _ = fresh()
    assert read_state(folder, adapter).step == STEPS
    found = json.loads((folder / "state.json").read_text())
    found["fingerprint"]["seed"] = json.loads("[" * 10 + "]" * 10)
    (folder / "state.json").write_text(json.dumps(found))
    with pytest.raises(EffiLoRAError, match="nested too deeply"):
        read_state(folder, adapter)


def test_configurations_with_bad_values_are_refused():
    found = by_hand(CONFIGURATIONS, lambda name, folder: hostile_configuration(name), 100)
    assert found.failures == []
    assert found.refused == len(CONFIGURATIONS)


def test_captions_that_are_none_are_refused():
    found = by_hand(CAPTIONS, hostile_caption, 100)
    assert found.failures == []
    assert found.refused == len(CAPTIONS)
    assert found.growth < 600e6


def test_images_are_refused_or_used_by_both_kinds_of_training():
    found = by_hand([*IMAGES, *SPECIAL, "61-megapixels.jpg"], hostile_image, 100)
    assert found.failures == []
    assert found.count == len(IMAGES) + len(SPECIAL) + 1 > 50
    assert min(found.refused, found.used) > 20
    assert found.growth < 900e6
    assert "61-megapixels.jpg" in CAMERA


def test_what_breaks_hangs_or_dies_is_counted_as_a_failure():
    def die():
        hostile_files.os.kill(hostile_files.os.getpid(), 9)

    def hang():
        while True:
            pass

    assert in_a_process("x", die).failures == ["x: killed by signal 9"]
    assert "MemoryError" in in_a_process("x", lambda: judged("x", lambda: bytearray(1 << 40))).failures[0]
    assert "no end after" in in_a_process("x", lambda: judged("x", hang, 0.2)).failures[0]
    for error in (KeyError("a"), EffiLoRAError("\x1b[2J"), EffiLoRAError("x" * 10**6), EffiLoRAError("")):
        assert judged("x", lambda error=error: (_ for _ in ()).throw(error)).failures
    assert judged("x", int).used == 1

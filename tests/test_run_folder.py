"""The folder of a run: one writer at a time, its own files only, checkpoints by name, and references to them."""

import subprocess
import sys

import pytest
from helpers import make_subject, settings, trainer

from effilora_diffusion.core import EffiLoRAError
from effilora_diffusion.core.run_folder import (
    LOCK_FILE,
    OWNER_FILE,
    Reference,
    RunFolder,
    adapter_file,
    checkpoints,
    parse_reference,
)
from effilora_diffusion.diffusion.training.checkpoints import IMAGE_RUN
from effilora_diffusion.language.trainer import LANGUAGE_RUN

HOLDER = """
import sys
from pathlib import Path
from effilora_diffusion.core.run_folder import RunFolder
from effilora_diffusion.diffusion.training.checkpoints import IMAGE_RUN
folder = RunFolder(Path(sys.argv[1]), IMAGE_RUN)
folder.claim(False, None)
print("claimed", flush=True)
sys.stdin.readline()
"""


def claimed_elsewhere(path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "claimed\n"
    return process


@pytest.mark.parametrize("layout", [IMAGE_RUN, LANGUAGE_RUN], ids=["image", "language"])
def test_a_second_run_in_the_same_folder_is_refused_and_told_whose_it_is(tmp_path, layout):
    process = claimed_elsewhere(tmp_path / "out")
    try:
        with pytest.raises(EffiLoRAError, match=rf"another run \(process {process.pid} on .*, since 20\d\d-"):
            RunFolder(tmp_path / "out", layout).claim(False, None)
    finally:
        process.communicate("\n")


def test_a_killed_run_leaves_the_folder_free(tmp_path):
    process = claimed_elsewhere(tmp_path / "out")
    process.kill()
    process.wait()
    folder = RunFolder(tmp_path / "out", IMAGE_RUN)
    folder.claim(False, None)
    folder.release()
    assert not list((tmp_path / "out").iterdir())


def test_the_lock_is_held_from_the_start_of_a_run_to_its_end(tiny_pipeline, tmp_path):
    make_subject(tmp_path / "subject")
    config = {"max_train_steps": 1, "num_validation_images": 0}
    run = trainer(tiny_pipeline, tmp_path / "subject", tmp_path / "out", **config)
    assert (tmp_path / "out" / LOCK_FILE).exists()
    with pytest.raises(EffiLoRAError, match="is being written by another run"):
        trainer(tiny_pipeline, tmp_path / "subject", tmp_path / "out", **config)
    run.run()
    assert not (tmp_path / "out" / LOCK_FILE).exists()
    assert not (tmp_path / "out" / OWNER_FILE).exists()
    trainer(tiny_pipeline, tmp_path / "subject", tmp_path / "out", **config, overwrite_output_dir=True).run()


def test_a_run_that_can_t_be_prepared_gives_the_folder_free(tiny_pipeline, tmp_path):
    (tmp_path / "subject").mkdir()
    config = settings(tiny_pipeline, tmp_path / "subject", tmp_path / "out")
    for _ in range(2):
        with pytest.raises(EffiLoRAError, match="holds no images"):
            trainer(tiny_pipeline, tmp_path / "subject", tmp_path / "out")
    assert not (tmp_path / "out" / LOCK_FILE).exists()
    assert config.output_dir == str(tmp_path / "out")


@pytest.mark.parametrize("layout", [IMAGE_RUN, LANGUAGE_RUN], ids=["image", "language"])
def test_removing_a_run_leaves_what_is_not_its_own(tmp_path, layout):
    own = [*layout.marks, *layout.files]
    for name in (*own, "notes.txt", "model.safetensors"):
        (tmp_path / name).write_text("x")
    for name in ("checkpoint-3", "checkpoint-10", "checkpoint-mine", "photos"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-7").write_text("a file of the user's")
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-10"]
    folder = RunFolder(tmp_path, layout)
    assert folder.used
    folder.remove()
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == ["checkpoint-7", "checkpoint-mine", "model.safetensors", "notes.txt", "photos"]
    assert not folder.used


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("my-cat", Reference("my-cat")),
        ("my-cat@300", Reference("my-cat", 300)),
        ("my-cat @ 300", Reference("my-cat", 300)),
        ("my cat # 2", Reference("my cat", None, 2)),
        ("my-cat @ 300 # 2", Reference("my-cat", 300, 2)),
        ("outputs/my-cat@12", Reference("outputs/my-cat", 12)),
        ("a@b", Reference("a@b")),
        ("@3", Reference("@3")),
        ("", Reference("")),
    ],
)
def test_references_are_read_and_written(text, reference):
    assert parse_reference(text) == reference
    assert parse_reference(str(reference)) == reference


def test_a_reference_means_the_run_s_adapter_or_that_of_a_checkpoint(tmp_path):
    for name, file in (("image", "adapter.safetensors"), ("language", "effilora.safetensors")):
        folder = tmp_path / name / "checkpoint-20"
        folder.mkdir(parents=True)
        (folder / file).write_text("x")
        (tmp_path / name / "effilora.safetensors").write_text("x")
        assert adapter_file(str(tmp_path / name)) == tmp_path / name / "effilora.safetensors"
        assert adapter_file(f"{tmp_path / name}@20") == folder / file
        with pytest.raises(EffiLoRAError, match=r"has no checkpoint of step 7; there are \[20\]"):
            adapter_file(f"{tmp_path / name}@7")
    (tmp_path / "odd@20").write_text("a file of that name")
    assert adapter_file(str(tmp_path / "odd@20")) == tmp_path / "odd@20"
    for missing in ("nothing", "nothing@3"):
        with pytest.raises(EffiLoRAError, match="no such file"):
            adapter_file(str(tmp_path / missing))

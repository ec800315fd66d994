"""The folder of a run: one writer at a time, its own files only, checkpoints by name, and references to them."""

import json
import os
import subprocess
import sys

import pytest
from helpers import files_in, make_subject, settings, trainer

from effilora_diffusion.core import EffiLoRAError
from effilora_diffusion.core.reference import Reference, adapter_file, parse_reference
from effilora_diffusion.core.run_folder import LOCK_FILE, OWNER_FILE, RECORD_FILE, RunFolder
from effilora_diffusion.diffusion.training.checkpoints import IMAGE_RUN
from effilora_diffusion.language.checkpoints import LANGUAGE_RUN

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


def claimed(path, layout=IMAGE_RUN, overwrite=False, checkpoint=None):
    folder = RunFolder(path, layout)
    folder.claim(overwrite, checkpoint)
    return folder


def write_run(path, text="first", finished=True, release=True):
    """A run of a few files in ``path``, as a trainer writes them."""
    folder = claimed(path, overwrite=True)
    folder.open(None)
    for name in ("config.yaml", "metrics.jsonl", "samples/step-000000.png", "checkpoint-2/adapter.safetensors"):
        if text != "first" and name.startswith("checkpoint"):
            continue
        folder.own(name.partition("/")[0] if name.startswith("checkpoint") else name)
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(text)
    if finished:
        folder.own("effilora.safetensors").write_text(text)
        folder.finish()
    if release:
        folder.release()
    return folder


FOREIGN = ("README.md", "config.yaml", "samples/step-000000.png", "checkpoint-5/model.safetensors", "before_after.png")


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_first_run_refuses_a_folder_with_files_that_it_would_replace(tmp_path, name, overwrite):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    before = files_in(tmp_path)
    with pytest.raises(EffiLoRAError, match=f"no run wrote and that this one would replace: {name.partition('/')[0]}"):
        claimed(tmp_path, overwrite=overwrite)
    assert files_in(tmp_path) == before


def test_replacing_a_run_leaves_what_is_not_its_own(tmp_path):
    write_run(tmp_path)
    own = {"notes.txt", "samples/mine.png", "checkpoint-mine/a.txt", "photos/1.png", "effilora-2.safetensors"}
    for name in own:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    write_run(tmp_path, "second")
    after = files_in(tmp_path)
    assert {name for name, content in after.items() if content == b"mine"} == own
    assert not any(content == b"first" for content in after.values())
    assert "checkpoint-2" not in {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("end", ["error", "kill"])
def test_a_replaced_run_returns_if_nothing_comes_of_the_new_one(tmp_path, end):
    write_run(tmp_path)
    before = files_in(tmp_path)
    folder = write_run(tmp_path, "second", finished=False, release=end == "error")
    if end == "kill":
        assert (tmp_path / "config.yaml").read_text() == "second"
        folder._lock.release()  # what the system does for a killed process
        with pytest.raises(EffiLoRAError, match="holds an earlier run"):
            claimed(tmp_path)
    assert files_in(tmp_path) == before


@pytest.mark.parametrize("moves", range(1, 12))
def test_a_kill_while_a_run_is_moved_aside_or_put_back_loses_nothing(tmp_path, monkeypatch, moves):
    write_run(tmp_path)
    before = files_in(tmp_path)
    replace, left = os.replace, [moves]

    def killed(source, target):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        replace(source, target)

    monkeypatch.setattr("effilora_diffusion.core.run_folder.os.replace", killed)
    folder = None
    try:
        folder = claimed(tmp_path, overwrite=True)
        folder.open(None)
        folder.release()  # no step was taken: everything is put back
    except KeyboardInterrupt:
        pass
    monkeypatch.undo()
    if folder is not None and folder._lock is not None:
        folder._lock.release()
    claimed(tmp_path, overwrite=True).release()
    assert files_in(tmp_path) == before


def test_only_what_is_recorded_is_replaced_later(tmp_path):
    folder = write_run(tmp_path, finished=False, release=False)
    (tmp_path / "README.md").write_text("mine, written while it trained")
    with pytest.raises(EffiLoRAError, match=r"README.md is not this run's, so it is not replaced"):
        folder.own("README.md")
    folder.release()


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b", "", 3])
def test_a_forged_record_deletes_nothing_outside(tmp_path, name):
    outside = tmp_path / "outside"
    outside.write_text("mine")
    write_run(tmp_path / "run")
    record = tmp_path / "run" / RECORD_FILE
    record.write_text(json.dumps({"written": [name], "finished": True}))
    RunFolder(tmp_path / "run", IMAGE_RUN).remove()
    assert outside.read_text() == "mine"


def test_what_a_killed_process_was_writing_is_swept_and_a_replaced_checkpoint_recovered(tmp_path):
    write_run(tmp_path, finished=False)
    for name in (".checkpoint-4.effilora-tmp", ".config.yaml.x1.effilora-tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-2").rename(tmp_path / ".checkpoint-2.old")
    with pytest.raises(EffiLoRAError, match="its manifest can't be used"):  # it is found, though no real one
        RunFolder(tmp_path, IMAGE_RUN).find_checkpoint("checkpoint-2")
    claimed(tmp_path, overwrite=True).release()
    assert not [name for name in files_in(tmp_path) if "tmp" in name or ".old" in name]
    assert (tmp_path / "checkpoint-2" / "adapter.safetensors").exists()


def test_advice_names_only_what_can_be_done(tmp_path):
    folder = claimed(tmp_path)
    folder.open(None)
    folder.own("metrics.jsonl").write_text("{}")
    folder._lock.release()  # killed before its first checkpoint
    with pytest.raises(EffiLoRAError, match="holds an earlier run") as caught:
        claimed(tmp_path)
    assert "resume" not in str(caught.value)
    assert "--overwrite_output_dir" in str(caught.value)


def test_what_is_left_of_a_finished_run_is_not_swept_by_the_next(tmp_path):
    """A language run whose adapter was moved away: its PEFT files are a result too."""
    folder = claimed(tmp_path, LANGUAGE_RUN)
    folder.open(None)
    for name in ("effilora.safetensors", "adapter_config.json", "adapter_model.safetensors"):
        folder.own(name).write_text("result")
    folder.finish()
    folder.release()
    (tmp_path / "effilora.safetensors").unlink()
    before = files_in(tmp_path)
    with pytest.raises(EffiLoRAError, match="holds an earlier run"):
        claimed(tmp_path, LANGUAGE_RUN)
    claimed(tmp_path, LANGUAGE_RUN, overwrite=True).release()  # its run fails before it writes
    assert files_in(tmp_path) == before


def test_a_run_of_version_0_1_0_is_known_by_its_files(tmp_path):
    for name in ("effilora.safetensors", "metrics.jsonl", "README.md", "checkpoint-3/adapter.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("old")
    (tmp_path / "checkpoint-9").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    folder = RunFolder(tmp_path, IMAGE_RUN)
    assert folder.used
    assert folder.finished
    with pytest.raises(EffiLoRAError, match=r"no run wrote .*: checkpoint-9"):
        claimed(tmp_path, overwrite=True)
    (tmp_path / "checkpoint-9").rmdir()
    write_run(tmp_path, "second")
    assert b"old" not in files_in(tmp_path).values()
    assert (tmp_path / "notes.txt").exists()


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

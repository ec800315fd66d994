"""Full disks, really full: a sentence, nothing half, nothing lost, and resuming ends where an unbroken run does."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_adapter
from helpers import files_in, make_subject
from PIL import Image
from safetensors.torch import save_file

from effilora_diffusion.core import AdapterFile, save_adapter_file
from effilora_diffusion.core.writing import WriteError, append_line, write_atomic, write_text, writing
from effilora_diffusion.diffusion.sampling.png import save_png
from effilora_diffusion.diffusion.training.checkpoints import TrainingState, save_checkpoint

CASES = 7


@pytest.mark.skipif(sys.platform != "linux", reason="file systems of any size are mounted with Linux's tmpfs")
def test_a_run_on_a_full_disk_says_so_and_is_resumed_when_there_is_room(tiny_pipeline, tmp_path):
    (tmp_path / "disk").mkdir()
    words = [sys.executable, str(Path(__file__).parent / "full_disk.py"), str(tiny_pipeline)]
    words += [str(make_subject(tmp_path / "images")), str(tmp_path / "disk"), str(CASES)]
    alone = ["unshare", "--mount"] if os.getuid() == 0 else ["unshare", "--mount", "--map-root-user"]
    done = subprocess.run([*alone, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    whole, *cases = map(json.loads, done.stdout.splitlines())
    assert whole["code"] == 0
    assert len(cases) == CASES
    for case in cases:
        if case["code"] == 0:  # only what shows the result was missing
            assert case["size"] > 0.8 * whole["bytes"]
        else:
            assert case["code"] == 2
            assert len(case["said"]) == 1
            assert (
                "could not be written (No space left on device" in case["said"][0] or "os error 28" in case["said"][0]
            )
        assert case["temporary"] == case["faults"] == []
        assert case["again"] == [0, []]
        assert case["adapter"] == whole["adapter"]
    assert {case["checkpoints"] for case in cases} > {0, 1}


def checkpoint(folder):
    adapter = make_adapter()
    optimizer = torch.optim.AdamW(adapter.parameters())
    sum(p.square().sum() for p in adapter.parameters()).backward()
    optimizer.step()
    save_checkpoint(folder, adapter, optimizer, TrainingState(2, {"seed": 0}, {}, {}))


def log(folder):
    append_line(folder / "metrics.jsonl", "x" * 30000)


def torch_file(folder):
    with writing(folder / "optimizer.pt"):
        torch.save(torch.zeros(9000), folder / "optimizer.pt")


WRITERS = {
    "adapter": lambda folder: save_adapter_file(folder / "effilora.safetensors", AdapterFile(make_adapter(rank=64))),
    "plain LoRA": lambda folder: write_atomic(
        folder / "lora.safetensors", lambda path: save_file({"a": torch.zeros(9000)}, path)
    ),
    "image": lambda folder: save_png(Image.effect_noise((400, 400), 90), folder / "a.png"),
    "text": lambda folder: write_text(folder / "README.md", "x" * 30000),
    "checkpoint": checkpoint,
    "log": log,
    "torch": torch_file,
}


@pytest.fixture
def _small_files():
    """No file may have more than 8 kB, as under ``ulimit -f``."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("_small_files")
@pytest.mark.parametrize("writer", WRITERS)
def test_a_limit_on_file_sizes_is_told_and_what_was_there_stays(tmp_path, writer):
    for name in ("effilora.safetensors", "lora.safetensors", "a.png", "README.md", "checkpoint-1/state.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("older")
    before = files_in(tmp_path)
    with pytest.raises(WriteError, match="could not be written"):
        WRITERS[writer](tmp_path)
    after = files_in(tmp_path)
    assert {name: after[name] for name in before} == before
    assert not [name for name in after if "tmp" in name]


@pytest.mark.parametrize("writer", WRITERS)
def test_a_folder_that_is_a_file_is_told(tmp_path, writer):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(WriteError, match="could not be written"):
        WRITERS[writer](tmp_path / "file")
    assert files_in(tmp_path) == {"file": b"mine"}

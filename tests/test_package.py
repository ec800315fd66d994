"""The built wheel in an environment of its own, used from an empty folder, as somebody who installed it would."""

import os
import re
import socket
import subprocess
import sys
import sysconfig
import urllib.request
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PATIENCE = 900
"""Seconds until a command that hangs is given up: far more than it takes."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT, check=True, capture_output=True, timeout=PATIENCE,
    )  # fmt: skip
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The folder of commands of an environment with the wheel, and with this one's libraries but not its checkout."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    commands = folder / ("Scripts" if os.name == "nt" else "bin")
    python = str(commands / "python")
    words = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([python, *words], check=True, capture_output=True, timeout=PATIENCE)
    ask = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    own = Path(subprocess.run(ask, check=True, capture_output=True, text=True).stdout.strip())
    (own / "libraries.pth").write_text(
        sysconfig.get_path("purelib")
    )  # .pth files in there, as a checkout's, are not read
    return commands


def run(commands, folder, *words, code=0):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    program = [str(commands / words[0]), *words[1:]]
    done = subprocess.run(
        program,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == code, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def trained(installed, tmp_path_factory):
    """An empty folder in which the installed command has trained the example for two steps."""
    folder = tmp_path_factory.mktemp("empty")
    run(
        installed, folder, "effilora", "train", "--max_train_steps", "2",
        "--num_validation_images", "1", "--validation_inference_steps", "2",
        "--export_distillation_steps", "2",
    )  # fmt: skip
    return folder


def test_the_wheel_carries_types_the_base_and_the_example(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for name in (
        "py.typed",
        "_assets/base/model_index.json",
        "_assets/base/unet/config.json",
        "studio/server.py",
        "studio/tabs/train.py",
        "cli/train.py",
    ):
        assert f"effilora_diffusion/{name}" in names
    assert sum(name.startswith("effilora_diffusion/_assets/example_subject/") for name in names) >= 5
    assert {name.split("/")[0] for name in names} == {"effilora_diffusion", Path(names[-1]).parts[0]}


def test_the_description_on_a_package_index_has_no_relative_link(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = archive.read(name).decode()
    assert "# EffiLoRA Diffusion" in metadata
    assert "Description-Content-Type: text/markdown" in metadata
    assert [link for link in re.findall(r"\]\(([^)]*)\)", metadata) if not link.startswith("http")] == []


def test_the_installed_package_is_the_wheel_s(installed, tmp_path):
    program = "import effilora_diffusion, torch; print(effilora_diffusion.__file__)"
    file = run(installed, tmp_path, "python", "-c", program).strip()
    assert Path(file).is_relative_to(installed.parent)


def test_the_installed_command_trains_the_example_and_draws_with_it(installed, trained):
    output = trained / "outputs" / "example"
    for name in ("effilora.safetensors", "pytorch_lora_weights.safetensors", "before_after.png", "README.md"):
        assert (output / name).stat().st_size > 0
    words = ["--prompt", "an emoji of sks cat", "--num_inference_steps", "2", "--output", "cat.png"]
    assert run(installed, trained, "effilora", "generate", "--adapter", "outputs/example", *words) == "cat.png\n"
    assert (trained / "cat.png").stat().st_size > 0
    assert "rank 8" in run(installed, trained, "effilora", "inspect", "outputs/example")


def test_the_training_modules_run_as_accelerate_launches_them(installed, tmp_path):
    assert "--instance_data_dir" in run(installed, tmp_path, "python", "-m", "effilora_diffusion.train", "--help")
    assert "--train_file" in run(installed, tmp_path, "effilora", "train-llm", "--help")
    assert "--image_folder" in run(installed, tmp_path, "effilora", "train-vlm", "--help")


def test_the_installed_command_serves_the_web_ui(installed, trained):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [str(installed / "effilora"), "app", "--port", str(port)], cwd=trained, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        address = process.stdout.readline().strip()  # printed once the page is served; empty if the process has ended
        assert address == f"http://127.0.0.1:{port}", process.stderr.read()
        with urllib.request.urlopen(address, timeout=PATIENCE) as page:
            assert page.status == 200
            assert "EffiLoRA" in page.read().decode()
    finally:
        process.terminate()
        process.communicate(timeout=PATIENCE)

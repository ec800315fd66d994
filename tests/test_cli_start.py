"""What the command needs before it does anything: its help comes without the libraries of models."""

import subprocess
import sys

import pytest

import effilora_diffusion

HEAVY = ("torch", "diffusers", "transformers", "gradio", "accelerate", "PIL", "numpy")
PROGRAM = """
import sys
from effilora_diffusion.cli import main
code = 0
try:
    main(sys.argv[1:])
except SystemExit as stop:
    code = stop.code
print([name for name in {heavy!r} if name in sys.modules], code)
"""


@pytest.mark.parametrize("words", [["--help"], ["--version"]])
def test_help_and_version_import_no_heavy_library(words):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(heavy=HEAVY), *words], capture_output=True, text=True, check=True
    )
    said, _, imported = done.stdout.rstrip().rpartition("\n")
    assert imported == "[] 0"
    if words == ["--version"]:
        assert said == f"effilora {effilora_diffusion.__version__}"
    else:
        assert all(command in said for command in ("train", "train-llm", "train-vlm", "generate", "app", "export"))


def test_help_of_training_does_not_wait_for_torch():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(heavy=("torch", "diffusers")), "train", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.rstrip().endswith("[] 0")


def test_importing_the_package_imports_no_heavy_library():
    program = f"import sys, effilora_diffusion; print([n for n in {HEAVY!r} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_an_unknown_command_is_code_two():
    done = subprocess.run([sys.executable, "-m", "effilora_diffusion", "paint"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "invalid choice: 'paint'" in done.stderr

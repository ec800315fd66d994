"""What the command needs before it does anything: its help comes without the libraries of models."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import effilora_diffusion

HEAVY = ("torch", "diffusers", "transformers", "gradio", "accelerate", "PIL", "numpy")
PROGRAM = """
import sys
from pathlib import Path
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


WAITING = """
import os, sys
from effilora_diffusion.cli import train
assert "torch" not in sys.modules
train.main(["--nothing"])
print(os.environ.get("OMP_WAIT_POLICY"), os.environ.get("GOMP_SPINCOUNT"))
"""


@pytest.mark.parametrize(
    ("chosen", "found"),
    [({}, "None 1000"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE None"), ({"GOMP_SPINCOUNT": "7"}, "None 7")],
)
def test_threads_soon_sleep_while_they_wait_unless_the_user_chose_otherwise(chosen, found):
    environment = {
        name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    }
    words = [sys.executable, "-c", WAITING]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=environment | chosen)
    assert done.stdout == f"{found}\n"


def test_a_command_starts_without_the_warnings_of_libraries(tmp_path):
    script = Path(__file__).parents[1] / "train_scripts" / "train_dreambooth_effilora.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRANSFORMERS_VERBOSITY"}
    words = [sys.executable, str(script), "--dry_run"]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=environment, cwd=tmp_path)
    assert done.stdout.startswith("  ")
    assert done.stderr == ""

"""What the pages tell a reader to type: commands train, the notebook runs, other trainers' names lead to real settings."""

import ast
import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest
from accelerate import Accelerator
from helpers import make_subject
from tiny_families import build

from effilora_diffusion.cli import COMMANDS
from effilora_diffusion.cli.train import parse_arguments
from effilora_diffusion.core.options import settings_of
from effilora_diffusion.diffusion.config import TrainingConfig
from effilora_diffusion.diffusion.training.diffusers_flags import FLAGS
from effilora_diffusion.diffusion.training.trainer import Trainer

ROOT = Path(__file__).parents[1]
SMALL = [
    *("--resolution", "64", "--max_train_steps", "2", "--checkpointing_steps", "1", "--validation_steps", "1"),
    *("--mixed_precision", "no", "--num_validation_images", "1", "--validation_inference_steps", "1"),
    *("--export_distillation_steps", "1", "--report_to", "none", "--judge", "none"),
]


def page(name):
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def command_of(text):
    """The words of the first training command in indented code."""
    lines = "\n".join(line[4:] for line in text.splitlines() if line.startswith("    "))
    found = re.search(r"^effilora train \\\n(?:.*\\\n)*.*$", lines, re.MULTILINE)
    return shlex.split(found[0].replace("\\\n", " "))[2:]


@pytest.mark.parametrize(("name", "family"), [("style.md", "sd15"), ("sdxl.md", "sdxl"), ("flux.md", "flux")])
def test_the_command_of_a_page_trains(name, family, tmp_path):
    build(family).save_pretrained(tmp_path / "model")
    own = ["--pretrained_model_name_or_path", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out")]
    own += ["--instance_data_dir", str(make_subject(tmp_path / "s", 2, size=(64, 64)))]
    named = command_of(page(name))
    assert "--pretrained_model_name_or_path" in named
    Trainer(parse_arguments([*named, *own, *SMALL]), Accelerator(cpu=True)).run()
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"pytorch_lora_weights.safetensors", "report.html", "scores.jsonl", "checkpoint-2"} <= written


def test_the_notebook_runs_from_its_first_cell_to_its_last(tmp_path, monkeypatch):
    notebook = json.loads((ROOT / "examples" / "subject.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code")
    assert cells[0].startswith("STEPS = 250")
    cells[0] = cells[0].replace("STEPS = 250", "STEPS = 1")
    quick = "--num_validation_images 1 --validation_inference_steps 1 --export_distillation_steps 1 --report_to none"
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    shown = []
    for cell in cells:
        cell = cell.replace('"train", ', f'"train", *"{quick}".split(), ')
        cell = cell.replace("num_inference_steps=25", "num_inference_steps=1")
        body = ast.parse(cell).body
        last = body.pop() if isinstance(body[-1], ast.Expr) else None
        exec(compile(ast.Module(body, []), "cell", "exec"), names)
        if last is not None:
            shown.append(eval(compile(ast.Expression(last.value), "cell", "eval"), names))
    assert shown[0] == 0
    assert (tmp_path / "outputs" / "notebook" / "report.html").is_file()
    assert "pytorch_lora_weights.safetensors" in shown[-1]


def test_names_of_other_trainers_lead_to_settings_that_there_are():
    known = {entry.name for entry in settings_of(TrainingConfig)} | {*FLAGS}
    tables = page("coming_from.md").split("\n## ")[1:]
    assert [table.split("\n")[0] for table in tables] == [
        "diffusers",
        "kohya's sd-scripts",
        "ai-toolkit",
        "OneTrainer",
    ]
    for table in tables:
        rows = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith("|")][2:]
        assert len(rows) > 10
        for theirs, ours, _ in rows:
            named = ours if "the same" not in ours or table.startswith("kohya") else ours + theirs
            for flag in re.findall(r"`--(\w+?)(?:_\*)?[` ]", named):
                assert flag in known or any(one.startswith(flag) for one in known), flag


def test_every_yes_of_the_comparison_is_shown_and_every_no_has_a_reason():
    text = page("comparison.md")
    features, complaints = (
        [line.split("|")[1:-1] for line in part.splitlines() if line.startswith("|")][2:]
        for part in text.split("\n## ")
    )
    for first, *_, ours in features:
        for test in re.findall(r"`(tests/\w+\.py)`", ours):
            assert (ROOT / test).is_file(), test
        shown = "`" in ours or ".md" in ours or first.strip().startswith(("PixArt", "Qwen"))
        assert shown or re.search(r"no:? .{8}|no: not yet|others: no", ours), first
    numbers = [number for first, _ in complaints for number in numbered(first.strip().split(". ")[0])]
    assert sorted(numbers) == list(range(1, 41))


def numbered(text):
    """The numbers of ``7, 8, 10`` and ``20-22``."""
    pairs = [part.split("-") for part in text.split(", ")]
    return [number for pair in pairs for number in range(int(pair[0]), int(pair[-1]) + 1)]


def test_commands_on_the_pages_are_commands():
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for command in re.findall(r"(?:^    |`)effilora ([a-z-]+)", path.read_text(encoding="utf-8"), re.MULTILINE):
            assert command in COMMANDS, (path.name, command)


def test_the_image_is_built_from_what_there_is():
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]]
    assert copied
    assert [name for name in copied if not (ROOT / name).exists()] == []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (extras,) = (line.removeprefix("ARG EXTRAS=") for line in lines if line.startswith("ARG EXTRAS"))
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    assert [line for line in lines if line.startswith("FROM")] == ["FROM python:3.11-slim"]
    assert "effilora" in project["scripts"]
    packed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert {*packed["packages"], *packed["force-include"]} <= set(copied)
    assert re.search(r"^torch==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)

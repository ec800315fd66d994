"""One direction of imports: the core knows neither images nor language, and they do not know one another."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "effilora_diffusion"


def imported(path):
    """Modules that a file names in its import statements, relative ones spelt out."""
    here = ("effilora_diffusion", *path.relative_to(PACKAGE).parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(here[: len(here) - node.level + 1]) if node.level else ""
            found.add(".".join(part for part in (base, node.module) if part))
            found |= {f"{base}.{name.name}" for name in node.names if node.level and not node.module}
    return found


@pytest.mark.parametrize(
    ("part", "forbidden"),
    [
        ("core", ("diffusers", "transformers", "peft", "effilora_diffusion.diffusion", "effilora_diffusion.language")),
        ("diffusion", ("effilora_diffusion.language", "effilora_diffusion.cli", "app", "benchmarks")),
        ("language", ("diffusers", "effilora_diffusion.diffusion", "effilora_diffusion.cli", "app", "benchmarks")),
    ],
)
def test_imports_go_one_way(part, forbidden):
    files = sorted((PACKAGE / part).rglob("*.py"))
    assert files
    for path in files:
        wrong = [
            name for name in imported(path) if any(name == one or name.startswith(f"{one}.") for one in forbidden)
        ]
        assert wrong == [], path


def test_the_core_runs_without_diffusers_and_transformers():
    program = (
        "import importlib, pkgutil, sys\n"
        "for name in ('diffusers', 'transformers', 'peft', 'accelerate'): sys.modules[name] = None\n"
        "import effilora_diffusion.core as core\n"
        "for module in pkgutil.iter_modules(core.__path__): importlib.import_module(f'{core.__name__}.{module.name}')\n"
        "print(core.EffiLoRAConfig(rank=2).rank)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr

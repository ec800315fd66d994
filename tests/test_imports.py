"""The import structure: one direction, no cycles, small files and functions."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "effilora_diffusion"
FILES = sorted(PACKAGE.rglob("*.py"))
FRONT_ENDS = ("effilora_diffusion.cli", "effilora_diffusion.studio", "train_scripts", "benchmarks", "app", "tests")
FORBIDDEN = {
    "core": ("diffusers", "transformers", "peft", "effilora_diffusion.diffusion", "effilora_diffusion.language"),
    "diffusion": ("effilora_diffusion.language",),
    "language": ("diffusers", "effilora_diffusion.diffusion"),
    "cli": ("train_scripts", "benchmarks", "app", "tests"),
    "studio": ("train_scripts", "benchmarks", "app", "tests"),
}
"""What the files of a folder must not import, besides the front ends for ``core``, ``diffusion`` and ``language``."""


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path, nodes):
    """Full names in the import statements among ``nodes``: modules, and names that may be modules."""
    package = path.relative_to(ROOT).parts[:-1]
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = (*package[: len(package) - node.level + 1],) if node.level else ()
            module = ".".join((*base, *filter(None, [node.module])))
            names |= {module, *(f"{module}.{name.name}" for name in node.names)}
    return names


def top_level(tree):
    """The nodes that run when a module is imported (and those under TYPE_CHECKING), without bodies of functions."""
    pending = list(tree.body)
    while pending:
        node = pending.pop()
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            pending += ast.iter_child_nodes(node)


def module_graph():
    """Imports at module level between the package's modules; a package counts as its ``__init__``."""
    modules = {module_of(path) for path in FILES}
    graph = {}
    for path in FILES:
        names = imported(path, top_level(ast.parse(path.read_text(encoding="utf-8"))))
        leaves = {name for name in names if not any(other.startswith(f"{name}.") for other in names & modules)}
        graph[module_of(path)] = {longest(name, modules) for name in leaves} - {None, module_of(path)}
    return graph


def longest(name, modules):
    """The module that ``name`` is, or is in."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name or None


def reachable(graph, start):
    seen, pending = set(), list(graph[start])
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            pending += graph[node]
    return seen


def cycles(graph):
    """Strongly connected components of more than one node."""
    reach = {node: reachable(graph, node) for node in graph}
    groups = {frozenset(other for other in reach[node] if node in reach[other]) for node in graph}
    return sorted(sorted(group) for group in groups if len(group) > 1)


@pytest.mark.parametrize("part", FORBIDDEN)
def test_imports_go_one_way(part):
    files = sorted((PACKAGE / part).rglob("*.py"))
    assert files
    forbidden = FORBIDDEN[part] + (FRONT_ENDS if part in ("core", "diffusion", "language") else ())
    for path in files:
        names = imported(path, ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        wrong = [name for name in names if any(name == one or name.startswith(f"{one}.") for one in forbidden)]
        assert wrong == [], path


def test_no_module_imports_itself_through_others():
    graph = module_graph()
    assert "effilora_diffusion.core.errors" in reachable(graph, "effilora_diffusion.language.trainer")
    assert cycles(graph) == []


def test_the_folders_of_diffusion_are_in_layers():
    prefix = "effilora_diffusion.diffusion."
    folders = {path.name for path in (PACKAGE / "diffusion").iterdir() if (path / "__init__.py").is_file()}
    assert {"models", "adapters", "data", "sampling", "training"} <= folders
    graph = {folder: set() for folder in folders}
    for path in sorted((PACKAGE / "diffusion").rglob("*.py")):
        here = path.relative_to(PACKAGE / "diffusion").parts[0]
        if here in folders:
            names = imported(path, ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
            targets = {name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix)}
            graph[here] |= (targets & folders) - {here}
    assert "models" in reachable(graph, "training")
    assert cycles(graph) == []


def test_cycles_are_found():
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_are_small(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert [n.name for n in functions if n.end_lineno - n.lineno >= 60] == []


def test_the_core_runs_without_diffusers_and_transformers():
    program = (
        "import importlib, pkgutil, sys\n"
        "for name in ('diffusers', 'transformers', 'peft', 'accelerate'): sys.modules[name] = None\n"
        "import effilora_diffusion.core as core\n"
        "for module in pkgutil.iter_modules(core.__path__): importlib.import_module(f'{core.__name__}.{module.name}')\n"
        "print(core.EffiLoRAConfig(rank=2).rank)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr


def test_a_run_s_settings_stay_with_the_run():
    """What reads images, encodes, draws and adapts takes what it needs, so that it also serves without a training run."""
    knowing = {
        module_of(path).removeprefix("effilora_diffusion.")
        for path in FILES
        if any(
            name.endswith(".config.TrainingConfig") for name in imported(path, ast.walk(ast.parse(path.read_text())))
        )
    }
    assert not {name for name in knowing if not name.startswith(("cli.", "studio.", "diffusion.training."))}
    assert len({name for name in knowing if not name.startswith("studio.")}) <= 12


def test_every_benchmark_finds_what_it_imports():
    names = [f"benchmarks.{path.stem}" for path in sorted((ROOT / "benchmarks").glob("*.py"))]
    lines = ["import importlib", *(f"importlib.import_module({name!r})" for name in names)]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

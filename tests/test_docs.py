"""The pages match the code: the table of families, the files they name, the structure of the package."""

import re
import runpy
from pathlib import Path

import pytest

from effilora_diffusion.diffusion.models import FAMILIES

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "effilora_diffusion"
PAGE = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_the_page_has_every_family_with_its_file(family):
    file = ROOT / Path(*family.__module__.split(".")).with_suffix(".py")
    lines = len(file.read_text(encoding="utf-8").splitlines())
    (row,) = (line for line in PAGE.splitlines() if f"`{file.name}` ({lines})" in line)
    assert all(f"`{pipeline}`" in row for pipeline in family.pipelines)
    assert lines < 200
    assert ("ComfyUI" in row) == family.comfyui


def test_the_example_on_the_page_is_the_file_it_shows():
    shown = PAGE.split("```python\n")[1].split("```")[0].strip()
    assert shown in (ROOT / "effilora_diffusion/diffusion/models/auraflow.py").read_text(encoding="utf-8")


def test_the_page_of_settings_is_what_the_code_says():
    written = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    page = runpy.run_path(str(ROOT / "docs" / "settings_page.py"))["page"]
    assert written == page(), "run: python docs/settings_page.py > docs/settings.md"


def test_the_page_of_targets_says_what_the_groups_mean_in_transformers_models():
    page = runpy.run_path(str(ROOT / "docs" / "targets_page.py"))["page"]
    written = (ROOT / "docs" / "targets.md").read_text(encoding="utf-8")
    assert written == page(), "run: python docs/targets_page.py > docs/targets.md"


def test_the_files_that_the_pages_name_exist():
    pages = [ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    named = {name for page in pages for name in re.findall(r"`([\w/]+/[\w/]+\.py)`", page.read_text(encoding="utf-8"))}
    assert "language/targets.py" in named
    assert [name for name in sorted(named) if not any((root / name).is_file() for root in (ROOT, PACKAGE))] == []


def test_the_structure_in_contributing_is_the_package_s():
    tree = (
        (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("effilora_diffusion/\n")[1].split("    app/")[0]
    )
    folders = {re.match(r" *([\w/]+?)/ ", line)[1] for line in tree.splitlines() if re.match(r" *[\w/]+/ ", line)}
    assert folders == {path.parent.name for path in PACKAGE.rglob("__init__.py")} - {"effilora_diffusion", "tabs"}

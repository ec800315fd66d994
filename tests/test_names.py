"""Names and paths as Windows reads them: nothing here was run there, so its own rules are applied to what is written."""

import ntpath
from pathlib import PureWindowsPath

import pytest

from effilora_diffusion.cli.arguments import parse_adapter
from effilora_diffusion.core import run_folder
from effilora_diffusion.core.hub import HUB_ID
from effilora_diffusion.core.names import is_inside, name_fault
from effilora_diffusion.core.reference import parse_reference
from effilora_diffusion.core.writing import TEMPORARY
from effilora_diffusion.diffusion.models.pipelines import public_name

GOOD = ["cat", "my cat 2", "cat-2_b", "\u732b", "console", "com10", "a.b"]
BAD = ["", "con", "Con", "NUL.txt", "com1", "lpt9.safetensors", "aux ", "cat.", "cat ", " cat", "a/b", "a\\b", "c:d", "a?",
       "a*", "a|b", 'a"', "a<b", "tab\t", "a\x00", "x" * 101]  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_a_usual_name_has_no_fault(name):
    assert name_fault(name) is None
    assert not PureWindowsPath(name).is_reserved()


@pytest.mark.parametrize("name", BAD)
def test_a_name_that_some_system_refuses_has_a_fault(name):
    assert name_fault(name) is not None


def test_every_name_that_windows_reserves_has_a_fault():
    devices = ["con", "prn", "aux", "nul", *(f"{kind}{number}" for kind in ("com", "lpt") for number in range(1, 10))]
    assert all(PureWindowsPath(name).is_reserved() and name_fault(name) for name in devices)


@pytest.mark.parametrize(
    "name", ["..", "../a", "a/../../b", "/a", "", "C:a", "C:\\a", "..\\a", "a\\..\\b", "\\\\server\\share\\a", "\\a"]
)
def test_a_recorded_name_never_leaves_its_folder_on_any_system(name):
    assert not is_inside(name)


@pytest.mark.parametrize("name", ["a", "samples/step-000000.png", "checkpoint-5", ".run.json"])
def test_recorded_names_are_inside(name):
    assert is_inside(name)


def test_what_a_run_writes_has_names_that_every_system_takes():
    files = [value for name, value in vars(run_folder).items() if name.endswith(("_FILE", "_FOLDER"))]
    assert len(files) > 10
    assert [name for name in [*files, "checkpoint-500", TEMPORARY.replace("*", "a")] if name_fault(name)] == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("C:\\loras\\cat.safetensors", ("C:\\loras\\cat.safetensors", 1.0)),
        ("C:\\loras\\cat.safetensors:0.8", ("C:\\loras\\cat.safetensors", 0.8)),
        ("D:cat.safetensors:-1", ("D:cat.safetensors", -1.0)),
        ("\\\\server\\loras\\cat.safetensors:.5", ("\\\\server\\loras\\cat.safetensors", 0.5)),
    ],
)
def test_a_drive_letter_is_no_strength(text, expected):
    assert parse_adapter(text) == expected
    assert ntpath.splitdrive(expected[0])[0]


def test_a_checkpoint_of_a_run_on_another_drive():
    assert parse_reference("C:\\runs\\cat@500").step == 500
    assert parse_reference("C:\\runs\\cat@500").name == "C:\\runs\\cat"


@pytest.mark.parametrize(
    "path", ["C:\\models\\sd15", "C:/models/sd15", "\\\\server\\models\\sd15", "models\\sd15\\", "./models/sd15"]
)
def test_a_model_s_public_name_is_the_last_part_of_its_path(path):
    assert public_name(path) == "sd15"
    assert not HUB_ID.fullmatch(path)


def test_a_path_as_long_as_windows_takes_leaves_room_for_the_temporary_name():
    longest = max(len(value) for name, value in vars(run_folder).items() if name.endswith("_FILE"))
    temporary = 1 + min(longest, 60) + 1 + 8 + len(TEMPORARY) - 2
    assert temporary <= longest + 30

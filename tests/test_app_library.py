"""The library of the web UI without a browser: what is found, shown, noted and deleted."""

import os
import shutil
from types import SimpleNamespace

import pytest
from app_forms import built, image_size
from helpers import image

from effilora_diffusion import EffiLoRAError
from effilora_diffusion.diffusion.sampling.a1111 import infotext
from effilora_diffusion.diffusion.sampling.png import save_png
from effilora_diffusion.diffusion.sampling.request import GenerationRequest
from effilora_diffusion.studio.library import FAVOURITES, GRID_SHEETS, IMAGES, SUFFIXES, Library
from effilora_diffusion.studio.notes import Note, Notes, note_of
from effilora_diffusion.studio.tabs.library import PAGE, LibraryTab

FILES = {
    "a.png": GenerationRequest("a red fox", "blurry", [("cat", 1.0)], 2, 3.0, seed=12),
    "b.png": GenerationRequest("a blue fox", seed=123),
    "c.png": GenerationRequest("a castle", adapters=[("dog @ 20", 0.5)], seed=7),
}


def keep(folder, name, request, minutes=0, **more):
    """An image in a folder, drawn some minutes after the first."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = image(len(name) + request.seed, (64, 32))
    save_png(pixels, folder / name, {**request.parameters(pixels, request.seed, None), **more})
    os.utime(folder / name, (1_000_000 + 60 * minutes,) * 2)
    return folder / name


@pytest.fixture
def folder(tmp_path):
    history = tmp_path / "outputs" / "history"
    for minutes, (name, request) in enumerate(FILES.items()):
        keep(history, name, request, minutes)
    return history


@pytest.fixture
def library(folder):
    return Library(folder, folder.parent / ".thumbnails")


@pytest.fixture
def tab(folder):
    return built(LibraryTab, SimpleNamespace(history=folder, outputs=folder.parent))


def names(found):
    return [entry.name for entry in found]


def listed(tab, query="", kind="All", page=0, opened=None, chosen=()):
    parts = ("cards", "page", "newer", "older", "status", "many", "count")
    return dict(zip(parts, tab.listing(query, kind, page, opened, list(chosen)), strict=True))


def shown(tab, name):
    return dict(zip(("name", "details", "image", "facts", "star", "tags", "note"), tab.show(name), strict=True))


# ------------------------------------------------------------------------------------------------------- finding


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("", "c b a"),
        ("fox", "b a"),
        ("RED fox", "a"),
        ("fox castle", ""),
        ("blurry", "a"),
        ("dog", "c"),
        ("cat", "a"),
        ("12", "b a"),
        ("seed:12", "a"),
        ("seed:12 fox", "a"),
        ("c.png", "c"),
    ],
)
def test_words_of_prompts_adapters_and_seeds_are_found(library, query, found):
    assert names(library.find(query)) == [f"{name}.png" for name in found.split()]


def test_files_that_come_and_go_by_hand_are_seen(library, folder, tmp_path):
    assert names(library.find("fox")) == ["b.png", "a.png"]
    (folder / "a.png").unlink()
    keep(folder, "by hand.png", GenerationRequest("my fox"), 9)
    keep(folder, "b.png", GenerationRequest("a dog now"), 10)
    assert names(library.find("fox")) == ["by hand.png"]
    assert names(library.find("now")) == ["b.png"]
    for name in (".hidden.png", "text.txt", "bad\n.png"):
        shutil.copyfile(folder / "b.png", folder / name)
    (tmp_path / "secret.png").write_bytes((folder / "b.png").read_bytes())
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "folder.png").mkdir()
    assert names(library.find("now")) == ["b.png"]
    for name in ("../secret.png", "link.png", "", None, str(tmp_path / "secret.png")):
        with pytest.raises(EffiLoRAError, match=r"no longer there|choose an image"):
            library.file(name)


def test_images_of_other_programs_and_damaged_ones_are_listed(library, folder, tab):
    facts = {"prompt": "a lighthouse", "seed": 5, "width": 64, "height": 32, "num_inference_steps": 20}
    save_png(image(1), folder / "theirs.png", None, infotext(facts))
    image(2).save(folder / "bare.JPG")
    (folder / "broken.webp").write_bytes(b"RIFF")
    assert names(library.find("lighthouse")) == ["theirs.png"]
    assert names(library.find("seed:5")) == ["theirs.png"]
    assert {"bare.JPG", "broken.webp"} <= set(names(library.find()))
    assert "| Made with | A1111 |" in shown(tab, "theirs.png")["facts"]
    assert "this image carries none" in shown(tab, "bare.JPG")["facts"]
    assert shown(tab, "broken.webp")["image"]["value"] is None
    assert 'aria-label="broken.webp"' in listed(tab, "broken")["cards"]
    assert all(suffix == suffix.lower() for suffix in SUFFIXES)


def test_grids_and_favourites_are_kinds(library, folder):
    keep(folder, "sheet.png", FILES["a.png"], 5, grid={"kind": "heads"})
    library.notes.put("b.png", Note(favourite=True))
    assert names(library.find("", GRID_SHEETS)) == ["sheet.png"]
    assert names(library.find("fox", IMAGES)) == ["b.png", "a.png"]
    assert names(library.find("", FAVOURITES)) == ["b.png"]


def test_only_the_page_that_is_shown_is_read(tab, folder, library):
    for number in range(2 * PAGE):
        keep(folder, f"{number:03}.png", GenerationRequest(f"number {number}"), 100 + number)
    first = listed(tab)
    assert first["cards"].count("<li>") == PAGE
    assert first["status"] == "83 images, page 1 of 3"
    assert (first["newer"]["interactive"], first["older"]["interactive"]) == (False, True)
    assert len(tab.library._index) == PAGE
    assert len(list((folder.parent / ".thumbnails").iterdir())) == PAGE
    last = listed(tab, page=7)
    assert (last["page"], last["older"]["interactive"]) == (2, False)
    assert last["cards"].count("<li>") == 3
    assert tab.turn(1)("", "All", 0, None, [])[1] == 1


def test_thumbnails_are_small_and_follow_their_image(library, folder):
    (entry,) = library.find("castle")
    small = library.thumbnail(entry)
    assert image_size(small) == (64, 32)
    before = small.read_bytes()
    image(99, (2000, 1000)).save(folder / "c.png")
    assert image_size(library.thumbnail(library.entry("c.png"))) == (320, 160)
    assert small.read_bytes() != before


# --------------------------------------------------------------------------------------------------------- noting


def test_notes_survive_and_are_found(tab, folder, library):
    assert tab.favourite("a.png")[1] == "Added to the favourites."
    assert tab.save_note("a.png", "animals, best,, animals", "for the\nposter") == "Tags and note saved."
    assert library.notes.of("a.png") == Note(
        True, ("animals", "best"), "for the\nposter"
    )  # as another server reads it
    assert names(library.find("best poster")) == ["a.png"]
    found = shown(tab, "a.png")
    assert (found["tags"], found["note"]) == ("animals, best", "for the\nposter")
    assert 'aria-label="favourite"' in listed(tab)["cards"]
    assert tab.favourite("a.png")[1] == "Removed from the favourites."
    assert tab.favour(["b.png", "gone.png"]) == "1 added to the favourites."
    assert "no longer there" in tab.save_note("../x", "", "")
    assert "21 tags" in tab.save_note("a.png", ",".join(map(str, range(21))), "")
    assert "2000 characters" in tab.save_note("a.png", "", "x" * 2001)


def test_notes_are_a_plain_file_that_may_be_edited(tmp_path):
    notes = Notes(tmp_path / "notes.json")
    notes.put("a.png", note_of(True, "", ""))
    (tmp_path / "notes.json").write_text(
        '{"a.png": {"mine": 1, "tags": ["x", 2]}, "b.png": {"text": "hi"}, "c.png": 3}'
    )
    assert notes.all() == {"a.png": Note(tags=("x", "2")), "b.png": Note(text="hi")}
    notes.put("a.png", Note())
    assert '"mine": 1' in (tmp_path / "notes.json").read_text()  # what others wrote stays
    notes.drop(["b.png"])
    assert not notes.of("b.png").text


def test_damaged_notes_are_told_and_kept(tab, folder):
    (folder / "notes.json").write_text("{")
    said = listed(tab)
    assert "the notes in history/notes.json can't be read: mend that file" in said["status"]
    assert said["cards"].count("<li>") == 3
    assert "Not saved" in tab.favourite("a.png")[1]
    assert shown(tab, "a.png")["name"] == "a.png"
    assert (folder / "notes.json").read_text() == "{"


# -------------------------------------------------------------------------------------------------------- showing


def test_an_image_is_shown_with_its_facts(tab, folder):
    found = shown(tab, "a.png")
    for row in ("| Prompt | a red fox |", "| Negative prompt | blurry |", "| Seed | 12 |", "| Size | 64 x 32 |",
                "| Adapters | cat at 1.0 |", "| Steps | 2 |"):  # fmt: skip
        assert row in found["facts"]
    assert found["image"]["alt_text"] == "a red fox"
    assert shown(tab, "../../cat")["name"] is None
    axes = {"across": {"setting": "steps", "values": ["1", "2"]}}
    keep(folder, "sheet.png", FILES["b.png"], 5, grid={"axes": axes, "missing": 1})
    assert "| Across | steps: 1; 2 |\n| Missing | 1 cells" in shown(tab, "sheet.png")["facts"]


def test_words_of_images_are_only_words(tab, folder):
    bad = '<img src=x onerror=alert(1)> "quoted" ![a](http://evil.example/x)'
    keep(
        folder, '"><b>.png', GenerationRequest(bad, adapters=[(bad, 1.0)]), 9, odd={"a": [1]}, strange=bad, grid=[bad]
    )
    cards, facts = listed(tab)["cards"], shown(tab, '"><b>.png')["facts"]
    for text in (cards, facts):
        assert "<b>" not in text
        assert "<img src=x" not in text
    assert "](http" not in facts
    assert "&lt;img src=x onerror=alert(1)&gt; &quot;quoted&quot;" in cards


def test_settings_are_sent_to_other_tabs(tab, folder):
    send = tab.sender("generate", lambda found: [found.parameters["prompt"], "said"], 2)
    assert send("a.png") == [{"__type__": "update", "selected": "generate"}, "", "a red fox", "said"]
    image(2).save(folder / "bare.png")
    _, said, *kept = send("bare.png")
    assert said == "**Not sent:** this image carries no settings"
    assert all("value" not in update for update in kept)
    assert "no longer there" in send("gone.png")[1]


# ------------------------------------------------------------------------------------------------------- deleting


def test_chosen_images_are_deleted_after_a_question(tab, folder, library):
    listed(tab)
    tab.favourite("a.png")
    chosen = tab.choose(SimpleNamespace(shown=["a.png", "c.png"], chosen=["a.png"]), ["b.png", "c.png"])[0]
    assert chosen == ["b.png", "a.png"]
    assert tab.chosen_row(chosen)[1] == "2 chosen"
    assert tab.choose(SimpleNamespace(shown=["b.png"], chosen=[]), chosen)[0] == ["a.png"]
    asked, question = tab.ask([*chosen, "gone.png", "../cat"])
    assert question == "Delete these 2 images from the disk? It can't be undone."
    assert sorted(asked) == ["a.png", "b.png"]
    assert names(library.find()) == ["c.png", "b.png", "a.png"]  # so far it is a question
    assert tab.delete_images(asked, "a.png", [*chosen, "c.png"]) == (None, ["c.png"], "2 images deleted.")
    assert names(library.find()) == ["c.png"]
    assert not library.notes.of("a.png").favourite
    assert [file.name for file in (folder.parent / ".thumbnails").iterdir()] == ["c.png.webp"]
    assert tab.ask([])[0] is None
    assert "Not deleted" in tab.delete_images(["../x"], None, [])[2]


def test_the_last_sheet_of_a_grid_takes_its_cells_along(tab, folder):
    name = "20260101-000000-000000"
    for number in (1, 2):
        keep(folder, f"{name}-{number}-grid.png", FILES["a.png"])
    cells = keep(folder / "grids" / name, "1-1-1.png", FILES["a.png"]).parent
    tab.delete_images([f"{name}-1-grid.png"], None, [])
    assert cells.is_dir()
    assert "its cells are deleted, too" in tab.ask(f"{name}-2-grid.png")[1]
    tab.delete_images([f"{name}-2-grid.png"], None, [])
    assert not cells.exists()

"""the image folder: every kind of file gives an example or a reason in words, before the first step."""

import hashlib
import json
import os
import sys
import unicodedata
from pathlib import Path

import pytest
from image_zoo import BAD_FILES, encoded, image, noise, note
from PIL import Image

from effilora_diffusion.core.errors import EffiLoRAError
from effilora_diffusion.diffusion.data.folder import Example, Problem, report_problems, scan_images


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_skipped_with_its_reason(tmp_path, name):
    content, phrase = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    good = image(tmp_path / "good.png")
    examples, problems = scan_images(tmp_path, "a toy")
    assert [example.path for example in examples] == [good]
    assert [(problem.path.name, problem.fatal) for problem in problems] == [(name, True)]
    assert phrase in problems[0].reason
    assert "\n" not in problems[0].reason


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pipes in folders")
def test_folder_links_and_pipes_are_skipped_with_a_reason(tmp_path):
    image(tmp_path / "good.png")
    (tmp_path / "dir.png").mkdir()
    (tmp_path / "dangling.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    os.mkfifo(tmp_path / "pipe.png")  # opening it would wait for ever
    examples, problems = scan_images(tmp_path, "a toy")
    assert [example.path.name for example in examples] == ["good.png"]
    reasons = {problem.path.name: problem.reason for problem in problems if problem.fatal}
    assert reasons.keys() == {"dangling.png", "loop.png", "pipe.png"}
    assert "is a folder without images" in note(problems, "dir.png")
    assert "link to a file that does not exist" in reasons["dangling.png"]
    assert "cannot be read (" in reasons["loop.png"]
    assert "not a regular file" in reasons["pipe.png"]


def test_examples_are_sorted_and_carry_hash_and_size(tmp_path):
    for seed, name in enumerate(("c.png", "a.png", "b.PNG")):
        image(tmp_path / name, seed=seed, width=100 + seed)
    examples, problems = scan_images(tmp_path, "a toy")
    assert problems == []
    assert [example.path.name for example in examples] == ["a.png", "b.PNG", "c.png"]
    for example in examples:
        assert example.sha256 == hashlib.sha256(example.path.read_bytes()).hexdigest()
        assert example.caption == "a toy"
    assert [example.size for example in examples] == [(101, 80), (102, 80), (100, 80)]
    assert scan_images(str(tmp_path), "a toy") == (examples, problems)


def test_upper_case_unicode_spaces_and_missing_suffixes_are_accepted(tmp_path):
    names = ["IMG 1.JPG", "Grüße 猫.png", "plain", "two.dots.jpeg"]
    for seed, name in enumerate(names):
        (tmp_path / name).write_bytes(encoded(noise(seed=seed), "JPEG" if "JP" in name.upper() else "PNG"))
    examples, problems = scan_images(tmp_path, "a toy")
    assert [example.path.name for example in examples] == sorted(names)
    assert problems == []


def test_hidden_and_unrelated_entries_are_passed_over_in_silence(tmp_path):
    image(tmp_path / "good.png")
    image(tmp_path / ".hidden.png")
    for name in ("._good.png", ".DS_Store", "Thumbs.db", "desktop.ini", "README.md", "info.json", "x.safetensors"):
        (tmp_path / name).write_bytes(b"\0\1\2")
    for name in (".ipynb_checkpoints", "__MACOSX"):
        (tmp_path / name).mkdir()
        image(tmp_path / name / "inside.png")
    examples, problems = scan_images(tmp_path, "a toy")
    assert [example.path.name for example in examples] == ["good.png"]
    assert problems == []


def test_odd_images_are_used_with_a_note(tmp_path):
    for first, name in enumerate(("film.gif", "film.webp", "film.png", "pages.tiff")):
        frames = [Image.fromarray(noise(80, 80, seed=10 + 3 * first + more)) for more in range(3)]
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    Image.new("RGB", (4096, 2)).save(tmp_path / "strip.png")
    (tmp_path / "endless.png").write_bytes(encoded(noise(seed=5))[:-12])
    broken = bytearray(encoded(noise(seed=6)))
    broken[-13] ^= 1  # the check sum of the pixel data
    (tmp_path / "checksum.png").write_bytes(broken)
    examples, problems = scan_images(tmp_path, "a toy")
    assert len(examples) == 8
    assert not any(problem.fatal for problem in problems)
    for name in ("film.gif", "film.webp", "film.png"):
        assert note(problems, name) == "animated, 3 frames: only the first is used"
    assert note(problems, "pages.tiff") == "3 pages: only the first is used"
    assert note(problems, "dot.png") == "very small (1x1 pixels)"
    assert "extreme aspect ratio (4096x2 pixels)" in note(problems, "strip.png")
    assert "damaged or missing" in note(problems, "endless.png")
    assert "damaged or missing" in note(problems, "checksum.png")
    assert [problem.path.name for problem in problems] == sorted(problem.path.name for problem in problems)


def test_photo_with_a_second_map_inside_is_no_animation(tmp_path):
    images = [Image.fromarray(noise(seed=seed)) for seed in (0, 1)]
    images[0].save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=images[1:])
    assert Image.open(tmp_path / "phone.jpg").n_frames == 2
    assert scan_images(tmp_path, "a toy")[1] == []


def test_size_notes_start_exactly_at_their_limits(tmp_path):
    for name, size in (("a", (64, 64)), ("b", (63, 64)), ("c", (256, 64)), ("d", (64, 257))):
        Image.fromarray(noise(*size, seed=ord(name))).save(tmp_path / f"{name}.png")
    _, problems = scan_images(tmp_path, "a toy")
    assert [(problem.path.name, problem.reason.split(" (")[0]) for problem in problems] == [
        ("b.png", "very small"),
        ("d.png", "extreme aspect ratio"),
    ]


def test_duplicates_are_kept_and_noted(tmp_path):
    content = encoded(noise())
    for name in ("a.png", "b.png", "c.png"):
        (tmp_path / name).write_bytes(content)
    image(tmp_path / "d.png", seed=1)
    examples, problems = scan_images(tmp_path, "a toy")
    assert len(examples) == 4
    assert [(problem.path.name, problem.fatal) for problem in problems] == [("b.png", False), ("c.png", False)]
    assert "the same file as 'a.png'" in problems[0].reason


def test_folder_mistakes_raise_one_clear_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "unrelated").mkdir()
    (tmp_path / "unrelated" / "notes.md").write_text("no image")
    (tmp_path / "file.png").write_bytes(encoded(noise()))
    for name, phrase in (
        ("missing", "does not exist"),
        ("empty", "holds no images"),
        ("unrelated", "holds no images"),
        ("file.png", "is a file, not a folder"),
    ):
        with pytest.raises(EffiLoRAError, match=phrase) as caught:
            scan_images(tmp_path / name, "a toy")
        assert name in str(caught.value)


def test_folder_without_a_usable_image_lists_the_first_reasons(tmp_path):
    for index in range(5):
        (tmp_path / f"{index}.png").write_bytes(b"")
    with pytest.raises(EffiLoRAError) as caught:
        scan_images(tmp_path, "a toy")
    message = str(caught.value)
    assert "none of the 5 files" in message
    assert all(f"{index}.png: the file is empty" in message for index in range(3))
    assert "3.png" not in message
    assert "and 2 more" in message


def test_report_has_one_line_per_problem():
    problems = [
        Problem(Path("x/a.png"), "the file is empty", fatal=True),
        Problem(Path("x/b\nc\udc80.png"), "very small", fatal=False),
    ]
    assert report_problems(problems) == "skipped  a.png: the file is empty\nnote  b\\nc\\udc80.png: very small"
    assert report_problems([]) == ""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such a name")
def test_names_that_no_terminal_can_print_are_handled(tmp_path):
    name = os.fsdecode(b"caf\xe9\n.png")
    (tmp_path / name).write_bytes(b"")
    image(tmp_path / "good.png")
    _, problems = scan_images(tmp_path, "a toy")
    assert report_problems(problems).encode("utf-8") == b"skipped  caf\\udce9\\n.png: the file is empty"


# --------------------------------------------------------------------------------------------------------- captions


def captions(folder, default="a toy"):
    examples, problems = scan_images(folder, default)
    return {example.path.name: example.caption for example in examples}, problems


def write_metadata(folder, *entries):
    lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")


def test_text_file_wins_over_metadata_wins_over_default(tmp_path):
    for seed, name in enumerate("abcde"):
        image(tmp_path / f"{name}.png", seed=seed)
    (tmp_path / "a.txt").write_bytes("\ufeff  ein süßer Hund \r\n".encode())
    write_metadata(
        tmp_path,
        {"file_name": "a.png", "text": "loses"},
        {"file_name": "b.png", "text": " wins "},
        "",
        {"file_name": "./c.png", "caption": "by caption", "other": 1},
        {"file_name": "d.png", "text": None, "prompt": "by prompt"},
    )
    found, problems = captions(tmp_path)
    assert found == {
        "a.png": "ein süßer Hund",
        "b.png": "wins",
        "c.png": "by caption",
        "d.png": "by prompt",
        "e.png": "a toy",
    }
    assert problems == []


def test_captions_match_upper_case_suffixes_dots_and_both_unicode_forms(tmp_path):
    decomposed = unicodedata.normalize("NFD", "é")
    for seed, name in enumerate(("A.JPG", "two.dots.png", f"{decomposed}.png", f"{decomposed}2.png")):
        image(tmp_path / name, seed=seed)
    (tmp_path / "A.TXT").write_text("one")
    (tmp_path / "two.dots.txt").write_text("two")
    (tmp_path / "é.txt").write_text("three")
    write_metadata(tmp_path, {"file_name": "é2.png", "text": "four"})
    found, problems = captions(tmp_path, None)
    assert found == {"A.JPG": "one", "two.dots.png": "two", f"{decomposed}.png": "three", f"{decomposed}2.png": "four"}
    assert problems == []


def test_empty_caption_falls_back_to_the_default_with_a_note(tmp_path):
    for seed, name in enumerate("ab"):
        image(tmp_path / f"{name}.png", seed=seed)
    (tmp_path / "a.txt").write_text(" \n")
    write_metadata(tmp_path, {"file_name": "a.png", "text": "not asked"}, {"file_name": "b.png", "text": ""})
    found, problems = captions(tmp_path)
    assert found == {"a.png": "a toy", "b.png": "a toy"}
    assert "'a.txt' is empty" in note(problems, "a.png")
    assert "line 2 of metadata.jsonl is empty" in note(problems, "b.png")


def test_image_without_any_caption_is_an_error_naming_it(tmp_path):
    image(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("has one")
    image(tmp_path / "lonely.png", seed=1)
    with pytest.raises(EffiLoRAError, match=r"lonely\.png' has no caption.*'lonely\.txt'"):
        scan_images(tmp_path, None)
    (tmp_path / "lonely.txt").write_text("")
    with pytest.raises(EffiLoRAError, match=r"lonely\.png' has no caption: 'lonely\.txt' is empty"):
        scan_images(tmp_path, None)


def test_unusable_image_needs_no_caption(tmp_path):
    image(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("has one")
    (tmp_path / "bad.png").write_bytes(b"")
    assert captions(tmp_path, None)[0] == {"a.png": "has one"}


@pytest.mark.parametrize("content", [b"\xff\xfea\0 \0c\0", b"caf\xe9"])
def test_undecodable_caption_is_an_error_naming_it(tmp_path, content):
    image(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(EffiLoRAError, match=r"a\.txt' can't be read: it is not UTF-8"):
        scan_images(tmp_path, "a toy")


def test_caption_that_is_a_folder_is_an_error_naming_it(tmp_path):
    image(tmp_path / "a.png")
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(EffiLoRAError, match=r"the caption file '.*a\.txt' can't be read: it is not a regular file"):
        scan_images(tmp_path, "a toy")


def test_an_empty_text_does_not_hide_a_filled_caption(tmp_path):
    for seed, name in enumerate("abc"):
        image(tmp_path / f"{name}.png", seed=seed)
    write_metadata(
        tmp_path,
        {"file_name": "a.png", "text": " ", "caption": "by caption"},
        {"file_name": "b.png", "text": None, "caption": "", "prompt": "by prompt"},
        {"file_name": "c.png", "text": "by text", "caption": "loses"},
    )
    assert captions(tmp_path, None)[0] == {"a.png": "by caption", "b.png": "by prompt", "c.png": "by text"}


@pytest.mark.parametrize(
    ("line", "phrase"),
    [
        ('{"file_name": "a.png", "text": ', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('["a.png", "words"]', "not a JSON object"),
        ('{"text": "words"}', 'no "file_name"'),
        ('{"file_name": 7, "text": "words"}', 'no "file_name"'),
        ('{"file_name": "a.png", "text": ["words", 7]}', "not text"),
        ('{"file_name": "a.png", "text": "\\ud800"}', "not text"),
    ],
)
def test_bad_metadata_line_is_an_error_naming_file_and_line(tmp_path, line, phrase):
    image(tmp_path / "a.png")
    write_metadata(tmp_path, {"file_name": "a.png", "text": "fine"}, "", line)
    with pytest.raises(EffiLoRAError, match=phrase) as caught:
        scan_images(tmp_path, "a toy")
    assert str(caught.value).startswith("line 3 of '")
    assert "metadata.jsonl'" in str(caught.value)


def test_metadata_that_is_not_utf8_is_an_error_naming_it(tmp_path):
    image(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_bytes('{"file_name": "a.png"}'.encode("utf-16"))
    with pytest.raises(EffiLoRAError, match=r"metadata\.jsonl' can't be read: it is not UTF-8"):
        scan_images(tmp_path, "a toy")


def test_two_captions_for_one_image_are_an_error(tmp_path):
    image(tmp_path / "a.png")
    write_metadata(tmp_path, {"file_name": "a.png", "text": "one"}, {"file_name": "a.png", "text": "two"})
    with pytest.raises(EffiLoRAError, match=r"lines 1 and 2 of .* give 'a\.png' two captions"):
        scan_images(tmp_path, "a toy")
    write_metadata(tmp_path, {"file_name": "a.png", "text": "one"}, {"file_name": "a.png", "text": "one"})
    assert captions(tmp_path)[0] == {"a.png": "one"}


def test_metadata_line_may_hold_a_unicode_line_separator(tmp_path):
    image(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_bytes('\ufeff{"file_name": "a.png", "text": "one\u2028two"}\r\n'.encode())
    assert captions(tmp_path)[0] == {"a.png": "one\u2028two"}


def test_captions_without_a_image_are_noted(tmp_path):
    image(tmp_path / "a.png")
    (tmp_path / "bad.png").write_bytes(b"")
    (tmp_path / "bad.txt").write_text("belongs to a bad image")
    (tmp_path / "a.png.txt").write_text("misnamed")
    write_metadata(tmp_path, {"file_name": "gone.png", "text": "x"}, {"file_name": "bad.png", "text": "y"})
    _, problems = captions(tmp_path)
    assert [(problem.path.name, problem.fatal) for problem in problems] == [
        ("a.png.txt", False),
        ("bad.png", True),
        ("gone.png", False),
    ]
    assert "no image here has this name" in problems[0].reason
    assert problems[2].reason == "line 1 of metadata.jsonl names 'gone.png', which is not here"


def test_examples_and_problems_are_immutable():
    with pytest.raises(AttributeError):
        Example(Path("a"), "b", "c", (1, 1)).caption = "d"
    with pytest.raises(AttributeError):
        Problem(Path("a"), "b", True).reason = "c"

"""Text files of users: whole, UTF-8 and of a sane size, or one sentence."""

import os

import pytest

from effilora_diffusion.core.errors import EffiLoRAError
from effilora_diffusion.core.text_io import TextError, parse_json, read_user_text


def test_text_comes_back_without_its_byte_order_mark(tmp_path):
    (tmp_path / "a").write_bytes("\ufeffein süßer Hund\r\n".encode())
    assert read_user_text(tmp_path / "a") == "ein süßer Hund\r\n"
    (tmp_path / "b").write_bytes(b"")
    assert read_user_text(tmp_path / "b") == ""


def test_the_limit_is_exact(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 10)
    assert read_user_text(tmp_path / "a", 10) == "x" * 10
    with pytest.raises(TextError, match="more than the allowed 9 bytes"):
        read_user_text(tmp_path / "a", 9)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pipes in folders")
def test_what_is_no_text_file_is_refused_with_its_reason(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    for name, reason in (
        ("pipe", "not a regular file"),
        ("zero", "not a regular file"),
        (".", "not a regular file"),
        ("none", "No such file"),
        ("loop", "symbolic links"),
        ("nul\0", "null"),
        ("latin", "not UTF-8 text; save it as UTF-8"),
    ):
        with pytest.raises(TextError, match=reason) as caught:
            read_user_text(tmp_path / name, what=f"--config {name}")
        assert str(caught.value).startswith("--config ")
        assert reason in caught.value.reason
        assert str(caught.value).isprintable()


def test_no_handle_stays_open_where_a_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        for name in ("pipe", "."):
            with pytest.raises(TextError):
                read_user_text(tmp_path / name)
    assert len(os.listdir("/proc/self/fd")) == before


def test_json_has_no_nan_and_a_depth():
    assert parse_json('{"a": [1, {"b": null}]}', 3) == {"a": [1, {"b": None}]}
    for text, depth, reason in (
        ('{"a": [1, {"b": null}]}', 2, "nested too deeply"),
        ("[" * 100_000, None, "nested too deeply"),
        ("[NaN]", None, "NaN is no number"),
        ("[-Infinity]", None, "no number"),
        ("[1", None, "Expecting"),
        ("9" * 5000, None, "integer"),
    ):
        with pytest.raises(EffiLoRAError, match=reason):
            parse_json(text, depth)

"""A slice of ``python -m benchmarks.reliability``: runs killed and stopped at random moments, and what a user finds then."""

import pytest

from benchmarks.reliability import killed, stopped
from benchmarks.reliability_cases import Workplace, content, count_events, difference


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = Workplace(tmp_path_factory.mktemp("reliability"))
    place.events = count_events(place)
    assert place.events > 100
    return place


@pytest.mark.parametrize("seed", [1000, 1001])
def test_nothing_is_lost_by_a_kill(place, seed):
    assert killed(place, seed).fault == ""


def test_nothing_is_lost_by_a_signal(place):
    assert stopped(place, 1002).fault == ""


def test_a_missing_a_changed_and_a_left_over_file_are_found(tmp_path):
    for name, text in (("out/a", "a"), ("out/b", "b"), ("out/metrics.jsonl", "1")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    whole = content(tmp_path)
    (tmp_path / "out" / "metrics.jsonl").write_text("2")  # times differ
    assert difference(content(tmp_path), whole) == ""
    (tmp_path / "out" / "a").unlink()
    (tmp_path / "out" / "b").write_text("c")
    (tmp_path / "out" / ".b.tmp").write_text("")
    assert difference(content(tmp_path), whole) == "missing: out/a; left over: out/.b.tmp; different: out/b"

"""What survives a reload: a generation that goes on, and forms that the browser keeps."""

import json
import threading

import gradio as gr
import pytest

from effilora_diffusion import EffiLoRAError
from effilora_diffusion.diffusion.sampling.stream import Progress, Stop
from effilora_diffusion.studio import jobs
from effilora_diffusion.studio.jobs import Job, Jobs
from effilora_diffusion.studio.memory import restored


class Steps:
    """A generation whose events come when they are let: ``give`` waits until the job has taken one."""

    def __init__(self):
        self.ready, self.waiting, self.next = threading.Semaphore(0), threading.Semaphore(0), None

    def __iter__(self):
        while True:
            self.waiting.release()
            self.ready.acquire()
            if isinstance(self.next, Exception):
                raise self.next
            if self.next is None:
                return
            yield self.next

    def give(self, event):
        self.waiting.acquire()
        self.next = event
        self.ready.release()


def test_a_job_goes_on_without_its_page_and_is_found_again(tmp_path):
    steps, found = Steps(), Jobs()
    job = Job(iter(steps), Stop(), "facts")
    found.keep("page", job)
    following = job.follow()
    next(following)
    steps.give(Progress(0, 2, 1, 4, preview="rough"))
    next(following)
    assert (job.progress.step, job.preview, job.files) == (1, "rough", [])
    following.close()  # the page is left
    steps.give(tmp_path / "a.png")
    steps.give(Progress(1, 2, 1, 4))
    steps.give(None)
    again = found.of("page")
    assert [again.ended for _ in again.follow()][-1]
    assert (again.files, again.preview, again.error, again.facts) == ([tmp_path / "a.png"], None, None, "facts")
    assert not again.stop
    assert found.of("other") is None


def test_a_job_that_nobody_comes_back_to_is_stopped(monkeypatch):
    monkeypatch.setattr(jobs, "GRACE", -1.0)
    steps = Steps()
    job = Job(iter(steps), Stop())
    following = job.follow()
    next(following)
    steps.give(Progress(0, 1, 1, 4))
    next(following)
    assert not job.stop  # while it is followed
    following.close()
    steps.give(Progress(0, 1, 2, 4))
    steps.give(None)
    list(job.follow())
    assert job.stop


def test_the_error_of_a_job_is_kept():
    steps = Steps()
    job = Job(iter(steps), Stop())
    steps.give(EffiLoRAError("too large"))
    list(job.follow())
    assert str(job.error) == "too large"


def test_ended_jobs_do_not_add_up(monkeypatch):
    monkeypatch.setattr(jobs, "MOST", 2)
    found = Jobs()
    for name in "abcd":
        job = Job(iter(()), Stop())
        list(job.follow())
        found.keep(name, job)
    assert [found.of(name) is not None for name in "abcd"] == [False, False, True, True]


@pytest.fixture
def parts():
    return [gr.Textbox(), gr.Slider(0, 10), gr.Number(), gr.Checkbox(), gr.Dropdown(["a", ("B", "b")])]


def test_a_form_is_put_back_as_it_was(parts):
    assert restored(parts, json.dumps(["text", 3, 1.5, True, "b"])) == ["text", 3, 1.5, True, "b"]


@pytest.mark.parametrize(
    "text", [None, "", "{", "[1]", "5", '{"a": 1}', "[" * 50_000, json.dumps(["x" * 200_000, 1, 1, True, "a"])]
)
def test_what_is_no_form_changes_nothing(parts, text):
    assert restored(parts, text) == [gr.skip()] * 5


def test_values_that_no_longer_fit_stay_as_the_page_has_them(parts):
    found = restored(parts, json.dumps([5, 11, float("nan"), 1, "B"]))
    assert found == [gr.skip()] * 5
    assert restored(parts, json.dumps(["", True, "1", False, "c"]))[3:4] == [False]
    assert restored(parts, json.dumps(["", 1, 1, False, "c"]), lambda part, value: value == 1) == [
        gr.skip(), 1, 1, gr.skip(), gr.skip()
    ]  # fmt: skip

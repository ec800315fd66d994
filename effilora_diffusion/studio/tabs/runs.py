"""The tab of training runs: the queue, the run that is chosen as it goes, and what can be done with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from ... import EffiLoRAError
from ...diffusion.report import figures
from ..adapter_row import AdapterRow
from ..queue import refusal
from ..run_files import delete_run, describe, known_run, log_of, rename_run, report_of
from ..run_view import (
    checkpoint_choices,
    loss_chart,
    outcome,
    progress_html,
    queue_words,
    reference,
    report_frame,
    samples_html,
    scores_html,
    stamp,
    waiting_choices,
)
from ..runs import Run, Status, list_runs, running_run
from ..session import Session
from ..training_queue import TrainingQueue
from ..words import Markdown, plain_words

NONE_YET = "No run yet: start one in Train."

ADDRESS = "(...values) => {{ history.pushState(null, '', '#{}'); return values; }}"
"""A script for events that lead to another tab: a reload then comes back to it."""


class RunsTab:
    """Components and handlers of the tab."""

    def __init__(self, session: Session):
        self.session, self.queue = session, TrainingQueue(session.outputs)

    # ---------------------------------------------------------------------------------------------------------- layout

    def build(self) -> None:
        """Lay the tab out and wire its events."""
        self._build_queue()
        self.which = gr.Dropdown(self.names(), value=None, label="Run", elem_id="runs-which", allow_custom_value=True)
        self.status = Markdown(NONE_YET, elem_id="runs-status")
        self.progress = gr.HTML("", elem_id="runs-progress", padding=False)
        with gr.Row():
            self.stop = gr.Button("Stop", interactive=False, elem_id="runs-stop", min_width=90, size="md")
            self.resume = gr.Button("Resume", interactive=False, elem_id="runs-resume", min_width=90, size="md")
        self.note = Markdown("", elem_id="runs-note")
        with gr.Column(visible=False) as self.details:
            with gr.Row(equal_height=False):
                with gr.Column(scale=5, min_width=320):
                    self.plot = gr.HTML("", elem_id="runs-plot", padding=False)
                    self.log_scale = gr.Checkbox(False, label="Logarithmic scale", elem_id="runs-log-scale")
                    self.scores = gr.HTML("", elem_id="runs-scores", padding=False)
                    self._build_use()
                with gr.Column(scale=6, min_width=320):
                    self.samples = gr.HTML("", elem_id="runs-samples", padding=False)
            self._build_more()
        self.timer = gr.Timer(2.0)
        self._wire()

    def _build_queue(self) -> None:
        self.queue_words = Markdown("", elem_id="runs-queue-status")
        with gr.Group(visible=False, elem_id="runs-waiting") as self.waiting_group:
            self.waiting = gr.Radio([], label="Queue: these start one after the other", elem_id="runs-waiting-list")
            with gr.Row():
                self.up = gr.Button("Move up", size="sm", elem_id="runs-up", min_width=90)
                self.down = gr.Button("Move down", size="sm", elem_id="runs-down", min_width=90)
                self.again = gr.Button("Try again", size="sm", visible=False, elem_id="runs-again", min_width=90)
                self.remove = gr.Button("Remove from the queue", size="sm", elem_id="runs-remove", min_width=150)

    def _build_use(self) -> None:
        with gr.Row():
            self.checkpoint = gr.Dropdown([], label="Checkpoint", elem_id="runs-checkpoint", min_width=160)
            self.use = gr.Button(
                "Use in Generate", variant="primary", interactive=False, elem_id="runs-use", min_width=140
            )
        self.go_on = gr.Button("Continue with other settings", size="md", elem_id="runs-continue")

    def _build_more(self) -> None:
        with gr.Accordion("Layers", open=False, visible=False, elem_id="runs-layers") as self.layers_box:
            self.layers = gr.HTML("")
        with gr.Accordion("Settings and figures before the first step", open=False, visible=False,
                          elem_id="runs-report") as self.report_box:  # fmt: skip
            self.report = gr.Textbox(label="What was to be trained", lines=6, max_lines=16, interactive=False)
        with gr.Accordion("Log", open=False, elem_id="runs-log") as self.log_box:
            self.log = gr.Textbox(
                label="Last lines of the log", lines=8, max_lines=20, interactive=False, autoscroll=True
            )
            self.log_again = gr.Button("Read it again", size="sm", elem_id="runs-log-again")
        with gr.Accordion("Training report", open=False, elem_id="runs-page") as self.page_box:
            self.page = gr.HTML("")
        with gr.Accordion("Rename or delete", open=False, elem_id="runs-manage") as self.manage_box:
            with gr.Row():
                self.new_name = gr.Textbox(
                    label="New name", max_lines=1, elem_id="runs-new-name", min_width=180, scale=3
                )
                self.rename = gr.Button("Rename", elem_id="runs-rename", min_width=100)
            self.delete = gr.Button("Delete this run", variant="stop", size="sm", elem_id="runs-delete")
            with gr.Group(visible=False) as self.sure:
                self.question = Markdown("", elem_id="runs-question", elem_classes="subject-note")
                with gr.Row():
                    self.really = gr.Button("Delete", variant="stop", elem_id="runs-really", min_width=100)
                    self.keep = gr.Button("Keep it", elem_id="runs-keep", min_width=100)

    # ------------------------------------------------------------------------------------------------------ what it shows

    @property
    def shown(self) -> list[Any]:
        """What :meth:`look` fills."""
        return [self.status, self.progress, self.stop, self.resume, self.details, self.plot, self.scores, self.checkpoint,
                self.use, self.samples, self.layers_box, self.layers, self.report_box, self.report]  # fmt: skip

    @property
    def queued(self) -> list[Any]:
        """What :meth:`look_at_queue` fills."""
        return [self.queue_words, self.waiting_group, self.waiting]

    def names(self) -> list[tuple[str, str]]:
        """The runs on the disk, the newest first, those that wait before them: label and value."""
        outputs = self.session.outputs
        runs = list_runs(outputs)
        waiting = [name for _, name in self._waiting() if name not in runs]
        labels = {name: outcome(Run(outputs, name)) for name in runs}
        return [(f"{name} (waiting)", name) for name in waiting] + [
            (f"{name} ({labels[name]})" if labels[name] else name, name) for name in runs
        ]

    def _waiting(self) -> list[tuple[str, str]]:
        try:
            return waiting_choices(self.queue)
        except EffiLoRAError:
            return []

    def look_at_queue(self) -> tuple[Any, Any, Any]:
        """What is trained, and what waits."""
        try:
            words, choices = queue_words(self.queue, running_run(self.session.outputs)), waiting_choices(self.queue)
        except EffiLoRAError as error:
            return refusal(error, "Queue"), gr.update(visible=False), gr.update(choices=[], value=None)
        return plain_words(words, 600), gr.update(visible=bool(choices)), gr.update(choices=choices)

    def look(self, name: str | None, log: bool = False) -> tuple[Any, ...]:
        """The run as it stands."""
        try:
            run = None if not name else Run(self.session.outputs, name)
            status = None if run is None else self.queue.status(run)
        except EffiLoRAError as error:
            return self._empty(f"**{plain_words(error)}**")
        if run is None or status is None:
            return self._empty(NONE_YET)
        text = plain_words(status.message, 600)
        return (
            f"**{text}**" if status.state == "failed" else text,
            progress_html(run, status, self.queue),
            gr.update(interactive=status.state == "running"),
            gr.update(interactive=status.state != "waiting" and run.can_resume),
            gr.update(visible=status.state != "new" and (status.state != "waiting" or bool(status.metrics))),
            *self._details(run, status, log),
        )

    def _details(self, run: Run, status: Status, log: bool) -> tuple[Any, ...]:
        """Everything below a run's status."""
        choices = checkpoint_choices(run, status)
        history = run.history(status.step) if status.metrics else None
        layers = figures.active(history, status.step) + figures.importance(history) if history else ""
        report = run.report()
        return (
            loss_chart(status.metrics, log),
            scores_html(run, status),
            gr.update(choices=choices, value=choices[0][1] if choices else None, interactive=len(choices) > 0),
            gr.update(interactive=bool(choices)),
            samples_html(run),
            gr.update(visible=bool(layers)),
            layers,
            gr.update(visible=bool(report)),
            report,
        )

    def _empty(self, words: str) -> tuple[Any, ...]:
        off, hidden = gr.update(interactive=False), gr.update(visible=False)
        return words, "", off, off, hidden, "", "", gr.update(choices=[], value=None), off, "", hidden, "", hidden, ""

    def watch(self, name: str | None, log: bool, chosen: Any, seen: Any) -> tuple[Any, ...]:
        """What has changed since ``seen``: a page that is left open costs the trainer next to nothing.

        While a run is trained its words and times are sent alone, and the rest when there is something new.
        """
        queue = [running_run(self.session.outputs), self._waiting()]
        told = self.look_at_queue() if not seen or queue != seen[1] else [gr.skip()] * len(self.queued)
        names = gr.update(choices=self.names()) if not seen or queue != seen[1] else gr.skip()
        try:
            run = Run(self.session.outputs, name or "")
            now: Any = [name, stamp(run), self.queue.place(run.name)]
        except EffiLoRAError:
            now = [name]
        if not seen or now != seen[0]:
            shown = list(self.look(name, log))
            if seen and seen[0][0] == name:  # the visitor's choice stays
                shown[self.shown.index(self.checkpoint)] = self._kept(shown[self.shown.index(self.checkpoint)], chosen)
        else:
            shown = [gr.skip()] * len(self.shown)
            if len(now) > 1 and now[1][0]:
                shown[1] = progress_html(run, run.status(), self.queue)
        return *shown, *told, names, [now, queue]

    @staticmethod
    def _kept(update: Any, chosen: Any) -> Any:
        """The update of the checkpoints with what was chosen before, if it is still there."""
        there = [value for _, value in update["choices"]]
        return {**update, "value": chosen} if chosen in there else update

    def refresh(self, name: str | None, log: bool) -> tuple[Any, ...]:
        """The runs as they are on the disk now, and the chosen one (or the newest) as it stands."""
        choices = self.names()
        there = [value for _, value in choices]
        name = name if name in there else running_run(self.session.outputs) or next(iter(there), None)
        return gr.update(choices=choices, value=name), *self.look(name, log), *self.look_at_queue()

    # ------------------------------------------------------------------------------------------------- what can be done

    def end(self, name: str | None) -> str:
        """Stop a run after its step."""
        try:
            run = known_run(self.session.outputs, name)
            if not run.running:
                return "It is not running."
            begun = run.status().step > 0
            run.stop()
            follows = next((f"Then {entry.name} starts." for entry in self.queue.waiting() if not entry.fault), "")
        except Exception as error:
            return refusal(error, "Not stopped")
        words = "Stopping after this step; the checkpoint follows." if begun else "Stopping before its first step."
        return f"{words} {plain_words(follows)}".strip()

    def restart(self, name: str | None) -> str:
        """Let a run go on from its last checkpoint, once nothing else is trained."""
        try:
            run = known_run(self.session.outputs, name)
            return plain_words(self.queue.enter(run.name, run.settings(), resume=True))
        except Exception as error:
            return refusal(error, "Not resumed")

    def rearrange(self, act: Callable[[str], None], name: str | None) -> tuple[Any, ...]:
        """Change the queue, and show it; what was chosen stays chosen while it waits."""
        try:
            if not name:
                raise EffiLoRAError("choose one of the queue first")
            act(str(name))
            words = ""
        except Exception as error:
            words = refusal(error, "Queue not changed")
        told = list(self.look_at_queue())
        there = [value for _, value in self._waiting()]
        told[2] = gr.update(choices=self._waiting(), value=name if name in there else None)
        return *told, gr.update(choices=self.names()), words

    def choose_waiting(self, name: str | None) -> Any:
        """Whether what was chosen in the queue can be tried again."""
        try:
            return gr.update(visible=any(one.name == name and one.fault for one in self.queue.waiting()))
        except EffiLoRAError:
            return gr.update(visible=False)

    def ask(self, name: str | None) -> tuple[Any, str, str]:
        """What deleting would delete, with the buttons that do it."""
        try:
            return gr.update(visible=True), plain_words(describe(self.session.outputs, name)), ""
        except Exception as error:
            return gr.update(visible=False), "", refusal(error, "Not deleted")

    def delete_it(self, name: str | None) -> tuple[Any, Any, str]:
        """Delete a run for good; the next one is chosen."""
        try:
            remark = delete_run(self.session.outputs, name)
        except Exception as error:
            return gr.skip(), gr.update(visible=False), refusal(error, "Not deleted")
        choices = self.names()
        update = gr.update(choices=choices, value=choices[0][1] if choices else None)
        return update, gr.update(visible=False), f"{plain_words(name)} is deleted. {plain_words(remark)}".strip()

    def rename_it(self, name: str | None, wanted: str) -> tuple[Any, Any, str]:
        """Give a run another name."""
        try:
            new = rename_run(self.session.outputs, name, wanted)
        except Exception as error:
            return gr.skip(), gr.skip(), refusal(error, "Not renamed")
        words = f"{plain_words(name)} is now named {plain_words(new)}."
        return gr.update(choices=self.names(), value=new), "", words

    def read_log(self, name: str | None) -> str:
        """The end of a run's log."""
        try:
            return log_of(self.session.outputs, name)
        except EffiLoRAError as error:
            return str(error)

    def read_page(self, name: str | None) -> str:
        """A run's report as a frame."""
        try:
            return report_frame(report_of(self.session.outputs, name), str(name))
        except Exception as error:
            return f"<p>{plain_words(refusal(error, 'No report').replace('**', ''))}</p>"

    def wanted(self, name: str | None, choice: str | None) -> tuple[Any, Any, str]:
        """The adapter that Generate is to use, its tab, and why there is none."""
        try:
            if not choice:
                raise EffiLoRAError("there is no checkpoint yet")
            found = reference(known_run(self.session.outputs, name).name, str(choice))
            if not self.session.knows(found):
                raise EffiLoRAError(f"{found} is not there any more")
        except (EffiLoRAError, ValueError) as error:
            return gr.skip(), gr.skip(), refusal(error, "Not used")
        return found, gr.Tabs(selected="generate"), ""

    # ----------------------------------------------------------------------------------------------------------- wiring

    def _wire(self) -> None:
        hidden: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
        run = [self.which, self.log_scale]
        self.which.change(self.look, run, self.shown, **hidden)
        self.which.change(self._folded, None, self.folded, **hidden)
        self.which.input(lambda: "", None, self.note, **hidden)
        self.log_scale.change(self.draw_loss, run, self.plot, **hidden)
        self.stop.click(self.end, self.which, self.note, **hidden)
        self.resume.click(self.restart, self.which, self.note, **hidden)
        changed = [*self.queued, self.which, self.note]
        acts: tuple[tuple[gr.Button, Callable[[str], None]], ...] = (
            (self.up, lambda name: self.queue.move(name, -1)),
            (self.down, lambda name: self.queue.move(name, 1)),
            (self.again, self.queue.retry),
            (self.remove, self.queue.remove),
        )
        for button, act in acts:
            button.click(lambda name, act=act: self.rearrange(act, name), self.waiting, changed, **hidden)
        self.waiting.change(self.choose_waiting, self.waiting, self.again, **hidden)
        self.log_box.expand(self.read_log, self.which, self.log, **hidden)
        self.log_again.click(self.read_log, self.which, self.log, **hidden)
        self.page_box.expand(self.read_page, self.which, self.page, **hidden)
        self.delete.click(self.ask, self.which, [self.sure, self.question, self.note], **hidden)
        self.keep.click(lambda: gr.update(visible=False), None, self.sure, **hidden)
        self.really.click(self.delete_it, self.which, [self.which, self.sure, self.note], **hidden)
        self.rename.click(
            self.rename_it, [self.which, self.new_name], [self.which, self.new_name, self.note], **hidden
        )
        seen = gr.State(None)
        self.timer.tick(
            self.watch, [*run, self.checkpoint, seen], [*self.shown, *self.queued, self.which, seen], **hidden
        )

    @property
    def folded(self) -> list[Any]:
        """What belongs to one run and is shown on demand."""
        return [self.log_box, self.page_box, self.page, self.sure]

    def _folded(self) -> tuple[Any, ...]:
        closed = gr.update(open=False)
        return closed, closed, "", gr.update(visible=False)

    def draw_loss(self, name: str | None, log: bool) -> str:
        """The chart of the loss on the chosen scale."""
        try:
            return loss_chart(Run(self.session.outputs, name or "").status().metrics, log)
        except EffiLoRAError:
            return ""

    def lead_to(self, tabs: gr.Tabs, row: AdapterRow, prompt: gr.Textbox) -> None:
        """Connect what leaves this tab: a checkpoint becomes the first adapter of Generate."""
        hidden: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
        chosen = self.use.click(self.wanted, [self.which, self.checkpoint], [row.choice, tabs, self.note], **hidden)
        chosen.success(row.fill, [prompt, row.choice], prompt, js=ADDRESS.format("generate"), **hidden)

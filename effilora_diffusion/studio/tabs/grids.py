"""The part of Compare that draws grids: cells as they come, stopped and continued, one sheet for each value of the third axis."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from ... import EffiLoRAError
from ...core import is_native, load_adapter_file
from ...core.files import adapter_tensors
from ...diffusion.sampling.metadata import ImageFacts
from ...diffusion.sampling.request import GenerationRequest
from ..adapter_row import NONE
from ..axes import AXES, FINAL, NOTHING, REPLACE, Axis, axis_of
from ..cards import address
from ..grids import Grid, axes_of, load_grid, unfinished
from ..queue import BUSY, IDLE, refusal, shown_file
from ..session import Session
from ..words import Markdown
from .drawing import DrawingTab, notes_of

VALUES = "Values, also prompts, are separated by `;`. Numbers may be ranges: `0-1 [5]` (five values), `1-9 (2)` (in steps of 2)."


class GridPart(DrawingTab):
    """Components and handlers of grids.

    Args:
        session: of the page.
        request: makes a request of the form's values.
    """

    def __init__(self, session: Session, request: Callable[..., GenerationRequest]):
        super().__init__(session)
        self.request = request

    def build_form(self) -> None:
        """Lay out the axes and buttons."""
        with gr.Accordion("Grid over two or three settings", open=False, elem_id="grid-settings"):
            Markdown(VALUES)
            self.axes: list[tuple[gr.Dropdown, gr.Textbox]] = []
            for label, letter, name, values in (("Across", "x", "strength", "0; 0.5; 1"), ("Down", "y", "seed", "0; 1"),
                                                ("Sheets", "z", NOTHING, "")):  # fmt: skip
                choices = list(AXES) if letter == "x" else [NOTHING, *AXES]
                with gr.Row():
                    axis = gr.Dropdown(choices, value=name, label=label, elem_id=f"grid-{letter}", min_width=120)
                    said = "Values per sheet" if letter == "z" else f"Values {label.lower()}"
                    words = gr.Textbox(values, label=said, elem_id=f"grid-{letter}-values", min_width=140,
                                       visible=name != NOTHING)  # fmt: skip
                self.axes.append((axis, words))
            self.go = gr.Button("Generate the grid", elem_id="draw-grid")
            with gr.Row(equal_height=True):
                found = unfinished(self.session.history)
                self.left = gr.Dropdown(found, value=None, label="Stopped grids", scale=3, min_width=160,
                                        visible=bool(found), elem_id="grid-left")  # fmt: skip
                self.resume = gr.Button("Continue", elem_id="grid-continue", visible=bool(found), min_width=90)

    def build_result(self) -> None:
        """Lay out the cells and the finished sheets."""
        self.cells = gr.HTML("", elem_id="grid-cells", visible=False)
        self.which = gr.Radio([], label="Sheet", visible=False, elem_id="grid-sheet")
        self.sheet = gr.Image(label="Grid", format="png", type="filepath", elem_id="grid", interactive=False, visible=False,
                              show_label=False, buttons=["download", "fullscreen"], alt_text="The grid")  # fmt: skip

    @property
    def form(self) -> list[Any]:
        """The axes and their values."""
        return [part for pair in self.axes for part in pair]

    @property
    def left_shown(self) -> list[Any]:
        """Outputs of :meth:`stopped`."""
        return [self.left, self.resume]

    # ------------------------------------------------------------------------------------------------------- drawing

    def draw(self, visit: gr.Request, x: str, x_values: str, y: str, y_values: str, z: str, z_values: str, *values: Any
             ) -> Iterator[tuple[Any, ...]]:  # fmt: skip
        """Draw a grid of every combination of values, cell by cell."""

        def made() -> Grid:
            axes = axis_of(x, x_values), axis_of(y, y_values), axis_of(z, z_values)
            return Grid.new(self.session.history, self.request(*values), axes, self.session.model)

        yield from self._drawn(visit, made)

    def carry_on(self, visit: gr.Request, name: str | None) -> Iterator[tuple[Any, ...]]:
        """Draw what is missing of a stopped grid."""

        def found() -> Grid:
            grid = load_grid(self.session.history, str(name or ""))
            if grid.model != self.session.model:
                model = Path(str(grid.model)).name if grid.model else "the embedded base"
                raise EffiLoRAError(f"this grid was begun with {model}: open that model to continue it")
            return grid

        yield from self._drawn(visit, found)

    def _drawn(self, visit: gr.Request, make: Callable[[], Grid]) -> Iterator[tuple[Any, ...]]:
        visitor = self.visitor(visit)
        ticket = self.tickets.begin(visitor)
        same, hidden, grid, said = gr.update(), gr.update(visible=False), None, ""
        try:
            grid = make()
            said = notes_of(drawing for one in grid.missing() for drawing in self.session.check(one.request))
            count = len(grid.cells)
            for one in grid.missing():
                status = f"Image {count - len(grid.missing()) + 1} of {count}"
                yield hidden, self._live(grid), hidden, hidden, status, same, same, *BUSY
                self.session.image_to(grid.file(one), one.request, ticket.stop)
                grid.save()
            columns, rows, sheets = grid.axes
            named = ((columns, "across"), (rows, "down"), (sheets, "on sheets"))
            said = f"{', '.join(f'{axis.name} {side}' for axis, side in named if axis.name != NOTHING)}.{said}"
        except Exception as error:
            said = self._ended(grid, error)
        finally:
            self.tickets.end(visitor, ticket)
        yield self._result(grid, said)

    def _ended(self, grid: Grid | None, error: Exception) -> str:
        """What is said of a grid that was not finished."""
        done = len(grid.cells) - len(grid.missing()) if grid is not None and grid.folder.exists() else 0
        if grid is None or not done:
            return refusal(error)
        kept = f"{done} of {len(grid.cells)} cells are kept; Continue generates the others."
        return f"Stopped: {kept}" if str(error) == "stopped" else f"{refusal(error)}. {kept}"

    def _live(self, grid: Grid) -> Any:
        return gr.update(value=grid.html(lambda file: address(self.cells, file)), visible=True)

    def _result(self, grid: Grid | None, said: str) -> tuple[Any, ...]:
        """The slider hidden, cells, sheets, the status, and the grids that can be continued."""
        files: list[Path] = []
        try:
            files = grid.write_sheets() if grid is not None and grid.folder.exists() else []
        except EffiLoRAError as error:
            said = f"{said} {refusal(error, 'Sheets not saved')}"
        if grid is None or not files:
            return gr.update(), gr.update(visible=False), gr.update(), gr.update(), said, *self.stopped(None), *IDLE
        finished = not grid.missing()
        labels = dict(zip(grid.sheets(), grid.sheet_labels(), strict=True))
        which = gr.update(choices=[(labels[file], file.name) for file in files], value=files[0].name,
                          visible=len(files) > 1 and finished)  # fmt: skip
        sheet = self._shown(files[0], labels[files[0]]) if finished else gr.update(visible=False)
        cells = gr.update(visible=False) if finished else self._live(grid)
        return (
            gr.update(visible=False),
            cells,
            which,
            sheet,
            said,
            *self.stopped(None if finished else grid.name),
            *IDLE,
        )

    def _shown(self, file: Path, label: str) -> Any:
        return gr.update(value=shown_file(self.sheet, file), visible=True, alt_text=f"Grid of images, {label}")

    def turn(self, name: str | None) -> Any:
        """Show another sheet."""
        found = {file.name: file for file in self.session.history.glob("*-grid.png")}
        return self._shown(found[name], name) if name in found else gr.update()

    def stopped(self, chosen: str | None) -> tuple[Any, Any]:
        """The list of grids to continue, hidden while there is none, and its button."""
        found = unfinished(self.session.history)
        value = chosen if chosen in {name for _, name in found} else found[0][1] if found else None
        return gr.update(choices=found, value=value, visible=bool(found)), gr.update(visible=bool(found))

    # ---------------------------------------------------------------------------------------------------------- axes

    def suggest(self, axis: str, name: str | None, prompt: str) -> str:
        """Values to begin with on an axis."""
        if axis == "checkpoint":
            return "; ".join(self._checkpoints(name or ""))
        if axis == "adapter":
            return "; ".join([NONE, *self.session.fitting()][:6])
        if axis == "sampler":
            return "; ".join(self.session.samplers[:3])
        if axis == REPLACE:
            return "; ".join(str(prompt or "").split()[-1:])
        usual = {"strength": "0; 0.5; 1", "steps": "10; 25; 50", "guidance": "1; 2; 4", "seed": "0; 1", NOTHING: ""}
        return usual.get(axis, prompt or "")

    def suggested(self, axis: str, name: str | None, prompt: str) -> Any:
        """The field with these values, which an axis that changes nothing does not have."""
        return gr.update(value=self.suggest(axis, name, prompt), visible=axis != NOTHING)

    def _checkpoints(self, name: str) -> list[str]:
        """The steps of an adapter's checkpoints, and ``final`` unless it is the last of them."""
        try:
            saved = self.session.checkpoints(name)
            last = saved.get(max(saved, default=-1))
            final = [] if last is not None and same_adapter(last, self.session.adapter_path(name)) else [FINAL]
        except EffiLoRAError:
            return [FINAL]
        return [*map(str, sorted(saved)), *final]

    def filled(self, found: ImageFacts) -> list[Any]:
        """The axes of a grid's sheet; unchanged for any other image."""
        if "grid" not in found.parameters:
            return [gr.update() for _ in self.form]
        try:
            axes: Sequence[Axis] = axes_of(found.parameters)
        except EffiLoRAError:
            return [gr.update() for _ in self.form]
        return [
            update
            for axis in axes
            for update in (axis.name, gr.update(value="; ".join(axis.values), visible=axis.name != NOTHING))
        ]

    def wire(
        self, adapter: gr.Dropdown, prompt: gr.Textbox, form: list[Any], hidden: Any, status: Any, halt: Any
    ) -> None:
        """Connect the buttons; ``hidden`` is what the grid takes the place of."""
        at_once: dict[str, Any] = {"api_visibility": "private", "queue": False, "show_progress": "hidden"}
        shared = [hidden, self.cells, self.which, self.sheet, status, *self.left_shown]
        for button, draw, inputs in (
            (self.go, self.draw, [*self.form, *form]),
            (self.resume, self.carry_on, [self.left]),
        ):
            self.wire_drawing([button.click], draw, inputs, [*shared, button, halt], status, button, halt)
        self.which.input(self.turn, self.which, self.sheet, **at_once)
        for axis, words in self.axes:
            axis.input(self.suggested, [axis, adapter, prompt], words, **at_once)


def same_adapter(one: Path, other: Path) -> bool:
    """Whether two files hold the same adapter, whatever else they say."""
    if not (is_native(one) and is_native(other)):
        return False
    first, second = (adapter_tensors(load_adapter_file(path).adapter) for path in (one, other))
    return first.keys() == second.keys() and all(bool((first[key] == second[key]).all()) for key in first)

"""Grids over up to three settings as folders on the disk: what is to be drawn, and every cell as soon as it is there.

A stopped grid, also one whose server has ended, is continued from its folder.
"""

from __future__ import annotations

import contextlib
import datetime
import html
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from .. import EffiLoRAError, __version__
from ..core.writing import write_text
from ..diffusion.models.pipelines import EMBEDDED_BASE
from ..diffusion.sampling.a1111 import infotext
from ..diffusion.sampling.grid import labelled_grid
from ..diffusion.sampling.png import save_png
from ..diffusion.sampling.request import GenerationRequest
from .axes import AXES, MAX_CELLS, NOTHING, REPLACE, THEIRS, Axis, cell
from .library import GRIDS, sheet_name, thumbnail
from .words import clean

logger = logging.getLogger(__name__)

GRID_FILE = "grid.json"
SIDES = ("across", "down", "sheets")
"""The axes of a grid in their order: columns, rows, and one sheet for each value."""


@dataclass(frozen=True)
class Cell:
    """One image of a grid: its place (sheet, row, column) and its request."""

    place: tuple[int, int, int]
    request: GenerationRequest


class Grid:
    """A grid in the folder ``<history>/grids/<name>``.

    Args:
        history: folder of the images, in which the sheets are written.
        name: of the grid, a time.
        base: what all cells have in common.
        axes: across, down and sheets.
        model: that draws it, as images name it.
    """

    def __init__(
        self, history: Path, name: str, base: GenerationRequest, axes: tuple[Axis, Axis, Axis], model: str | None
    ):
        self.history, self.name, self.base, self.axes, self.model = history, name, base, axes, model
        self.folder = history / GRIDS / name
        columns, rows, sheets = axes
        names = [axis.name for axis in axes if axis.name != NOTHING]
        if not names:
            raise EffiLoRAError("choose a setting for an axis of the grid")
        if len(set(names)) < len(names):
            raise EffiLoRAError("choose different settings for the axes")
        count = len(columns.values) * len(rows.values) * len(sheets.values)
        if count > MAX_CELLS:
            raise EffiLoRAError(f"the grid would have {count} images: {MAX_CELLS} are possible, use fewer values")
        self.cells = [
            Cell((z, y, x), self._request((across, down, sheet)))
            for z, sheet in enumerate(sheets.values)
            for y, down in enumerate(rows.values)
            for x, across in enumerate(columns.values)
        ]

    def _request(self, values: tuple[str, str, str]) -> GenerationRequest:
        first = next((axis.values[0] for axis in self.axes if axis.name == REPLACE), "")
        return cell(self.base, {axis.name: value for axis, value in zip(self.axes, values, strict=True)}, first)

    @classmethod
    def new(cls, history: Path, base: GenerationRequest, axes: tuple[Axis, Axis, Axis], model: str | None) -> Grid:
        """A grid that is not on the disk yet; raises :class:`EffiLoRAError` for axes that make none."""
        return cls(history, datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f"), base, axes, model)

    def save(self) -> None:
        """Write what is to be drawn, so that it can be continued later."""
        if not (self.folder / GRID_FILE).exists():
            write_text(self.folder / GRID_FILE, json.dumps(self.parameters(), ensure_ascii=False, indent=1))

    def parameters(self) -> dict[str, Any]:
        """What all cells have in common, in the form of an image's parameters, with ``grid``: the axes."""
        axes = {
            side: {"setting": axis.name, "values": list(axis.values)}
            for side, axis in zip(SIDES, self.axes, strict=True)
            if axis.name != NOTHING
        }
        return {**facts_of(self.base, self.model), "grid": {"name": self.name, "axes": axes}}

    def file(self, one: Cell) -> Path:
        """Where a cell's image lies once it is drawn."""
        return self.folder / f"{'-'.join(str(number + 1) for number in one.place)}.png"

    def missing(self) -> list[Cell]:
        """The cells that are still to be drawn."""
        return [one for one in self.cells if not self.file(one).is_file()]

    def sheets(self) -> list[Path]:
        """Where the sheets lie, one for each value of the third axis."""
        return [self.history / sheet_name(self.name, number) for number in range(1, len(self.axes[2].values) + 1)]

    def sheet_labels(self) -> list[str]:
        """What each sheet is."""
        return [self.axes[2].label(value) or "Grid" for value in self.axes[2].values]

    def write_sheets(self) -> list[Path]:
        """Write the sheets of all that is drawn so far; those without any image are left out."""
        missing, written = {one.place for one in self.missing()}, []
        for z, path in enumerate(self.sheets()):
            cells = [one for one in self.cells if one.place[0] == z]
            left = sum(one.place in missing for one in cells)
            if left == len(cells):
                continue
            said = {**self.parameters()["grid"], "sheet": self.axes[2].values[z], "missing": left}
            first = next(one.request for one in cells if one.place not in missing)
            save_sheet(self._sheet(z), path, self.base, self.model, said, first, self._theirs())
            written.append(path)
        return written

    def _sheet(self, z: int) -> Image.Image:
        columns, rows, sheets = self.axes
        drawn: list[tuple[str, list[Image.Image | None]]] = []
        for y, down in enumerate(rows.values):
            row = [self._image(one) for one in self.cells if one.place[:2] == (z, y)]
            drawn.append((rows.label(down), row))
        varied, base = {axis.name for axis in self.axes}, self.base
        same = {"seed": f"seed {base.seed}", "steps": f"{base.num_inference_steps} steps",
                "guidance": f"guidance {base.guidance_scale:g}"}  # fmt: skip
        facts = [text for setting, text in same.items() if setting not in varied]
        title = ", ".join(filter(None, [sheets.label(sheets.values[z]), base.prompt, *facts]))
        return labelled_grid(drawn, title, [columns.label(value) for value in columns.values])

    def _image(self, one: Cell) -> Image.Image | None:
        with contextlib.suppress(OSError), Image.open(self.file(one)) as image:
            return image.convert("RGB")
        return None

    def _theirs(self) -> dict[str, str]:
        """The settings by which A1111 describes such a grid."""
        found = {"Script": "X/Y/Z plot"}
        for letter, axis in zip("XYZ", self.axes, strict=True):
            if axis.name != NOTHING:
                found |= {f"{letter} Type": THEIRS[axis.name], f"{letter} Values": ", ".join(axis.values)}
        return found

    def html(self, address: Callable[[Path], str]) -> str:
        """The cells as a table for each sheet, with those that are missing; ``address`` tells where the page finds a file."""
        columns, rows, sheets = self.axes
        tables = []
        for z, sheet in enumerate(sheets.values):
            caption = f"<caption>{_text(sheets.label(sheet))}</caption>" if sheets.name != NOTHING else ""
            heads = "".join(f'<th scope="col">{_text(columns.label(value))}</th>' for value in columns.values)
            lines = "".join(
                f'<tr><th scope="row">{_text(rows.label(down))}</th>'
                + "".join(self._html_cell(one, address) for one in self.cells if one.place[:2] == (z, y))
                + "</tr>"
                for y, down in enumerate(rows.values)
            )
            tables.append(f"<table>{caption}<thead><tr><td></td>{heads}</tr></thead><tbody>{lines}</tbody></table>")
        return f'<div class="cells" tabindex="0" role="group" aria-label="Cells of the grid">{"".join(tables)}</div>'

    def _html_cell(self, one: Cell, address: Callable[[Path], str]) -> str:
        file, (z, y, x) = self.file(one), one.place
        columns, rows, sheets = self.axes
        labels = (columns.label(columns.values[x]), rows.label(rows.values[y]), sheets.label(sheets.values[z]))
        alt = html.escape(clean(", ".join(filter(None, labels))), quote=True)
        small = thumbnail(file, self.folder / ".thumbnails" / f"{file.stem}.webp") if file.is_file() else None
        if small is None:
            return f'<td class="missing"><span role="img" aria-label="{alt}: not drawn yet"></span></td>'
        return f'<td><img src="{address(small)}" alt="{alt}"></td>'


def _text(text: str) -> str:
    return html.escape(clean(text, 160))


def facts_of(request: GenerationRequest, model: str | None) -> dict[str, Any]:
    """A request's parameters, in the form in which images carry them."""
    size = Image.new("1", (request.width or 1, request.height or 1))
    return request.parameters(size, request.seed, model)


def save_sheet(image: Image.Image, path: Path, base: GenerationRequest, model: str | None, said: dict[str, Any],
               first: GenerationRequest | None = None, more: dict[str, str] | None = None) -> None:  # fmt: skip
    """Write a sheet of images that says how they were drawn.

    Args:
        image: the sheet.
        path: of the file.
        base: what all its images have in common.
        model: that drew them, as images name it.
        said: what is different between them.
        first: the request of its first image, which A1111's text describes; ``None``: ``base``.
        more: settings of that text besides the image's.
    """
    facts = {**facts_of(base, model), "grid": said}
    save_png(image, path, facts, infotext(facts_of(first or base, model), None, f"EffiLoRA {__version__}", more))


def axes_of(facts: dict[str, Any]) -> tuple[Axis, Axis, Axis]:
    """The axes in a grid's parameters; raises :class:`EffiLoRAError` if there are none that can be drawn."""
    try:
        said = facts["grid"]["axes"]
        found = {side: Axis(str(said[side]["setting"]), tuple(map(str, said[side]["values"]))) for side in said}
        axes = (found.get(SIDES[0], Axis()), found.get(SIDES[1], Axis()), found.get(SIDES[2], Axis()))
        known = all(axis.name in (NOTHING, *AXES) and axis.values for axis in axes) and found.keys() <= set(SIDES)
    except (KeyError, TypeError, AttributeError) as error:
        raise EffiLoRAError("this grid's axes are not complete") from error
    if not known:
        raise EffiLoRAError("this grid's axes are not known here")
    return axes


def grid_rows(said: Any) -> dict[str, str]:
    """What a table says of a grid: its axes, and what is missing."""
    if isinstance(said, dict) and isinstance(said.get("kind"), str):
        return {"Grid": said["kind"]}
    try:
        axes = axes_of({"grid": said})
    except EffiLoRAError:
        return {}
    labels = ("Across", "Down", "Sheets")
    rows = {label: f"{axis.name}: {'; '.join(axis.values)}" for label, axis in zip(labels, axes, strict=True)
            if axis.name != NOTHING}  # fmt: skip
    left = said.get("missing") if isinstance(said, dict) else 0
    return {**rows, **({"Missing": f"{left} cells: continue the grid in Compare"} if left else {})}


def load_grid(history: Path, name: str) -> Grid:
    """A grid of the disk; raises :class:`EffiLoRAError` for names that are none's."""
    if name not in {file.parent.name for file in (history / GRIDS).glob(f"*/{GRID_FILE}")}:
        raise EffiLoRAError("this grid is no longer there" if name else "choose a grid to continue")
    try:
        facts = json.loads((history / GRIDS / name / GRID_FILE).read_text(encoding="utf-8"))
        base = GenerationRequest.from_parameters(facts)
        return Grid(
            history, name, base, axes_of(facts), None if facts["model"] == EMBEDDED_BASE else str(facts["model"])
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, EffiLoRAError):
            raise
        raise EffiLoRAError(f"the grid {name} can't be read: its {GRID_FILE} is damaged") from error


def unfinished(history: Path) -> list[tuple[str, str]]:
    """The grids that have cells to be drawn, the newest first: what to call each, and its name."""
    found = []
    for file in sorted((history / GRIDS).glob(f"*/{GRID_FILE}"), reverse=True):
        try:
            grid = load_grid(history, file.parent.name)
        except EffiLoRAError as error:
            logger.warning("%s", error)
            continue
        if missing := len(grid.missing()):
            count = len(grid.cells)
            what = ", ".join(axis.name for axis in grid.axes if axis.name != NOTHING)
            found.append((clean(f"{count - missing} of {count} cells: {what}: {grid.base.prompt}", 90), grid.name))
    return found

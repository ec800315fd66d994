"""Labelled grids of images."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont, ImageOps

PAPER, INK, EMPTY = "#20242c", "#f1f3f5", "#4b5563"
"""A dark sheet with light words: calm on a light page, and no lamp on a dark one."""

LINE = 24
MOST_LINES = 3
"""Of the label over a column."""


def labelled_grid(
    rows: Sequence[tuple[str, Sequence[Image.Image | None]]], title: str = "", heads: list[str] | None = None
) -> Image.Image:
    """Rows of images with labels on the left, and ``heads`` over the columns, each whole in its square cell.

    ``None`` in the place of an image leaves an empty frame.
    """
    edge = min(max(128, *(max(image.size) for _, images in rows for image in images if image is not None)), 512)
    font = ImageFont.load_default(size=15)
    columns = max(len(images) for _, images in rows)
    gap, left = 6, 190 if any(label for label, _ in rows) else 6
    wrapped = [_wrapped(label, edge // 9).split("\n")[:MOST_LINES] for label in heads or []]
    lines = max(map(len, wrapped), default=0) if any(heads or []) else 0
    width = left + columns * (edge + gap)
    said = _wrapped(title, width // 8).split("\n")[:MOST_LINES] if title else []
    below = gap + LINE * len(said)
    top = below + (18 * lines + gap) * bool(lines)
    canvas = Image.new("RGB", (width, top + len(rows) * (edge + gap)), PAPER)
    pen = ImageDraw.Draw(canvas)
    for number, text in enumerate(said):
        pen.text((gap, 7 + LINE * number), text, fill=INK, font=font)
    for column, label in enumerate(wrapped):
        place = left + column * (edge + gap), below
        pen.multiline_text(place, "\n".join(label), fill=INK, font=font, spacing=2)
    for row, (name, images) in enumerate(rows):
        y = top + row * (edge + gap)
        pen.multiline_text((gap, y + gap), _wrapped(name, 22), fill=INK, font=font, spacing=4)
        for column, image in enumerate(images):
            x = left + column * (edge + gap)
            if image is None:
                pen.rectangle((x, y, x + edge - 1, y + edge - 1), outline=EMPTY)
                continue
            filter_ = Image.Resampling.NEAREST if max(image.size) < edge else Image.Resampling.LANCZOS
            cell = ImageOps.contain(image.convert("RGB"), (edge, edge), filter_)
            across, down = ((edge - side) // 2 for side in cell.size)
            canvas.paste(cell, (x + across, y + down))
    return canvas


def _wrapped(text: str, width: int) -> str:
    lines, line = [], ""
    for word in text.split():
        if line and len(line) + 1 + len(word) > width:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".strip()
    return "\n".join([*lines, line])

"""Labelled grids of images."""

from __future__ import annotations

from PIL import Image, ImageDraw, ImageFont, ImageOps


def labelled_grid(
    rows: list[tuple[str, list[Image.Image]]], title: str = "", heads: list[str] | None = None
) -> Image.Image:
    """Rows of images with labels on the left, and ``heads`` over the columns, each whole in its square cell."""
    edge = min(max(128, max(max(image.size) for _, images in rows for image in images)), 512)
    font = ImageFont.load_default(size=15)
    columns = max(len(images) for _, images in rows)
    gap, left, line = 6, 190, 24
    top = gap + line * (bool(title) + bool(heads))
    canvas = Image.new("RGB", (left + columns * (edge + gap), top + len(rows) * (edge + gap)), "white")
    pen = ImageDraw.Draw(canvas)
    if title:
        pen.text((gap, 7), title[: canvas.width // 8], fill="black", font=font)
    for column, label in enumerate(heads or []):
        pen.text((left + column * (edge + gap), top - line), label[: edge // 8], fill="black", font=font)
    for row, (label, images) in enumerate(rows):
        y = top + row * (edge + gap)
        pen.multiline_text((gap, y + gap), _wrapped(label, 22), fill="black", font=font, spacing=4)
        for column, image in enumerate(images):
            filter_ = Image.Resampling.NEAREST if max(image.size) < edge else Image.Resampling.LANCZOS
            cell = ImageOps.contain(image.convert("RGB"), (edge, edge), filter_)
            across, down = ((edge - side) // 2 for side in cell.size)
            canvas.paste(cell, (left + column * (edge + gap) + across, y + down))
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

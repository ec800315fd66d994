"""Figures as HTML tables: they take the page's colours, are read by screen readers, and scale with the text."""

from __future__ import annotations

from html import escape
from itertools import pairwise

from ...core.inspection import ReducerHistory

BINS = 24
"""Columns of a figure over time."""

WORDS = {
    "down_blocks": "down",
    "up_blocks": "up",
    "mid_block": "mid",
    "attentions": "attention",
    "transformer_blocks": "block",
    "single_transformer_blocks": "single block",
}

STYLE = """
.figure { overflow-x: auto; }
.figure table { border-collapse: collapse; width: 100%; font-size: 13px; }
.figure caption { text-align: left; font-weight: 600; padding: 4px 0; }
.figure th { text-align: left; font-weight: 400; padding: 2px 10px 2px 0; white-space: nowrap; }
.figure thead th { font-size: 12px; padding: 2px 4px; }
.figure td { padding: 2px 4px; font-variant-numeric: tabular-nums; }
.figure table, .figure tr, .figure thead, .figure th, .figure td { border: none !important; }
.figure td.heat { padding: 0; height: 22px; min-width: 6px; outline: 1px solid var(--border-color-primary);
  background: color-mix(in srgb, var(--color-accent) calc(var(--v) * 1%), transparent); }
.figure .bar { display: block; height: 5px; border-radius: 3px; background: var(--color-accent);
  width: calc(var(--v) * 1%); min-width: 1px; }
.figure p { font-size: 13px; margin: 4px 0 10px; }
"""


def short_names(layers: list[str]) -> dict[str, str]:
    """Layers' names for people: ``down_blocks.1.attentions.0.transformer_blocks.0`` as ``down 1, attention 0``."""
    parts: dict[str, list[str]] = {}
    for layer in layers:
        found: list[str] = []
        for word in layer.split("."):
            if word.isdecimal() and found:
                found[-1] += f" {word}"
            else:
                found.append(WORDS.get(word, word.replace("_", " ")))
        parts[layer] = found
    while len(parts) > 1 and min(map(len, parts.values())) > 1 and len({found[-1] for found in parts.values()}) == 1:
        for found in parts.values():
            found.pop()
    return {layer: ", ".join(found) for layer, found in parts.items()}


def _figure(caption: str, note: str, head: list[tuple[str, int]], rows: list[str]) -> str:
    """The table, with heads as (text, columns)."""
    heads = "".join(f'<th scope="col" colspan="{width}">{escape(text)}</th>' for text, width in [("layer", 1), *head])
    label = escape(caption, quote=True)
    return (
        f'<div class="figure" role="region" tabindex="0" aria-label="{label}"><table><caption>{escape(caption)}</caption>'
        f"<thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table><p>{escape(note)}</p></div>"
    )


def bars(caption: str, note: str, values: dict[str, list[float] | None], head: list[str], digits: int = 2) -> str:
    """A table of numbers with bars under them, one row a layer; ``None``: not known."""
    names = short_names(list(values))
    largest = max((value for row in values.values() if row for value in row), default=0.0) or 1.0
    rows = []
    for layer, row in values.items():
        cells = "".join(
            f'<td>{value:.{digits}f}<span class="bar" style="--v:{100 * value / largest:.1f}"></span></td>'
            for value in row or []
        )
        rows.append(f'<tr><th scope="row">{escape(names[layer])}</th>{cells or "<td>not known</td>"}</tr>')
    return _figure(caption, note, [(text, 1) for text in head], rows)


def heat(caption: str, note: str, values: dict[str, list[float]], head: list[str], last: str) -> str:
    """A table of colours (0: none, 1: full), one row a layer, with the last value, or ``last`` over all, as a number."""
    names = short_names(list(values))
    rows = []
    for layer, row in values.items():
        cells = "".join(
            f'<td class="heat" style="--v:{100 * value:.0f}" title="{escape(names[layer], quote=True)}, '
            f'{escape(title, quote=True)}: {value:.2f}"></td>'
            for value, title in zip(row, head, strict=True)
        )
        number = row[-1] if last == "now" else sum(row) / max(1, len(row))
        rows.append(f'<tr><th scope="row">{escape(names[layer])}</th>{cells}<td>{number:.2f}</td></tr>')
    span = head[0] if len(head) == 1 else f"{head[0]} to {head[-1].removeprefix('step ')}"
    return _figure(caption, note, [(span, len(head)), (last, 1)], rows)


def importance(history: ReducerHistory) -> str:
    """The importance of every layer at each of its measurements (evenly chosen ones, if there are many)."""
    count = len(history.steps)
    if not count:
        return ""
    chosen = sorted({round(index * (count - 1) / max(1, min(BINS, count) - 1)) for index in range(min(BINS, count))})
    values = {layer: [row[index] for index in chosen] for layer, row in history.importance.items()}
    return heat(
        "Importance over time",
        "Measured by suppressing layers: 0.5 at the start; a layer whose suppression hurts rises, and is trained more often.",
        values,
        [f"step {history.steps[index]}" for index in chosen],
        "now",
    )


def active(history: ReducerHistory, steps: int) -> str:
    """How often every layer was trained in each part of the run."""
    if steps < 1:
        return ""
    count = min(BINS, steps)
    edges = [round(index * steps / count) for index in range(count + 1)]
    pairs = list(pairwise(edges))
    values = {layer: [history.share_active(layer, first, last) for first, last in pairs] for layer in history.active}
    return heat(
        "Layers trained over time",
        "The share of the steps that trained the layer's heads: full colour is every step.",
        values,
        [f"step {first}" for first, _ in pairs],
        "mean",
    )

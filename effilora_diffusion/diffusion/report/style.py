"""The look of the pages: one column of cards, in the reader's light or dark, readable on a telephone and on paper."""

from __future__ import annotations

import re
from html import escape

from .figures import STYLE as FIGURES

PARTS = """
figure { margin: 0; min-width: 0; }
figcaption { font-weight: 600; font-size: 14px; margin-bottom: 4px; }
.plot { position: relative; height: 210px; margin: 10px 12px 26px 56px; border-bottom: 1px solid var(--rule); }
.plot svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; }
.plot line.grid { stroke: var(--rule); stroke-width: 1; vector-effect: non-scaling-stroke; }
.plot line.mark { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 4 4; vector-effect: non-scaling-stroke; }
.plot polyline { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round; vector-effect: non-scaling-stroke; }
.plot polyline.faint { stroke-width: 1; opacity: .35; }
.plot span { position: absolute; color: var(--soft); font-size: 12px; line-height: 1; white-space: nowrap; }
.plot .y { right: calc(100% + 8px); transform: translateY(-50%); }
.plot .x { top: calc(100% + 8px); transform: translateX(-50%); }
.plot .marked { bottom: 4px; padding: 0 5px; }
.plot .marked.right { transform: translateX(-100%); }
.dot { position: absolute; width: 8px; height: 8px; margin: -4px; border-radius: 50%; background: var(--c);
  box-shadow: 0 0 0 2px var(--card); }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 0; padding: 0; list-style: none; font-size: 13px;
  color: var(--soft); }
.key { display: inline-block; width: 14px; height: 3px; border-radius: 2px; background: var(--c); margin-right: 6px;
  vertical-align: middle; }
.key.faint { opacity: .35; }
.scroll { overflow-x: auto; }
table.plain { border-collapse: collapse; width: 100%; font-size: 14px; }
table.plain th, table.plain td { text-align: left; vertical-align: top; padding: 5px 14px 5px 0;
  border-top: 1px solid var(--rule); }
table.plain tr:first-child > * { border-top: none; }
table.plain th { font-weight: 400; color: var(--soft); white-space: nowrap; }
table.plain thead th { color: var(--ink); font-weight: 600; }
table.plain td { font-variant-numeric: tabular-nums; overflow-wrap: break-word; min-width: 5em; }
table.plain tr.best > * { font-weight: 600; color: var(--ink); }
"""
"""Charts and tables, which stand in the web UI as well."""

LIGHT = "--k0: #2f6fde; --k1: #d9662b; --k2: #1d8a5f; --k3: #a442b8; --k4: #b58500; --k5: #c43d5b; --k6: #0f8a9d; --k7: #6b6f76;"
DARK = "--k0: #6ea2ff; --k1: #f39a63; --k2: #56c795; --k3: #d58be5; --k4: #e3b93f; --k5: #f07f98; --k6: #55c6d8; --k7: #a9adb5;"
"""Colours of curves on light and on dark paper."""

CSS = """
:root { color-scheme: light dark; --paper: #f6f7f9; --card: #fff; --ink: #1a1d23; --soft: #5b6472; --rule: #dfe3e8;
  --accent: #2f6fde; --border-color-primary: var(--rule); --color-accent: var(--accent);
  LIGHT }
@media (prefers-color-scheme: dark) { :root { --paper: #14161a; --card: #1d2026; --ink: #e8eaee; --soft: #a0a8b5;
  --rule: #343a44; --accent: #6ea2ff; DARK } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 24px 20px 64px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 0 0 12px; }
p { margin: 0 0 10px; }
a { color: var(--accent); }
.lead, .note { color: var(--soft); }
.note { font-size: 13px; margin: 8px 0 0; }
section { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 18px 20px; margin-top: 18px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 18px 0 0; padding: 0; }
.tiles div { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 10px 14px; }
.tiles dt { color: var(--soft); font-size: 13px; }
.tiles dd { margin: 0; font-size: 18px; font-weight: 600; overflow-wrap: anywhere; }
.tiles small { display: block; font-size: 12.5px; font-weight: 400; color: var(--soft); }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 22px; }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)); gap: 16px; }
.samples.side { grid-auto-flow: column; grid-auto-columns: minmax(260px, 1fr); grid-template-columns: none; overflow-x: auto; }
.samples img { display: block; width: 100%; height: auto; border: 1px solid var(--rule); border-radius: 6px; }
.thumbs { display: grid; grid-template-columns: repeat(auto-fill, minmax(112px, 1fr)); gap: 14px; }
.thumbs img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; background: var(--paper);
  border: 1px solid var(--rule); border-radius: 6px; }
.thumbs figcaption { font-weight: 400; font-size: 12.5px; margin: 4px 0 0; overflow-wrap: anywhere; }
figcaption small { color: var(--soft); display: block; font-weight: 400; }
pre { overflow-x: auto; background: var(--paper); border: 1px solid var(--rule); border-radius: 8px; padding: 10px 12px;
  font-size: 13px; }
code { font-family: ui-monospace, Consolas, monospace; }
summary { cursor: pointer; color: var(--accent); margin: 10px 0 6px; }
@media (max-width: 600px) { main { padding: 16px 12px 40px; } section { padding: 14px; } h1 { font-size: 22px; }
  .tiles { grid-template-columns: repeat(2, 1fr); }
  table.plain th { white-space: normal; overflow-wrap: anywhere; min-width: 10.5em; font-size: 13px; }
  .plot { height: 180px; margin-left: 48px; } }
@media print { section { break-inside: avoid; } }
""".replace("LIGHT", LIGHT).replace("DARK", DARK)

COLOURS = "".join(f".c{number} {{ --c: var(--k{number}); }}\n" for number in range(8))

ICON = "data:,"
"""So that browsers ask nobody for a favicon."""


def within(selector: str) -> str:
    """The style of :data:`PARTS` for those in a ``selector`` of another page, whose class ``dark`` says that its paper is."""

    def scoped(rule: re.Match[str]) -> str:
        names = ", ".join(f"{selector} {name.strip()}" for name in rule[1].split(","))
        return f"{names} {{{rule[2]}}}\n"

    return f"{selector} {{ {LIGHT} }}\n.dark {selector} {{ {DARK} }}\n" + re.sub(
        r"([^{}]+)\{([^{}]*)\}\s*", scoped, PARTS.strip() + "\n" + COLOURS
    )


def document(title: str, body: str) -> str:
    """A whole page in one file, which the browser may not extend by anything from elsewhere."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, '
        f'initial-scale=1"><meta http-equiv="Content-Security-Policy" content="{policy}"><link rel="icon" href="{ICON}">'
        f"<title>{escape(title)}</title><style>{PARTS}{CSS}{COLOURS}{FIGURES}</style></head><body><main>{body}</main></body></html>\n"
    )


def section(title: str, *parts: str) -> str:
    """A card with a heading; empty where all ``parts`` are."""
    content = "".join(parts)
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content else ""


def tiles(facts: list[tuple[str, str, str]]) -> str:
    """Figures in a row: what, how much, and a small remark."""
    cells = (
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}{f'<small>{escape(more)}</small>' if more else ''}</dd></div>"
        for name, value, more in facts
    )
    return f'<dl class="tiles">{"".join(cells)}</dl>'


def table(head: list[str], rows: list[list[str]], best: int | None = None, label: str = "") -> str:
    """A table whose first column names the rows; ``best`` is the number of a row that stands out.

    One with a ``label`` can be scrolled by the keyboard.
    """
    heads = "".join(f'<th scope="col">{escape(text)}</th>' for text in head)
    top = f"<thead><tr>{heads}</tr></thead>" if head else ""
    lines = []
    for number, (first, *rest) in enumerate(rows):
        mark = ' class="best"' if number == best else ""
        cells = "".join(f"<td>{escape(text)}</td>" for text in rest)
        lines.append(f'<tr{mark}><th scope="row">{escape(first)}</th>{cells}</tr>')
    region = f' role="region" tabindex="0" aria-label="{escape(label, quote=True)}"' if label else ""
    return f'<div class="scroll"{region}><table class="plain">{top}<tbody>{"".join(lines)}</tbody></table></div>'


def picture(uri: str, caption: str, more: str = "") -> str:
    """An image with its caption."""
    said = f"<small>{escape(more)}</small>" if more else ""
    image = f'<img src="{uri}" alt="{escape(caption, quote=True)}">'
    return f"<figure>{image}<figcaption>{escape(caption)}{said}</figcaption></figure>"

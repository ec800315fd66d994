"""The trainer's report before its first step as a table."""

from __future__ import annotations

import html
import re

LABELLED = re.compile(r"(\S.*?)(?: {2,}|: )(.*)")
"""A line with a label; lines that begin with spaces belong to the line above."""

STYLE = """
.report-table { width: 100%; border-collapse: collapse; font-size: 13px; color: var(--body-text-color); }
.report-table caption { text-align: left; font-weight: 600; padding-bottom: 4px; }
.report-table th, .report-table td { text-align: left; vertical-align: top; padding: 5px 8px;
  border-top: 1px solid var(--border-color-primary); background: none; }
.report-table th { font-weight: 600; white-space: nowrap; }
.report-table td { font-family: var(--font-mono); font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
"""


def report_rows(text: str) -> list[tuple[str, str]]:
    """Labels and values of a report's lines; notes are labelled so, and lines of one label are one row."""
    rows: list[tuple[str, str]] = []
    for line in text.splitlines():
        found = LABELLED.fullmatch(line)
        if found:
            rows.append((found[1], found[2]))
        elif rows:
            rows[-1] = (rows[-1][0], f"{rows[-1][1]}\n{line.strip()}")
    return rows


def report_table(text: str, caption: str = "What would be trained") -> str:
    """A report as HTML, its words as text and nothing else.

    Example:
        >>> report_table("steps       250, batch size 4", "Report").count("<tr>")
        1
    """
    rows = "".join(
        f'<tr><th scope="row">{html.escape(label.capitalize())}</th>'
        f"<td>{'<br>'.join(map(html.escape, value.splitlines()))}</td></tr>"
        for label, value in report_rows(text)
    )
    return f'<table class="report-table"><caption>{html.escape(caption)}</caption>{rows}</table>'

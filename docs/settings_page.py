"""``python docs/settings_page.py > docs/settings.md``: the page of settings, made from the settings."""

from __future__ import annotations

from dataclasses import Field
from typing import Any

from effilora_diffusion.cli.settings_parser import groups_of
from effilora_diffusion.core.options import default_of
from effilora_diffusion.diffusion.config import TrainingConfig
from effilora_diffusion.language.config import USUAL, kinds_of

HEAD = """# Settings

Every setting is a flag of its command and a name in the TOML or YAML file of `--config`; the command line wins.
`--learning-rate` is `--learning_rate`; `--no_center_crop` or `--center_crop false` switch off. A resumed run must have
the same values where *fixed* is marked: they decide what a step computes. (`--max_train_steps` is fixed as well unless
the learning rate is constant.)
"""

COMMANDS = (
    ("effilora train", (TrainingConfig,), ()),
    ("effilora train-llm", kinds_of(False), USUAL),
    ("effilora train-vlm", kinds_of(True), USUAL),
)


def page() -> str:
    """The page as Markdown."""
    parts = [HEAD]
    for command, kinds, usual in COMMANDS:
        parts.append(f"\n## {command}\n")
        for title, entries in groups_of(kinds, usual).items():
            own = [entry for entry, _ in entries if "group" in entry.metadata or entry.name in usual]
            if own:
                rows = "\n".join(map(_row, own))
                parts.append(f"\n**{title}**\n\n| setting | default | |\n|---|---|---|\n{rows}\n")
            else:
                parts.append(f"\n**{title}**: see transformers' documentation of `TrainingArguments`.\n")
    return "".join(parts)


def _row(entry: Field[Any]) -> str:
    default = default_of(entry)
    shown = " ".join(default) if isinstance(default, list) else default
    value = "" if default in (None, []) else f"`{shown}`"
    notes = [" ".join(str(entry.metadata.get("help", "")).split())]
    if entry.metadata.get("choices"):
        notes.append(f"one of {', '.join(f'`{choice}`' for choice in entry.metadata['choices'])}")
    if entry.metadata.get("bounds"):
        notes.append(str(entry.metadata["bounds"]))
    if entry.metadata.get("fixed"):
        notes.append("*fixed*")
    text = "; ".join(notes).replace("|", "\\|")
    return f"| `--{entry.name}` | {value} | {text} |"


if __name__ == "__main__":
    print(page(), end="")

"""``effilora plan``: from a base model, images and a budget to the settings of a run, and the command that starts it."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..core.errors import EffiLoRAError, exit_code
from ..core.options import COUNT, POSITIVE, SHARE, Bounds, default_of, settings_of
from ..core.writing import write_text
from ..diffusion.config import TrainingConfig
from ..diffusion.presets import DEFAULT, PRESETS
from ..diffusion.training.diffusers_flags import FLAGS, translate_diffusers_flags
from ..diffusion.training.example import example_settings
from .environment import prepare
from .settings_parser import make_parser, parse
from .train import settings_of_run

if TYPE_CHECKING:
    from ..diffusion.training.plan import Plan

DESCRIPTION = (
    "Choose the settings of a run of `effilora train` for a base model, images and a budget, without loading weights. "
    "Settings that are named here stay as they are."
)

BUDGETS: dict[str, tuple[type, Bounds, str]] = {
    "max_parameters": (int, COUNT, "parameters of the adapter at most"),
    "max_file_mb": (float, POSITIVE, "megabytes of the adapter's file, and of its plain LoRA, at most"),
    "max_memory_gb": (float, POSITIVE, "gigabytes of memory at most, as --dry_run counts them: libraries come on top"),
    "time": (float, SHARE, "share of the preset's time, all its steps full ones, that the run may take"),
}
"""What a plan may be given to keep to."""

ALWAYS = (
    *("rank", "heads", "routing", "resolution", "train_batch_size", "gradient_accumulation_steps", "max_train_steps"),
    *("learning_rate", "mixed_precision", "output_dir"),
)
"""Settings that a plan states even where they are the trainer's defaults."""


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    """Print a plan; returns the exit code: 0, or 2 for a mistake or a budget that can't be met."""
    prepare()
    parser = make_parser([TrainingConfig], DESCRIPTION, prog)
    for name in FLAGS:
        parser.add_argument(f"--{name}", nargs="*", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    group = parser.add_argument_group("Budget")
    for name, (kind, bounds, text) in BUDGETS.items():
        group.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS, help=f"{text} ({bounds})")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the settings here, for --config",
                        default=argparse.SUPPRESS)  # fmt: skip

    def run() -> int:
        given = parse(parser, [TrainingConfig], arguments, (*FLAGS, *BUDGETS, "output"))
        extra = dict(given.extra)
        wanted = {name: extra.pop(name) for name in (*BUDGETS, "output") if name in extra}
        chosen = translate_diffusers_flags({**given.values, **extra})
        plan = make_plan({"preset": DEFAULT} | chosen, wanted)
        if "output" in wanted:
            write_settings(plan, wanted["output"])
        return 0

    return exit_code(run)


def make_plan(chosen: dict[str, Any], wanted: dict[str, Any]) -> Plan:
    """The plan for what somebody has ``chosen`` and ``wanted``; it is printed."""
    for name, (_, bounds, _) in BUDGETS.items():
        if name in wanted and not bounds.hold(wanted[name]):
            raise EffiLoRAError(f"--{name} must be {bounds}, not {wanted[name]}")
    long = [name for name in ("max_train_steps", "num_train_epochs") if name in chosen]
    if long and "time" in wanted:
        raise EffiLoRAError(f"--{long[0]} and --time both say how long: leave one of them out")
    if "output" in wanted and wanted["output"].exists():
        raise EffiLoRAError(f"--output {wanted['output']} is there already: name another file")
    from ..diffusion.training.build import check_folders, check_hardware
    from ..diffusion.training.plan import GIGA, MEGA, Budget, Planner
    from ..diffusion.training.processes import start

    file, memory = wanted.get("max_file_mb"), wanted.get("max_memory_gb")
    budget = Budget(
        wanted.get("max_parameters"), file and file * MEGA, memory and memory * GIGA, wanted.get("time")
    )  # fmt: skip
    config = TrainingConfig(**settings_of_run(chosen, example_settings))
    accelerator = start()
    remarks: list[str] = []  # told after the plan
    check_hardware(config, accelerator.device, remarks.append)
    check_folders(config)
    plan = Planner(accelerator, set(chosen), budget, remarks.append).plan(config)
    print("\n".join([*lines(plan), *filter(None, remarks)]))
    print(f"\n{command(plan)}")
    return plan


def lines(plan: Plan) -> list[str]:
    """What the plan is and why, in five lines, and what is worth knowing about captions and settings."""
    from ..diffusion.training.dry_run import size_text
    from ..diffusion.training.notes import notes

    report, c = plan.report, plan.config
    first, images, *_ = report.lines()
    plain = f"plain LoRA {size_text(report.plain)}, " + ("exact" if _exact(c) else "an approximation")
    shape = (
        f"rank {c.rank}, {c.heads} head{'s' if c.heads > 1 else ''}, {c.routing} routing on {report.linears} linears"
    )
    rate = f"learning rate {c.learning_rate:g}, {c.lr_scheduler}"
    rows = c.train_batch_size * c.gradient_accumulation_steps
    memory = report.lines()[-1].split(None, 1)[1]
    cut = "" if c.reducer == "off" else f", Reducer: {c.reducer}"
    why = PRESETS[c.preset].gives if c.preset else ""
    return [
        f"base        {first.split(None, 1)[1]}; {images.split(None, 1)[1]}",
        f"adapter     {shape}: {report.counts['stored']:,} parameters, file {size_text(report.file)}, {plain}; "
        f"--preset {c.preset}: {why}",
        f"class       {_class(plan)}",
        f"steps       {plan.parts.steps} of {rows} image{'s' if rows > 1 else ''}, {rate}{cut}: {plan.time:.2f} of the time of "
        f"{plan.usual} full steps"
        + ("; in that time fewer full steps are better than shortened ones" if plan.time < 1 else ""),
        f"memory      {memory}; {_budget(plan)}",
        *(f"note: {note}" for note in notes(replace(plan.parts, config=replace(c, preset=None)))),
    ]


def _exact(config: TrainingConfig) -> bool:
    return config.heads == 1 or config.routing in ("static", "concept")


def _class(plan: Plan) -> str:
    if plan.parts.prior is None:
        return "not preserved: --with_prior_preservation drifts a fifth as much (0.035 against 0.160 on the example)"
    held = "the base's own prediction, which drifts half as much as class images"
    prompts = plan.config.class_prompt
    named = ", ".join(map(repr, prompts[:2])) + (f" and {len(prompts) - 2} more" if len(prompts) > 2 else "")
    return f"{named or 'each subject its own'} held to {held if plan.parts.prior.from_base else 'their images'}"


def _budget(plan: Plan) -> str:
    return "; ".join(plan.reduced) if plan.reduced else "nothing had to be reduced"


def settings(plan: Plan) -> dict[str, Any]:
    """The plan's settings by name: what differs from the trainer's defaults, and what a plan always states."""
    found = {}
    for entry in settings_of(TrainingConfig):
        value = getattr(plan.config, entry.name)
        if entry.name not in plan.config.not_kept and (value != default_of(entry) or entry.name in ALWAYS):
            found[entry.name] = value
    return {name: value for name, value in found.items() if value is not None}


def command(plan: Plan) -> str:
    """The command that starts the run, for a shell."""
    words = []
    for name, value in settings(plan).items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            values = value if isinstance(value, list) else [value]
            words.append(" ".join([f"--{name}", *(shlex.quote(str(one)) for one in values)]))
    return " \\\n    ".join(["accelerate launch train_scripts/train_dreambooth_effilora.py", *words])


def write_settings(plan: Plan, path: Path) -> None:
    """Write the settings as a config file, the plan above them."""
    head = "".join(f"# {line}\n" for line in lines(plan))
    write_text(path, head + yaml.safe_dump(settings(plan), sort_keys=False, allow_unicode=True))
    print(f"\nwritten to {path}: effilora train --config {shlex.quote(str(path))}")

"""``effilora report``: write the page of a run again."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``effilora report``."""
    parser.add_argument(
        "run", type=Path, help="output folder of a training run on images; report.html is written there"
    )


def run(args: argparse.Namespace) -> None:
    """Write ``report.html`` from what lies in the folder."""
    from ..core.errors import EffiLoRAError
    from ..core.run_folder import holder
    from ..core.scores import PAGE_FILE
    from ..diffusion.report.page import write_page
    from ..diffusion.report.run import ANY, RunFolder, read_run

    folder = args.run.expanduser()
    read_run(folder)
    if holder(folder) is not None:
        raise EffiLoRAError(f"{folder} is being written by a run, which writes {PAGE_FILE} at every validation itself")
    RunFolder(folder, ANY).own(PAGE_FILE)
    print(write_page(folder))

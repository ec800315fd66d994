"""``python -m effilora_diffusion.studio.supervise EXIT_FILE WORDS...``: run the trainer and write its exit code.

The exit code is then known to whoever looks, and whenever. Signals are passed on to the trainer.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any


def main(exit_file: Path, words: list[str]) -> None:
    """Train with ``words`` as arguments, and write the exit code to ``exit_file``."""
    child: subprocess.Popen[bytes] | None = None
    asked: int | None = None  # a signal that came before the child was there

    def pass_on(number: int, frame: Any) -> None:
        nonlocal asked
        asked = number
        if child is not None:
            child.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_on)
    child = subprocess.Popen([sys.executable, "-m", "effilora_diffusion.train", *words])
    if asked is not None:
        child.send_signal(asked)
    exit_file.write_text(str(child.wait()))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

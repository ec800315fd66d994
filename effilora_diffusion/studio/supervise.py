"""``python -m effilora_diffusion.studio.supervise EXIT_FILE WORDS...``: run the trainer and write its exit code.

The exit code is then known to whoever looks, and whenever. Signals are passed on to the trainer.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from .processes import APART, STOP

SIGNALS = ("SIGINT", "SIGTERM", "SIGBREAK")
"""Those that exist: SIGBREAK is Windows'."""


def main(exit_file: Path, words: list[str]) -> None:
    """Train with ``words`` as arguments, and write the exit code to ``exit_file``."""
    child: subprocess.Popen[bytes] | None = None
    asked = False  # by a signal that came before the child was there

    def pass_on(number: int, frame: Any) -> None:
        nonlocal asked
        asked = True
        if child is not None:
            child.send_signal(STOP)

    for name in SIGNALS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), pass_on)
    child = subprocess.Popen([sys.executable, "-m", "effilora_diffusion.train", *words], **APART)
    if asked:
        child.send_signal(STOP)
    exit_file.write_text(str(child.wait()))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

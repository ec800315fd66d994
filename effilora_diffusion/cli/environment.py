"""What a command sets for the libraries it uses; it must run before they are imported."""

from __future__ import annotations

import logging
import os

DEFAULTS = {
    "TRANSFORMERS_VERBOSITY": "error",  # else it warns of torchvision, which nothing here needs
}
"""Environment variables and their values, where the user has not set them."""

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
"""How threads wait for one another: whoever has set one of them has decided."""

SPINS = "1000"
"""Spins of a waiting thread before it sleeps, libgomp's own number for machines with more threads than cores.

Its usual 300,000 make a step ten to thirty times slower beside another program, and no spins at all make it twice as slow on an
idle machine; this number costs about a tenth there (``docs/reliability.md``).
"""


QUIET = ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao", "bitsandbytes.backends.cpu.ops")
"""Loggers of libraries that warn whenever they are imported, of things that concern their developers."""


def prepare() -> None:
    """Set the defaults for this process and those that it starts."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    if not any(name in os.environ for name in WAITING):
        os.environ["GOMP_SPINCOUNT"] = SPINS
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.ERROR)

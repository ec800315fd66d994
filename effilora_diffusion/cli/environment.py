"""What a command sets for the libraries it uses; it must run before they are imported."""

from __future__ import annotations

import logging
import os

DEFAULTS = {
    "TRANSFORMERS_VERBOSITY": "error",  # else it warns of torchvision, which nothing here needs
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin at every barrier make a step a hundred times slower beside another program
}
"""Environment variables and their values, where the user has not set them."""


QUIET = ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao", "bitsandbytes.backends.cpu.ops")
"""Loggers of libraries that warn whenever they are imported, of things that concern their developers."""


def prepare() -> None:
    """Set the defaults for this process and those that it starts."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.ERROR)

"""``python -m effilora_diffusion`` is the ``effilora`` command."""

import sys

from .cli import main

sys.exit(main())

"""DreamBooth with an EffiLoRA adapter: ``accelerate launch train_scripts/train_dreambooth_effilora.py``.

With no arguments it teaches the embedded base the example subject. ``--help`` lists diffusers' flags and ours.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # also from a checkout that is not installed

from effilora_diffusion.diffusion.training.main import main

if __name__ == "__main__":
    sys.exit(main())

"""Visual instruction tuning of a vision-language model with EffiLoRA: ``accelerate launch train_scripts/train_vlm_effilora.py``.

``--help`` lists the flags of transformers' examples and ours.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # also from a checkout that is not installed

from effilora_diffusion.language.main import main

if __name__ == "__main__":
    sys.exit(main(images=True))

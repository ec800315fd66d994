"""Captioned images with an EffiLoRA adapter: ``accelerate launch train_scripts/train_text_to_image_effilora.py``.

``--help`` lists the flags of diffusers' text-to-image scripts and ours. The package must be installed (``pip install -e .``);
``effilora train-text-to-image`` is the same command.
"""

import sys

from effilora_diffusion.cli import main

if __name__ == "__main__":
    sys.exit(main(["train-text-to-image", *sys.argv[1:]]))

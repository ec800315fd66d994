"""Visual instruction tuning with EffiLoRA: ``accelerate launch train_scripts/train_vlm_effilora.py``.

``--help`` lists the flags of transformers' examples and ours. The package must be installed (``pip install -e .``);
``effilora train-vlm`` is the same command.
"""

import sys

from effilora_diffusion.cli import main

if __name__ == "__main__":
    sys.exit(main(["train-vlm", *sys.argv[1:]]))

"""Instruction tuning with an EffiLoRA adapter: ``accelerate launch train_scripts/train_llm_effilora.py``.

``--help`` lists the flags of transformers' examples and ours. The package must be installed (``pip install -e .``);
``effilora train-llm`` is the same command.
"""

import sys

from effilora_diffusion.cli import main

if __name__ == "__main__":
    sys.exit(main(["train-llm", *sys.argv[1:]]))

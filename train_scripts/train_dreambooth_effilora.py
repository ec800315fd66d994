"""DreamBooth with an EffiLoRA adapter: ``accelerate launch train_scripts/train_dreambooth_effilora.py``.

With no arguments it teaches the embedded base the example subject. ``--help`` lists diffusers' flags and ours. The
package must be installed (``pip install -e .``); ``effilora train`` is the same command.
"""

import sys

from effilora_diffusion.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))

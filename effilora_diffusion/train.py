"""``accelerate launch -m effilora_diffusion.train``: the training command of image models, from an installed package."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))

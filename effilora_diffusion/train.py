"""``accelerate launch -m effilora_diffusion.train``: the training command of image models, from an installed package."""

import sys

from .cli.train import main

if __name__ == "__main__":
    sys.exit(main())

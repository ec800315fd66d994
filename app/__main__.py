"""``python -m app``: the same as ``effilora app``."""

import sys

from effilora_diffusion.cli import main

if __name__ == "__main__":
    sys.exit(main(["app", *sys.argv[1:]]))

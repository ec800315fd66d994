"""Launch the web UI: ``python app/app.py``, or a hosted Space whose ``app_file`` this is.

A Space serves other machines and needs credentials: set the secret ``EFFILORA_AUTH=user:password``.
Arguments are those of ``effilora app``.
"""

import os
import sys

from effilora_diffusion.cli import main

if __name__ == "__main__":
    hosted = ["--listen"] if "SPACE_ID" in os.environ else []
    name = os.environ.get("SPACE_HOST")
    if hosted and name:
        hosted += ["--allowed_host", name]
    sys.exit(main(["app", *hosted, *sys.argv[1:]]))

"""Publishing a run's folder as a model on the Hugging Face hub."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import HfApi

from ...core import EffiLoRAError
from ...core.errors import DEBUG
from ...core.scores import BEST_FILE, PAGE_FILE

LEFT_OUT = ["checkpoint-*", "checkpoint-*/**", ".*", ".*/**", "logs/**", "cache/**", PAGE_FILE, BEST_FILE]
"""What is of no use to whoever loads the result, and the page, which shows every image of the run and where it lay."""


class Publication:
    """The model on the hub that a run is uploaded to.

    Args:
        output: folder of the run.
        model: id on the hub (default: the folder's name, in the account of the token).
        token: default: that of ``hf auth login``, or ``HF_TOKEN``.

    Raises:
        EffiLoRAError: the model can't be made or written: told before anything is trained.
    """

    def __init__(self, output: Path, model: str | None, token: str | None):
        self.output, self.api = output, HfApi(token=token)
        name = model or output.resolve().name
        try:
            self.name = self.api.create_repo(name, exist_ok=True).repo_id
        except Exception as error:  # of the hub, the network or whichever HTTP client its library has
            raise EffiLoRAError(
                f"--push_to_hub: the model {name[:100]} can't be made or written on the hub ({_reason(error)}): log in with "
                "`hf auth login`, name another --hub_model_id, or leave --push_to_hub out"
            ) from error

    def upload(self) -> str:
        """Upload what the run wrote; returns a line on what was done. A failure loses nothing, and says what to do."""
        try:
            self.api.upload_folder(
                repo_id=self.name, folder_path=self.output, commit_message="End of training", ignore_patterns=LEFT_OUT
            )
        except Exception as error:
            if os.environ.get(DEBUG) == "1":
                raise
            return (
                f"note: the run is complete in {self.output}, but could not be uploaded ({_reason(error)}); upload it with: "
                f"hf upload {self.name} {self.output} . --exclude 'checkpoint-*' {PAGE_FILE}"
            )
        return f"uploaded    {self.api.endpoint}/{self.name}"


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__

"""Models on the hub: whether it can be reached, asked once before a loader asks for every file with retries."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .errors import EffiLoRAError

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
"""A model's id on the hub: its owner and its name."""

EMBEDDED_BASE = "the embedded base"
"""Name of the model that comes with the package."""

TIMEOUT = 10.0
"""Seconds to wait for the hub's answer."""


def loading_options(name: str, revision: str | None = None) -> dict[str, Any]:
    """What ``from_pretrained`` needs beside ``name``: nothing for a folder and a reachable hub, else the cache alone.

    Args:
        name: model folder, file or hub id.
        revision: of the hub's model.

    Raises:
        EffiLoRAError: no folder, and no id that the hub has.
    """
    if Path(name).exists():
        return {}
    if not HUB_ID.fullmatch(name):
        raise EffiLoRAError(f"the model {name!r} can't be loaded: there is no such folder or file")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        HfApi().model_info(name, revision=revision, timeout=TIMEOUT)
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise EffiLoRAError(
            f"the model {name!r} is neither a folder here nor a model on the hub; a private one needs `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise EffiLoRAError(f"the model {name!r} has no revision {revision!r}") from error
    except HfHubHTTPError:
        return {}  # the loader's own request may succeed, or says more
    except Exception:  # no connection: the transport's errors have other names in every version of the hub's client
        return {"local_files_only": True}
    return {}


def not_cached(name: str) -> str:
    """The way out where neither folder, hub nor cache has the model."""
    return (
        f"there is no folder {name!r} here, the hub can't be reached, and its cache on this machine does not hold the whole "
        f"model: go online once, or copy the model here and give its folder"
    )


def public_name(model: str | None) -> str:
    """A model's name for files that are passed on: of a folder or file on this machine only the last part."""
    name = str(model or EMBEDDED_BASE)
    return re.split(r"[\\/]", name.rstrip("\\/"))[-1] if not HUB_ID.fullmatch(name) or Path(name).exists() else name

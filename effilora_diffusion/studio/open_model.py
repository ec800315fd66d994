"""The model that is open, with everything that depends on it: replaced as a whole when another one is opened."""

from __future__ import annotations

import gc
import itertools
from pathlib import Path
from typing import Any

import torch

from .. import EffiLoRAError
from ..core.fingerprint import base_fingerprint
from ..core.load import host_model
from ..diffusion.adapters.active_adapters import ActiveAdapters
from ..diffusion.adapters.fitting import Layers
from ..diffusion.models import Family, family_class
from ..diffusion.models.pipelines import load_pipeline
from ..diffusion.sampling.request import sampling_defaults
from ..diffusion.sampling.samplers import own_sampler, sampler_names
from ..diffusion.sampling.start import tasks_of
from ..diffusion.sampling.tokens import TokenCounter

_NUMBERS = itertools.count(1)


class OpenModel:
    """A pipeline, ready to generate.

    Args:
        model: folder, hub id or single file; ``None``: the embedded base.
        dtype: of the model's weights.

    Attributes:
        number: by which pages know that another model was opened.
        tasks: what it can do besides generating from a prompt alone, see :func:`~..diffusion.sampling.start.tasks_of`.
    """

    def __init__(self, model: str | None, dtype: torch.dtype):
        self.model, self.number = model, next(_NUMBERS)
        self.pipe: Any = load_pipeline(model, dtype)
        self.base = base_fingerprint(host_model(self.pipe))
        self.layers = Layers(self.pipe)
        self.active = ActiveAdapters(self.pipe)
        self.family: type[Family] = family_class(self.pipe) or Family
        self.samplers, self.own_sampler = sampler_names(self.pipe), own_sampler(self.pipe)
        self.tokens = TokenCounter(self.pipe)
        self.tasks = tasks_of(self.pipe)
        self.defaults = sampling_defaults(self.pipe, model)
        self._fits: dict[tuple[Any, ...], bool] = {}
        if torch.cuda.is_available():
            self.pipe.enable_model_cpu_offload()  # as `effilora generate` does: parts visit the GPU when they are needed

    def close(self) -> None:
        """Let the weights go; whoever still holds this knows of no pipeline any more."""
        self.active.use([])
        if torch.cuda.is_available():
            self.pipe.remove_all_hooks()
        self.pipe = self.active.pipe = None
        gc.collect()  # pipelines and hooks refer to each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def fits(self, path: Path) -> bool:
        """Whether an adapter's layers are this model's; a file that can't be read counts, and is told of when it is used."""
        try:
            stated = path.stat()
            key = (path, stated.st_mtime_ns, stated.st_size)
            if key not in self._fits:
                self._fits[key] = self.layers.fit(path)
            return self._fits[key]
        except (EffiLoRAError, OSError):
            return True

"""Making a loaded adapter ready for use on a model, and saying what may be wrong with the pair."""

from __future__ import annotations

import logging

from torch import nn

from .adapter import EffiLoRA
from .attach import adapters_of
from .files import AdapterFile
from .fingerprint import base_facts, is_base

logger = logging.getLogger(__name__)


def prepare_for_inference(model: nn.Module, content: AdapterFile, scale: float, label: str) -> EffiLoRA:
    """The adapter in ``content``, frozen and at strength ``scale``, not yet attached.

    Warns of an adapter that changes nothing, and of one that was trained on other weights of the same shape.
    """
    adapter = content.adapter
    adapter.eval().requires_grad_(False)
    adapter.strength = float(scale)
    if all(not heads.any() for heads in adapter.B):
        logger.warning("the adapter %s changes nothing: all its heads are zero", label)
    merged = any(other.merged for other in adapters_of(model).values())  # then the weights are not the base's
    if not merged and is_base(base_facts(model), content.metadata) is False:
        logger.warning(
            "the adapter %s was trained on %s, this is another model of the same shape: results may differ",
            label,
            content.metadata.get("base_model", "another model"),
        )
    return adapter

"""Named endpoints for programs: ``gradio_client`` calls them by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from .. import EffiLoRAError
from ..diffusion.sampling.request import GenerationRequest
from ..diffusion.sampling.sampler_names import known_name
from .fields import seed_of, whole
from .queue import MODEL_QUEUE
from .session import Session
from .shelf import adapter_facts
from .training_api import add_training_endpoints
from .words import one_line


def add_endpoints(session: Session) -> None:
    """Add ``/generate``, ``/list_adapters`` and the endpoints of trainings to the page that is being built."""

    def generate(prompt: str, adapter: str = "", strength: float = 1.0, seed: int = 0, steps: int | None = None,
                 guidance_scale: float | None = None, negative_prompt: str = "", width: int | None = None,
                 height: int | None = None, sampler: str = "", literal: bool = False) -> gr.FileData:  # fmt: skip
        """Generate one image, by default with the open model's own settings; returns the PNG, which carries its parameters."""
        own = session.defaults()
        steps, guidance_scale = _given(steps, own["steps"]), _given(guidance_scale, own["guidance_scale"])
        width, height = _given(width, own["edge"]), _given(height, own["edge"])
        try:
            chosen = [(str(adapter), float(strength))] if adapter else []
            wanted = GenerationRequest(
                str(prompt or ""), str(negative_prompt or ""), chosen, whole(steps, "steps"), float(guidance_scale),
                whole(width, "width"), whole(height, "height"), 1, seed_of(seed, False),
                known_name(sampler) or str(sampler) or None, bool(literal),
            )  # fmt: skip
            (path,) = (event for event in session.draw(wanted, preview_every=0) if isinstance(event, Path))
        except Exception as error:
            raise gr.Error(one_line(error), print_exception=False) from error
        return gr.FileData(path=str(path), orig_name=path.name)

    def list_adapters() -> list[dict[str, Any]]:
        """The adapters that ``generate`` knows: name, kind, trigger prompt, base model, rank, heads, checkpoints."""
        found = []
        for name, path in session.adapters().items():
            try:
                found.append({"name": name, **adapter_facts(path), "checkpoints": sorted(session.checkpoints(name))})
            except (EffiLoRAError, OSError):
                continue
        return found

    gr.api(generate, api_name="generate", **MODEL_QUEUE)
    gr.api(list_adapters, api_name="list_adapters")
    add_training_endpoints(session)


def _given(value: Any, usual: Any) -> Any:
    return usual if value is None else value

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
from .runs import Run
from .session import Session
from .shelf import adapter_facts
from .words import one_line


def add_endpoints(session: Session) -> None:
    """Add ``/generate``, ``/list_adapters`` and ``/train_status`` to the page that is being built."""
    defaults = session.defaults()

    def generate(prompt: str, adapter: str = "", strength: float = 1.0, seed: int = 0, steps: int = defaults["steps"],
                 guidance_scale: float = defaults["guidance_scale"], negative_prompt: str = "",
                 width: int = defaults["edge"], height: int = defaults["edge"], sampler: str = "",
                 literal: bool = False) -> gr.FileData:  # fmt: skip
        """Draw one image; returns the PNG, which carries its parameters."""
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

    def train_status(name: str) -> dict[str, Any]:
        """A training run: state (new, running, done, stopped, failed, deleted, elsewhere), message, step, steps, loss."""
        try:
            status = Run(session.outputs, name).status()
        except Exception as error:
            raise gr.Error(one_line(error), print_exception=False) from error
        last = status.metrics[-1] if status.metrics else {}
        facts = {"state": status.state, "message": status.message, "step": status.step, "steps": status.steps}
        return {**facts, "loss": last.get("loss"), "active_layers": last.get("active_layers")}

    gr.api(generate, api_name="generate", **MODEL_QUEUE)
    gr.api(list_adapters, api_name="list_adapters")
    gr.api(train_status, api_name="train_status")

"""Named endpoints for programs: ``gradio_client`` calls them by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from effilora_diffusion import EffiLoRAError
from effilora_diffusion.core import load_adapter_file

from .generate import MODEL_QUEUE, one_line
from .studio import Request, Studio


def add_endpoints(studio: Studio) -> None:
    """Add ``/generate`` and ``/list_adapters`` to the page that is being built."""
    defaults = studio.defaults()

    def generate(prompt: str, adapter: str = "", strength: float = 1.0, seed: int = 0, steps: int = defaults["steps"],
                 guidance_scale: float = defaults["guidance_scale"], negative_prompt: str = "",
                 width: int = defaults["edge"], height: int = defaults["edge"]) -> gr.FileData:  # fmt: skip
        """Draw one picture; returns the PNG, which carries its parameters."""
        try:
            chosen = [(str(adapter), float(strength))] if adapter else []
            size = {"width": int(width), "height": int(height), "seed": int(seed), "steps": int(steps)}
            wanted = Request(str(prompt), str(negative_prompt), chosen, guidance_scale=float(guidance_scale), **size)
            (path,) = (event for event in studio.draw(wanted, preview_every=0) if isinstance(event, Path))
        except (EffiLoRAError, RuntimeError, ValueError, TypeError, OverflowError) as error:
            raise gr.Error(one_line(error), print_exception=False) from error
        return gr.FileData(path=str(path), orig_name=path.name)

    def list_adapters() -> list[dict[str, Any]]:
        """The adapters that ``generate`` knows: name, trigger prompt, base model, rank, heads."""
        found = []
        for name, path in studio.adapters().items():
            try:
                content = load_adapter_file(path)
            except EffiLoRAError:
                continue
            config = content.adapter.config
            facts = {"name": name, "trigger_prompt": content.metadata.get("trigger_prompt"), "rank": config.rank}
            found.append({**facts, "heads": config.heads, "base_model": content.metadata.get("base_model")})
        return found

    gr.api(generate, api_name="generate", **MODEL_QUEUE)
    gr.api(list_adapters, api_name="list_adapters")

"""Named endpoints for programs: ``gradio_client`` calls them by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from .. import EffiLoRAError
from ..diffusion.sampling.request import GenerationRequest
from ..diffusion.sampling.sampler_names import known_name
from ..diffusion.sampling.styles import STYLES, chosen_styles, with_styles
from .exporting import MERGED, export_adapter
from .fields import number, seed_of, whole
from .queue import MODEL_QUEUE
from .session import Session
from .shelf import adapter_facts
from .training_api import add_training_endpoints
from .words import clean, one_line


def add_endpoints(session: Session) -> None:
    """Add ``/generate``, ``/list_adapters``, ``/export`` and the endpoints of trainings to the page that is being built."""

    def generate(prompt: str, adapter: str = "", strength: float = 1.0, seed: int = 0, steps: int | None = None,
                 guidance_scale: float | None = None, negative_prompt: str = "", width: int | None = None,
                 height: int | None = None, sampler: str = "", literal: bool = False,
                 adapters: list[tuple[str, float]] | None = None, styles: list[str] | None = None
                 ) -> gr.FileData:  # fmt: skip
        """Generate one image, by default with the open model's own settings; returns the PNG, which carries its parameters.

        ``adapters`` are pairs of name and strength, besides ``adapter``; ``styles`` names of ``styles.csv``.
        """
        own = session.defaults()
        steps, guidance_scale = _given(steps, own["steps"]), _given(guidance_scale, own["guidance_scale"])
        width, height = _given(width, own["edge"]), _given(height, own["edge"])
        try:
            chosen = [(str(adapter), float(strength))] if adapter else []
            chosen += pairs_of(adapters)
            prompt, negative_prompt = with_styles(
                str(prompt or ""),
                str(negative_prompt or ""),
                chosen_styles(session.outputs / STYLES, names_of(styles)),
            )
            wanted = GenerationRequest(
                prompt, negative_prompt, chosen, whole(steps, "steps"), float(guidance_scale),
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

    def export(name: str, format: str = "diffusers") -> tuple[gr.FileData, str]:
        """Export an adapter as the Adapters page does; returns the file, and how exact it is. A merged model is not sent."""
        try:
            if format == MERGED:
                raise EffiLoRAError("a merged model is too large to be sent: use `effilora export --format merged`")
            done = export_adapter(session, str(name or ""), str(format))
        except Exception as error:
            raise gr.Error(one_line(error), print_exception=False) from error
        return gr.FileData(path=str(done.path), orig_name=done.path.name), done.said

    gr.api(export, api_name="export", **MODEL_QUEUE)
    gr.api(generate, api_name="generate", **MODEL_QUEUE)
    gr.api(list_adapters, api_name="list_adapters")
    add_training_endpoints(session)


def pairs_of(adapters: Any) -> list[tuple[str, float]]:
    """Pairs of name and strength, as a program sends them; raises :class:`EffiLoRAError` for anything else."""
    if adapters is None:
        return []
    if not isinstance(adapters, list) or not all(isinstance(one, list | tuple) and len(one) == 2 for one in adapters):
        raise EffiLoRAError('adapters must be a list of names and strengths, as in [["cat", 0.8]]')
    found = [(str(name), number(strength, f"the strength of {clean(name, 80)}")) for name, strength in adapters]
    if len({name for name, _ in found}) < len(found):
        raise EffiLoRAError("the same adapter is given twice: give it once and change its strength")
    return found


def names_of(styles: Any) -> list[str]:
    """Names, as a program sends them; raises :class:`EffiLoRAError` for anything else."""
    if styles is not None and not (isinstance(styles, list) and all(isinstance(one, str) for one in styles)):
        raise EffiLoRAError('styles must be a list of names, as in ["poster"]')
    return styles or []


def _given(value: Any, usual: Any) -> Any:
    return usual if value is None else value

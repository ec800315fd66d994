"""Filling the Generate form from an image: what can be taken over with the open model, and words for what can't."""

from __future__ import annotations

from typing import Any

from .. import EffiLoRAError
from ..diffusion.sampling.metadata import ImageFacts
from ..diffusion.sampling.prompt_syntax import network_names
from ..diffusion.sampling.request import GenerationRequest
from .adapter_row import NONE
from .adapter_slots import SLOTS
from .fields import in_words
from .session import LIMITS, Session
from .start_form import STRENGTH, editor_value
from .words import plain_words

OWN = "the model's own"
"""Stands for no other sampler."""


def filled(session: Session, found: ImageFacts) -> list[Any]:
    """The form with an image's parameters, in its order, and what is to be said of it.

    Raises :class:`EffiLoRAError` for parameters that no form can hold.
    """
    asked, notes = readable(found), [*found.notes]
    steps, guidance, width, height = _fitting(session, asked, notes)
    here = [pair for pair in asked.adapters if session.knows(pair[0])]
    missing = [name for name, _ in asked.adapters if not session.knows(name)]
    missing += [name for name, _ in here[SLOTS:]]
    if not asked.literal:
        missing += [name for name in network_names(asked.prompt) if session.find(name) is None]
    slots: list[Any] = []
    for index in range(SLOTS):
        slots += [*(here[index] if index < len(here) else (NONE, 1.0)), True]
    sampler = asked.sampler if asked.sampler in session.samplers else None
    if asked.sampler and sampler is None:
        notes.append(f"the sampler {asked.sampler}, which this model does not have")
    negative = asked.negative_prompt if session.family.negative_prompts else ""
    if asked.negative_prompt and not negative:
        notes.append("the negative prompt, which this model does not have")
    prompts = [text.encode("utf-8", "replace").decode() for text in (asked.prompt, negative)]
    start = _start(session, found.parameters, notes)
    return [*prompts, steps, guidance, width, height, 1, str(asked.seed), False, sampler or OWN, asked.literal,
            *slots, *start, [], False, _said_of(found, missing, notes)]  # fmt: skip


def readable(found: ImageFacts) -> GenerationRequest:
    """The request in an image's parameters; raises :class:`EffiLoRAError` for what no form can hold."""
    asked = GenerationRequest.from_parameters(found.parameters)
    if max(len(asked.prompt), len(asked.negative_prompt)) > LIMITS.prompt:
        raise EffiLoRAError(f"this image's prompt has more than {LIMITS.prompt:g} characters")
    if not all(abs(power) <= LIMITS.seed for _, power in asked.adapters) or not 0 <= asked.seed <= LIMITS.seed:
        raise EffiLoRAError("this image's parameters are out of range")
    return asked


def _fitting(session: Session, asked: GenerationRequest, notes: list[str]) -> tuple[int, float, int, int]:
    """Steps, guidance, width and height, where the model can have them; else, and where none are given, the usual ones."""
    usual = session.defaults()  # `effilora generate` leaves what was not given to the model
    steps, guidance, edge = usual["steps"], usual["guidance_scale"], usual["edge"]
    if asked.num_inference_steps is not None and 1 <= asked.num_inference_steps <= LIMITS.steps:
        steps = asked.num_inference_steps
    elif asked.num_inference_steps is not None:
        notes.append(f"{in_words(asked.num_inference_steps)} steps, of which 1 to {LIMITS.steps:g} are possible")
    if asked.guidance_scale is not None and 0 <= asked.guidance_scale <= LIMITS.guidance:
        guidance = asked.guidance_scale
    elif asked.guidance_scale is not None:
        notes.append(f"guidance {in_words(asked.guidance_scale)}, of which 0 to {LIMITS.guidance:g} is possible")
    size = (asked.width or 0, asked.height or 0)
    if all(LIMITS.least_edge <= one <= session.max_edge and one % 8 == 0 for one in size):
        return steps, guidance, *size
    notes.append(f"the size {in_words(size[0])} x {in_words(size[1])}, which can't be generated with this model")
    return steps, guidance, edge, edge


def _start(session: Session, parameters: dict[str, Any], notes: list[str]) -> tuple[Any, float]:
    """What the editor shows of the image it began with, and the strength."""
    name, painted = parameters.get("image"), parameters.get("mask_image")
    try:
        strength = min(1.0, max(0.05, float(parameters.get("strength", STRENGTH))))
    except (TypeError, ValueError, OverflowError):
        strength = STRENGTH
    if name is None:
        return None, strength
    image, mask = session.starts.find(name), session.starts.find(painted)
    if image is None or (painted is not None and mask is None):
        notes.append("the image that it began with, which is not in the history here")
        return None, strength
    if not session.opened.tasks:
        notes.append("the image that it began with, which this model can't begin with")
        return None, strength
    return editor_value(image, mask), strength


def _said_of(found: ImageFacts, missing: list[str], notes: list[str]) -> str:
    """What the form holds now, and what it does not."""
    text = f"Settings loaded{'' if found.program == 'EffiLoRA' else f', from {found.program}'}"
    if missing:
        text += f", **but for adapters that are not here:** {', '.join(plain_words(name, 80) for name in missing)}"
    if notes:
        text += f". **Not taken over:** {'; '.join(plain_words(note, 200) for note in notes)}"
    model = found.parameters.get("model")
    if found.program != "EffiLoRA" and model:
        text += f". It was generated with the model {plain_words(model, 80)}"
    return f"{text}."

"""What is worth knowing before the first step: settings and captions that are allowed, and mostly not what was meant."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ...core.fingerprint import same_base
from ...core.image_io import printable
from ..data.folder import Example
from ..models import Family
from ..presets import describe_preset
from ..sampling.request import sampling_defaults
from .build import RunParts
from .optim import learning_rates

NAMED = 5
"""Names in a note; of more, their number is told."""


def notes(parts: RunParts) -> list[str]:
    """One sentence each, for settings and captions of a run that is about to start."""
    found = [*_preset(parts), *_start(parts), *_schedule(parts), *_length(parts), *_size(parts), *_captions(parts)]
    return [*found, *_subjects(parts)]


def _subjects(parts: RunParts) -> list[str]:
    count = len(parts.concepts)
    if count < 2 or parts.config.routing == "concept":
        return []
    return [
        f"{count} subjects share the adapter, and --routing {parts.config.routing} does not keep them apart: "
        "--routing concept gives each a head of its own"
    ]


def _preset(parts: RunParts) -> list[str]:
    c = parts.config
    return [describe_preset(c.preset, vars(c), not c.pretrained_model_name_or_path)] if c.preset else []


def _start(parts: RunParts) -> list[str]:
    initial = parts.initial
    if initial is None or same_base(parts.base, initial.metadata) is not False:
        return []
    trained_on = initial.metadata.get("base_model", "another model")
    return [
        f"--init_from {parts.config.init_from} was trained on {trained_on}, this is another model of the same shape"
    ]


def _schedule(parts: RunParts) -> list[str]:
    c = parts.config
    if not c.lr_warmup_steps:
        return []
    if c.lr_scheduler == "constant":
        return [
            f"--lr_warmup_steps {c.lr_warmup_steps} has no effect with --lr_scheduler constant: "
            "constant_with_warmup has a warm-up"
        ]
    if c.lr_warmup_steps < parts.steps:
        return []
    rate = learning_rates(c, parts.steps, c.learning_rate)(parts.steps - 1)
    return [
        f"the warm-up ({c.lr_warmup_steps} steps) is not below the run ({parts.steps} steps): the learning rate only gets to "
        f"{rate:.2g} of {c.learning_rate:.2g}"
    ]


def _length(parts: RunParts) -> list[str]:
    c, count = parts.config, len(parts.examples)
    seen = parts.steps * parts.images_per_step / count
    if c.max_train_steps is not None or seen < 1.5 * c.num_train_epochs:
        return []
    why = (
        f"the {sum(folder.count for folder in set(parts.classes))} class images"
        if parts.classes
        else f"at least one step of {parts.images_per_step}"
    )
    return [
        f"{c.num_train_epochs} epochs are {parts.steps} steps, in which each of the {count} images is seen {seen:.0f} times: "
        f"an epoch is as long as {why}; --max_train_steps gives a number of steps"
    ]


def _size(parts: RunParts) -> list[str]:
    edge, wanted = sampling_defaults(parts.family.pipe, "")["edge"], parts.config.resolution
    if edge / 2 < wanted < edge * 2:
        return []
    return [f"--resolution {wanted} is far from the model's own {edge} px: it may draw badly at other sizes"]


def _captions(parts: RunParts) -> list[str]:
    found = []
    for example in {example.caption: example for example in parts.examples}.values():
        tokens, limit = parts.family.prompt_length(example.caption)
        if limit is not None and tokens > limit:
            names = [other.path.name for other in parts.examples if other.caption == example.caption]
            found.append(f"the caption of {_names(names)} has {tokens} tokens, and only the first {limit} are read")
    if len(found) > NAMED:
        found = [*found[:NAMED], f"{len(found) - NAMED} more captions are as long"]
    prompt = parts.config.instance_prompt
    captioned = [example for example in parts.examples if example.source]
    lacking = [example.path.name for example in captioned if prompt and not has_trigger(example, prompt, parts.family)]
    if prompt and lacking:
        word = parts.family.rarest_word(prompt)
        found.append(
            f"{len(lacking)} of {len(captioned)} captions do not contain {word!r} of --instance_prompt ({_names(lacking)}): "
            "these images do not teach it"
        )
    return found


def has_trigger(example: Example, prompt: str, family: Family) -> bool:
    """Whether an image teaches ``prompt``: its caption has the word that names the subject, by :meth:`Family.rarest_word`."""
    return not example.source or family.rarest_word(prompt).casefold() in example.caption.casefold()


def trigger_prompt(parts: RunParts) -> str:
    """The prompt that the adapter was trained with: the instance prompt, if any image teaches it; of several, the first."""
    if parts.concepts:
        return parts.concepts[0].prompt
    prompt = parts.config.instance_prompt
    if prompt and any(has_trigger(example, prompt, parts.family) for example in parts.examples):
        return prompt
    return parts.examples[0].caption


def caption_table(examples: Iterable[Example]) -> list[str]:
    """A line per image: its name, its caption, and where that stands."""
    return [
        f"  {f'{example.concept}: ' if example.concept else ''}{printable(example.path.name)}: {printable(example.caption)!r} "
        f"({example.source or ('its instance_prompt' if example.concept else '--instance_prompt')})"
        for example in examples
    ]


def _names(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(re.sub(r"\s+", " ", printable(name)) for name in names[:NAMED]) + more

"""What is worth knowing before the first step: settings and captions that are allowed, and mostly not what was meant."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import islice

from ...core.concepts import contains
from ...core.fingerprint import same_base
from ...core.image_io import printable
from ...core.words import reword
from ..data.folder import Example
from ..presets import describe_preset
from ..sampling.request import sampling_defaults
from ..text_options import words_share
from .build import RunParts
from .optim import learning_rates

SHOWN = 500
"""Images in a table of captions."""

MARKS = 8
"""Tokens that tokenizers put around a text at most."""

OLD_END = 2
"""What old configurations of CLIP call the number of the end token, which it is not."""

NAMED = 5
"""Names in a note; of more, their number is told."""


def notes(parts: RunParts) -> list[str]:
    """One sentence each, for settings and captions of a run that is about to start."""
    found = [*_preset(parts), *_start(parts), *_schedule(parts), *_length(parts), *_size(parts), *_captions(parts)]
    return [*found, *_subjects(parts), *_drawn(parts), *_dataset_config(parts), *_text(parts)]


def _drawn(parts: RunParts) -> list[str]:
    """Captions that are drawn anew for every row, and what that costs; settings of captions without an effect."""
    c, found = parts.config, []
    styles = {example.style for example in parts.examples}
    several = sum(bool(example.others) for example in parts.images)
    if several:
        found.append(
            f"{several} image{'s have' if several > 1 else ' has'} several captions: one is drawn for every row"
        )
    rows = parts.steps * parts.images_per_step
    if any(style.varies for style in styles):
        when = "as they come" if parts.family.device.type == "cpu" else "before training, as far as memory goes"
        when = "before training, into files" if c.cache_text_encoder_outputs_to_disk else when
        found.append(f"captions are drawn anew for every row: up to {rows:,} texts are encoded, {when}")
    if not any(style.by_tags for style in styles) and any(style.keep_tokens for style in styles):
        found.append("--keep_tokens has no effect without --shuffle_caption or --caption_tag_dropout_rate")
    if (
        c.trigger
        and not parts.concepts
        and not any(contains(caption, c.trigger[0]) for example in parts.examples for caption in example.captions)
    ):
        found.append(f"no caption has --trigger {c.trigger[0]!r}, nor [trigger] in its place: no image teaches it")
    return found


def _dataset_config(parts: RunParts) -> list[str]:
    """What a file of data sets sets for the whole run, and which of its keys change nothing."""
    file = parts.config.dataset_file()
    if file is None:
        return []
    named = ", ".join(f"{name} {value}" for name, value in file.settings.items())
    found = [f"--dataset_config goes before other settings, as in sd-scripts: {named}"]
    return found + ([f"keys of --dataset_config without an effect: {', '.join(file.unused)}"] if file.unused else [])


def _text(parts: RunParts) -> list[str]:
    c = parts.config
    if not c.train_text_encoder and not c.train_text_encoder_ti:
        unused = c.text_encoder_lr is not None
        return ["--text_encoder_lr has no effect without --train_text_encoder"] if unused else []
    return [*_rate(parts), *_last_token(parts), *_alone(parts)]


def _alone(parts: RunParts) -> list[str]:
    c = parts.config
    if not c.train_text_encoder_ti or words_share(c) == c.train_text_encoder_ti_frac:
        return []
    return [
        f"--train_transformer_frac 0 trains new words only, so they are trained to the end, not for "
        f"--train_text_encoder_ti_frac {c.train_text_encoder_ti_frac:g} of the steps"
    ]


def _last_token(parts: RunParts) -> list[str]:
    """Old configurations of CLIP take the state of the highest token number for that of the end, and new words are highest."""
    words = parts.adapter.words
    if words is None or len(parts.family.prompt_outputs) == 1:  # only its states are used, not the pooled one
        return []
    old = [part for part in words.embeddings if getattr(parts.family.pipe, part).config.eos_token_id == OLD_END]
    return [
        f"{part} takes the last new word's state for that of the whole prompt, as in diffusers and everywhere else: its "
        f"configuration is of an old kind (eos_token_id {OLD_END})"
        for part in old
    ]


def _rate(parts: RunParts) -> list[str]:
    c = parts.config
    if c.text_encoder_lr not in (None, c.learning_rate) and c.optimizer == "prodigy":
        return ["--optimizer prodigy finds its own rate, which --learning_rate scales for text encoders too"]
    return []


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
    seen = parts.steps * parts.images_per_step / parts.epoch
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
    found, limit = [], parts.family.prompt_length("")[1]
    long: list[tuple[str, int]] = []
    for caption in dict.fromkeys(caption for example in parts.examples for caption in example.captions):
        if limit is None or len(caption.encode()) + MARKS <= limit:  # a token is a byte at least
            continue
        tokens = parts.family.prompt_length(caption)[0]
        if tokens > limit:
            long.append((caption, tokens))
    more = ": --max_token_length reads more" if parts.family.chunked else ""
    for caption, tokens in long[:NAMED]:
        names = [other.path.name for other in parts.images if caption in other.captions]
        found.append(f"the caption of {_names(names)} has {tokens} tokens, and only the first {limit} are read{more}")
    if len(long) > NAMED:
        found.append(f"{len(long) - NAMED} more captions are as long")
    prompt = parts.config.instance_prompt
    captioned = [example for example in parts.images if example.source]
    word = parts.family.rarest_word(prompt) if prompt else ""
    lacking = [example.path.name for example in captioned if not has_trigger(example, word)]
    if lacking:
        found.append(
            f"{len(lacking)} of {len(captioned)} captions do not contain {word!r} of --instance_prompt ({_names(lacking)}): "
            "these images do not teach it"
        )
    return found


def has_trigger(example: Example, word: str) -> bool:
    """Whether an image teaches the instance prompt, whose rarest ``word`` names the subject: each of its captions has it."""
    return not example.source or all(word.casefold() in caption.casefold() for caption in example.captions)


def trigger_prompt(parts: RunParts) -> str:
    """The prompt that the adapter was trained with: the instance prompt, if any image teaches it; of several, the first."""
    if parts.concepts:
        return parts.concepts[0].prompt
    prompt = parts.config.instance_prompt
    word = parts.family.rarest_word(prompt) if prompt else ""
    if prompt and any(has_trigger(example, word) for example in parts.examples):
        return reword(parts.family.pipe, prompt)
    return reword(parts.family.pipe, parts.examples[0].caption)


def caption_table(examples: Iterable[Example]) -> list[str]:
    """A line per image: its name, its caption, and where that stands."""
    shown = list(islice(examples, SHOWN + 1))
    return [
        *(
            f"  {f'{example.concept}: ' if example.concept else ''}{printable(example.path.name)}: "
            f"{printable(' | '.join(example.captions))!r} "
            f"({example.source or ('its instance_prompt' if example.concept else '--instance_prompt')})"
            for example in shown[:SHOWN]
        ),
        *(["  ..."] if len(shown) > SHOWN else []),
    ]


def _names(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(re.sub(r"\s+", " ", printable(name)) for name in names[:NAMED]) + more

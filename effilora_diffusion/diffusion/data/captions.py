"""Captions as they are used: prefixes, the trigger's placeholder, and what is drawn anew for every row."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from ...core.concepts import contains
from ...core.errors import EffiLoRAError
from ...core.rng import draw_uniform
from ...core.text_io import printable
from ..caption_options import TRIGGER_MARK, CaptionStyle
from .folder import Example

_WILDCARD = re.compile(r"\{([^{}]+)\}")


def with_affixes(caption: str, style: CaptionStyle) -> str:
    """``caption`` between the style's prefix and suffix."""
    parts = (style.caption_prefix, caption, style.caption_suffix)
    return " ".join(part.strip() for part in parts if part and part.strip())


def with_trigger(example: Example, word: str | None) -> Example:
    """``example`` with ``word`` in place of the trigger's mark in its captions.

    Raises:
        EffiLoRAError: a caption has the mark, and there is no word.
    """
    if not any(TRIGGER_MARK in caption for caption in example.captions):
        return example
    if word is None:
        raise EffiLoRAError(
            f"the caption of '{printable(example.path)}' has {TRIGGER_MARK}: say with --trigger what stands for it"
        )
    first, *others = (caption.replace(TRIGGER_MARK, word) for caption in example.captions)
    return replace(example, caption=first, others=tuple(others))


def draw_caption(
    captions: Sequence[str],
    style: CaptionStyle,
    triggers: Sequence[str],
    seed: int,
    purpose: str,
    position: int,
) -> str:
    """The caption of the row at ``position``: one of several, with its tags shuffled or dropped, or none.

    Args:
        captions: of the image.
        style: what is done to them.
        triggers: words of which the result keeps the one that it had: tags with it are not dropped, and it is what a dropped
            caption leaves.
        seed, purpose: of the draw, which is a function of them and ``position``.

    Example:
        >>> draw_caption(["sks, red, round"], CaptionStyle(shuffle_caption=True, keep_tokens=1), (), 0, "instance", 3)
        'sks, round, red'
    """
    if len(captions) == 1 and not style.varies:
        return captions[0]
    which, drop = draw_uniform(2, seed, f"{purpose} caption", position).tolist()
    caption = captions[min(int(which * len(captions)), len(captions) - 1)]
    if style.enable_wildcard:
        caption = _without_wildcards(caption, seed, purpose, position)
    own = [trigger for trigger in triggers if contains(caption, trigger)]
    if drop < style.caption_dropout_rate:
        return own[0] if own else ""
    if not style.by_tags:
        return caption
    varied = _shuffled(caption, style, own, seed, purpose, position)
    # a trigger that goes over several tags would be torn apart
    return varied if all(contains(varied, trigger) for trigger in own) else caption


def _without_wildcards(caption: str, seed: int, purpose: str, position: int) -> str:
    count = len(_WILDCARD.findall(caption))
    numbers = iter(draw_uniform(count, seed, f"{purpose} wildcards", position).tolist() if count else [])

    def choose(match: re.Match[str]) -> str:
        words = match[1].split("|")
        return words[min(int(next(numbers) * len(words)), len(words) - 1)].strip()

    return _WILDCARD.sub(choose, caption)


def _shuffled(caption: str, style: CaptionStyle, own: list[str], seed: int, purpose: str, position: int) -> str:
    """``caption`` with its tags in another order, some of them left out."""
    first, loose, last = _parts(caption, style)
    numbers = draw_uniform(2 * len(loose), seed, f"{purpose} tags", position).tolist() if loose else []
    order, drops = numbers[: len(loose)], numbers[len(loose) :]
    kept = [
        number
        for number, tag in enumerate(loose)
        if drops[number] >= style.caption_tag_dropout_rate or any(contains(tag, trigger) for trigger in own)
    ]
    if style.shuffle_caption:
        kept.sort(key=lambda number: order[number])
    between = style.caption_separator
    between += "" if between[-1].isspace() else " "
    return between.join([*first, *(loose[number] for number in kept), *last])


def _parts(caption: str, style: CaptionStyle) -> tuple[list[str], list[str], list[str]]:
    """The tags that stay where they are at the start, those that may move, and those that stay at the end."""

    def tags(text: str) -> list[str]:
        return [tag for part in text.split(style.caption_separator.strip() or " ") if (tag := part.strip())]

    mark = style.keep_tokens_separator
    if mark and mark in caption:
        start, rest = caption.split(mark, 1)
        middle, _, end = rest.partition(mark)
        return tags(start), tags(middle), tags(end)
    found = tags(caption)
    return found[: style.keep_tokens], found[style.keep_tokens :], []

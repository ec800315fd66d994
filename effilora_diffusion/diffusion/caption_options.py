"""How captions are drawn from the files of a data set, by sd-scripts' names."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from ..core.options import NATURAL, Bounds, option

CAPTIONS = "Captions"
"""Group of these settings in ``--help``."""

TRIGGER_MARK = "[trigger]"
"""What captions and prompts may have in place of the word that names the subject, as in ai-toolkit."""

_RATE = Bounds(at_least=0, at_most=1)


@dataclass(frozen=True)
class CaptionStyle:
    """What is done to a caption whenever it is used; see :func:`.draw_caption`. The names are those of the settings."""

    shuffle_caption: bool = False
    keep_tokens: int = 0
    keep_tokens_separator: str | None = None
    caption_separator: str = ","
    caption_tag_dropout_rate: float = 0.0
    caption_dropout_rate: float = 0.0
    caption_prefix: str | None = None
    caption_suffix: str | None = None
    enable_wildcard: bool = False

    @property
    def varies(self) -> bool:
        """Whether one caption becomes different texts."""
        rates = self.caption_tag_dropout_rate, self.caption_dropout_rate
        return self.shuffle_caption or self.enable_wildcard or max(rates) > 0

    @property
    def by_tags(self) -> bool:
        """Whether a caption is taken apart into its tags."""
        return self.shuffle_caption or self.caption_tag_dropout_rate > 0


PLAIN = CaptionStyle()
"""Captions as they stand in their files."""


@dataclass
class CaptionOptions:
    """Settings of captions, which :class:`.TrainingConfig` has beside its others."""

    shuffle_caption: bool = option(False, "shuffle the tags of a caption whenever it is used", CAPTIONS, fixed=True)
    keep_tokens: int = option(
        0, "tags at the start that are neither shuffled nor dropped", CAPTIONS, bounds=NATURAL, fixed=True
    )
    keep_tokens_separator: str | None = option(
        None, "what ends the tags that are kept, in captions that have it, e.g. |||", CAPTIONS, fixed=True
    )
    caption_separator: str = option(",", "what stands between two tags", CAPTIONS, fixed=True)
    caption_tag_dropout_rate: float = option(
        0.0, "share of the tags that are left out", CAPTIONS, bounds=_RATE, fixed=True
    )
    caption_dropout_rate: float = option(
        0.0,
        "share of the rows that are trained without their caption (diffusers' --caption_dropout); with routing concept the "
        "trigger stays",
        CAPTIONS,
        bounds=_RATE,
        fixed=True,
    )
    caption_prefix: str | None = option(None, "text in front of every caption", CAPTIONS)
    caption_suffix: str | None = option(None, "text behind every caption", CAPTIONS)
    enable_wildcard: bool = option(
        False, "draw one of the alternatives of {red|green|blue} in captions", CAPTIONS, fixed=True
    )
    caption_extension: str | None = option(
        None, "suffix of the caption files beside the images (default: .txt, else .caption)", CAPTIONS, form=False
    )


def style_of(settings: Any) -> CaptionStyle:
    """The style that ``settings`` describe."""
    return CaptionStyle(**{entry.name: getattr(settings, entry.name) for entry in fields(CaptionStyle)})

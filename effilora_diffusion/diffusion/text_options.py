"""The settings of what is trained in text encoders, by the names of diffusers' scripts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..core.errors import EffiLoRAError
from ..core.options import COUNT, NATURAL, POSITIVE, SHARE, Bounds, option
from .run_options import RunOptions

TEXT = "Text encoders"
"""Group of these settings, as it stands in ``--help``."""


@dataclass
class TextOptions(RunOptions):
    """The settings of :class:`.TrainingConfig` so far, with these."""

    train_text_encoder: bool = option(
        False,
        "also train an adapter with one head in the attention of the CLIP text encoders (Stable Diffusion, SDXL, SD 3, FLUX.1)",
        TEXT,
        fixed=True,
    )
    text_encoder_lr: float | None = option(
        None,
        "learning rate of text encoders and new words (default: learning_rate)",
        TEXT,
        bounds=POSITIVE,
        fixed=True,
    )
    adam_weight_decay_text_encoder: float = option(
        1e-3, "AdamW's weight decay of what is trained in text encoders", TEXT, bounds=NATURAL, fixed=True
    )
    train_text_encoder_frac: float = option(
        1.0,
        "share of the steps, from the first one, in which train_text_encoder trains",
        TEXT,
        bounds=SHARE,
        fixed=True,
    )
    train_text_encoder_ti: bool = option(
        False, "also train new words of the CLIP text encoders, for placeholders in the prompts", TEXT, fixed=True
    )
    train_text_encoder_ti_frac: float = option(
        0.5, "share of the steps, from the first one, in which new words are trained", TEXT, bounds=SHARE, fixed=True
    )
    train_transformer_frac: float = option(
        1.0,
        "share of the steps in which the UNet's or transformer's adapter is trained beside text encoders; 0: new words only",
        TEXT,
        bounds=Bounds(at_least=0, at_most=1),
        fixed=True,
    )
    token_abstraction: list[str] = option(
        ["TOK"], "placeholders in prompts that new words stand for, apart or joined by commas", TEXT, fixed=True
    )
    num_new_tokens_per_abstraction: int | None = option(
        None,
        "new tokens for each placeholder (default: 2, or as many as initializer_concept has)",
        TEXT,
        bounds=COUNT,
        fixed=True,
    )
    initializer_concept: str | None = option(
        None, "words whose embeddings the new ones start as (default: random)", TEXT, fixed=True
    )
    enable_t5_ti: bool = option(False, "new words for the T5 of FLUX.1 and SD 3, too", TEXT, fixed=True)


def check_text(settings: Any) -> None:
    """Raise :class:`EffiLoRAError` for settings of a run that do not go together with text encoders that are trained."""
    if settings.train_text_encoder and settings.routing == "concept":
        raise EffiLoRAError(
            "--train_text_encoder acts on every prompt, and --routing concept promises the base for prompts without a trigger: "
            "leave one of them out"
        )
    given = settings.token_abstraction
    settings.token_abstraction = [name.strip() for text in given for name in text.split(",") if name.strip()]
    _check_shares(settings)
    if not settings.train_text_encoder_ti:
        return
    if not settings.token_abstraction or len(set(settings.token_abstraction)) < len(settings.token_abstraction):
        raise EffiLoRAError("--token_abstraction needs placeholders that differ: TOK, for example")
    if settings.routing == "concept" or settings.concepts_list or settings.concepts:
        raise EffiLoRAError(
            "--train_text_encoder_ti is for a single subject, without --routing concept: leave it out, or the list of several"
        )


def _check_shares(settings: Any) -> None:
    """Raise :class:`EffiLoRAError` where in some steps nothing would be trained."""
    if settings.train_transformer_frac < 1 and max(_shares(settings), default=0) < 1:
        raise EffiLoRAError(
            f"--train_transformer_frac {settings.train_transformer_frac:g}: in the last steps nothing would be trained: leave it "
            "out, or train text encoders or new words to the end (--train_text_encoder_frac 1, --train_text_encoder_ti_frac 1)"
        )


def ends_early(settings: Any) -> bool:
    """Whether something is trained for a share of the steps, so that a longer run trains it differently from the start."""
    return any(0 < share < 1 for share in [*_shares(settings), settings.train_transformer_frac])


def _shares(settings: Any) -> list[float]:
    """The shares of the steps in which text encoders and new words are trained, of those that are."""
    shares = [settings.train_text_encoder_frac] if settings.train_text_encoder else []
    return shares + ([words_share(settings)] if settings.train_text_encoder_ti else [])


def words_share(settings: Any) -> float:
    """The share of the steps in which new words are trained: all of them where nothing else is."""
    alone = settings.train_transformer_frac == 0 and not settings.train_text_encoder
    return 1.0 if alone else float(settings.train_text_encoder_ti_frac)

"""New words of a run, and the files by which other programs know them.

diffusers' advanced scripts write ``clip_l``, ``clip_g`` and ``t5``, ``(tokens, width)`` each; ``pipe.load_textual_inversion``
takes the rows one by one, A1111, ComfyUI and sd-scripts the file as it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...core import AdapterFile, EffiLoRAError
from ...core.files import ENCODERS
from ...core.peft_format import write_tensors
from ...core.rng import draw_normal
from ...core.words import NewWords
from .encoders import clip_encoders

WORDS_FILE = "_emb.safetensors"
"""How the name of the file with the embeddings ends, behind that of the run's folder, or of the plain LoRA's file."""

TOKENS = 2
"""New tokens for a placeholder, as in diffusers' scripts."""


def with_t5(pipe: Any) -> dict[str, Any]:
    """The CLIP and T5 text encoders of a pipeline by name."""
    found = {name: getattr(pipe, name, None) for name in ENCODERS}
    clips = clip_encoders(pipe)
    return {name: part for name, part in found.items() if name in clips or name == t5_of(pipe)}


def t5_of(pipe: Any) -> str | None:
    """The name of a pipeline's T5, if it has one."""
    return next((name for name in ENCODERS if "T5" in type(getattr(pipe, name, None)).__name__), None)


@torch.no_grad()
def make_words(
    pipe: Any, placeholders: list[str], count: int | None, concept: str | None, t5: bool, seed: int
) -> NewWords:
    """New words of the CLIP text encoders of ``pipe``, with ``t5`` of its T5 too.

    Args:
        pipe: the pipeline; it does not know the words yet.
        placeholders: in prompts.
        count: of tokens for each placeholder.
        concept: words whose embeddings they start as, one after the other and again; then ``count`` is the number of those.
        t5: whether the T5 has them.
        seed: of random ones, which are spread as the encoder's own.

    Raises:
        EffiLoRAError: there is no T5.
    """
    encoders: dict[str, Any] = with_t5(pipe) if t5 else dict(clip_encoders(pipe))
    if t5 and len(encoders) == len(clip_encoders(pipe)):
        raise EffiLoRAError(f"--enable_t5_ti: a {type(pipe).__name__} has no T5: leave it out")
    ids = {}
    for name in encoders if concept else ():
        tokenizer = getattr(pipe, name.replace("text_encoder", "tokenizer"))
        ids[name] = tokenizer(concept, add_special_tokens=False).input_ids
    each = max(map(len, ids.values())) if ids else count or TOKENS
    names = [[f"<s{number * each + index}>" for index in range(each)] for number in range(len(placeholders))]
    tables: dict[str, Any] = {name: encoder.get_input_embeddings().weight for name, encoder in encoders.items()}
    words = NewWords(
        dict(zip(placeholders, map(tuple, names), strict=True)),
        {name: table.shape[1] for name, table in tables.items()},
    )
    for name, rows in words.embeddings.items():
        table = tables[name]
        if concept:
            own = [ids[name][index % each % len(ids[name])] for index in range(len(rows))]
            rows.copy_(table[own].float())
        else:
            rows.copy_(draw_normal(tuple(rows.shape), seed, "new words", ENCODERS.index(name)) * spread(table))
    return words


def spread(table: Tensor) -> float:
    """The deviation of a table of embeddings."""
    return float(table.float().std())


def write_words(path: Path, content: AdapterFile) -> None:
    """Write the embeddings of an adapter's new words as other programs read them."""
    words = content.adapter.words
    assert words is not None
    keys = file_keys(list(words.embeddings), str(content.metadata.get("t5", "")))
    tensors = {keys[part]: rows.detach().float().cpu().contiguous() for part, rows in words.embeddings.items()}
    write_tensors(path, tensors, {"format": "pt"})


def file_keys(parts: list[str], t5: str) -> dict[str, str]:
    """What the embeddings of each text encoder are called in such a file; ``t5`` names the one that is a T5."""
    clips = [part for part in parts if part != t5]
    return {part: "t5" if part == t5 else ("clip_l", "clip_g")[clips.index(part)] for part in parts}


@torch.no_grad()
def keep_words(pipe: Any, words: NewWords) -> None:
    """Put new words into the tokenizers and tables of ``pipe`` for good, as a merged model has them."""
    for part, rows in words.embeddings.items():
        tokenizer, encoder = getattr(pipe, part.replace("text_encoder", "tokenizer")), getattr(pipe, part)
        tokenizer.add_tokens(words.tokens)
        table = encoder.get_input_embeddings().weight
        encoder.resize_token_embeddings(max(len(tokenizer), len(table)))
        numbers = tokenizer.convert_tokens_to_ids(words.tokens)
        encoder.get_input_embeddings().weight[numbers] = rows.to(table)

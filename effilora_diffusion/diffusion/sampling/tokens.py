"""How many tokens a prompt has, and how many of them a model reads."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from inspect import signature
from typing import Any

from transformers import CLIPTokenizer, PreTrainedTokenizerBase

from ...core import EffiLoRAError
from ..models import Family, family_class
from ..models.base import MOST_TOKENS
from ..models.weighted_prompts import split_fragments
from .prompt_syntax import fragments, plain, without_networks


@dataclass(frozen=True)
class TokenCount:
    """Tokens of a prompt; ``limit`` is how many are read (``None``: all), ``chunks`` into how many parts they are cut."""

    tokens: int
    limit: int | None
    chunks: int = 1

    @property
    def cut(self) -> bool:
        """Whether the end of the prompt is not read."""
        return self.limit is not None and self.tokens > self.limit

    def __str__(self) -> str:
        if self.limit is None:
            return f"{self.tokens} tokens"
        if self.cut:
            return f"{self.tokens} tokens, of which only the first {self.limit} are read"
        chunks = f", in {self.chunks} chunks" if self.chunks > 1 else ""
        return f"{self.tokens} of {self.limit} tokens{chunks}"


class TokenCounter:
    """Counts with copies of a pipeline's tokenizers, so that it may be asked while the pipeline draws.

    Example:
        >>> str(TokenCounter(pipe).count("a (red:1.4) cat"))
        '3 of 75 tokens'
    """

    def __init__(self, pipe: Any):
        own = [part for part in pipe.components.values() if isinstance(part, PreTrainedTokenizerBase)]
        self.tokenizers: list[Any] = [copy.deepcopy(tokenizer) for tokenizer in own]
        self.chunked = (family_class(pipe) or Family).chunked
        call = signature(type(pipe).__call__).parameters
        self.most = call["max_sequence_length"].default if "max_sequence_length" in call else None

    def count(self, prompt: str, literal: bool = False) -> TokenCount | None:
        """The tokens of a prompt, its choices and wildcards as they are written; ``None`` for pipelines without tokenizers."""
        if not self.tokenizers:
            return None
        parts = [(prompt, 1.0)]
        if not literal:
            try:
                parts = fragments(without_networks(prompt).text)
            except EffiLoRAError:  # a weight that is refused when it is drawn
                literal = True
        if self.chunked:
            chunks = max((split_fragments(tokenizer, parts) for tokenizer in self.tokenizers), key=len)
            size = int(self.tokenizers[0].model_max_length) - 2
            return TokenCount(sum(map(len, chunks)), size * len(chunks), len(chunks))
        counts = [self._read(tokenizer, plain(parts)) for tokenizer in self.tokenizers]
        limit, tokens = max(counts)
        return TokenCount(tokens, limit if limit < MOST_TOKENS else None)

    def _read(self, tokenizer: Any, words: str) -> tuple[int, int]:
        """How many tokens a tokenizer reads, and how many ``words`` are."""
        limit = int(tokenizer.model_max_length)
        if not isinstance(tokenizer, CLIPTokenizer) and self.most:
            limit = int(self.most)
        return limit, len(tokenizer(words, verbose=False).input_ids)

"""New words for the text encoders of a pipeline: tokens that nobody else has, and their embeddings, which are trained.

Tokenizers are exchanged for copies that know the tokens, and hooks of the encoders' embeddings put the new rows in: taking the
words off again leaves the pipeline as it was, and no table of embeddings is copied. Pipelines are known here by the names of
their parts alone.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .errors import EffiLoRAError

TOKEN = re.compile(r"<[A-Za-z0-9_-]{1,40}>")
"""What a new token may be called."""

BOOK = "_effilora_words"
"""Name under which a pipeline carries its :class:`WordBook`."""

MOST_TOKENS = 1000
MOST_WIDTH = 1 << 16


class NewWords(nn.Module):
    """New tokens and their embeddings.

    Args:
        meanings: the tokens that stand for each placeholder of prompts, as ``{"TOK": ("<s0>", "<s1>")}``.
        widths: of the embeddings, by the names of the text encoders that have them.

    Attributes:
        embeddings: ``(tokens, width)`` by the text encoder's name; zero until they are set.
    """

    def __init__(self, meanings: Mapping[str, Sequence[str]], widths: Mapping[str, int]):
        super().__init__()
        self.meanings = {placeholder: tuple(tokens) for placeholder, tokens in meanings.items()}
        count = len(self.tokens)
        self.embeddings = nn.ParameterDict(
            {part: nn.Parameter(torch.zeros(count, width)) for part, width in widths.items()}
        )

    @property
    def tokens(self) -> list[str]:
        """The new tokens in the order of their embeddings."""
        return [token for tokens in self.meanings.values() for token in tokens]

    def in_prompt(self, prompt: str) -> str:
        """``prompt`` with the new tokens in the place of the placeholders.

        Example:
            >>> NewWords({"TOK": ("<s0>", "<s1>")}, {"text_encoder": 8}).in_prompt("a TOK dog")
            'a <s0><s1> dog'
        """
        for placeholder, tokens in self.meanings.items():
            prompt = re.sub(rf"(?<!\w){re.escape(placeholder)}(?!\w)", "".join(tokens), prompt)
        return prompt

    def described(self) -> dict[str, Any]:
        """What a native file says of the words."""
        widths = {part: value.shape[1] for part, value in self.embeddings.items()}
        return {"meanings": {name: list(tokens) for name, tokens in self.meanings.items()}, "widths": widths}

    @classmethod
    def from_description(cls, found: Any, parts: Sequence[str]) -> NewWords:
        """Inverse of :meth:`described`, for text encoders named in ``parts``; raises :class:`EffiLoRAError` if it is none."""
        meanings, widths = (found.get("meanings"), found.get("widths")) if isinstance(found, dict) else (None, None)
        if not isinstance(meanings, dict) or not isinstance(widths, dict) or not meanings or not widths:
            raise EffiLoRAError("its header has new words without tokens or widths: get the file again")
        tokens = [token for value in meanings.values() for token in (value if isinstance(value, list) else [None])]
        named = all(isinstance(token, str) and TOKEN.fullmatch(token) for token in tokens)
        if not named or len(set(tokens)) < len(tokens) or not 0 < len(tokens) <= MOST_TOKENS:
            raise EffiLoRAError("its header has new words with tokens as no run makes them: get the file again")
        known = set(widths) <= {*parts}
        if not known or not all(type(width) is int and 0 < width <= MOST_WIDTH for width in widths.values()):
            raise EffiLoRAError("its header has new words for what is no text encoder: get the file again")
        if not all(name.strip() and name.isprintable() and len(name) <= 100 for name in meanings):
            raise EffiLoRAError("its header has placeholders that can't be printed: get the file again")
        return cls(meanings, widths)


class EmbeddingHooks:
    """Hooks before and after a text encoder's embedding: new tokens get the rows of their words.

    Attributes:
        rows: the token numbers of some words, and the words.
    """

    def __init__(self, part: str):
        self.part = part
        self.rows: list[tuple[Tensor, NewWords]] = []
        self.asked: Tensor | None = None

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Ask the base's embedding for its first token instead of a new one."""
        self.asked = args[0]
        new = torch.zeros_like(args[0], dtype=torch.bool)
        for numbers, _ in self.rows:
            new |= torch.isin(args[0], numbers.to(args[0].device))
        return (args[0].masked_fill(new, 0), *args[1:])

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """The output with the rows of new tokens put in."""
        asked, self.asked = self.asked, None
        assert asked is not None
        for numbers, words in self.rows:
            hits = asked.unsqueeze(-1) == numbers.to(asked.device)
            rows = words.embeddings[self.part].to(output)[
                hits.int().argmax(-1)
            ]  # with offloading they may be elsewhere
            output = torch.where(hits.any(-1, keepdim=True), rows, output)
        return output


@dataclass
class WordBook:
    """The new words of a pipeline: by the adapter's name, with what was there before.

    Attributes:
        tokenizers: the pipeline's own, by text encoder.
        handles: of the hooks, by text encoder.
    """

    words: dict[str, NewWords] = field(default_factory=dict)
    tokenizers: dict[str, Any] = field(default_factory=dict)
    handles: dict[str, list[Any]] = field(default_factory=dict)

    def apply(self, pipe: Any) -> None:
        """Let ``pipe`` know these words, and no others."""
        for part in [*self.tokenizers]:
            for handle in self.handles.pop(part, []):
                handle.remove()
            setattr(pipe, _tokenizer(part), self.tokenizers.pop(part))
        wanted = dict.fromkeys(part for words in self.words.values() for part in words.embeddings)
        for part in wanted:
            self.tokenizers[part] = tokenizer = getattr(pipe, _tokenizer(part))
            grown, hooks = copy.deepcopy(tokenizer), EmbeddingHooks(part)
            for words in self.words.values():
                if part in words.embeddings:
                    grown.add_tokens(words.tokens)
                    hooks.rows.append((torch.tensor(grown.convert_tokens_to_ids(words.tokens)), words))
            setattr(pipe, _tokenizer(part), grown)
            self.handles[part] = [
                handle
                for embedding in _embeddings(getattr(pipe, part))
                for handle in (
                    embedding.register_forward_pre_hook(hooks.before),
                    embedding.register_forward_hook(hooks.after),
                )
            ]

    def in_prompt(self, prompt: str) -> str:
        """``prompt`` with new tokens in the place of all placeholders."""
        for words in self.words.values():
            prompt = words.in_prompt(prompt)
        return prompt


def _embeddings(encoder: Any) -> list[nn.Module]:
    """The modules that read the encoder's table of embeddings: a T5's stack has one of its own, with the same weight."""
    table = encoder.get_input_embeddings().weight
    return [part for part in encoder.modules() if isinstance(part, nn.Embedding) and part.weight is table]


def _tokenizer(part: str) -> str:
    return part.replace("text_encoder", "tokenizer")


def add_words(pipe: Any, words: NewWords, name: str) -> None:
    """Let ``pipe`` know ``words`` under the name of their adapter.

    Raises:
        EffiLoRAError: the pipeline lacks a text encoder or its tokenizer, the widths differ, or a token is taken; nothing is
            changed then.
    """
    for part, rows in words.embeddings.items():
        encoder, tokenizer = getattr(pipe, part, None), getattr(pipe, _tokenizer(part), None)
        if isinstance(pipe, nn.Module) or not isinstance(encoder, nn.Module) or tokenizer is None:
            raise EffiLoRAError(
                f"the adapter has new words for {part}, which a {type(pipe).__name__} does not have: load it into the whole "
                "pipeline it was made for"
            )
        width: int = encoder.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
        if width != rows.shape[1]:
            raise EffiLoRAError(
                f"the adapter was made for another base model: its new words are {rows.shape[1]} numbers long, those of "
                f"{part} {width}"
            )
        taken = [token for token in words.tokens if token in tokenizer.get_vocab()]
        if taken:
            raise EffiLoRAError(f"the word {taken[0]} is another adapter's in this pipeline: remove that one first")
    book = vars(pipe).setdefault(BOOK, WordBook())
    book.words[name] = words
    for part, rows in words.embeddings.items():
        rows.data = rows.data.to(getattr(pipe, part).device)
    book.apply(pipe)


def remove_words(pipe: Any, name: str | None) -> None:
    """Take the words of an adapter, or all, off ``pipe``, if it has any."""
    book = vars(pipe).get(BOOK)
    if isinstance(pipe, nn.Module) or book is None:
        return
    for key in [key for key in book.words if name in (None, key)]:
        del book.words[key]
    book.apply(pipe)
    if not book.words:
        del vars(pipe)[BOOK]


def reword(pipe: Any, prompt: str) -> str:
    """``prompt`` with the new words of ``pipe`` in the place of their placeholders."""
    book = vars(pipe).get(BOOK)
    return prompt if book is None else book.in_prompt(prompt)

"""Conversations about images, in LLaVA's format, as tokens and what a model's processor makes of the images."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ..core import EffiLoRAError
from ..core.image_io import ImageError, check_header, load_image
from .batches import pad_and_concat
from .chat_template import Pieces
from .conversations import MARK, Conversation, check_record, to_conversation
from .encoding import Encoder, Example

T = TypeVar("T")

VICUNA = (
    "{% for message in messages %}{% if loop.first %}{% if message['role'] == 'system' %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %} {% else %}"
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
    "polite answers to the user's questions. {% endif %}{% endif %}"
    "{% if message['role'] == 'user' %}USER: {% elif message['role'] == 'assistant' %} ASSISTANT: {% endif %}"
    "{% if message['role'] != 'system' %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
"""The chat template of LLaVA-1.5, for processors without one; the space before an answer belongs to it."""


def image_paths(record: dict[str, Any], folder: Path, where: str) -> list[Path]:
    """The files of a record's ``image`` (a name, or a list of names), inside ``folder``."""
    named = record.get("image") or record.get("images") or []
    names = [named] if isinstance(named, str) else named
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise EffiLoRAError(f"{where}: 'image' must be a file name or a list of them")
    paths = [Path(os.path.normpath(folder / name)) for name in names]
    for path in paths:  # by its name: the folder may hold links, as LLaVA's data usually does
        if not path.is_relative_to(os.path.normpath(folder)):
            raise EffiLoRAError(f"{where}: the image {path} is outside --image_folder {folder}")
    return paths


def _read(reader: Callable[[Path], T], path: Path, where: str) -> T:
    """What ``reader`` finds in an image; an error names the record."""
    try:
        return reader(path)
    except ImageError as error:
        raise EffiLoRAError(f"{where}: {error}") from error


def with_images(messages: list[dict[str, str]], images: int, where: str) -> list[dict[str, Any]]:
    """Chat messages in parts, ``{"type": "image"}`` where the texts say ``<image>``.

    One image comes first in its message, as LLaVA trains it, wherever its mark stands; images without any mark belong to the
    first question.
    """
    marks = sum(message["content"].count(MARK) for message in messages)
    if marks not in (0, images):
        raise EffiLoRAError(f"{where}: its texts have {marks} times {MARK}, but it names {images} images")
    missing = images - marks
    found: list[dict[str, Any]] = []
    for message in messages:
        pieces = message["content"].split(MARK)
        if len(pieces) == 2 and images == 1:
            pieces = ["", " ".join(piece.strip() for piece in pieces if piece.strip())]
        parts: list[dict[str, str]] = []
        if missing and message["role"] == "user":
            parts, missing = [{"type": "image"}] * missing, 0
        for place, piece in enumerate(pieces):
            parts = [*parts, {"type": "image"}] if place else parts
            text = piece.strip() if len(pieces) > 1 else piece
            parts = [*parts, {"type": "text", "text": text}] if text or len(pieces) == 1 else parts
        found.append({"role": message["role"], "content": parts})
    return found


class ImageEncoder(Encoder):
    """Turns records with images into examples, by a model's processor.

    Args:
        processor: of the model: its tokenizer, what prepares images, and how many tokens stand for one.
        image_folder: where the records' images are.
        template: ``chat`` (the processor's), ``vicuna`` (LLaVA-1.5's), or ``auto``: the processor's if it has one.
        max_length: longest example in tokens; longer ones lose their end, never a part of their images.
    """

    truncation_side = "right"

    def __init__(
        self,
        processor: Any,
        image_folder: Path,
        template: str = "auto",
        max_length: int = 2048,
        chat_template: str | None = None,
        options: dict[str, Any] | None = None,
        date: str | None = None,
    ):
        if chat_template and template == "vicuna":
            raise EffiLoRAError("--chat_template and --prompt_template vicuna exclude each other")
        own = chat_template or getattr(processor, "chat_template", None)
        if template == "chat" and not own:
            raise EffiLoRAError("--prompt_template chat: this model's processor has no chat template; use vicuna")
        self.processor, self.tokenizer, self.image_folder = processor, processor.tokenizer, image_folder
        self.max_length = max_length
        self.mark = str(getattr(processor, "image_token", MARK))
        self.chat_template = own if own and template != "vicuna" else VICUNA.replace(MARK, self.mark)
        self.template = "chat" if self.chat_template == own else "vicuna"
        self._configure(True, chat_template, options, date)

    def source(self, tools: Any = None) -> str:
        """The chat template's text."""
        found = self.chat_template
        return str(found["default"] if isinstance(found, dict) and "default" in found else found)

    def conversation(self, record: dict[str, Any], where: str) -> Conversation:
        """The record's messages in parts, as processors take them."""
        check_record(record, where, images=True)
        paths = image_paths(record, self.image_folder, where)
        found = to_conversation(record, where, images=True)
        return replace(found, messages=with_images(found.messages, len(paths), where))

    def content(self, text: str) -> Any:
        """A text as the content of a message, in parts."""
        return [{"type": "text", "text": text}]

    def apply(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool,
        tools: Any = None,
        options: dict[str, Any] | None = None,
    ) -> str:
        """Messages in parts as one text."""
        more = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
        text = str(self.processor.apply_chat_template(messages, **more, **self._inputs(tools, options)))
        if "{'type': " in text:  # the parts themselves, printed
            raise EffiLoRAError("this model's chat template takes texts only: give --prompt_template vicuna")
        return text

    def encode(self, record: dict[str, Any], where: str = "a record") -> Example:
        """One record as an :class:`Example`; its images are read."""
        return self._example(self.segments(record, where), record, where)

    def encode_lesson(self, record: dict[str, Any], lesson: int, where: str) -> Example:
        """One of a record's examples, of which there are several where the chat template rewrites earlier turns."""
        conversation = self.conversation(record, where)
        lessons, _ = self.template_for(conversation).lessons(conversation, where)
        return self._example(lessons[lesson].pieces, record, where, last=lesson == len(lessons) - 1)

    def encode_choice(self, record: dict[str, Any], where: str = "a record") -> Example:
        """One record with the loss on its last answer only."""
        return self._example(self.choice_segments(record, where), record, where)

    def encode_prompt(
        self, record: dict[str, Any], where: str = "the question", max_length: int | None = None
    ) -> Example:
        """Tokenise the record's question with its images; refuse one that is longer than ``max_length`` tokens."""
        length = min(self.max_length, max_length or self.max_length)
        example = self._example([(self.prompt(record, where), False)], record, where)
        if example.truncated or len(example.ids) > length:  # its end is the question itself
            raise EffiLoRAError(
                f"{where}: with its images it is longer than {length} tokens: start a new conversation"
            )
        return example

    def _example(self, segments: Pieces, record: dict[str, Any], where: str, last: bool = True) -> Example:
        paths = image_paths(record, self.image_folder, where)
        images = [_read(load_image, path, where) for path in paths]
        example = Example([], [])
        start = self.tokenizer.bos_token
        if start and segments and not segments[0][0].startswith(start) and self.tokenizer("")["input_ids"][:1]:
            segments = [(start, False), *segments]
        before = ""
        for text, answered in segments:
            count = text.count(self.mark)
            used, images = images[:count], images[count:]
            ids, per_token, features = self._piece(before, text, used, where)
            before += text
            for name in {**per_token, **example.per_token}:
                known = example.per_token.get(name, [0] * len(example.ids))
                example.per_token[name] = known + per_token.get(name, [0] * len(ids))
            example.add(ids, answered)
            for name, value in features.items():
                seen = example.images.get(name)
                example.images[name] = value if seen is None else pad_and_concat([seen, value])
        if images and last:
            raise EffiLoRAError(
                f"{where}: the chat template leaves out {len(images)} of its images: {self.mark} is not in its text"
            )
        return self._shortened(example, where)

    def _piece(
        self, before: str, text: str, images: list[Image.Image], where: str
    ) -> tuple[list[int], dict[str, list[int]], dict[str, Tensor]]:
        """Token ids of one piece after ``before``, what else there is for every token, and what belongs to its images."""
        if not images:
            return self.tokens_after(before, text), {}, {}
        try:
            found = self.processor(images=images, text=[text], add_special_tokens=False, return_tensors="pt")
        except (ValueError, TypeError, RuntimeError) as error:
            raise EffiLoRAError(f"{where}: the model's processor can't take its images: {error}") from error
        size = found["input_ids"].shape
        others = {name: value for name, value in found.items() if name not in ("input_ids", "attention_mask")}
        per_token = {name: value[0].tolist() for name, value in others.items() if value.shape == size}
        return found["input_ids"][0].tolist(), per_token, {k: v for k, v in others.items() if k not in per_token}

    def _shortened(self, example: Example, where: str) -> Example:
        cut = example.ids[self.max_length :]
        token = getattr(self.processor, "image_token_id", None)
        if cut and example.images and (token in cut or token is None):
            raise EffiLoRAError(f"{where}: its images alone are longer than --max_length {self.max_length}: raise it")
        per_token = {name: values[: self.max_length] for name, values in example.per_token.items()}
        ids, labels = example.ids[: self.max_length], example.labels[: self.max_length]
        return Example(ids, labels, per_token, example.images, truncated=bool(cut))


class ImageExamples(Dataset[Example]):
    """Records that are encoded when they are asked for: thousands of images at once would not fit in memory.

    Their form and the images' headers are checked at once, and the first record whole.
    """

    def __init__(self, records: list[dict[str, Any]], encoder: ImageEncoder, where: str):
        self.records, self.encoder, self.where = records, encoder, where
        self.notes: Counter[str] = Counter()
        self.items: list[tuple[int, int]] = []  # records and which of their examples
        rewrites: bool | None = None
        varies = encoder.can_reason or encoder.has_marks  # what a template does then depends on what is said
        for number, record in enumerate(records):
            place = f"{where}, record {number + 1}"
            conversation = encoder.conversation(record, place)
            if not any(part.get("text") for part in conversation.messages[-1]["content"]):
                raise EffiLoRAError(f"{place}: its answer is empty")
            for path in image_paths(record, encoder.image_folder, place):
                _read(check_header, path, place)
            count = int(any(conversation.learned))
            several = sum(conversation.learned) > 1
            if (count and varies) or (several and rewrites is not False):  # rendering all conversations takes long:
                count = len(encoder.template_for(conversation).lessons(conversation, place)[0])
            if several and rewrites is None:  # the first one shows what the template does
                rewrites = count > 1
            self.items += [(number, lesson) for lesson in range(count)]
            self.notes += conversation.notes + Counter(split=int(count > 1))
        if not self.items:
            raise EffiLoRAError(f"{where}: none of its {len(records)} records has an answer to learn")
        self[0]  # template and processor, before anything is trained

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Example:
        number, lesson = self.items[index]
        where = f"{self.where}, record {number + 1}"
        example = self.encoder.encode_lesson(self.records[number], lesson, where)
        if example.num_label_tokens == 0:
            raise EffiLoRAError(f"{where}: its answer is empty, or cut off by --max_length {self.encoder.max_length}")
        if example.truncated:
            warnings.warn(
                f"{where}: longer than --max_length {self.encoder.max_length}, it lost its end", stacklevel=2
            )
        return example

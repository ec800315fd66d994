"""What is done to all captions at once: a word in front, other words instead, words by a vision-language model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from ..diffusion.data.vision_captions import Captioner
from .brought import captions_in, key_of, sort_out
from .queue import refusal
from .session import Session
from .words import Markdown


class CaptionTools:
    """The tools below the cards."""

    def __init__(self, session: Session, elem: str):
        self.session, self.elem = session, elem

    def build(self) -> None:
        """Lay the tools out."""
        with gr.Accordion("Change all captions", open=False, elem_id=f"{self.elem}-captions"):
            with gr.Row(equal_height=False):
                self.word = gr.Textbox(label="Put in front of every caption", placeholder="sks dog", scale=3,
                                       min_width=140, elem_id=f"{self.elem}-word")  # fmt: skip
                self.put = gr.Button("Put in front", size="sm", min_width=90, elem_id=f"{self.elem}-put")
            with gr.Row(equal_height=False):
                self.old = gr.Textbox(label="Replace", min_width=110, scale=2, elem_id=f"{self.elem}-old")
                self.new = gr.Textbox(label="by", min_width=110, scale=2, elem_id=f"{self.elem}-new")
                self.swap = gr.Button("Replace", size="sm", min_width=90, elem_id=f"{self.elem}-swap")
            with gr.Row():
                self.describe = gr.Button("Write the empty ones with a model", size="sm", min_width=200,
                                          elem_id=f"{self.elem}-describe")  # fmt: skip
                self.halt = gr.Button("Stop", size="sm", min_width=70, elem_id=f"{self.elem}-describe-stop")
            self.note = Markdown("", elem_id=f"{self.elem}-captions-note")

    @staticmethod
    def put_in_front(cards: Any, word: str) -> tuple[Any, str]:
        """Every caption with the word in front."""
        word = " ".join(str(word or "").split())
        if not word:
            return gr.skip(), "Enter the word that is to stand in front."
        return _changed(cards, lambda caption: with_word(caption, word))

    @staticmethod
    def replace(cards: Any, old: str, new: str) -> tuple[Any, str]:
        """Every caption with other words instead of some."""
        if not old:
            return gr.skip(), "Enter the text that is to be replaced."
        return _changed(cards, lambda caption: caption.replace(str(old), str(new or "")))

    def write(self, files: list[str] | None, cards: Any, folder: str) -> Iterator[tuple[Any, str]]:
        """Captions by the model in ``folder`` for the images without one, each shown as it comes."""
        images = {key_of(path): path for path in sort_out(files).images}
        wanted = [key for key, caption in captions_in(cards).items() if not caption and key in images]
        if not wanted:
            yield gr.skip(), "No image lacks a caption."
            return
        yield gr.skip(), "Loading the model ..."
        try:
            with self.session.holding():
                captioner = Captioner(Path(str(folder or "").strip()).expanduser() if folder else None)
                for number, key in enumerate(wanted, 1):
                    caption = captioner.caption(images[key])
                    cards = [{**one, "caption": caption} if one.get("key") == key else one for one in cards]
                    yield cards, f"{number} of {len(wanted)} captions written."
        except Exception as error:
            yield gr.skip(), refusal(error, "No captions written")


def _changed(cards: Any, change: Callable[[str], str]) -> tuple[Any, str]:
    """The cards with every caption changed, and how many were."""
    before = captions_in(cards)
    after = [{**one, "caption": change(before[str(one.get("key"))])} for one in cards or [] if isinstance(one, dict)]
    count = sum(before[str(one.get("key"))] != one["caption"] for one in after)
    if not any(before.values()):
        return gr.skip(), "There are no captions: write some, or drop .txt files beside the images."
    return (after if count else gr.skip()), f"{count} caption{'s' if count != 1 else ''} changed."


def with_word(caption: str, word: str) -> str:
    """A caption, or each of several, with ``word`` in front unless it begins with it; an empty one stays empty.

    Example:
        >>> with_word("on a sofa", "sks dog")
        'sks dog, on a sofa'
    """
    lines = [line for line in caption.splitlines() if line.strip()]
    return "\n".join(line if line.startswith(word) else f"{word}, {line}" for line in lines)

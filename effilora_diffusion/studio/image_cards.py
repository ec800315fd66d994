"""The images that were brought, as cards: what each shows, what is wrong with it, what is cut out of it, its caption."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from ..core.image_io import ImageError
from ..diffusion.data.folder import mask_stem
from ..diffusion.data.images import Preparation
from .brought import (
    ANYWAY,
    CAPTION_FILES,
    Brought,
    Seen,
    captions_in,
    key_of,
    look_at,
    lost_masks,
    read_captions,
    sort_out,
    thumbnail,
    words_for_page,
)
from .caption_tools import CaptionTools
from .closer import Closer
from .session import Session
from .training_data import painted_masks
from .words import Markdown

SCRIPT = Path(__file__).with_name("cards.js").read_text(encoding="utf-8")

STYLE = """
.image-cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 250px), 1fr)); gap: 10px; }
.image-card { display: flex; flex-direction: column; border: 1px solid var(--border-color-primary); border-radius: 10px;
  overflow: hidden; background: var(--block-background-fill); }
.image-card.stop { border: 2px solid var(--error-border-color); }
.card-image { width: 100%; height: 150px; object-fit: contain; background: var(--background-fill-secondary); }
.card-empty { display: flex; align-items: center; justify-content: center; color: var(--body-text-color-subdued); }
.card-words { display: flex; flex-direction: column; gap: 4px; padding: 8px 10px 10px; font-size: 13px; }
.card-name { font-weight: 600; overflow-wrap: anywhere; color: var(--body-text-color); }
.card-size { font-variant-numeric: tabular-nums; color: var(--body-text-color-subdued); }
.card-verdict { color: var(--body-text-color); overflow-wrap: anywhere; }
.stop .card-verdict { color: var(--error-text-color); font-weight: 600; }
.card-caption { width: 100%; resize: vertical; padding: 6px 8px; border: 1px solid var(--border-color-primary);
  border-radius: 6px; background: var(--input-background-fill); color: var(--body-text-color); font: inherit; }
.card-caption::placeholder { color: var(--body-text-color-subdued); opacity: 1; }
.card-buttons { display: flex; gap: 6px; }
.card-button { flex: 1; padding: 5px 8px; border-radius: 6px; border: 1px solid var(--border-color-primary);
  background: var(--button-secondary-background-fill); color: var(--button-secondary-text-color); cursor: pointer; }
@media (max-width: 480px) { .image-card { flex-direction: row; } .card-image { width: 104px; height: auto; flex: none; }
  .card-words { flex: 1; min-width: 0; } }
.card-button:focus-visible, .card-caption:focus-visible { outline: 2px solid var(--primary-600); outline-offset: 1px; }
"""


class ImageCards:
    """The drop zone, the cards below it, and what can be done with them.

    Args:
        session: which is to be trained with.
        elem: names the parts on the page.
    """

    def __init__(self, session: Session, elem: str):
        self.elem, self.painted = elem, painted_masks(session)
        self.tools, self.closer = CaptionTools(session, elem), Closer(elem, self.painted)

    def build(self) -> None:
        """Lay them out."""
        self.drop = gr.File(label="Drop 5 to 30 images of one subject here, with captions if you have some", height=140,
                            file_count="multiple", file_types=["image", *CAPTION_FILES],
                            elem_id=f"{self.elem}-files")  # fmt: skip
        self.example = gr.Button("Take the example's images", size="sm", elem_id=f"{self.elem}-example")
        self.note = Markdown("", elem_id=f"{self.elem}-images-note")
        self.cards = gr.HTML([], html_template='<div class="image-cards" role="list" aria-label="Images"></div>',
                             css_template=STYLE, js_on_load=SCRIPT, apply_default_css=False,
                             elem_id=f"{self.elem}-cards")  # fmt: skip
        self.closer.build()
        self.tools.build()
        self.files = gr.State([])  # the drop zone is emptied, for more
        self.taken = gr.State([])  # caption files that are in the cards already

    def build_anyway(self) -> None:
        """Lay out the box that overrules what is said of the images; it is there once something is."""
        self.anyway = gr.Checkbox(False, label=ANYWAY, visible=False, elem_id=f"{self.elem}-anyway")

    @property
    def shown(self) -> list[Any]:
        """What :meth:`refresh` fills."""
        return [self.cards, self.note, self.anyway, self.taken]

    def refresh(self, files: list[str] | None, cards: Any, taken: list[str], how: Preparation) -> tuple[Any, ...]:
        """A card for every image that was brought; captions that stand in a card stay as they are."""
        brought, written = sort_out(files), captions_in(cards)
        fresh = any(str(path) not in taken for path in brought.captions)
        read, said = read_captions(brought.images, brought.captions)
        seen = look_at(brought.images, how.resolution)
        captions = {}
        for key in map(key_of, brought.images):
            stays = key in written and (
                written[key] or not fresh
            )  # what was emptied by hand comes back with new files
            captions[key] = written[key] if stays else read.get(key, "")
        held = [
            one.name
            for one in seen
            if captions[key_of(one.path)] != read.get(key_of(one.path), captions[key_of(one.path)])
        ]
        said += [f"The caption of {name} stays as it was written here." for name in held[:5] if fresh]
        masks = self._masked(seen, brought)
        found = [card_of(one, captions[key_of(one.path)], how, one.path in masks) for one in seen]
        bad = sum(bool(one.faults) for one in seen)
        note = words_for_page([*count_words(seen, bad, len(read)), *said, *lost_masks(brought)])
        shown = gr.update(visible=True) if bad else gr.update(visible=False, value=False)
        return found, note, shown, [str(path) for path in brought.captions]

    def _masked(self, seen: Sequence[Seen], brought: Brought) -> set[Path]:
        """The images with a mask, brought or painted."""
        stems = {mask_stem(path) for path in brought.masks}
        painted = {file.stem for file in self.painted.glob("*.png")}
        return {one.path for one in seen if one.path.stem in stems or (one.check and one.check.sha256 in painted)}

    @staticmethod
    def added(dropped: list[str] | None, files: list[str]) -> tuple[None, list[str]]:
        """The drop zone, empty again, and all files that were brought."""
        return None, [*files, *(file for file in dropped or [] if file not in files)]

    @staticmethod
    def without(files: list[str], key: str) -> list[str]:
        """The files without that of a card."""
        return [file for file in files if key_of(Path(file)) != key]


def count_words(seen: Sequence[Seen], bad: int, captions: int) -> list[str]:
    """How many images there are, in a line; none without any."""
    if not seen:
        return []
    told = f"{len(seen)} image{'s' if len(seen) > 1 else ''}"
    told += f", {bad} of them can't be trained on" if bad else ""
    told += f", {captions} caption{'s' if captions > 1 else ''} read from files" if captions else ""
    return [f"{told}."]


def card_of(one: Seen, caption: str, how: Preparation, masked: bool = False) -> dict[str, Any]:
    """What the page shows of an image, which may be ``masked``."""
    card = {"key": key_of(one.path), "name": one.name, "caption": caption, "size": "", "thumb": ""}
    if one.check is None:
        return {**card, "level": "stop", "says": f"Can't be used: {one.faults[0]}"}
    width, height = one.check.size
    across, down = how.size_of(one.check.size)
    card["size"] = f"{width} x {height} px, cut to {across} x {down}{', with a mask' if masked else ''}"
    try:
        card["thumb"] = thumbnail(one.path, one.path.stat().st_mtime_ns)
    except (ImageError, OSError) as error:  # it was there a moment ago
        return {**card, "level": "stop", "says": f"Can't be used: {error}"}
    if one.faults:
        return {**card, "level": "stop", "says": f"Can't be trained on: {'; '.join(one.faults)}"}
    if one.check.remarks:
        return {**card, "level": "odd", "says": f"Can be used; {'; '.join(one.check.remarks)}"}
    return {**card, "level": "good", "says": "Good"}

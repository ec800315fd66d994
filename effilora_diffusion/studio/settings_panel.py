"""The trainer's settings in the form: those that people change in five groups, all others in a list that can be searched."""

from __future__ import annotations

from typing import Any

import gradio as gr

from .session import Session
from .train_form import component_of, shown_fields, usual_settings
from .words import Markdown

GROUPS: dict[str, tuple[str, ...]] = {
    "How long": ("max_train_steps", "train_batch_size"),
    "How strong": ("rank", "learning_rate", "with_prior_preservation", "class_prompt"),
    "Images": ("resolution", "use_aspect_ratio_buckets", "center_crop", "random_flip", "masked_loss"),
    "Memory": ("mixed_precision", "gradient_checkpointing", "gradient_accumulation_steps", "quantization"),
    "Saving and samples": (
        *("checkpointing_steps", "checkpoints_total_limit", "validation_prompt", "num_validation_images"),
        "validation_steps",
    ),
}
"""The settings that people change, by what they are about."""

FILTER = """(text) => {
  const words = text.toLowerCase().split(/\\s+/).filter(Boolean);
  const shown = (found) => [...found].filter((one) => one.style.display !== "none").length;
  const all = document.querySelectorAll("#train-expert .expert-setting");
  for (const one of all) {
    const said = `${one.id} ${one.textContent}`.toLowerCase();
    one.style.display = words.every((word) => said.includes(word)) ? "" : "none";
  }
  for (const group of document.querySelectorAll("#train-expert .expert-group"))
    group.style.display = shown(group.querySelectorAll(".expert-setting")) ? "" : "none";
  return words.length ? `${shown(all)} of ${all.length} settings.` : "";
}"""
"""Hides the settings whose name and help don't have all words of the search field."""


class SettingsPanel:
    """Components of all settings, by name."""

    def __init__(self, session: Session):
        self.usual, self.parts = usual_settings(session), dict[str, Any]()
        self.fields = {entry.name: entry for entry in shown_fields()}

    @property
    def components(self) -> list[Any]:
        """All components, in the order of :func:`.shown_fields`."""
        return [self.parts[name] for name in self.fields]

    def build_plain(self) -> None:
        """Lay out the five groups."""
        for title, names in GROUPS.items():
            with gr.Accordion(title, open=False, elem_id=f"train-{title.split()[-1].lower()}"):
                for name in names:
                    self.parts[name] = component_of(self.fields[name], self.usual[name])

    def build_expert(self) -> None:
        """Lay out all other settings, below a search field."""
        rest = {name: entry for name, entry in self.fields.items() if name not in self.parts}
        with gr.Accordion(f"Expert settings ({len(rest)})", open=False, elem_id="train-expert"):
            search = gr.Textbox(label="Search", placeholder="a word of a setting's name or help, as 'optimizer'",
                                elem_id="train-search")  # fmt: skip
            found = Markdown("", elem_id="train-found")
            self.caption_model = gr.Textbox(
                label="Caption model", lines=1, elem_id="train-caption-model", elem_classes="expert-setting",
                info="folder of a vision-language model on this machine, as LLaVA, Qwen-VL or BLIP, which writes captions",
            )  # fmt: skip
            for group in dict.fromkeys(entry.metadata["group"] for entry in rest.values()):
                with gr.Column(elem_classes="expert-group"):
                    Markdown(f"## {group}")
                    for name, entry in rest.items():
                        if entry.metadata["group"] == group:
                            self.parts[name] = component_of(entry, self.usual[name], "expert-setting")
        search.input(None, search, found, js=FILTER, queue=False, show_progress="hidden", api_visibility="private")

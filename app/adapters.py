"""The tab of adapters: what each is, bringing one, taking one elsewhere, deleting one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image
from safetensors import SafetensorError, safe_open

from effilora_diffusion import EffiLoRAError, export_lora
from effilora_diffusion.core import load_adapter_file
from effilora_diffusion.core.attach import check_sites
from effilora_diffusion.diffusion.inspection import inspect_adapter
from effilora_diffusion.diffusion.loading import component_of
from effilora_diffusion.diffusion.outputs import COMPARISON_FILE

from .generate import one_line
from .runs import NAME, Run
from .studio import Studio

FORMATS = ("diffusers", "kohya", "native")


class AdaptersTab:
    """Components and handlers of the tab."""

    def __init__(self, studio: Studio):
        self.studio = studio

    def build(self) -> None:
        """Lay the tab out and wire its events."""
        names = list(self.studio.adapters())
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=300):
                self.which = gr.Dropdown(names, value=names[0] if names else None, label="Adapter", elem_id="which")
                self.upload = gr.File(label="Bring an adapter (.safetensors)", file_types=[".safetensors"], height=160,
                                      elem_id="adapter-upload")  # fmt: skip
                with gr.Row():
                    self.format = gr.Dropdown(list(FORMATS), value="diffusers", label="Take it as", min_width=120)
                    self.export = gr.Button("Export", elem_id="export")
                self.file = gr.File(label="To download", visible=False, interactive=False)
                with gr.Row():
                    self.sure = gr.Checkbox(False, label="Yes, delete it", elem_id="sure", min_width=120)
                    self.delete = gr.Button("Delete", variant="stop", elem_id="delete")
                self.status = gr.Markdown("", elem_id="adapter-status")
            with gr.Column(scale=6, min_width=300):
                self.card = gr.Markdown("", elem_id="card")
                self.picture = gr.Image(label="Before and after", format="png", type="pil", interactive=False,
                                        visible=False, buttons=["fullscreen"])  # fmt: skip
        self._wire()

    def show(self, name: str | None) -> tuple[str, Any]:
        """An adapter's card, and the picture of its training if there is one."""
        if not name:
            return "No adapter yet: train one, or bring one.", gr.update(visible=False)
        try:
            path = self.studio.adapter_path(name)
            facts = inspect_adapter(path)
        except EffiLoRAError as error:
            return f"**{one_line(error)}**", gr.update(visible=False)
        config = facts["config"]
        gap = "exact" if facts["exact_export"] else f"{facts.get('export_error', 0):.1%} of the update missing"
        rows = {
            "trigger prompt": facts.get("trigger_prompt", "unknown"),
            "base": facts.get("base_model", "unknown"),
            "adapter": f"rank {config['rank']}, {config['heads']} heads, {config['routing']} routing",
            "parameters": f"{facts['parameters']:,} in {facts['maps']} linear maps",
            "heads in use": f"{facts['heads_used']} of {facts['heads_total']}",
            "trained": f"{facts.get('steps', '?')} steps on {facts.get('pictures', '?')} pictures",
            "file": f"{path.stat().st_size / 1000:.0f} kB",
            "as plain LoRA": gap,
        }
        table = "\n".join(f"| {label} | {str(value).replace('|', '/')} |" for label, value in rows.items())
        picture = path.parent / COMPARISON_FILE
        if path.parent == self.studio.uploads or not picture.is_file():
            return f"| {name} | |\n|---|---|\n{table}", gr.update(visible=False)
        with Image.open(picture) as opened:
            return f"| {name} | |\n|---|---|\n{table}", gr.update(value=opened.copy(), visible=True)

    def bring(self, file: str | None) -> tuple[Any, str]:
        """Take an adapter in, judged by its content: it must fit the model that is open here."""
        if file is None:
            return gr.update(), ""
        try:
            name = self.take_in(Path(file))
        except EffiLoRAError as error:
            return gr.update(), f"**Not taken:** {one_line(error)}"
        return gr.update(choices=list(self.studio.adapters()), value=name), f"{name} is here."

    def take_in(self, file: Path) -> str:
        """Copy a native file into the adapters, and return its name; raises :class:`EffiLoRAError` for others."""
        if is_plain_lora(file):
            raise EffiLoRAError("this is a plain LoRA; only EffiLoRA's own files can be used here so far")
        content = load_adapter_file(file)
        check_sites(component_of(self.studio.pipe), content.adapter.sites)
        stem = "".join(letter if letter.isalnum() or letter in " _-" else "-" for letter in file.stem)[:60].strip(" -")
        stem = stem if NAME.fullmatch(stem) else "adapter"
        name, number = stem, 2
        while name in self.studio.adapters() or (self.studio.uploads / f"{name}.safetensors").exists():
            name, number = f"{stem} {number}", number + 1
        shutil.copyfile(file, self.studio.uploads / f"{name}.safetensors")
        return name

    def write(self, name: str | None, format: str) -> tuple[Any, str]:
        """Export the adapter; the file can then be downloaded."""
        try:
            path = self.studio.adapter_path(name or "")
            folder = self.studio.exports
            folder.mkdir(parents=True, exist_ok=True)
            target = folder / f"{name}-{format}.safetensors"
            if format == "native":
                shutil.copyfile(path, target)
                return gr.update(value=str(target), visible=True), "The adapter as it is."
            if format not in FORMATS:
                raise EffiLoRAError(f"choose one of {', '.join(FORMATS)}")
            error = export_lora(path, target, format)
        except EffiLoRAError as problem:
            return gr.update(visible=False), f"**Not exported:** {one_line(problem)}"
        missing = "exact" if error == 0 else f"least squares, {error:.1%} of the update is missing"
        return gr.update(value=str(target), visible=True), f"Plain LoRA for {format}: {missing}."

    def remove(self, name: str | None, sure: bool) -> tuple[Any, bool, str]:
        """Delete an adapter; of a training run only the adapter's files, its pictures stay."""
        try:
            path = self.studio.adapter_path(name or "")
            if not sure:
                raise EffiLoRAError("tick the box first: a deleted adapter is gone")
            if path.parent != self.studio.uploads and Run(self.studio.outputs, path.parent.name).running:
                raise EffiLoRAError("it is being trained: stop that first")
            path.unlink()
        except (EffiLoRAError, OSError) as error:
            return gr.update(), False, f"**Not deleted:** {one_line(error)}"
        names = list(self.studio.adapters())
        return gr.update(choices=names, value=names[0] if names else None), False, f"{name} is deleted."

    def refresh(self, name: str | None) -> tuple[Any, str, Any]:
        """The adapters as they are on the disk now, and the card of the chosen one (or the newest)."""
        names = list(self.studio.adapters())
        name = name if name in names else next(iter(names), None)
        return gr.update(choices=names, value=name), *self.show(name)

    def _wire(self) -> None:
        hidden: dict[str, Any] = {"api_visibility": "private"}
        self.which.change(self.show, self.which, [self.card, self.picture], queue=False, **hidden)
        self.upload.upload(self.bring, self.upload, [self.which, self.status], **hidden)
        self.export.click(self.write, [self.which, self.format], [self.file, self.status], **hidden)
        self.delete.click(self.remove, [self.which, self.sure], [self.which, self.sure, self.status], **hidden)


def is_plain_lora(file: Path) -> bool:
    """Whether a safetensors file holds LoRA factors by any of the usual names."""
    try:
        with safe_open(file, "pt") as opened:
            return any(part in key for key in opened.keys() for part in ("lora_A", "lora_down", "lora.down"))  # noqa: SIM118
    except (SafetensorError, OSError):
        return False

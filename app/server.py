"""Starting the web UI: the page, its safe settings, and the command that serves it."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr

from effilora_diffusion import EffiLoRAError

from .adapters import AdaptersTab
from .api import add_endpoints
from .compare import CompareTab
from .generate import GenerateTab
from .studio import Studio
from .train import TrainTab

LOOPBACK = "127.0.0.1"

STYLE = """
.gradio-container { width: 100% !important; max-width: 1280px !important; margin: 0 auto !important; }
#slider { max-width: 520px; }
#status p, #compare-status p { font-variant-numeric: tabular-nums; }
"""


def make_page(studio: Studio) -> gr.Blocks:
    """The whole page, not yet served."""
    with gr.Blocks(title="EffiLoRA", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.Markdown("# EffiLoRA", elem_id="title")
        with gr.Tabs():
            generate, compare, train = GenerateTab(studio), CompareTab(studio), TrainTab(studio)
            with gr.Tab("Generate", id="generate") as first:
                generate.build()
            with gr.Tab("Compare", id="compare") as second:
                compare.build()
            with gr.Tab("Train", id="train") as third:
                train.build()
            adapters = AdaptersTab(studio)
            with gr.Tab("Adapters", id="adapters") as fourth:
                adapters.build()
        add_endpoints(studio)
        outputs = [*[slot[0] for slot in generate.slots], generate.past]
        for trigger in (page.load, first.select):
            trigger(generate.refresh, None, outputs, queue=False, api_visibility="private")
        second.select(compare.refresh, compare.adapter, compare.adapter, queue=False, api_visibility="private")
        for trigger in (page.load, third.select):
            trigger(train.refresh, train.which, train.which, queue=False, api_visibility="private")
        for trigger in (page.load, fourth.select):
            trigger(
                adapters.refresh,
                adapters.which,
                [adapters.which, adapters.card, adapters.picture],
                queue=False,
                api_visibility="private",
            )
    return page


def credentials() -> tuple[str, str] | None:
    """User and password from ``EFFILORA_AUTH`` or the file named in ``EFFILORA_AUTH_FILE``, as ``user:password``."""
    text = os.environ.get("EFFILORA_AUTH", "")
    file = os.environ.get("EFFILORA_AUTH_FILE")
    if file:
        try:
            text = Path(file).read_text(encoding="utf-8").strip()
        except OSError as error:
            raise EffiLoRAError(f"EFFILORA_AUTH_FILE {file} can't be read: {error.strerror}") from error
    if not text:
        return None
    user, colon, password = text.partition(":")
    if not (user and colon and len(password) >= 8):
        raise EffiLoRAError("credentials must be user:password, the password of 8 characters at least")
    return user, password


def serve(args: argparse.Namespace, block: bool = True) -> gr.Blocks:
    """Serve the page; raises :class:`EffiLoRAError` for settings that would not be safe."""
    auth = credentials()
    if args.listen and auth is None:
        raise EffiLoRAError("--listen needs credentials: set EFFILORA_AUTH=user:password or EFFILORA_AUTH_FILE")
    studio = Studio(args.model, args.outputs)
    page = make_page(studio)
    page.queue(max_size=16, default_concurrency_limit=1)
    page.launch(
        server_name="0.0.0.0" if args.listen else LOOPBACK,
        server_port=args.port,
        share=False,
        auth=auth,
        allowed_paths=[str(studio.history), str(studio.exports)],
        max_file_size="64mb",
        show_error=False,
        run_history=False,
        footer_links=[],
        enable_monitoring=False,
        prevent_thread_lock=not block,
        quiet=True,
        theme=gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=STYLE,
    )
    return page

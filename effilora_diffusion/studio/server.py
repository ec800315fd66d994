"""Starting the web UI: the page, its safe settings, and the command that serves it."""

from __future__ import annotations

import argparse
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr

from .. import EffiLoRAError
from ..diffusion.config import PRECISIONS
from ..diffusion.report import figures
from ..diffusion.report.style import within
from . import cards, run_view
from .api import add_endpoints
from .guards import allowed_hosts, guarded
from .looks import HEAD, STYLE, theme
from .model_shelf import ModelShelf
from .session import Session
from .status_bar import StatusBar
from .tabs.adapters import AdaptersTab
from .tabs.compare import CompareTab
from .tabs.generate import GenerateTab
from .tabs.inspect import InspectTab
from .tabs.library import IN_ORDER, LibraryTab
from .tabs.runs import RunsTab
from .tabs.train import TrainTab
from .train_form import followed
from .training_queue import Keeper, TrainingQueue

LOOPBACK = "127.0.0.1"

MOST_SESSIONS = 256
"""Visitors whose form is kept in memory, 0.4 MB each; the one that was idle longest goes first."""


def make_page(session: Session, shelf: ModelShelf | None = None) -> gr.Blocks:
    """The whole page, not yet served; ``shelf``: the models that can be opened, by default without a folder of them."""
    shelf = ModelShelf(session.outputs) if shelf is None else shelf
    with gr.Blocks(title="EffiLoRA", analytics_enabled=False, fill_width=True, delete_cache=(3600, 86400)) as page:
        bar = StatusBar(session, shelf)
        bar.build()
        generate, compare, train = GenerateTab(session), CompareTab(session), TrainTab(session)
        runs, library = RunsTab(session), LibraryTab(session)
        adapters, inspect = AdaptersTab(session), InspectTab(session)
        tabs: dict[str, Any] = {
            "Generate": generate,
            "Compare": compare,
            "Train": train,
            "Runs": runs,
            "Library": library,
            "Adapters": adapters,
            "Inspect": inspect,
        }
        shown: dict[str, gr.Tab] = {}
        with gr.Tabs() as all_tabs:
            for label, tab in tabs.items():
                with gr.Tab(label, id=label.lower()) as shown[label]:
                    tab.build()
        train_follow = (lambda: followed(session), train.advanced)
        bar.wire(page, [(generate.follow, generate.follows), (compare.follow, compare.follows), train_follow])
        train.lead_to(all_tabs, runs.which, runs.go_on, runs.note)
        runs.lead_to(all_tabs, generate.slots[0], generate.prompt)
        library.connect(all_tabs, [
            (library.generate, "generate", generate.filled, [*generate.form, generate.status]),
            (library.compare, "compare", compare.filled, [*compare.form, *compare.grids.form, compare.status]),
        ])  # fmt: skip
        generate.survive(page)
        train.survive(page)
        add_endpoints(session)

        def leave(visit: gr.Request) -> None:
            session.tickets.forget(session.jobs.visitor(str(visit.session_hash)))

        page.unload(leave)
        refreshed: dict[str, tuple[Any, Any, Any]] = {
            "Generate": (generate.refresh, None, generate.refreshed),
            "Compare": (compare.refresh, compare.adapter, [compare.adapter, *compare.grids.left_shown]),
            "Library": (library.refresh, library.asked, [*library.listed, *library.shown]),
            "Runs": (runs.refresh, [runs.which, runs.log_scale], [runs.which, *runs.shown, *runs.queued]),
            "Adapters": (adapters.refresh, [adapters.which, adapters.query], adapters.shown),
            "Inspect": (inspect.refresh, inspect.which, [inspect.which, inspect.layers, inspect.training]),
        }
        for label, (refresh, inputs, outputs) in refreshed.items():
            turn: dict[str, Any] = IN_ORDER if label == "Library" else {"queue": False}
            for trigger in (page.load, shown[label].select):
                trigger(refresh, inputs, outputs, show_progress="hidden", api_visibility="private", **turn)
        shown["Train"].select(train.predict, train.asked, train.takes, queue=False, show_progress="hidden",
                              api_visibility="private")  # fmt: skip
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
    hosts = allowed_hosts(args.allowed_host, args.listen)
    session = Session(args.model, args.outputs, PRECISIONS[args.mixed_precision])
    if args.models is not None and not args.models.is_dir():
        raise EffiLoRAError(f"--models {args.models} is no folder")
    shelf = ModelShelf(session.outputs, args.models, typed=not args.listen)
    shelf.note(args.model)
    page = make_page(session, shelf)
    page.queue(max_size=64, default_concurrency_limit=1)

    @asynccontextmanager
    async def behind_guards(app: Any) -> AsyncIterator[None]:
        app.middleware_stack = guarded(app.middleware_stack, page, hosts, args.allowed_host)
        keeper = Keeper(TrainingQueue(session.outputs))
        keeper.start()
        yield
        keeper.stop()

    _launch(
        page,
        server_name="0.0.0.0" if args.listen else LOOPBACK,
        server_port=args.port,
        share=False,
        auth=auth,
        app_kwargs={"lifespan": behind_guards},  # around all that Gradio adds, and before the first request
        allowed_paths=[str(session.history), str(session.exports)],
        state_session_capacity=MOST_SESSIONS,
        max_file_size="64mb",
        show_error=False,
        run_history=False,
        footer_links=[],
        enable_monitoring=False,
        prevent_thread_lock=True,
        quiet=True,
        theme=theme(),
        css=STYLE + figures.STYLE + run_view.STYLE + cards.STYLE + within(".report-part"),
        head=HEAD,
    )
    if block:
        print(f"http://{LOOPBACK}:{page.server_port}", flush=True)
        page.block_thread()
    return page


def _launch(page: gr.Blocks, **options: Any) -> None:
    try:
        page.launch(**options)
    except OSError as error:
        raise EffiLoRAError(f"--port {options['server_port']} can't be used: {error}") from error

"""A page that stays open while a long run is trained: memory of the server and of the browser.

    python -m benchmarks.open_page --work /tmp/page --minutes 60

The web UI is served by a process of its own, the example is trained there with samples every 50 steps, and Chromium shows the
Runs page. Every few minutes the browser's rubbish is collected, and counted is what is left: the heap of scripts, nodes of
the document, and the memory that the renderer and the server hold for themselves.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from gradio_client import Client, handle_file
from playwright.sync_api import CDPSession, Page, sync_playwright

from effilora_diffusion.diffusion.training.example import example_settings

PORT = 7987
NAME = "open page"
ENDLESS = {"max_train_steps": 1_000_000, "validation_steps": 50, "num_validation_images": 1, "checkpointing_steps": 500,
           "checkpoints_total_limit": 2, "preset": "fast"}  # fmt: skip


def own_mb(process: psutil.Process) -> float:
    """What a process holds for itself, in MB."""
    return float(process.memory_full_info().uss) / 1e6


def renderer_mb(browser: psutil.Process) -> float:
    """What Chromium's processes that show pages hold for themselves."""
    shown = [one for one in browser.children(recursive=True) if "--type=renderer" in one.cmdline()]
    return sum(own_mb(one) for one in shown)


def counted(session: CDPSession) -> dict[str, float]:
    """Heap in MB and nodes of the document after a collection."""
    session.send("HeapProfiler.collectGarbage")
    found = {one["name"]: one["value"] for one in session.send("Performance.getMetrics")["metrics"]}
    return {"heap": found["JSHeapUsedSize"] / 1e6, "nodes": found["Nodes"]}


def start_run(url: str) -> None:
    """Train the example without an end, on copies of its images."""
    settings = example_settings()
    files = sorted(Path(settings["instance_data_dir"]).glob("*.png"))
    chosen = {**ENDLESS, "instance_prompt": settings["instance_prompt"]}
    Client(url, verbose=False).predict(
        NAME, [handle_file(str(file)) for file in files], chosen, api_name="/train_start"
    )


def watch(page: Page, url: str, server: psutil.Process, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Figures of the open page, from the first step of the run on."""
    page.goto(f"{url}#runs")
    page.locator("#runs-progress").get_by_text("Step 1").first.wait_for(timeout=600_000)
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable")
    session.send("HeapProfiler.enable")
    began, rows = time.monotonic(), []
    while True:
        minutes = (time.monotonic() - began) / 60
        step = page.locator("#runs-progress").inner_text().split(" of ")[0].rpartition(" ")[2]
        row = {"minutes": round(minutes), "step": step, **counted(session), "server": own_mb(server),
               "renderer": renderer_mb(psutil.Process())}  # fmt: skip
        rows.append(row)
        with (args.work / "open_page.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(row) + "\n")
        if minutes >= args.minutes:
            return rows
        page.wait_for_timeout(60_000 * min(args.every, args.minutes - minutes) + 1000)


def table(rows: list[dict[str, Any]]) -> str:
    """The figures in Markdown."""
    lines = ["| minutes | step | server MB | renderer MB | script heap MB | nodes |", "|---|---|---|---|---|---|"]
    for row in rows:
        figures = [
            f"{row[name]:.{digits}f}" for name, digits in (("server", 0), ("renderer", 0), ("heap", 1), ("nodes", 0))
        ]
        lines.append(f"| {row['minutes']} | {row['step']} | {' | '.join(figures)} |")
    return "\n".join(lines)


def main() -> None:
    """Serve, train, watch, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the outputs and the figures")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--every", type=float, default=5, help="minutes between two rows")
    args = parser.parse_args()
    outputs = args.work / "outputs"
    shutil.rmtree(outputs, ignore_errors=True)
    outputs.mkdir(parents=True)
    command = [sys.executable, "-m", "effilora_diffusion", "app", "--outputs", str(outputs), "--port", str(PORT)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        start_run(url)
        with sync_playwright() as playwright:
            found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
            browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
            rows = watch(browser.new_page(), url, psutil.Process(server.pid), args)
            browser.close()
        Client(url, verbose=False).predict(NAME, api_name="/train_stop")
    finally:
        server.send_signal(signal.SIGINT)
        server.wait()
    print(table(rows))


if __name__ == "__main__":
    main()

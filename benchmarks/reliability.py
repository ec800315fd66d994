"""What runs keep when they are killed, stopped or out of space: ``python -m benchmarks.reliability`` (Linux, as root).

Every case is a process of its own, ended at a random moment, and then what a user would do next: resume, or start again as
the message says. A case is lost if the end differs from that of an unbroken run in a single byte of adapter, plain LoRA,
images or class images, if a file is left over, or if more steps than one interval had to be taken again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from .reliability_cases import INTERVAL, Ended, Workplace, child, count_events, disk_cases

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass
class Outcome:
    """One case: ``kind`` of its row, where it was ended, and what was wrong afterwards ("" if nothing was)."""

    kind: str
    moment: str
    fault: str = ""


def killed(place: Workplace, seed: int) -> Outcome:
    """One run killed by SIGKILL: with an even seed at a file event, else at any time."""
    dice, folder = random.Random(seed), place.fresh()
    if seed % 2 == 0:
        event = dice.randrange(place.events)
        ended = child(place.train(folder), kill_at=(event, folder))
        moment = f"file event {event} of {place.events}: {ended.detail}"
    else:
        delay = dice.uniform(0, place.seconds)
        ended = child(place.train(folder), after=delay, number=signal.SIGKILL)
        moment = f"after {delay:.2f} of {place.seconds:.2f} s"
    return Outcome(
        "killed at a file event" if seed % 2 == 0 else "killed at any time", moment, place.fault(folder, ended)
    )


def stopped(place: Workplace, seed: int) -> Outcome:
    """One run stopped by a signal at any time: it must say so in a sentence, with its exit code."""
    dice, folder = random.Random(seed), place.fresh()
    number, delay = SIGNALS[seed % len(SIGNALS)], dice.uniform(0, place.seconds)
    ended = child(place.train(folder), after=delay, number=number)
    fault = place.fault(folder, ended)
    if ended.code not in (0, 128 + number):
        fault = fault or f"exit code {ended.code}"
    if ended.code == 128 + number and f"stopped by signal {int(number)}" not in ended.said[-1:][0]:
        fault = fault or f"said {ended.said[-1:]}"
    return Outcome("stopped by a signal", f"{number.name} after {delay:.2f} s", fault)


def full_disk(seed: int, count: int) -> list[Outcome]:
    """Cases on file systems that are too small, in a mount namespace of their own."""
    words = [sys.executable, "-m", "benchmarks.reliability", "--disk_cases_here", str(count), "--seed", str(seed)]
    alone = ["unshare", "--mount"] if os.getuid() == 0 else ["unshare", "--mount", "--map-root-user"]
    done = subprocess.run([*alone, *words], capture_output=True, text=True, check=True)
    return [Outcome(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith("{")]


def run(kills: int, signals: int, disks: int, seed: int) -> list[Outcome]:
    """All cases; prints each as it ends."""
    found: list[Outcome] = []

    def add(outcome: Outcome) -> None:
        found.append(outcome)
        print(f"{len(found):4d} {outcome.kind}, {outcome.moment}: {outcome.fault or 'nothing lost'}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        place = Workplace(Path(folder))
        place.events = count_events(place)
        for index in range(kills):
            add(killed(place, seed + index))
        for index in range(signals):
            add(stopped(place, seed + index))
    if disks:
        for outcome in full_disk(seed, disks):
            add(outcome)
    return found


def table(found: list[Outcome]) -> str:
    """Cases and losses by kind, as a Markdown table."""
    cases, lost = (
        Counter(outcome.kind for outcome in found),
        Counter(outcome.kind for outcome in found if outcome.fault),
    )
    lines = ["| cases | number | lost |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {kind} | {count} | {lost[kind]} |" for kind, count in cases.items())])


def main() -> int:
    """Run the cases; returns 1 if one was lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--signals", type=int, default=20)
    parser.add_argument("--disks", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--disk_cases_here", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.disk_cases_here is not None:
        for kind, moment, fault in disk_cases(args.disk_cases_here, args.seed):
            print(json.dumps(asdict(Outcome(kind, moment, fault))), flush=True)
        return 0
    began = time.time()
    found = run(args.kills, args.signals, args.disks, args.seed)
    print(f"\n{table(found)}\n\nseed {args.seed}, {time.time() - began:.0f} s")
    return int(any(outcome.fault for outcome in found))


__all__ = ["INTERVAL", "Ended", "Outcome", "killed", "run", "stopped", "table"]

if __name__ == "__main__":
    sys.exit(main())

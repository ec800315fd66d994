"""Files from elsewhere against everything that reads them: each is refused in a sentence, or can be used.

``python -m benchmarks.hostile_files --mutations 100000`` prints a table of outcomes; the exit code is 1 if anything failed.
Every case runs in a process of its own, with limits on time and memory, so that a hang or a crash is counted and not suffered.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import logging
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from effilora_diffusion.core import EffiLoRAError

from .hostile_adapters import HAND_MADE, Base, mutated
from .hostile_images import CAMERA, CAPTIONS, IMAGES, SPECIAL, hostile_caption, hostile_image
from .hostile_runs import CHECKPOINTS, CONFIGURATIONS, hostile_checkpoint, hostile_configuration

MEMORY = 4 << 30
"""Bytes that a case may ask for beyond what the process has."""

PATIENCE = 60
"""Seconds after which a case counts as hanging; the slowest takes two on an idle machine."""

BATCH = 500
"""Mutations in one process."""

LONGEST = 3000
"""Characters of the longest sentence that still is one on a screen."""


class Late(BaseException):
    """A case has not ended in time; nothing that the case does may take this for an error of a file."""


@dataclass
class Outcomes:
    """How the cases of one kind ended.

    ``failures`` holds ``case: what happened``, ``slowest`` seconds and the case, ``growth`` bytes of the largest process.
    """

    refused: int = 0
    used: int = 0
    failures: list[str] = field(default_factory=list)
    slowest: tuple[float, str] = (0.0, "")
    growth: int = 0

    def add(self, other: Outcomes) -> None:
        """Count the other's cases too."""
        self.refused, self.used = self.refused + other.refused, self.used + other.used
        self.failures += other.failures
        self.slowest, self.growth = max(self.slowest, other.slowest), max(self.growth, other.growth)

    @property
    def count(self) -> int:
        """Number of cases."""
        return self.refused + self.used + len(self.failures)


def judged(name: str, case: Callable[[], object], patience: float = PATIENCE) -> Outcomes:
    """Run one case here."""
    found, began = Outcomes(), time.perf_counter()

    def late(*_: object) -> None:
        raise Late(f"no end after {patience} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, patience)
    try:
        case()
        found.used = 1
    except EffiLoRAError as error:
        if isinstance(error, UnicodeError) or not _is_sentence(str(error)):
            found.failures.append(f"{name}: refused, but not in a sentence: {str(error)[:80]!r}")
        else:
            found.refused = 1
    except (Exception, Late) as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        said = " ".join(str(error).split())[:80]
        found.failures.append(f"{name}: {type(error).__name__} {said} ({Path(where.filename).name}:{where.lineno})")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    found.slowest = (time.perf_counter() - began, name)
    return found


def _is_sentence(text: str) -> bool:
    """Whether a terminal can print this error in a few lines."""
    return 0 < len(text) < LONGEST and all(letter.isprintable() or letter in "\n\t" for letter in text)


def in_a_process(name: str, work: Callable[[], Outcomes]) -> Outcomes:
    """Run ``work`` in a process with a limit on its memory; one that dies is a failure."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        code = 1
        try:
            start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            resource.setrlimit(resource.RLIMIT_AS, (_size() + MEMORY,) * 2)
            found = work()
            found.growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) * 1024
            with os.fdopen(writer, "w") as pipe:
                json.dump(vars(found), pipe)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    status = os.waitpid(child, 0)[1]
    if not text:
        how = f"killed by signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "the process gave up"
        return Outcomes(failures=[f"{name}: {how}"])
    found = Outcomes(**json.loads(text))
    found.slowest = (found.slowest[0], found.slowest[1])
    return found


def _size() -> int:
    """Bytes of address space that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder in memory, where the system has one."""
    parent = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="hostile-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def mutations(base: Base, folder: Path, numbers: range, seed: int) -> Outcomes:
    """Load and use the mutated files ``numbers``."""
    total, path = Outcomes(), folder / "mutation.safetensors"
    for number in numbers:
        try:
            path.write_bytes(mutated(base.parts, number, seed))
        except (TypeError, ValueError, RuntimeError):  # safetensors can't write such tensors, so nobody can have them
            total.refused += 1
            continue
        total.add(judged(f"mutation {number}", lambda: base.use(path)))
    return total


def by_hand(cases: Iterable[str], run: Callable[[str, Path], object], at_once: int = 1) -> Outcomes:
    """Run every one of ``cases`` in a folder of its own, ``at_once`` of them in one process."""
    total, names = Outcomes(), list(cases)

    def work(part: list[str]) -> Outcomes:
        found = Outcomes()
        for name in part:
            with scratch() as folder:
                found.add(judged(name, functools.partial(run, name, folder)))
        return found

    for first in range(0, len(names), at_once):
        part = names[first : first + at_once]
        total.add(in_a_process(", ".join(part), functools.partial(work, part)))
    return total


def hand_made(base: Base) -> Callable[[str, Path], None]:
    """What writes one of :data:`HAND_MADE` and uses it, exports included."""

    def run(name: str, folder: Path) -> None:
        path = folder / "adapter.safetensors"
        HAND_MADE[name](path, base.parts[0])
        base.folder = folder
        base.use(path, export=True)

    return run


def table(base: Base, count: int, seed: int) -> dict[str, Outcomes]:
    """Run everything; outcomes by kind of file."""
    rows = {
        "native files by hand": by_hand(HAND_MADE, hand_made(base)),
        "checkpoints": by_hand(CHECKPOINTS, hostile_checkpoint),
        "configurations": by_hand(CONFIGURATIONS, lambda name, folder: hostile_configuration(name)),
        "images": by_hand({**IMAGES, **CAMERA, **SPECIAL}, hostile_image),
        "captions": by_hand(CAPTIONS, hostile_caption),
        "native files, mutated": Outcomes(),
    }
    with scratch() as folder:
        for first in range(0, count, BATCH):
            numbers = range(first, min(first + BATCH, count))
            name = f"mutations {numbers.start} to {numbers.stop - 1}"
            work = functools.partial(mutations, base, folder, numbers, seed)
            rows["native files, mutated"].add(in_a_process(name, work))
    return rows


def report(rows: dict[str, Outcomes], seed: int) -> str:
    """The outcomes as a Markdown table, with the first failures below."""
    lines = ["| files | cases | refused | used | failed | slowest | memory |", "|---|---|---|---|---|---|---|"]
    for kind, row in rows.items():
        slowest = f"{row.slowest[0]:.2f} s ({row.slowest[1]})"
        counts = f"{row.count:,} | {row.refused:,} | {row.used:,} | {len(row.failures):,}"
        lines.append(f"| {kind} | {counts} | {slowest} | {row.growth / 1e6:.0f} MB |")
    lines.append(f"\nseed {seed}")
    for kind, row in rows.items():
        lines += [f"FAILED {kind}: {failure}" for failure in row.failures[:60]]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutations", type=int, default=2000, help="of native files, the hand-made ones not counted")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    with scratch() as folder:
        rows = table(Base(folder), args.mutations, args.seed)
    print(report(rows, args.seed))
    return int(any(row.failures for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())

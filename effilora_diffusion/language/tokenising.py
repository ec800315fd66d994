"""Tokenise records once: in several processes for large sets, whose tokens are kept on disk by what they were made of."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock
from huggingface_hub.constants import HF_HOME
from tqdm.auto import tqdm

from ..core import EffiLoRAError
from ..core.writing import WriteError, write_folder, writing
from .encoding import Encoder
from .examples import checked, encode_block
from .sources import Source
from .tokens import FACTS_FILE, FORMAT, Part, Tokens, write_tokens

SMALL = 16 << 20
"""Bytes of records below which they are tokenised in memory, in this process: that takes seconds, and is not kept."""

WORKER = (
    "import logging; logging.disable(logging.WARNING); from effilora_diffusion.language.tokenising import work; work()"
)


def tokenise(source: Source, encoder: Encoder, workers: int | None = None, anew: bool = False) -> Tokens:
    """The tokens of all records, in their order, whatever the number of processes.

    Args:
        source: the records.
        encoder: turns one into an example.
        workers: processes; ``None``: one per core for large sets, 1 for small ones.
        anew: don't take what an earlier run has kept.

    Raises:
        EffiLoRAError: for the first record that can't be learned from, by its number; the cache can't be written.
    """
    small = source.size < SMALL
    count = (1 if small else cores()) if workers is None else workers
    if small:
        with ExitStack() as stack:
            found = Tokens.join(parts(source, encoder, count, stack))
        return checked(found, encoder, source.where)
    home = Path(HF_HOME) / "effilora" / "tokens"
    folder = home / key(source, encoder)
    before = _stamp(folder)
    with writing(folder):
        home.mkdir(parents=True, exist_ok=True)
        with FileLock(home / f"{folder.name}.lock"), ExitStack() as stack:  # one of several processes; the others wait
            kept = None if anew and _stamp(folder) == before else _kept(folder)
            if kept is None:
                _remove(folder)
                made = parts(source, encoder, count, stack, home)
                write_folder(folder, lambda path: write_tokens(path, made))
                kept = Tokens.open(folder)
    return checked(kept, encoder, source.where)


def _stamp(folder: Path) -> tuple[int, int] | None:
    """Which tokens are kept in ``folder``: it changes when a process makes them anew, while the run's others wait for it."""
    try:
        found = (folder / FACTS_FILE).stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _kept(folder: Path) -> Tokens | None:
    try:
        return Tokens.open(folder)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _remove(folder: Path) -> None:
    for path in folder.iterdir() if folder.is_dir() else ():
        path.unlink()


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ----------------------------------------------------------------------------------------------------------------- key


def key(source: Source, encoder: Encoder) -> str:
    """A hash of everything that tokens depend on: data, tokenizer, template, settings, and the code that makes them."""
    digest = hashlib.sha256(f"{FORMAT} {version('transformers')} {source.digest}".encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):  # another version of them may make other tokens
        digest.update(path.read_bytes())
    digest.update(json.dumps(_settings(encoder), sort_keys=True).encode())
    digest.update(tokenizer_hash(encoder.tokenizer).encode())
    return digest.hexdigest()[:32]


def _settings(encoder: Encoder) -> dict[str, Any]:
    """The encoder's attributes that JSON knows; what it has computed itself aside."""
    kept = {"class": type(encoder).__name__}
    for name, value in vars(encoder).items():
        if isinstance(getattr(type(encoder), name, None), functools.cached_property):
            continue
        try:
            kept[name] = json.loads(json.dumps(value))
        except TypeError:
            continue
    return kept


def template_hash(encoder: Encoder) -> str:
    """A hash of the chat template; empty where none is used."""
    return hashlib.sha256(encoder.source().encode()).hexdigest() if encoder.is_chat else ""


def tokenizer_hash(tokenizer: Any) -> str:
    """A hash of a tokenizer's vocabulary, rules and chat template."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)  # only fast ones have it
    inner: dict[str, Any] = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    for name in ("truncation", "padding") if backend is not None else ():
        inner[name] = None  # of the last call
    facts = [type(tokenizer).__name__, tokenizer.chat_template, tokenizer.special_tokens_map]
    return hashlib.sha256(json.dumps([inner, *facts], sort_keys=True, default=str).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------------------- workers


def parts(
    source: Source, encoder: Encoder, workers: int, stack: ExitStack, home: Path | None = None
) -> Iterator[Part]:
    """The encoded blocks in their order; what ``stack`` holds is needed until they are used, for workers a folder in ``home``."""
    if workers > 1:
        try:
            task = pickle.dumps((source, encoder))
        except (TypeError, AttributeError, pickle.PicklingError):  # a tokenizer with code of its own
            pass
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".parts-", dir=home)))
            return _by_workers(task, workers, folder, source.where)
    bar = stack.enter_context(_bar(source.size >= SMALL, source.where))
    return (_counted(encode_block(encoder, block, source.where), bar) for block in source.blocks())


def _bar(shown: bool, where: str) -> Any:
    return tqdm(desc=f"tokenising {where}", unit=" records", disable=None if shown else True)


def _counted(part: Part, bar: Any) -> Part:
    bar.update(len(part.lengths))
    return part


def _by_workers(task: bytes, workers: int, folder: Path, where: str) -> Iterator[Part]:
    """Run the workers, then join what each has written, block by block."""
    team = _Team(folder, where)
    with team.bar, ThreadPoolExecutor(workers) as pool:
        try:
            futures = [pool.submit(team.follow, task, shard, workers) for shard in range(workers)]
            for future in futures:
                future.result()
        finally:
            team.stop()
    for text in team.warned:
        warnings.warn(text, stacklevel=2)
    if team.errors:
        raise EffiLoRAError(team.errors[min(team.errors)])
    with ExitStack() as stack:
        files = [stack.enter_context((folder / f"{shard}.bin").open("rb")) for shard in range(workers)]
        index = 0
        while (part := Part.read(files[index % workers])) is not None:
            yield part
            index += 1


class _Team:
    """The workers of one data set: what they say, and the earliest record that one of them can't encode."""

    def __init__(self, folder: Path, where: str):
        self.folder, self.bar, self.lock = folder, _bar(True, where), threading.Lock()
        self.running: list[subprocess.Popen[str]] = []
        self.warned: dict[str, None] = {}
        self.errors: dict[int, str] = {}
        self.stopped = False

    def follow(self, task: bytes, shard: int, of: int) -> None:
        """Run one worker to its end, or until another has failed before where it is."""
        (self.folder / f"{shard}.task").write_bytes(task)
        words = [sys.executable, "-P", "-c", WORKER, str(self.folder), str(shard), str(of)]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "TOKENIZERS_PARALLELISM": "false",
        }
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, encoding="utf-8", env=environment) as worker:
            with self.lock:
                self.running.append(worker)
            if self.stopped:
                worker.kill()
            assert worker.stdout is not None
            for line in worker.stdout:
                with self.lock:
                    self.hear(json.loads(line), worker)
        if worker.returncode and not self.errors and not self.stopped:
            raise EffiLoRAError(
                f"a process that tokenises ended with code {worker.returncode}: try --preprocessing_num_workers 1"
            )

    def hear(self, said: dict[str, Any], worker: subprocess.Popen[str]) -> None:
        """What a worker has said: it is stopped where an earlier record than its own has failed."""
        self.bar.update(said.get("examples", 0))
        self.warned |= dict.fromkeys(said.get("warnings", ()))
        if "error" in said:
            self.errors[said["block"]] = said["error"]
        if self.errors and said["block"] > min(self.errors):
            worker.kill()

    def stop(self) -> None:
        """End the workers that still run."""
        self.stopped = True
        for worker in self.running:
            if worker.poll() is None:
                worker.kill()


def work() -> None:
    """One worker: ``FOLDER SHARD OF`` are its arguments; it says on standard output what it has done."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print belongs elsewhere

    def say(**facts: Any) -> None:
        print(json.dumps(facts), file=channel, flush=True)

    folder, shard, of = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    source, encoder = pickle.loads((folder / f"{shard}.task").read_bytes())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default", UserWarning)
        _work(source, encoder, shard, of, folder / f"{shard}.bin", say)
    say(warnings=[str(one.message) for one in caught if issubclass(one.category, UserWarning)], block=-1)


def _work(source: Source, encoder: Encoder, shard: int, of: int, path: Path, say: Callable[..., None]) -> None:
    """Encode the blocks of one shard; of an error it says in which block it is, which is the next one if it can't be read."""
    here = shard
    with path.open("wb") as file:
        try:
            for block in source.blocks(shard, of):
                here = block.index
                part = encode_block(encoder, block, source.where)
                part.write(file)
                say(block=here, examples=len(part.lengths))
                here += of
        except EffiLoRAError as error:
            say(block=here, error=str(error))
        except OSError as error:
            say(block=here, error=str(WriteError(path.parent, error.strerror or str(error))))

"""Class images for prior preservation: counted, and the missing ones drawn by the base model itself."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from filelock import FileLock, Timeout

from ...core.errors import EffiLoRAError
from ...core.phases import CLASS_IMAGES, Tell, nobody
from ...core.rng import counter_seed
from ...core.run_folder import LOCK_FILE
from ...core.writing import write_text, writing
from ..caption_options import PLAIN
from ..sampling.generate import Sampler
from ..sampling.metadata import read_parameters
from ..sampling.png import save_png
from .folder import Example, Problem, is_unrelated, report_problems, scan_images

_DRAWN = re.compile(r"(\d+)-[0-9a-f]{40}\.png")


@dataclass(frozen=True)
class ClassFolder:
    """A folder that is to give ``count`` images of the class, drawn from ``prompts`` in turn where they are missing.

    Every drawn image carries its prompt, the ``model`` (name or hash) and its ``size`` in pixels in the file, so that images of
    another class, model or size are told from these.
    """

    path: Path
    prompts: Sequence[str]
    count: int
    seed: int
    model: str = ""

    def facts(self, index: int, size: int) -> dict[str, Any]:
        """What the drawn image ``index`` carries."""
        return {"prompt": self.prompts[index % len(self.prompts)], "model": self.model, "size": size}

    @property
    def caption(self) -> str | None:
        """The caption of images without one of their own."""
        return self.prompts[0] if len(self.prompts) == 1 else None

    def scan(self) -> tuple[list[Example], list[Problem]]:
        """The images that are there; captions and other unrelated files don't count."""
        entries = self.path.iterdir() if self.path.is_dir() else ()
        files = [path for path in entries if not path.name.startswith(".") and not is_unrelated(path)]
        return scan_images(self.path, self.caption) if files else ([], [])

    def as_it_is(self) -> ClassFolder:
        """All the images that are there, so that none is drawn; raises :class:`EffiLoRAError` where there are none."""
        found = len(self.scan()[0])
        if not found:
            raise EffiLoRAError(
                f"the folder of class images '{self.path}' holds no images; put PNG or JPEG files there"
            )
        return replace(self, count=found)

    def check(self, size: int) -> None:
        """Raise :class:`EffiLoRAError` for drawn images that are not what a run of ``size`` pixels would draw as these."""
        for path in sorted(self.path.iterdir()) if self.path.is_dir() else ():
            match = _DRAWN.fullmatch(path.name)
            try:
                found = read_parameters(path) if match else None
            except EffiLoRAError:  # drawn by version 0.1.0, which told nothing
                continue
            if match is None or found is None:
                continue
            facts = self.facts(int(match[1]), size)
            pairs = [(key, found.get(key, value), value) for key, value in facts.items()]
            different = [f"{key} {old!r} instead of {new!r}" for key, old, new in pairs if old != new]
            if different:
                raise EffiLoRAError(
                    f"--class_data_dir {self.path} holds images that were drawn for something else ({path.name}: "
                    f"{', '.join(different)}): give another folder, or delete them"
                )


def without_images(examples: list[Example], prompts: list[str]) -> list[Example]:
    """Class rows where there are no class images: each of the ``examples`` under each of the class ``prompts``."""
    plain = partial(replace, others=(), style=PLAIN, mask=None, mask_sha256="")
    return [plain(example, caption=prompt) for example in examples for prompt in prompts]


def class_examples(
    wanted: ClassFolder,
    sampler: Sampler,
    say: Callable[[str], None],
    accelerator: Accelerator | None = None,
    tell: Tell = nobody,
) -> list[Example]:
    """As many class images as wanted: the user's own by name, then drawn ones by number, the missing ones drawn now.

    Several processes share the drawing; another run that fills the folder is waited for. Files are named
    ``<index>-<sha1>.png``; each has its own seed and is drawn in the same batch whichever are missing, so that an interrupted
    filling goes on where it was, to the bit. With several prompts each image has its own beside it, in a ``.txt`` file.

    Raises:
        EffiLoRAError: the folder holds images that were drawn for another prompt, by another model or in another size.
    """
    alone = accelerator is None or accelerator.num_processes == 1
    main = accelerator is None or accelerator.is_main_process
    with writing(wanted.path):
        wanted.path.mkdir(parents=True, exist_ok=True)
    with _claimed(wanted.path, say) if main else nullcontext():
        wanted.check(sampler.resolution)
        present = wanted.scan()[0]
        drawn = {int(match[1]) for path in wanted.path.iterdir() if (match := _DRAWN.fullmatch(path.name))}
        missing = [index for index in range(wanted.count + len(drawn)) if index not in drawn]
        missing = missing[: max(0, wanted.count - len(present))]
        if missing:
            what = repr(wanted.caption) if wanted.caption is not None else f"{len(wanted.prompts)} class prompts"
            say(f"drawing {len(missing)} class images of {what}")
        batches = sorted({index // sampler.batch_size for index in missing})
        if accelerator is not None and not alone:
            accelerator.wait_for_everyone()  # all have looked into the folder before the first one writes
            batches = batches[accelerator.process_index :: accelerator.num_processes]
        if batches:
            with sampler.family.sampling():
                _draw(wanted, sampler, batches, missing, tell)
        if accelerator is not None and not alone:
            accelerator.wait_for_everyone()
    examples, problems = wanted.scan()
    bad = [problem for problem in problems if problem.fatal]
    if bad:
        say(report_problems(bad))
    chosen = sorted(examples, key=_order)[: wanted.count]
    return [example for example in examples if example in chosen]


def _order(example: Example) -> tuple[int, str]:
    """The user's own images by name, then drawn ones by number: images that another run adds come last, and are not used."""
    match = _DRAWN.fullmatch(example.path.name)
    return (int(match[1]) if match else -1, example.path.name)


@contextmanager
def _claimed(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Let one run at a time fill the folder; the lock file stays, since another run may be waiting for it."""
    lock = FileLock(folder / LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"waiting for another run that fills {folder}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _draw(wanted: ClassFolder, sampler: Sampler, batches: list[int], missing: list[int], tell: Tell) -> None:
    """Draw whole batches and write the missing images of each at once, its caption before an image if there are several."""
    here = wanted.count - len(missing)
    for batch in batches:
        tell(CLASS_IMAGES, here, wanted.count)
        start = batch * sampler.batch_size
        indices = range(start, min(start + sampler.batch_size, max(missing) + 1))
        facts = [wanted.facts(index, sampler.resolution) for index in indices]
        seeds = [counter_seed(wanted.seed, "class picture", index) for index in indices]
        images = sampler.draw([fact["prompt"] for fact in facts], seeds)
        for index, fact, image in zip(indices, facts, images, strict=True):
            if index in missing:
                name = f"{index}-{hashlib.sha1(image.tobytes()).hexdigest()}"
                if len(wanted.prompts) > 1:
                    write_text(wanted.path / f"{name}.txt", fact["prompt"])
                save_png(image, wanted.path / f"{name}.png", fact)
                here += 1

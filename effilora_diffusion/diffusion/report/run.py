"""What a run's folder tells of it; nothing else is needed for its page, so that old runs have one, too."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ...core.config import is_number
from ...core.errors import EffiLoRAError
from ...core.files import ADAPTER_FILE, load_adapter_file
from ...core.run_folder import CONFIG_FILE, METRICS_FILE, SAMPLES_FOLDER, Layout, RunFolder, checkpoints, step_of
from ...core.scores import choose_best, read_log, read_scores
from ...core.text_io import read_user_text
from ..caption_options import PLAIN
from ..concepts_list import check_entries, read_concepts
from ..config import default_settings
from ..data.folder import Example, scan_images
from ..dataset_config import read_dataset_config

ANY = Layout((), (), lambda folder: True, lambda folder: None)
"""Of a folder that is only read."""

SAMPLE = re.compile(r"step-(\d+)\.png")


@dataclass
class Run:
    """A run by its files.

    Attributes:
        folder: of the run.
        settings: of ``config.yaml``.
        metrics: lines of ``metrics.jsonl`` by step.
        scores: lines of ``scores.jsonl`` by step.
        samples: validation grids by step.
        finished: whether it has ended.
        adapter: what its adapter's file says of it, empty before the end.
    """

    folder: Path
    settings: dict[str, Any]
    metrics: list[dict[str, Any]]
    scores: list[dict[str, Any]]
    samples: dict[int, Path]
    finished: bool
    adapter: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What people call it."""
        return self.folder.resolve().name

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    @property
    def seconds(self) -> float:
        """Time of all steps."""
        return sum(float(line.get("seconds") or 0) for line in self.metrics)

    @property
    def best(self) -> dict[str, Any] | None:
        """The best checkpoint, see :func:`.choose_best`."""
        return choose_best(self.folder, self.step if self.finished else None)

    @property
    def checkpoints(self) -> list[int]:
        """Steps of the checkpoints that are there."""
        return [step_of(path) for path in checkpoints(self.folder)]

    def curve_of_metrics(self, name: str) -> list[tuple[float, float]]:
        """A figure of the steps, by step."""
        return _curve(self.metrics, name)

    def curve_of_scores(self, name: str) -> list[tuple[float, float]]:
        """A figure of the checkpoints, by step."""
        return _curve(self.scores, name)

    def changed(self) -> dict[str, Any]:
        """The settings that are not the defaults."""
        usual = default_settings()
        return {name: value for name, value in self.settings.items() if name not in usual or value != usual[name]}


def _curve(lines: list[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(float(line["step"]), float(line[name])) for line in lines if is_number(line.get(name), -1e30, 1e30)]


def read_run(folder: Path, finished: bool = False) -> Run:
    """The run in ``folder``; ``finished``: it ends with what is written now.

    Raises:
        EffiLoRAError: there is none, or its settings can't be read.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise EffiLoRAError(f"{folder} holds no image run: {CONFIG_FILE} is missing; give the --output_dir of one")
    try:
        settings = yaml.safe_load(read_user_text(folder / CONFIG_FILE, what=str(folder / CONFIG_FILE)))
    except yaml.YAMLError as error:
        raise EffiLoRAError(f"{folder / CONFIG_FILE} is no YAML that a run has written") from error
    if not isinstance(settings, dict):
        raise EffiLoRAError(f"{folder / CONFIG_FILE} holds no settings")
    ended = finished or RunFolder(folder, ANY).finished
    metrics, scores = read_log(folder / METRICS_FILE), read_scores(folder)
    return Run(folder, settings, metrics, scores, samples_of(folder), ended, _facts(folder) if ended else {})


def samples_of(folder: Path) -> dict[int, Path]:
    """The validation grids of the run in ``folder``, by step."""
    files = sorted((folder / SAMPLES_FOLDER).glob("step-*.png"))
    return {int(match[1]): path for path in files if (match := SAMPLE.fullmatch(path.name))}


def _facts(folder: Path) -> dict[str, Any]:
    """What the adapter is, by its own file."""
    try:
        content = load_adapter_file(folder / ADAPTER_FILE)
    except (EffiLoRAError, OSError):
        return {}
    return {**content.metadata, "stored": sum(value.numel() for value in content.adapter.parameters())}


def images_of(run: Run) -> list[Example]:
    """The images that a run learns from, with their captions, as far as they are where they were."""
    settings, found = run.settings, []
    try:
        entries = settings.get("concepts") or settings.get("concepts_list")
        if entries:
            each = check_entries(entries, "concepts") if isinstance(entries, list) else read_concepts(str(entries))
            for one in each:
                found += scan_images(Path(one.instance_data_dir), one.instance_prompt)[0]
        elif settings.get("dataset_config"):
            for subset in read_dataset_config(settings["dataset_config"], PLAIN, None).subsets:
                found += scan_images(Path(subset.image_dir), subset.prompt or settings.get("instance_prompt") or "")[0]
        elif settings.get("instance_data_dir"):
            found = scan_images(Path(str(settings["instance_data_dir"])), settings.get("instance_prompt") or "")[0]
    except (EffiLoRAError, OSError):
        return []
    return found

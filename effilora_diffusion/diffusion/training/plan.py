"""The Configurator (paper, figure 4): from a base model, images and a budget to the settings of a run.

What a run will take is what its dry run says; here it is asked of a pipeline without weights, for several settings.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ...core import EffiLoRAError
from ...core.file_size import native_bytes, plain_bytes
from ...core.load import detach
from ..adapters.processors import create_adapter
from ..config import PRECISIONS, TrainingConfig
from ..models import Family, make_family
from ..models.hollow import hollow_pipeline
from ..presets import CHECKPOINTED_STEP, SHAPE
from ..run_options import SAVED
from ..sampling.request import sampling_defaults
from .build import RunParts, build, can_checkpoint, with_data
from .dry_run import DryRunReport, dry_run_report, size_text

MEGA, GIGA = 1e6, 1e9


@dataclass(frozen=True)
class Budget:
    """What a run may take at most; ``None``: whatever it takes.

    Args:
        parameters: of the adapter.
        file: bytes of its file, and of its plain LoRA.
        memory: bytes while training, as the dry run counts them, and of the encoders before that.
        time: share of the time of the usual number of full steps.
    """

    parameters: int | None = None
    file: float | None = None
    memory: float | None = None
    time: float | None = None


@dataclass
class Plan:
    """The settings that keep to a budget, and what they will take.

    Args:
        config: the settings, with everything that follows from the model.
        parts: what will be trained on what; its model has no weights.
        report: the dry run's figures.
        usual: steps without a budget of time.
        reduced: what keeps to which budget, in words.
    """

    config: TrainingConfig
    parts: RunParts
    report: DryRunReport
    usual: int
    reduced: list[str]

    @property
    def time(self) -> float:
        """Time of the run, as a share of that of the usual number of full steps without gradient checkpointing."""
        return step_cost(self.config) * self.parts.steps / self.usual


def step_cost(config: TrainingConfig) -> float:
    """Time of a step as a share of a full one without gradient checkpointing."""
    return (CHECKPOINTED_STEP if config.gradient_checkpointing else 1.0) * (config.reducer_time or 1.0)


class Planner:
    """Looks for settings that keep to a budget.

    Args:
        accelerator: of this process.
        named: settings that somebody has named: these are not changed.
        budget: what must be kept to.
        say: takes remarks on images and settings.

    Example:
        >>> planner = Planner(start(), {"rank"}, Budget(memory=8e9), print)
        >>> plan = planner.plan(TrainingConfig(instance_data_dir="photos", instance_prompt="a photo of sks dog"))
    """

    def __init__(self, accelerator: Accelerator, named: Collection[str], budget: Budget, say: Callable[[str], None]):
        self.accelerator, self.named, self.budget, self.say = accelerator, set(named), budget, say
        self.families: dict[str, Family] = {}
        self.reduced: list[str] = []

    def plan(self, config: TrainingConfig) -> Plan:
        """The settings; raises :class:`EffiLoRAError` for a budget that can't be met, with the least that can be."""
        if config.quantization is not None:
            raise EffiLoRAError(
                "the memory of a quantised base is not predicted: leave --quantization out of the plan, and add it to the command"
            )
        self.reduced, config = [], with_data(config, self.say)
        family = self.family(config)
        if "resolution" not in self.named:
            config = replace(config, resolution=int(sampling_defaults(family.pipe, "")["edge"]))
        parts = self.parts(config, self.say)
        usual = parts.steps
        self.parts_config = parts.adapter.config
        config = self._fit_shape(replace(parts.config, max_train_steps=usual))
        config, report = self._fit_memory(config)
        config = self._fit_time(config, usual)
        parts = self.parts(config)
        return Plan(parts.config, parts, replace(report, config=parts.config, steps=parts.steps), usual, self.reduced)

    def family(self, config: TrainingConfig) -> Family:
        """The model without weights, in the precision of ``config``."""
        if config.mixed_precision not in self.families:
            name = config.pretrained_model_name_or_path
            if name is not None and Path(name).is_file():
                name = config.single_file_config
                if name is None:
                    raise EffiLoRAError(
                        "a plan reads configurations, and a single file has none: give --single_file_config, a folder of the "
                        "same architecture"
                    )
            dtype = getattr(torch, PRECISIONS[config.mixed_precision])
            pipe = hollow_pipeline(name, dtype, config.revision)
            made = make_family(pipe, self.accelerator.device, config.max_sequence_length)
            self.families[config.mixed_precision] = made
        return self.families[config.mixed_precision]

    def parts(self, config: TrainingConfig, say: Callable[[str], None] = lambda text: None) -> RunParts:
        """What a run with ``config`` consists of; the adapter is off the model again."""
        parts = build(config, self.accelerator, say, self.family(config))
        self._release(parts)
        return parts

    def predict(self, config: TrainingConfig) -> DryRunReport:
        """The dry run's report of a run with ``config``."""
        parts = build(config, self.accelerator, lambda text: None, self.family(config))
        try:
            return dry_run_report(parts, self.accelerator.num_processes)
        finally:
            self._release(parts)

    def _release(self, parts: RunParts) -> None:
        detach(parts.family.pipe, None)
        if parts.config.gradient_checkpointing:
            parts.family.model.disable_gradient_checkpointing()

    # ------------------------------------------------------------------------------------------------- parameters and file

    def sizes(self, config: TrainingConfig) -> tuple[int, int]:
        """Parameters of the adapter, and bytes of the larger of its two files."""
        shape = replace(self.parts_config, rank=config.rank, heads=config.heads, routing=config.routing)
        adapter = create_adapter(self.family(config).model, shape)
        dtype = getattr(torch, SAVED[config.save_precision])
        distilled = config.export_distillation_steps > 0
        files = native_bytes(adapter, dtype, distilled), plain_bytes(adapter, dtype, self.family(config).component)
        return adapter.parameter_counts()["stored"], max(files)

    def _within(self, config: TrainingConfig) -> bool:
        parameters, file = self.sizes(config)
        limits = (self.budget.parameters, parameters), (self.budget.file, file)
        return all(limit is None or value <= limit for limit, value in limits)

    def _fit_shape(self, config: TrainingConfig) -> TrainingConfig:
        """The largest adapter within the budgets of parameters and file."""
        if self._within(config):
            return config
        why = " and ".join(self._limits())
        if self.budget.file is not None and "save_precision" not in self.named and config.save_precision == "float":
            config = replace(config, save_precision="fp16")
            self.reduced.append(f"the file has 16 bits a number for {why}")
            if self._within(config):
                return config
        shapes = list(self._smaller(config))
        index = bisect.bisect_left(range(len(shapes)), True, key=lambda number: self._within(shapes[number]))
        if index == len(shapes):
            raise EffiLoRAError(self._impossible(shapes[-1] if shapes else config))
        self.reduced.append(f"{shape_text(shapes[index])} instead of {shape_text(config)} for {why}")
        return shapes[index]

    def _smaller(self, config: TrainingConfig) -> Iterator[TrainingConfig]:
        """Smaller adapters, the largest first: one head of up to twice the rank, which exports exactly, else lower ranks."""
        if config.init_from:
            return
        single = config.heads > 1 and config.routing != "concept" and not self.named & {"heads", "routing"}
        if "rank" in self.named:
            ranks = range(config.rank, config.rank - single, -1)
        else:
            # two heads are smaller than one of twice their rank
            ranks = range(min(2, config.heads - 1) * config.rank if single else config.rank - 1, 0, -1)
        for rank in ranks:
            heads, routing = (1, "static") if single else (config.heads, config.routing)
            yield replace(config, rank=rank, heads=heads, routing=routing)

    def _limits(self) -> list[str]:
        found = []
        if self.budget.parameters is not None:
            found.append(f"--max_parameters {self.budget.parameters}")
        if self.budget.file is not None:
            found.append(f"--max_file_mb {self.budget.file / MEGA:g}")
        return found

    def _impossible(self, least: TrainingConfig) -> str:
        parameters, file = self.sizes(least)
        held = [f"--{name} {getattr(least, name)}" for name in (*SHAPE, "save_precision") if name in self.named]
        smallest = "; with " + " and ".join(held) if held else ""
        return (
            f"{' and '.join(self._limits())} can't be met: the smallest adapter here ({shape_text(least)}{smallest}) has "
            f"{parameters:,} parameters and files of {file / MEGA:.2f} MB: allow that, "
            f"{'name less of it, ' if held else ''}or adapt fewer linears with --target_modules"
        )

    # -------------------------------------------------------------------------------------------------------------- memory

    def _fit_memory(self, config: TrainingConfig) -> tuple[TrainingConfig, DryRunReport]:
        """Settings within the budget of memory: what costs nothing first, then time, then precision, then the adapter."""
        report, limit = self.predict(config), self.budget.memory
        if limit is None:
            return config, report
        levers, pulled, why = self._levers(config), dict[str, str](), f"--max_memory_gb {limit / GIGA:g}"
        while peak(report) > limit or report.activations is None:
            found = next(levers, None)
            if found is None:
                break
            changes, words = found
            config = replace(config, **changes)
            report = self.predict(config)
            pulled[next(iter(changes))] = words
        if pulled:
            self.reduced.append(f"{', '.join(pulled.values())} for {why}")
        if peak(report) <= limit:
            return config, report
        shapes = list(self._smaller(config))
        reports: dict[int, DryRunReport] = {}

        def fits(number: int) -> bool:
            reports[number] = self.predict(shapes[number])
            return peak(reports[number]) <= limit

        index = bisect.bisect_left(range(len(shapes)), True, key=fits)
        if index == len(shapes):
            raise EffiLoRAError(self._too_large(config, reports.get(len(shapes) - 1, report)))
        self.reduced.append(f"{shape_text(shapes[index])} instead of {shape_text(config)} for {why}")
        return shapes[index], reports[index]

    def _levers(self, config: TrainingConfig) -> Iterator[tuple[dict[str, Any], str]]:
        """Changes that save memory, one after the other."""
        rows = config.train_batch_size * config.gradient_accumulation_steps
        if not self.named & {"train_batch_size", "gradient_accumulation_steps"}:
            for batch in range(config.train_batch_size - 1, 0, -1):
                if rows % batch == 0:
                    changes = {"train_batch_size": batch, "gradient_accumulation_steps": rows // batch}
                    yield changes, f"micro-batches of {batch}"
        free = "gradient_checkpointing" not in self.named and not config.gradient_checkpointing
        if free and can_checkpoint(self.family(config), config.routing):
            yield {"gradient_checkpointing": True}, "gradient checkpointing"
        if "mixed_precision" not in self.named and self.accelerator.device.type != "cpu":  # most CPUs are slow in it
            yield {"mixed_precision": "bf16"}, "base weights in bfloat16"

    def _too_large(self, config: TrainingConfig, least: DryRunReport) -> str:
        limit = f"--max_memory_gb {(self.budget.memory or 0) / GIGA:g}"
        if least.encoders > least.known:
            return (
                f"{limit} can't be met: the text encoders and the autoencoder take {size_text(least.encoders)} before training: "
                f"allow that{', or half of it with --mixed_precision bf16' if config.mixed_precision == 'no' else ''}"
            )
        how = ", activations recomputed" if config.gradient_checkpointing else ""
        half = ", --mixed_precision bf16" if config.mixed_precision == "no" else ""
        return (
            f"{limit} can't be met: with micro-batches of {config.train_batch_size}{how} and {shape_text(least.config)} "
            f"training takes {least.memory}, {size_text(least.weights)} of it the base's weights: allow that, or try a lower "
            f"--resolution{half} or --quantization"
        )

    # ---------------------------------------------------------------------------------------------------------------- time

    def _fit_time(self, config: TrainingConfig, usual: int) -> TrainingConfig:
        """Fewer full steps: at equal time they are better than cutting more of them short (docs/benchmarks.md)."""
        share = self.budget.time
        if share is None or step_cost(config) <= share:
            return config
        steps = max(1, int(usual * share / step_cost(config)))
        self.reduced.append(f"{steps} instead of {usual} steps for --time {share:g}")
        return replace(config, max_train_steps=steps)


def peak(report: DryRunReport) -> int:
    """Bytes that must be free: while training, or for the encoders before that."""
    return max(report.known, report.encoders)


def shape_text(config: TrainingConfig) -> str:
    """Rank and heads in words."""
    return f"rank {config.rank} with {config.heads} head{'s' if config.heads > 1 else ''}"

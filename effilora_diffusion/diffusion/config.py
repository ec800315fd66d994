"""Settings of an image training run: one dataclass that is the command line, the config file and the record of a run.

Names, meanings and defaults are those of diffusers' ``train_dreambooth_lora.py`` wherever it has them.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from ..core.concepts import Concept
from ..core.errors import EffiLoRAError
from ..core.options import check_options
from .concepts_list import ConceptData, check_entries, own_trigger, read_concepts
from .run_options import OPTIMIZERS, RunOptions

PRECISIONS = {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""torch's names for the values of ``--mixed_precision``."""

EMBEDDED_SAMPLING: dict[str, Any] = {"steps": 25, "guidance_scale": 2.0}
"""Sampling that suits the embedded base; other models have defaults of their own."""

ONCE = ("preset", "overwrite_output_dir", "resume_from_checkpoint", "dry_run", "hub_token")
"""What is meant for one start of a run, and is no part of it."""

PRESET_MARK = "# --preset {}, expanded\n"
"""First line of the config file of a run with a preset."""

BUDGETS = ("reducer_time", "reducer_memory", "reducer_depth", "reducer_plan")
"""Settings that each choose a plan for ``--reducer depth``."""

PATHS = (
    "pretrained_model_name_or_path",
    "instance_data_dir",
    "dataset_name",
    "class_data_dir",
    "output_dir",
    "resume_from_checkpoint",
    "init_from",
    "concepts_list",
)
"""Settings that may name a file or folder, ``~`` included."""


@dataclass
class TrainingConfig(RunOptions):
    """All settings of one training run."""

    def __post_init__(self) -> None:
        for name in ("class_prompt", "validation_prompt", "target_modules", "optimizer_args", "report_to", "trigger"):
            if isinstance(getattr(self, name), str):
                setattr(self, name, [getattr(self, name)])
        self.check()

    def check(self) -> None:
        """Raise :class:`EffiLoRAError` for values that can't work; one sentence each."""
        check_options(self)
        plain = self.optimizer.lower().replace("_", "").replace("-", "").removesuffix("optimizer")
        if "." not in self.optimizer:  # no import path
            self.optimizer = {"adamwschedulefree": "schedulefree"}.get(plain, plain)
            if self.optimizer not in OPTIMIZERS:
                raise EffiLoRAError(
                    f"--optimizer must be one of {', '.join(OPTIMIZERS)}, or a class by its import path as torch.optim.RMSprop, "
                    f"not {plain[:100]!r}"
                )
        if Path(self.logging_dir).is_absolute() or ".." in Path(self.logging_dir).parts:
            raise EffiLoRAError("--logging_dir is the name of a folder in output_dir: logs, for example")
        for name in PATHS:
            value = getattr(self, name)
            setattr(self, name, value and os.path.expanduser(value))
        self._check_subjects()
        self._choose_mode()
        self.adapter_config([Concept("any", ("any",))] if self.routing == "concept" else [])

    def _check_subjects(self) -> None:
        """Raise :class:`EffiLoRAError` where subjects are named in two ways, or not at all."""
        lists = [name for name in ("concepts_list", "concepts") if getattr(self, name)]
        if len(lists) > 1:
            raise EffiLoRAError(
                "--concepts_list names a file with the subjects, and concepts lists them: leave one out"
            )
        if lists and self.dataset_name:
            raise EffiLoRAError("--dataset_name is for a single subject: leave it out, or the list of several")
        if lists and (self.instance_data_dir or self.instance_prompt):
            raise EffiLoRAError(
                f"{'--' if lists[0] == 'concepts_list' else ''}{lists[0]} names folders and prompts: leave --instance_data_dir "
                "and --instance_prompt out"
            )
        if self.trigger and (lists or self.routing != "concept"):
            raise EffiLoRAError(
                "--trigger is for a single subject with --routing concept: leave it out"
                + (", and write it into the subjects' list" if lists else "")
            )
        if self.routing == "concept" and not lists and not self.instance_prompt:
            raise EffiLoRAError(
                "--routing concept needs --instance_prompt with what names the subject, or --concepts_list for several"
            )
        if self.with_prior_preservation and not lists:
            self._check_prior(self.class_prompt, self.class_data_dir)
        if self.concepts:
            check_entries(self.concepts, "concepts")

    def concept_data(self) -> list[ConceptData]:
        """The subjects that the run tells apart: those of its list, or its only one with ``concept`` routing; else none.

        Raises :class:`EffiLoRAError` for a list that can't be used, and where nothing tells what names the only subject.
        """
        if self.concepts:
            entries = check_entries(self.concepts, "concepts")
        elif self.concepts_list:
            entries = read_concepts(self.concepts_list)
        elif self.routing == "concept" and self.instance_data_dir:
            return [self._only_subject()]
        else:
            return []
        if self.with_prior_preservation:
            for entry in entries:
                prompt, folder = entry.class_prompt or self.class_prompt, entry.class_data_dir or self.class_data_dir
                self._check_prior(prompt, folder, entry.instance_data_dir)
        return entries

    def _only_subject(self) -> ConceptData:
        prompt = str(self.instance_prompt)
        triggers = tuple(self.trigger) or (own_trigger(prompt, self.class_prompt),)
        class_prompt = self.class_prompt[0] if len(self.class_prompt) == 1 else ""
        return ConceptData(str(self.instance_data_dir), prompt, class_prompt=class_prompt, triggers=triggers)

    def _check_prior(self, prompt: str | list[str], folder: str | None, entry: str = "") -> None:
        named = "concepts" if self.concepts else "--concepts_list"
        where = f", or the entry of {entry} in {named} its own" if entry else ""
        if not prompt and (entry or self.prior_target != "base" or not self.instance_prompt):
            raise EffiLoRAError(f"--with_prior_preservation needs --class_prompt{where}")
        if self.prior_target == "images" and not folder:
            raise EffiLoRAError(f"--prior_target images needs --class_data_dir{where}")

    def _choose_mode(self) -> None:
        """A budget means ``--reducer depth``, which needs one."""
        named = [name for name in BUDGETS if getattr(self, name) is not None]
        if named and self.reducer not in ("off", "depth"):
            raise EffiLoRAError(f"--{named[0]} is for --reducer depth, not {self.reducer}: leave one of them out")
        if self.reducer == "depth" and not named:
            raise EffiLoRAError(
                "--reducer depth needs a budget: --reducer_time 0.7, --reducer_memory or --reducer_depth"
            )
        if self.reducer_depth is not None and len(named) > 1:
            raise EffiLoRAError(
                f"--reducer_depth fixes what {'--' + (set(named) - {'reducer_depth'}).pop()} would choose: "
                "leave one of them out"
            )
        if named:
            self.reducer = "depth"

    @property
    def not_kept(self) -> tuple[str, ...]:
        """Names of what is no part of the run, or follows from the rest: a data set's folder, which lies in the cache."""
        return (*ONCE, "instance_data_dir") if self.dataset_name else ONCE

    def to_yaml(self) -> str:
        """The settings as a config file that repeats the run: from its beginning, and without replacing it."""
        kept = {name: value for name, value in asdict(self).items() if name not in self.not_kept}
        mark = PRESET_MARK.format(self.preset) if self.preset else ""
        return mark + yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)

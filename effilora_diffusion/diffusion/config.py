"""Settings of an image training run: one dataclass that is the command line, the config file and the record of a run.

Names, meanings and defaults are those of diffusers' ``train_dreambooth_lora.py`` wherever it has them.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from ..core.concepts import Concept
from ..core.errors import EffiLoRAError
from ..core.options import check_options, default_of, settings_of
from ..core.text_io import read_user_text
from .caption_options import TRIGGER_MARK, CaptionOptions, style_of
from .concepts_list import ConceptData, by_prompt, check_entries, own_trigger, read_concepts
from .dataset_config import DatasetConfig, Subset, read_dataset_config
from .loss_options import LossOptions
from .pixel_options import PixelOptions, parse_resolutions, parse_sizes
from .run_options import OPTIMIZERS
from .text_options import TextOptions, check_text

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

BUCKET_EDGES = ("min_bucket_reso", "max_bucket_reso", "bucket_reso_steps")
"""Settings of the buckets that are made where none are listed."""

IMAGES_IN = ("instance_data_dir", "dataset_name", "dataset_config", "concepts_list", "concepts")
"""Settings that name the images of a run, one of them in each."""

PATHS = (
    "pretrained_model_name_or_path",
    "single_file_config",
    "instance_data_dir",
    "dataset_name",
    "dataset_config",
    "class_data_dir",
    "validation_data_dir",
    "output_dir",
    "resume_from_checkpoint",
    "init_from",
    "concepts_list",
    "mask_dir",
    "latents_cache_dir",
    "judge",
)
"""Settings that may name a file or folder, ``~`` included."""


@dataclass
class TrainingConfig(PixelOptions, CaptionOptions, LossOptions, TextOptions):
    """All settings of one training run."""

    def __post_init__(self) -> None:
        for name in (
            "class_prompt",
            "validation_prompt",
            "target_modules",
            "optimizer_args",
            "report_to",
            "trigger",
            "token_abstraction",
        ):
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
        named = [name for name in ("loraplus_lr_ratio", "router_lr_ratio") if getattr(self, name) != 1]
        if named and self.optimizer == "prodigy":
            raise EffiLoRAError(
                f"--{named[0]} is for optimizers with a rate of your own, prodigy finds one: leave it out"
            )
        if Path(self.logging_dir).is_absolute() or ".." in Path(self.logging_dir).parts:
            raise EffiLoRAError("--logging_dir is the name of a folder in output_dir: logs, for example")
        for name in PATHS:
            value = getattr(self, name)
            setattr(self, name, value and os.path.expanduser(value))
        self._check_buckets()
        if self.unmasked_weight and not (self.masked_loss or self.mask_dir or self.alpha_mask):
            raise EffiLoRAError("--unmasked_weight is for masks: add --masked_loss, --mask_dir or --alpha_mask")
        if self.latents_cache_dir and not (self.cache_latents_to_disk or self.cache_text_encoder_outputs_to_disk):
            self.cache_latents_to_disk = True
        self._check_subjects()
        self._place_trigger()
        self._choose_mode()
        check_text(self)
        self.adapter_config([Concept("any", ("any",))] if self.routing == "concept" else [])

    def _check_buckets(self) -> None:
        """Raise :class:`EffiLoRAError` for settings of buckets that would have no effect."""
        listed = self.aspect_ratio_buckets
        if listed:
            parse_sizes(listed)
        named = [name for name in BUCKET_EDGES if getattr(self, name) is not None]
        if named and (listed or not self.use_aspect_ratio_buckets):
            what = "leave it out" if listed else "add --use_aspect_ratio_buckets"
            raise EffiLoRAError(f"--{named[0]} is for buckets that are made for --resolution: {what}")

    def _check_subjects(self) -> None:
        """Raise :class:`EffiLoRAError` where subjects are named in two ways, or not at all."""
        lists = [name for name in ("concepts_list", "concepts") if getattr(self, name)]
        if len(lists) > 1:
            raise EffiLoRAError(
                "--concepts_list names a file with the subjects, and concepts lists them: leave one out"
            )
        named = next((name for name in ("dataset_name", "dataset_config") if getattr(self, name)), None)
        if lists and named:
            raise EffiLoRAError(
                f"--{named} names the images of a run without a list of subjects: leave one of them out"
            )
        if self.dataset_config and (self.instance_data_dir or self.dataset_name):
            other = "instance_data_dir" if self.instance_data_dir else "dataset_name"
            raise EffiLoRAError(f"--dataset_config and --{other} both name the images: leave one of them out")
        if lists and (self.instance_data_dir or self.instance_prompt):
            raise EffiLoRAError(
                f"{'--' if lists[0] == 'concepts_list' else ''}{lists[0]} names folders and prompts: leave --instance_data_dir "
                "and --instance_prompt out"
            )
        if self.trigger and lists:
            raise EffiLoRAError(
                "--trigger is for a single subject: leave it out, and write it into the subjects' list"
            )
        if self.routing == "concept" and not lists and not self.instance_prompt and not self.dataset_config:
            raise EffiLoRAError(
                "--routing concept needs --instance_prompt with what names the subject, or --concepts_list for several"
            )
        if self.with_prior_preservation and not lists:
            self._check_prior(self.class_prompt, self.class_data_dir)
        if self.concepts:
            check_entries(self.concepts, "concepts")

    def dataset_file(self) -> DatasetConfig | None:
        """What ``dataset_config`` says, if there is one; raises :class:`EffiLoRAError` as :func:`.read_dataset_config`."""
        if not self.dataset_config:
            return None
        return read_dataset_config(self.dataset_config, style_of(self), self.caption_extension)

    def _place_trigger(self) -> None:
        """Put the trigger in place of its mark in prompts; raises :class:`EffiLoRAError` for a mark without a trigger."""
        for name in ("instance_prompt", "validation_prompt"):
            value = getattr(self, name)
            if not value or not any(TRIGGER_MARK in text for text in ([value] if isinstance(value, str) else value)):
                continue
            if not self.trigger:
                raise EffiLoRAError(f"--{name} has {TRIGGER_MARK}: say with --trigger what stands for it")
            word = self.trigger[0]
            placed = [text.replace(TRIGGER_MARK, word) for text in ([value] if isinstance(value, str) else value)]
            setattr(self, name, placed[0] if isinstance(value, str) else placed)

    @property
    def edges(self) -> tuple[int, ...]:
        """All resolutions of the run's images, the run's own first."""
        file = self.dataset_file()
        folders = () if file is None else (subset.resolution for subset in file.subsets if subset.resolution)
        return tuple(dict.fromkeys((self.resolution, *parse_resolutions(self.more_resolutions), *folders)))

    def image_data(self) -> list[ConceptData]:
        """The folders of every subject of the run; one entry where it tells none apart. Raises as :meth:`concept_data`."""
        style, extension = style_of(self), self.caption_extension
        found = self.concept_data()
        if not found:
            file = self.dataset_file()
            subsets = tuple(file.subsets) if file is not None else ()
            folder = subsets[0].image_dir if subsets else self.instance_data_dir
            found = [ConceptData(str(folder or ""), self.instance_prompt, subsets=subsets)]
        return [
            entry
            if entry.subsets
            else replace(
                entry,
                subsets=(Subset(entry.instance_data_dir, entry.instance_prompt, 1, style, extension),),
            )
            for entry in found
        ]

    def concept_data(self) -> list[ConceptData]:
        """The subjects that the run tells apart: those of its list, or its only one with ``concept`` routing; else none.

        Raises :class:`EffiLoRAError` for a list that can't be used, and where nothing tells what names the only subject.
        """
        if self.concepts:
            entries = check_entries(self.concepts, "concepts")
        elif self.concepts_list:
            entries = read_concepts(self.concepts_list)
        elif self.routing == "concept" and self.dataset_config and (file := self.dataset_file()):
            entries = by_prompt(file.subsets, f"--dataset_config {self.dataset_config}")
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


def default_settings() -> dict[str, Any]:
    """Every setting with its default."""
    return {entry.name: default_of(entry) for entry in settings_of(TrainingConfig)}


def read_settings(path: Path) -> TrainingConfig:
    """The settings of a run, as its :data:`~effilora_diffusion.core.run_folder.CONFIG_FILE` has them.

    Raises :class:`EffiLoRAError` for a file that no run of this version writes.
    """
    try:
        return TrainingConfig(**yaml.safe_load(read_user_text(path, what=str(path))))
    except (TypeError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise EffiLoRAError(f"{path} does not hold a run's settings: {' '.join(str(error).split())[:200]}") from error

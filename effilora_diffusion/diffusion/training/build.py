"""Everything a run consists of, loaded and checked on the CPU before the first byte goes to the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline

from ...core import AdapterFile, EffiLoRA, EffiLoRAError, is_exact
from ...core.concepts import Concept
from ...core.fingerprint import base_fingerprint
from ...core.initial import initial_file, start_from
from ...core.run_folder import EARLIER_FOLDER, SAMPLES_FOLDER
from ..adapters.initial import read_initial
from ..adapters.processors import attach, create_adapter
from ..adapters.prompts import follow_prompts
from ..concepts_list import ConceptData
from ..config import TrainingConfig
from ..data.concepts import ConceptSource, concept_rows, name_concepts, scan_concepts
from ..data.dataset import dataset_folder
from ..data.folder import Example
from ..data.images import Preparation
from ..data.latents import ExampleSource
from ..data.prior import ClassFolder, without_images
from ..models import Family, make_family
from ..models.base import PUNCTUATION
from ..models.pipelines import load_pipeline, quantization
from ..presets import PRESETS
from ..sampling.generate import Sampler
from .loss import DDPMObjective, FlowObjective, Objective, flow_shift, is_flow
from .preservation import Preservation, preservation

OTHER_IMAGES = 16
"""Images that are enough to see what an adapter does to unrelated prompts."""
NO_FINGERPRINT = dict.fromkeys(("base_hash", "base_hash_bfloat16", "base_dtype"))
"""Of a model whose weights mean nothing."""


@dataclass
class RunParts:
    """What will be trained on what: the attached ``adapter`` changes nothing yet, unless it starts from another.

    ``base`` identifies the base's weights (:func:`.base_fingerprint`), ``images_per_step`` counts over all processes,
    ``initial`` is the adapter that the run starts from. Of a run with several subjects there are the ``concepts``, the
    ``weights`` of their rows, and class images of each in the same order, or one folder for all.
    """

    config: TrainingConfig
    examples: list[Example]
    family: Family
    objective: Objective
    adapter: EffiLoRA
    base: dict[str, Any]
    images_per_step: int
    classes: tuple[ClassFolder, ...] = ()
    initial: AdapterFile | None = None
    concepts: tuple[Concept, ...] = ()
    weights: tuple[float, ...] = ()

    @property
    def prior(self) -> Preservation | None:
        """The class term of the loss."""
        return preservation(self.config, self.images_per_step)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch; as in diffusers' scripts it is as long as the larger of instance and class images."""
        count = max(len(self.examples), sum(folder.count for folder in set(self.classes)))
        return max(1, math.ceil(count / self.images_per_step))

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.config.max_train_steps or self.config.num_train_epochs * self.steps_per_epoch


def build(
    config: TrainingConfig, accelerator: Accelerator, say: Callable[[str], None], family: Family | None = None
) -> RunParts:
    """Read the images, load the model, create and attach the adapter; raises :class:`EffiLoRAError` for mistakes.

    ``family`` stands in for the model that ``config`` names; its weights mean nothing.
    """
    device = accelerator.device
    entries = config.concept_data()
    if not config.instance_data_dir and not entries:
        raise EffiLoRAError("--instance_data_dir is missing: the folder with the subject's images")
    groups = scan_concepts(entries or [ConceptData(str(config.instance_data_dir), config.instance_prompt)], say)
    known = family is None
    family = family or make_family(load_base(config), device, config.max_sequence_length)
    family.guidance_scale = config.guidance_scale
    config = _without_unsupported(_with_class(config, family), family, say)
    check_resolution(config.resolution, family)
    objective = make_objective(config, family)
    base = base_fingerprint(family.model) if known else NO_FINGERPRINT
    concepts, examples = name_concepts(entries, groups, family.rarest_word) if entries else ((), groups[0])
    adapter_config = replace(config.adapter_config(concepts), timestep_range=family.timestep_range)
    initial: AdapterFile | None = None
    if config.init_from is None:
        adapter = create_adapter(family.model, adapter_config, config.seed, config.a_start)
    else:
        source = initial_file(config.init_from)
        initial = read_initial(source, family.pipe, family.component, adapter_config)
        config, adapter = start_from(initial.adapter, config, source, concepts)
    config = replace(config, heads=adapter.config.heads)
    attach(family.model, adapter)
    follow_prompts(family.pipe)
    if config.gradient_checkpointing:
        if family.one_by_one and config.routing in ("timestep", "concept"):  # recomputation would see another call's
            raise EffiLoRAError(
                f"{family.title} can't have both --gradient_checkpointing and --routing {config.routing}"
            )
        family.enable_gradient_checkpointing()
    per_step = config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
    classes, weights = class_folders(config, base, entries, known), tuple(entry.weight for entry in entries)
    return RunParts(
        config, examples, family, objective, adapter, base, per_step, classes, initial, concepts, weights
    )  # fmt: skip


def _with_class(config: TrainingConfig, family: Family) -> TrainingConfig:
    """``config`` with a class prompt where it needs one: its instance prompt without the word that names the subject."""
    if not config.with_prior_preservation or config.class_prompt or config.concepts_list or config.concepts:
        return config
    named = str(config.instance_prompt)
    word = family.rarest_word(named)
    rest = " ".join(one for one in named.split() if one.strip(PUNCTUATION) != word)
    if not rest:
        raise EffiLoRAError(
            f"--with_prior_preservation needs --class_prompt: --instance_prompt {named!r} names nothing but the subject"
        )
    return replace(config, class_prompt=[rest])


def _without_unsupported(config: TrainingConfig, family: Family, say: Callable[[str], None]) -> TrainingConfig:
    """``config`` without the gradient checkpointing of its preset, where the family can't have it."""
    if not config.preset or not config.gradient_checkpointing:
        return config
    if can_checkpoint(family, config.routing) or not PRESETS[config.preset].settings.get("gradient_checkpointing"):
        return config
    say(f"note: {family.title} can't have the gradient checkpointing of --preset {config.preset}: it is left out")
    return replace(config, gradient_checkpointing=False)


def can_checkpoint(family: Family, routing: str) -> bool:
    """Whether a family can recompute activations while gates depend on what ``routing`` says."""
    supported = bool(getattr(family.model, "_supports_gradient_checkpointing", False))
    return supported and not (family.one_by_one and routing in ("timestep", "concept"))


def class_folders(
    config: TrainingConfig, base: dict[str, Any], entries: Sequence[ConceptData] = (), check: bool = True
) -> tuple[ClassFolder, ...]:
    """The folder of class images, if the run has any, or that of each of several subjects if one has its own.

    There are none where a subject would be without.

    Raises :class:`EffiLoRAError` for images of another class or model.
    """
    if not config.with_prior_preservation:
        return ()
    model = base["base_hash"] or str(config.pretrained_model_name_or_path)  # a quantised model has no hash
    named = [(entry.class_data_dir, [entry.class_prompt]) for entry in entries]
    shared = (config.class_data_dir or "", config.class_prompt)
    own = [pair if pair[0] and pair[1][0] else shared for pair in named]
    wanted = [shared] if all(pair == shared for pair in own) else own
    if not all(path for path, _ in wanted):
        return ()
    folders = tuple(
        ClassFolder(Path(path), tuple(prompts), config.num_class_images, config.seed, model)
        for path, prompts in wanted
    )
    for folder in folders if check else ():
        folder.check(config.resolution)
    return folders


def check_hardware(config: TrainingConfig, device: torch.device, say: Callable[[str], None]) -> None:
    """Raise :class:`EffiLoRAError` for precisions ``device`` can't train in; print a note for slow ones."""
    if device.type == "cpu" and config.mixed_precision == "fp16":
        raise EffiLoRAError("--mixed_precision fp16 needs a GPU: leave it out on a CPU")
    if device.type == "cpu" and config.quantization is not None and config.quantization.startswith("bnb"):
        raise EffiLoRAError(
            f"--quantization {config.quantization} needs a GPU: leave it out on a CPU, or use torchao's"
        )
    if device.type == "cpu" and config.mixed_precision == "bf16":
        say("note: bf16 is very slow on most CPUs; --mixed_precision no is usually faster")


def with_data(config: TrainingConfig, say: Callable[[str], None]) -> TrainingConfig:
    """``config`` with the folder of the data set that it names, if it names one; see :func:`.dataset_folder`."""
    if config.dataset_name is None:
        return config
    if config.instance_data_dir:
        raise EffiLoRAError("--dataset_name and --instance_data_dir both name the images: leave one of them out")
    if not config.caption_column and not config.instance_prompt:
        raise EffiLoRAError("--dataset_name needs --instance_prompt, or the column of captions with --caption_column")
    folder = dataset_folder(
        config.dataset_name, config.dataset_config_name, config.image_column, config.caption_column, say
    )
    return replace(config, instance_data_dir=str(folder))


def check_folders(config: TrainingConfig) -> None:
    """Raise :class:`EffiLoRAError` for folders that would be mixed: a run must not learn from what it writes."""
    output = Path(config.output_dir).resolve()
    entries = config.concept_data()
    instances = [config.instance_data_dir, *(entry.instance_data_dir for entry in entries)]
    classes = [config.class_data_dir, *(entry.class_data_dir for entry in entries)]
    named = {"instance_data_dir": instances, "class_data_dir": classes if config.with_prior_preservation else []}
    found = {name: [Path(folder).resolve() for folder in folders if folder] for name, folders in named.items()}
    for name, folders in found.items():
        mark = "" if entries else "--"
        for folder in folders:
            if folder == output or folder in output.parents:
                raise EffiLoRAError(
                    f"--output_dir {config.output_dir} is in {mark}{name}: give a folder outside of it"
                )
            if output in folder.parents and _is_written(folder.relative_to(output).parts[0]):
                raise EffiLoRAError(
                    f"{mark}{name} {folder} is where the run writes: give a folder outside of --output_dir"
                )
    if any(_overlap(one, other) for one in found["instance_data_dir"] for other in found["class_data_dir"]):
        raise EffiLoRAError("--class_data_dir and --instance_data_dir must be two folders, neither in the other")


def _is_written(name: str) -> bool:
    return name in (SAMPLES_FOLDER, EARLIER_FOLDER) or name.startswith("checkpoint-")


def _overlap(one: Path, other: Path) -> bool:
    return one == other or one in other.parents or other in one.parents


def check_resolution(resolution: int, family: Family) -> None:
    """Raise :class:`EffiLoRAError` for images that the family's tokens do not divide evenly."""
    if resolution % family.size_multiple:
        raise EffiLoRAError(
            f"--resolution must be a multiple of {family.size_multiple} for {family.title}, not {resolution}"
        )


def make_objective(config: TrainingConfig, family: Family) -> Objective:
    """The objective of the family's scheduler; raises :class:`EffiLoRAError` for options that it does not have."""
    scheduler = family.pipe.scheduler
    if type(scheduler).__name__.startswith("EDM"):
        raise EffiLoRAError(
            "models with an EDM scheduler (Playground 2.5) can't be trained: DDPM and flow matching can"
        )
    if not is_flow(scheduler):
        if config.weighting_scheme is not None:
            raise EffiLoRAError(f"--weighting_scheme is for flow matching, {family.title} is not: leave it out")
        return DDPMObjective(scheduler.config, config.snr_gamma)
    if config.snr_gamma is not None:
        raise EffiLoRAError(
            f"--snr_gamma is for DDPM models, {family.title} is trained by flow matching: leave it out"
        )
    return FlowObjective(
        flow_shift(scheduler.config, config.resolution),
        config.weighting_scheme or family.weighting_scheme,
        config.logit_mean,
        config.logit_std,
        config.mode_scale,
    )


def preparation(config: TrainingConfig) -> Preparation:
    """How the run's images become training squares."""
    c = config
    return Preparation(c.resolution, c.center_crop, c.random_flip, c.image_interpolation_mode, c.seed)


Source = ExampleSource | ConceptSource


def class_prompts(parts: RunParts) -> list[tuple[list[Example], list[str]]]:
    """The images of every subject of a run, with the prompts of its class."""
    shared = parts.config.class_prompt
    if not parts.concepts:
        return [(parts.examples, shared)]
    return [
        (
            [one for one in parts.examples if one.concept == each.name],
            [each.class_prompt] if each.class_prompt else shared,
        )
        for each in parts.concepts
    ]


def example_sources(parts: RunParts, prior: list[list[Example]]) -> tuple[Source, Source | None, ExampleSource | None]:
    """Where the rows of a run's batches come from: its images, and its class images, by folder, if it has any.

    Without class images the third is what stands for everything but the subject where a plain LoRA has to be fitted: some
    of the images without a prompt, which is also what guidance draws with.
    """

    def source(examples: list[Example], purpose: str) -> ExampleSource:
        return ExampleSource(parts.family, examples, preparation(parts.config), purpose)

    names = [concept.name for concept in parts.concepts]
    classes: Source | None = source(prior[0], "class") if prior else None
    others = None
    if classes is None and not is_exact(parts.adapter):
        others = source(without_images(parts.examples[:OTHER_IMAGES], [""]), "class")
    if len(prior) > 1:
        classes = concept_rows(source, zip(names, prior, strict=True), parts.weights, "class")
    if not names:
        return source(parts.examples, "instance"), classes, others
    groups = [(name, [example for example in parts.examples if example.concept == name]) for name in names]
    return concept_rows(source, groups, parts.weights, "instance"), classes, others


def sampler(config: TrainingConfig, family: Family) -> Sampler:
    """What draws the run's class and validation images."""
    steps, guidance = config.validation_inference_steps, config.validation_guidance_scale
    return Sampler(family, config.resolution, steps, guidance, config.sample_batch_size, config.max_sequence_length)


def place(model: torch.nn.Module, device: torch.device) -> None:
    """Move a model to ``device``; those of bitsandbytes are there already, and could not be moved."""
    if next(model.parameters()).device.type != device.type:
        model.to(device)


def load_base(config: TrainingConfig) -> DiffusionPipeline:
    """The pipeline that a run trains, its denoiser quantised if the run asks for it."""
    dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[config.mixed_precision]
    return load_pipeline(
        config.pretrained_model_name_or_path,
        dtype,
        config.single_file_config,
        to_train=True,
        revision=config.revision,
        variant=config.variant,
        quantization_config=quantization(config.quantization, dtype),
    )

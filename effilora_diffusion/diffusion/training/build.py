"""Everything a run consists of, loaded and checked on the CPU before the first byte goes to the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline

from ...core import AdapterFile, EffiLoRA, EffiLoRAError
from ...core.concepts import Concept
from ...core.fingerprint import base_fingerprint
from ...core.initial import initial_file, start_from
from ...core.load import attach_parts
from ...core.run_folder import CACHE_FOLDER, EARLIER_FOLDER, SAMPLES_FOLDER
from ..adapters.initial import read_initial
from ..adapters.processors import attach, create_adapter
from ..adapters.prompts import follow_prompts
from ..caption_options import style_of
from ..concepts_list import ConceptData
from ..config import TrainingConfig
from ..data.buckets import Size
from ..data.captions import with_trigger
from ..data.concepts import name_concepts, row_shares, scan_concepts
from ..data.dataset import dataset_folder
from ..data.folder import Example
from ..data.images import Preparation
from ..data.masks import MaskSource, with_masks
from ..data.prior import ClassFolder
from ..dataset_config import DatasetConfig, Subset
from ..models import Family, make_family
from ..models.pipelines import load_pipeline, quantization
from ..pixel_options import parse_resolutions
from ..presets import PRESETS
from ..sampling.generate import Sampler
from .held_out import hold_out, some_of
from .loss import Objective
from .objective import objective_of, set_scheduler
from .preservation import Preservation, preservation
from .sizes import at_resolutions, check_resolution, make_buckets
from .text import text_parts, trained_encoders

NO_FINGERPRINT = dict.fromkeys(("base_hash", "base_hash_bfloat16", "base_dtype"))
"""Of a model whose weights mean nothing."""


@dataclass
class RunParts:
    """What will be trained on what: the attached ``adapter`` changes nothing yet, unless it starts from another.

    ``base`` identifies the base's weights (:func:`.base_fingerprint`), ``images_per_step`` counts over all processes,
    ``preparation`` says how the images become training images,
    ``initial`` is the adapter that the run starts from, ``held_out`` are images for the validation loss alone. Of a run
    with several subjects there are the ``concepts``, the ``weights`` of their rows, and class images of each in the same
    order, or one folder for all.
    """

    config: TrainingConfig
    examples: list[Example]
    family: Family
    objective: Objective
    adapter: EffiLoRA
    base: dict[str, Any]
    images_per_step: int
    preparation: Preparation
    classes: tuple[ClassFolder, ...] = ()
    initial: AdapterFile | None = None
    concepts: tuple[Concept, ...] = ()
    weights: tuple[float, ...] = ()
    held_out: list[Example] = field(default_factory=list)

    @property
    def prior(self) -> Preservation | None:
        """The class term of the loss."""
        return preservation(self.config, self.images_per_step)

    @property
    def images(self) -> list[Example]:
        """Every image once, also where it is trained at several resolutions."""
        return list({replace(example, resolution=0): example for example in self.examples}.values())

    @property
    def sizes(self) -> list[Size]:
        """Width and height that every image is cut to."""
        how = self.preparation
        return [how.size_of(example.size, example.resolution) for example in self.examples]

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch; as in diffusers' scripts it is as long as the larger of instance and class images."""
        count = max(self.epoch, sum(folder.count for folder in set(self.classes)))
        return max(1, math.ceil(count / self.images_per_step))

    @property
    def epoch(self) -> int:
        """Images of an epoch, each as often as it is repeated."""
        return sum(example.repeats for example in self.examples)

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
    if not config.instance_data_dir and not entries and not config.dataset_config:
        raise EffiLoRAError("--instance_data_dir is missing: the folder with the subject's images")
    groups = scan_concepts([*config.image_data(), *_validation_data(config)], say, config.resolution)
    masks = MaskSource(config.masked_loss, Path(config.mask_dir) if config.mask_dir else None, config.alpha_mask)
    groups = with_masks(groups, masks, say)
    further = groups.pop() if config.validation_data_dir is not None else None
    known = family is None
    family = family or make_family(load_base(config), device, config.max_sequence_length)
    family.guidance_scale = config.guidance_scale
    family.read_tokens(config.max_token_length)
    family.placeholders = tuple(config.token_abstraction) if config.train_text_encoder_ti else ()
    config = _without_unsupported(_with_class(config, family), family, say)
    check_resolution(config.resolution, family)
    set_scheduler(config, family)
    how = preparation(config, family)
    objective = make_objective(config, family)
    base = base_fingerprint(family.model) if known else NO_FINGERPRINT
    word = config.trigger[0] if config.trigger else None
    if entries:
        concepts, examples = name_concepts(entries, groups, family.rarest_word)
        word = concepts[0].triggers[0] if len(concepts) == 1 else None
    else:
        concepts, examples = (), [with_trigger(example, word) for example in groups[0]]
    examples = some_of(examples, config.max_train_samples, config.seed)
    further = None if further is None else [with_trigger(example, word) for example in further]
    examples, held_out = hold_out(examples, further, config.validation_split, config.seed)
    examples = at_resolutions(examples, how, parse_resolutions(config.more_resolutions), say)
    adapter_config = replace(config.adapter_config(concepts), timestep_range=family.timestep_range)
    initial: AdapterFile | None = None
    if config.init_from is None:
        adapter = create_adapter(family.model, adapter_config, config.seed, config.a_start)
    else:
        source = initial_file(config.init_from)
        initial = read_initial(source, family.pipe, family.component, adapter_config)
        config, adapter = start_from(initial.adapter, config, source, concepts)
    config = replace(config, heads=adapter.config.heads)
    text_parts(adapter, config, family, [caption for example in examples for caption in example.captions])
    attach_parts(family.pipe, adapter, "default", attach)
    family.trained = trained_encoders(family, adapter)
    follow_prompts(family.pipe)
    if config.gradient_checkpointing:
        if family.one_by_one and config.routing in ("timestep", "concept"):  # recomputation would see another call's
            raise EffiLoRAError(
                f"{family.title} can't have both --gradient_checkpointing and --routing {config.routing}"
            )
        family.enable_gradient_checkpointing()
    per_step = config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
    classes, weights = class_folders(config, base, entries, known), row_shares(entries, examples, concepts)
    return RunParts(
        config, examples, family, objective, adapter, base, per_step, how, classes, initial, concepts, weights, held_out
    )  # fmt: skip


def _validation_data(config: TrainingConfig) -> list[ConceptData]:
    """The folder of images for the validation loss, as an entry behind those of the subjects; none without one."""
    folder, prompt = config.validation_data_dir, config.instance_prompt
    if folder is None:
        return []
    subset = Subset(folder, prompt, 1, style_of(config), config.caption_extension)
    return [ConceptData(folder, prompt, subsets=(subset,))]


def _with_class(config: TrainingConfig, family: Family) -> TrainingConfig:
    """``config`` with a class prompt where it needs one: its instance prompt without the word that names the subject."""
    if not config.with_prior_preservation or config.class_prompt or config.concepts_list or config.concepts:
        return config
    named = str(config.instance_prompt)
    rest = family.without_subject(named)
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
    if (file := config.dataset_file()) is not None and file.class_subset is not None:
        folders = tuple(folder.as_it_is() for folder in folders)
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
    """``config`` with what follows from the data set that it names: its folder, or the settings of its file.

    See :func:`.dataset_folder` and :func:`.read_dataset_config`; these settings go before others, as in sd-scripts.
    """
    if (file := config.dataset_file()) is not None:
        return replace(config, **file.settings, **_of_classes(file))
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


def _of_classes(file: DatasetConfig) -> dict[str, Any]:
    """The settings that train the folder of class images of a file as sd-scripts does."""
    if file.class_subset is None:
        return {}
    named = {"class_data_dir": file.class_subset.image_dir, "class_prompt": [str(file.class_subset.prompt)]}
    return {"with_prior_preservation": True, "prior_target": "images", **named}


def check_folders(config: TrainingConfig) -> None:
    """Raise :class:`EffiLoRAError` for folders that would be mixed: a run must not learn from what it writes."""
    output = Path(config.output_dir).resolve()
    entries = config.concept_data()
    instances: list[str | None] = [folder for entry in config.image_data() for folder in entry.folders]
    classes: list[str | None] = [config.class_data_dir, *(entry.class_data_dir for entry in entries)]
    named = {"instance_data_dir": instances, "class_data_dir": classes if config.with_prior_preservation else []}
    named["validation_data_dir"] = [config.validation_data_dir]
    masks = Path(config.mask_dir).resolve() if config.mask_dir else None
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
    if any(folder in (masks.parents if masks else ()) for folder in found["instance_data_dir"]):
        raise EffiLoRAError(
            f"--mask_dir {config.mask_dir} is in instance_data_dir, whose images are all trained on: give a folder outside of it"
        )
    if any(_overlap(one, other) for one in found["instance_data_dir"] for other in found["class_data_dir"]):
        raise EffiLoRAError("--class_data_dir and --instance_data_dir must be two folders, neither in the other")


def _is_written(name: str) -> bool:
    return name in (SAMPLES_FOLDER, EARLIER_FOLDER, CACHE_FOLDER) or name.startswith("checkpoint-")


def _overlap(one: Path, other: Path) -> bool:
    return one == other or one in other.parents or other in one.parents


def make_objective(config: TrainingConfig, family: Family) -> Objective:
    """The objective of the family's scheduler; raises :class:`EffiLoRAError` for options that it does not have."""
    return objective_of(config, family, config.resolution)


def preparation(config: TrainingConfig, family: Family) -> Preparation:
    """How a run's images become training images; raises :class:`EffiLoRAError` for sizes that the family can't have."""
    c, found = config, make_buckets(config, config.edges, family)
    return Preparation(
        *(c.resolution, c.center_crop, c.random_flip, c.image_interpolation_mode, c.seed, found),
        *(c.train_batch_size, c.unmasked_weight),
    )  # fmt: skip


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
        train_text=config.train_text_encoder or config.train_text_encoder_ti,
        revision=config.revision,
        variant=config.variant,
        quantization_config=quantization(config.quantization, dtype),
    )

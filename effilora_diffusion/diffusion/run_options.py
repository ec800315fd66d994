"""Every setting of an image training run: its name, default, help and bounds.

Names, meanings and defaults are those of diffusers' ``train_dreambooth_lora.py`` wherever it has them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..core.config import A_STARTS, REDUCER_MODES
from ..core.options import ADAPTER, COUNT, NATURAL, POSITIVE, REDUCER, SHARE, AdapterOptions, Bounds, option
from . import presets

SAVED = {"float": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""torch's names for the values of ``--save_precision``, which are sd-scripts'."""

SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
"""Schedules of the learning rate that are functions of the step."""

PRIOR_TARGETS = ("base", "images")
"""What class rows are held to."""

QUANTIZATIONS = ("bnb-8bit", "bnb-4bit", "torchao-int8", "torchao-float8")
"""Forms the frozen base can be loaded in, by the library that does it."""

OPTIMIZERS = ("adamw", "adamw8bit", "prodigy", "lion", "came", "schedulefree", "adafactor")
"""Optimizers that have a name."""

MODEL = "Model"
DATA = "Images and prompts"
PRIOR = "Prior preservation"
LENGTH = "Length and batches"
OPTIMIZER = "Optimizer"
MEMORY = "Precision and memory"
OUTPUT = "Output and checkpoints"
VALIDATION = "Validation"
"""Groups of settings, as they stand in ``--help``."""


@dataclass
class RunOptions(AdapterOptions):
    """The settings of :class:`.TrainingConfig`, which checks them.

    One head of rank 8 by default, whose plain LoRA is exact: on images it is as good as several of rank 4 (docs/benchmarks.md).
    """

    rank: int = option(8, "rank of the shared A", ADAPTER, bounds=COUNT, usual=True, fixed=True)
    heads: int = option(
        1,
        "B heads per adapted linear: 1 is plain LoRA with a shared A, and exact as such; several are mixed by a router",
        ADAPTER,
        bounds=COUNT,
        usual=True,
        fixed=True,
    )
    a_start: str = option(
        "gaussian",
        "what A starts as: gaussian as in diffusers' scripts, or kaiming, shorter, which takes a higher learning rate",
        ADAPTER,
        choices=A_STARTS,
    )
    reducer: str = option(
        "off",
        "which blocks' heads are trained; depth: those after a cut, chosen by a budget",
        REDUCER,
        choices=REDUCER_MODES,
        fixed=True,
    )
    reducer_time: float | None = option(
        None,
        "share of a full step's time that steps may take on average (measured at the start)",
        REDUCER,
        bounds=SHARE,
        fixed=True,
    )
    reducer_memory: float | None = option(
        None,
        "share of a full step's activations that a step may keep (measured at the start)",
        REDUCER,
        bounds=SHARE,
        fixed=True,
    )
    reducer_depth: float | None = option(
        None,
        "share of the blocks, counted from the last one, that every step trains",
        REDUCER,
        bounds=SHARE,
        fixed=True,
    )
    reducer_plan: str | None = option(
        None, "an earlier run's plan, as CUT:SHARE,CUT:SHARE, instead of measuring", REDUCER, form=False
    )
    preset: str | None = option(
        None,
        "settings that were measured together, for whatever is not named here or in --config",
        MODEL,
        choices=presets.NAMES,
        usual=True,
        form=False,
    )
    pretrained_model_name_or_path: str | None = option(
        None,
        "model folder, hub id or .safetensors checkpoint (default: the embedded base)",
        MODEL,
        usual=True,
        form=False,
    )
    single_file_config: str | None = option(
        None, "model folder or hub id with the configuration and tokenizers of a .safetensors checkpoint", MODEL
    )
    revision: str | None = option(None, "revision of a hub model", MODEL)
    variant: str | None = option(None, "weight variant of the model, e.g. fp16", MODEL)
    instance_data_dir: str | None = option(
        None, "folder with the subject's images (default: the example subject)", DATA, usual=True, form=False
    )
    dataset_name: str | None = option(
        None,
        "hub id or local folder of a data set for the datasets library, instead of instance_data_dir",
        DATA,
        form=False,
    )
    dataset_config_name: str | None = option(None, "configuration of a data set that has several", DATA, form=False)
    image_column: str = option("image", "column of the data set's images", DATA, form=False)
    caption_column: str | None = option(
        None, "column of the data set's captions (default: every image has the instance prompt)", DATA, form=False
    )
    dataset_config: str | None = option(
        None,
        "sd-scripts' TOML file of data sets ([general], [[datasets]], [[datasets.subsets]]), instead of instance_data_dir; "
        "what it says goes before other settings",
        DATA,
        form=False,
    )
    max_train_samples: int | None = option(
        None, "train on so many of the images, drawn by the seed", DATA, bounds=COUNT, form=False
    )
    instance_prompt: str | None = option(
        None,
        "prompt that names the subject, for images without a caption of their own",
        DATA,
        usual=True,
        form=False,
        blank=True,
    )
    concepts_list: str | None = option(
        None,
        "JSON list of several subjects, each with instance_data_dir and instance_prompt, and if needed class_data_dir, "
        "class_prompt, trigger, name and weight",
        DATA,
        usual=True,
        form=False,
    )
    concepts: list[dict[str, Any]] = option(
        [], "the subjects of concepts_list themselves, in a config file", DATA, form=False, command=False
    )
    trigger: list[str] = option(
        [],
        "the word in place of [trigger] in captions and prompts; with routing concept and a single subject also what names it "
        "(default: the words of instance_prompt that no class_prompt has)",
        DATA,
        form=False,
    )
    resolution: int = option(
        512,
        "edge of the training images, in pixels",
        DATA,
        bounds=Bounds(at_least=8, multiple_of=8),
        usual=True,
        fixed=True,
    )
    center_crop: bool = option(False, "crop the centre instead of a random place", DATA, fixed=True)
    random_flip: bool = option(False, "mirror images at random", DATA, fixed=True)
    image_interpolation_mode: str = option("lanczos", "filter for resizing images", DATA, fixed=True)
    max_sequence_length: int | None = option(
        None, "longest prompt in tokens (default: what the pipeline samples with)", DATA, bounds=COUNT, fixed=True
    )
    max_token_length: int = option(
        75,
        "most tokens that are read of a prompt in training, in chunks of 75, by Stable Diffusion 1.x, 2.x and XL (sd-scripts' "
        "name; its values are 75, 150 and 225); drawing reads all",
        DATA,
        bounds=Bounds(at_least=75, multiple_of=75),
        fixed=True,
    )
    class_data_dir: str | None = option(
        None,
        "folder with class images, filled up if needed (default: none, the class prompts go with the instance images)",
        PRIOR,
        form=False,
    )
    class_prompt: list[str] = option(
        [],
        "prompt of the class, e.g. 'a cat'; class images are shared out among several prompts (default with prior_target base: "
        "the instance_prompt without the word that names the subject)",
        PRIOR,
        usual=True,
    )
    with_prior_preservation: bool = option(
        False, "also train on the class, so that the model does not forget what it knows of it", PRIOR, usual=True
    )
    prior_target: str = option(
        "base",
        "what the class is held to: the frozen base's own prediction, or the class images themselves as in diffusers",
        PRIOR,
        choices=PRIOR_TARGETS,
        fixed=True,
    )
    prior_interval: int | None = option(
        None,
        "instance images per class image (default: about one class image a step with prior_target base, else 1)",
        PRIOR,
        bounds=COUNT,
        fixed=True,
    )
    prior_loss_weight: float | None = option(
        None,
        "weight of the prior preservation loss (default: 3 with prior_target base, else 1)",
        PRIOR,
        bounds=NATURAL,
        fixed=True,
    )
    num_class_images: int = option(100, "number of class images used; missing ones are drawn", PRIOR, bounds=COUNT)
    train_batch_size: int = option(
        4, "images per micro-batch and process", LENGTH, bounds=COUNT, usual=True, fixed=True
    )
    gradient_accumulation_steps: int = option(
        1, "micro-batches per optimizer step", LENGTH, bounds=COUNT, usual=True, fixed=True
    )
    num_train_epochs: int = option(1, "epochs, if max_train_steps is not given", LENGTH, bounds=COUNT, form=False)
    max_train_steps: int | None = option(None, "optimizer steps", LENGTH, bounds=COUNT, usual=True)
    seed: int = option(
        0,
        "seed of everything that is drawn",
        LENGTH,
        bounds=Bounds(at_least=0, at_most=2**63 - 1),
        usual=True,
        fixed=True,
        form=False,
    )
    learning_rate: float = option(
        5e-4,
        "peak learning rate (the embedded base without a rate: 4e-3 with a_start kaiming)",
        OPTIMIZER,
        bounds=POSITIVE,
        usual=True,
        fixed=True,
    )
    scale_lr: bool = option(
        False, "multiply the learning rate by processes, accumulation and batch size", OPTIMIZER, fixed=True
    )
    lr_scheduler: str = option(
        "constant",
        "schedule of the learning rate, by diffusers' names",
        OPTIMIZER,
        choices=SCHEDULES,
        usual=True,
        fixed=True,
    )
    lr_warmup_steps: int = option(0, "warm-up steps of the schedule", OPTIMIZER, bounds=NATURAL, fixed=True)
    lr_num_cycles: int = option(1, "cycles of cosine_with_restarts", OPTIMIZER, bounds=COUNT, fixed=True)
    lr_power: float = option(1.0, "power of the polynomial schedule", OPTIMIZER, bounds=NATURAL, fixed=True)
    optimizer: str = option(
        "adamw",
        f"{', '.join(OPTIMIZERS)}, or a class by its import path",
        OPTIMIZER,
        fixed=True,
    )
    optimizer_args: list[str] = option([], "further arguments of the optimizer, as KEY=VALUE", OPTIMIZER, fixed=True)
    loraplus_lr_ratio: float = option(
        1.0,
        "learning rate of the heads (B) relative to that of A, as in LoRA+",
        OPTIMIZER,
        bounds=POSITIVE,
        fixed=True,
    )
    router_lr_ratio: float = option(
        1.0, "learning rate of the routers relative to that of A", OPTIMIZER, bounds=POSITIVE, fixed=True
    )
    use_ema: bool = option(False, "keep and draw with a moving average of the weights", OPTIMIZER, fixed=True)
    ema_decay: float = option(
        0.999,
        "most that the moving average keeps of the past",
        OPTIMIZER,
        bounds=Bounds(at_least=0, below=1),
        fixed=True,
    )
    adam_beta1: float = option(0.9, "AdamW's beta1", OPTIMIZER, bounds=Bounds(at_least=0, below=1), fixed=True)
    adam_beta2: float = option(0.999, "AdamW's beta2", OPTIMIZER, bounds=Bounds(at_least=0, below=1), fixed=True)
    adam_weight_decay: float = option(1e-2, "AdamW's weight decay", OPTIMIZER, bounds=NATURAL, fixed=True)
    adam_epsilon: float = option(1e-8, "AdamW's epsilon", OPTIMIZER, bounds=POSITIVE, fixed=True)
    max_grad_norm: float = option(1.0, "gradient clipping", OPTIMIZER, bounds=POSITIVE, fixed=True)
    gradient_checkpointing: bool = option(False, "recompute activations: less memory, slower", MEMORY, usual=True)
    mixed_precision: str = option(
        "no", "type of the frozen base's weights", MEMORY, choices=("no", "fp16", "bf16"), usual=True, fixed=True
    )
    quantization: str | None = option(
        None,
        "quantise the frozen base: needs bitsandbytes (bnb) or torchao and mostly a GPU",
        MEMORY,
        choices=QUANTIZATIONS,
        fixed=True,
    )
    allow_tf32: bool = option(False, "TF32 matrix products on Ampere and later", MEMORY)
    sample_batch_size: int = option(4, "batch size when drawing class and validation images", MEMORY, bounds=COUNT)
    output_dir: str = option(
        "lora-dreambooth-model", "folder for everything the run writes", OUTPUT, usual=True, form=False
    )
    save_precision: str = option(
        "float",
        "type of the weights in the adapter and its plain forms; checkpoints keep float32",
        OUTPUT,
        choices=tuple(SAVED),
    )
    report_to: list[str] = option(
        [],
        "trackers to show metrics and images in: tensorboard, wandb, comet_ml, trackio, ... (see accelerate), all or none "
        "(default: tensorboard where it is installed)",
        OUTPUT,
    )
    logging_dir: str = option("logs", "folder for trackers' files, in output_dir", OUTPUT, form=False)
    push_to_hub: bool = option(False, "upload the result to the Hugging Face hub at the end", OUTPUT, form=False)
    hub_model_id: str | None = option(
        None, "model on the hub to upload to (default: the name of output_dir, in your account)", OUTPUT, form=False
    )
    hub_token: str | None = option(
        None, "token for the upload (default: that of `hf auth login`, or HF_TOKEN)", OUTPUT, form=False
    )
    export_distillation_steps: int = option(
        60,
        "optimizer steps in which the plain LoRA learns the adapter's predictions, where it can't be exact; 0: only "
        "fitted by least squares",
        OUTPUT,
        bounds=NATURAL,
    )
    overwrite_output_dir: bool = option(
        False, "replace an earlier run found in output_dir, once this one has saved its adapter", OUTPUT, form=False
    )
    dry_run: bool = option(False, "only load, check and print the report; write and train nothing", OUTPUT, form=False)
    checkpointing_steps: int = option(500, "optimizer steps between checkpoints", OUTPUT, bounds=COUNT)
    checkpoints_total_limit: int | None = option(
        None, "number of newest checkpoints to keep, beside one between two of them at the end", OUTPUT, bounds=COUNT
    )
    resume_from_checkpoint: str | None = option(
        None, "'latest', a checkpoint's name, or its folder", OUTPUT, form=False
    )
    validation_prompt: list[str] = option(
        [], "one or more prompts drawn on fixed seeds into a grid", VALIDATION, usual=True
    )
    num_validation_images: int = option(4, "images per validation prompt; 0: none", VALIDATION, bounds=NATURAL)
    validation_steps: int | None = option(
        None, "optimizer steps between grids (default: first and last only)", VALIDATION, bounds=COUNT
    )
    validation_epochs: int | None = option(
        None, "epochs between grids, if validation_steps is not given", VALIDATION, bounds=COUNT
    )
    validation_split: float | None = option(
        None,
        "share of the images that is held out, for the loss on fixed noise with every grid and checkpoint (validation_loss)",
        VALIDATION,
        bounds=Bounds(above=0, below=1),
    )
    validation_data_dir: str | None = option(
        None, "folder with images for the validation loss, instead of validation_split", VALIDATION, form=False
    )
    validation_inference_steps: int | None = option(
        None, "sampling steps of validation and class images (default: the pipeline's own)", VALIDATION, bounds=COUNT
    )
    validation_guidance_scale: float | None = option(
        None, "guidance of validation and class images (default: the pipeline's own)", VALIDATION, bounds=NATURAL
    )
    judge: str | None = option(
        None,
        "what likeness of validation images is measured with: folder or hub id of a DINOv2 or CLIP, efficientnet or none "
        "(default: efficientnet where its package is installed); a named judge also sees every checkpoint, and the best one is "
        "kept",
        VALIDATION,
    )

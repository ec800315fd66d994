"""One training run of any adapter on any device, step by step: ours through its trainer, PEFT's in its place.

Both take the same batches, noise, loss, schedule and optimizer; what differs is the adapter.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftConfig, get_peft_model_state_dict
from safetensors.torch import save_file

from effilora_diffusion import save_adapter
from effilora_diffusion.core.errors import EffiLoRAError
from effilora_diffusion.diffusion.config import TrainingConfig
from effilora_diffusion.diffusion.data.folder import scan_images
from effilora_diffusion.diffusion.data.latents import ExampleSource
from effilora_diffusion.diffusion.data.prior import without_images
from effilora_diffusion.diffusion.models import Family, make_family
from effilora_diffusion.diffusion.training.batches import BatchDrawer
from effilora_diffusion.diffusion.training.build import RunParts, load_base, make_objective, place, preparation
from effilora_diffusion.diffusion.training.loop import Loop
from effilora_diffusion.diffusion.training.loss import Objective, batch_loss
from effilora_diffusion.diffusion.training.optim import learning_rates
from effilora_diffusion.diffusion.training.preservation import preservation
from effilora_diffusion.diffusion.training.trainer import Trainer

Change = Callable[[Family], Objective | None]
"""Called before prompts are encoded; may change how, and returns another objective than the family's own."""


@dataclass
class Started:
    """A run before its first step.

    Args:
        family: the model with its adapter.
        loop: takes the steps.
        base: context in which the model is the frozen base.
        training: called with whether the adapter is being trained.
        save: writes what a user would keep to a file.
        settings: of the adapter, for the record.
        release: called when the run is over.
    """

    family: Family
    loop: Loop[Any]
    base: Callable[[], AbstractContextManager[Any]]
    training: Callable[[bool], Any]
    save: Callable[[Path], Any]
    settings: dict[str, Any]
    release: Callable[[], Any] = lambda: None

    @property
    def trained(self) -> int:
        """Trained parameters."""
        return sum(value.numel() for value in self.loop.parameters)


def start_ours(config: TrainingConfig, change: Change) -> Started:
    """A run with an EffiLoRA adapter; ``config`` decides everything."""

    class Changed(Trainer):
        """A trainer whose family is changed before anything is encoded."""

        def _build(self) -> RunParts:
            parts = super()._build()
            parts.objective = change(parts.family) or parts.objective
            return parts

    folder = tempfile.TemporaryDirectory()  # the Reducer's log of another row must not lie there
    trainer = Changed(replace(config, output_dir=folder.name), Accelerator(cpu=not torch.cuda.is_available()))
    adapter = trainer.adapter

    def release() -> None:
        trainer.folder.release()
        folder.cleanup()

    return Started(
        trainer.family,
        trainer.loop,
        adapter.disabled,
        adapter.train,
        lambda path: save_adapter(adapter, path, trainer.family.pipe),
        adapter.config.to_dict(),
        release,
    )


@contextlib.contextmanager
def _without(model: Any) -> Iterator[None]:
    """The model without its PEFT adapter in this context."""
    model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()


def start_peft(config: TrainingConfig, adapter: PeftConfig, change: Change) -> Started:
    """A run with one of PEFT's adapters, with the settings of ``config`` for everything else."""
    if config.class_data_dir is not None:
        raise EffiLoRAError("PEFT's rows are compared without class images: leave class_data_dir out")
    torch.manual_seed(config.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    family = make_family(load_base(config), device, config.max_sequence_length)
    family.guidance_scale = config.guidance_scale
    objective = change(family) or make_objective(config, family)
    model = family.model
    model.add_adapter(adapter)
    parameters = [value for value in model.parameters() if value.requires_grad]
    for value in parameters:
        value.data = value.data.float()  # as ours, and as PEFT's autocast_adapter_dtype, on a half-precision base
    if config.gradient_checkpointing:
        family.enable_gradient_checkpointing()
    examples, _ = scan_images(Path(str(config.instance_data_dir)), config.instance_prompt)
    prior = preservation(config, config.train_batch_size)
    instance = ExampleSource(family, examples, preparation(config, family), "instance")
    classes = None
    if prior is not None:
        classes = ExampleSource(
            family, without_images(examples, config.class_prompt), preparation(config, family), "class"
        )
    with family.encoders():
        for source in (instance, classes):
            if source is not None:
                source.fill(everything=device.type != "cpu")
    place(model, device)
    drawer, size, steps = BatchDrawer(family, objective, instance, classes, prior), config.train_batch_size, 0
    steps = config.max_train_steps or steps
    betas = (config.adam_beta1, config.adam_beta2)
    optimizer = torch.optim.AdamW(
        parameters, config.learning_rate, betas, config.adam_epsilon, config.adam_weight_decay, fused=True
    )
    loop: Loop[Any] = Loop(
        parameters,
        optimizer,
        learning_rates(config, steps, config.learning_rate),
        lambda step, micro: drawer.draw(step * size, size),
        lambda batch: batch_loss(family, objective, batch, device, prior, partial(_without, model)),
        max_grad_norm=config.max_grad_norm,
    )
    settings = {key: sorted(value) if isinstance(value, set) else value for key, value in adapter.to_dict().items()}
    return Started(family, loop, partial(_without, model), model.train, partial(_save_peft, model), settings)


def _save_peft(model: Any, path: Path) -> None:
    """The adapter's tensors as PEFT saves them."""
    found = get_peft_model_state_dict(model, adapter_name="default")
    save_file({name: value.contiguous().cpu() for name, value in found.items()}, path)

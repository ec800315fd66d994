"""Other methods in our training loop's place: the same batches, loss, schedule and optimizer, another adapter."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PEFT_TYPE_TO_TUNER_MAPPING, LoraConfig, PeftConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from effilora_diffusion.diffusion.config import TrainingConfig
from effilora_diffusion.diffusion.data.folder import scan_images
from effilora_diffusion.diffusion.data.latents import Batch, ExampleSource
from effilora_diffusion.diffusion.data.prior import ClassFolder, class_examples, without_images
from effilora_diffusion.diffusion.models import Family, make_family
from effilora_diffusion.diffusion.training.batches import BatchDrawer
from effilora_diffusion.diffusion.training.build import load_base, make_objective, preparation, sampler
from effilora_diffusion.diffusion.training.loop import Loop
from effilora_diffusion.diffusion.training.loss import batch_loss
from effilora_diffusion.diffusion.training.optim import learning_rates
from effilora_diffusion.diffusion.training.preservation import preservation

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
"""A UNet's attention projections, which every method adapts."""


@dataclass
class Fitted:
    """What a method has put on a model.

    Args:
        parameters: what it trains.
        base: context in which the model is the frozen base.
        save: writes what a user would keep to a file.
        route: called with the captions of every batch, for heads that prompts choose.
        acting: context in which what was trained acts on every prompt.
        penalty: added to the loss.
        after_step: called between an optimizer step and the end of its gradients, with the number of steps before it.
        finish: called after the last step.
    """

    parameters: list[torch.nn.Parameter]
    base: Callable[[], AbstractContextManager[Any]]
    save: Callable[[Path], Any]
    route: Callable[[list[str]], Any] = lambda captions: None
    acting: Callable[[], AbstractContextManager[Any]] = nullcontext
    penalty: Callable[[], Tensor] | None = None
    after_step: Callable[[int], Any] | None = None
    finish: Callable[[], Any] = lambda: None


Fit = Callable[[Family, TrainingConfig], Fitted]
"""Puts a method on a family's model, with a run's settings."""


@dataclass
class Outcome:
    """A finished run: its model, what it has trained, the losses of its steps, and the CPU time these took."""

    family: Family
    fitted: Fitted
    losses: list[float]
    seconds: float


def tune(model: torch.nn.Module, config: PeftConfig) -> Any:
    """Put one of PEFT's methods on ``model``; returns its tuner, whose parameters alone take gradients."""
    tuner = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type](model, config, "default")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # as ours, also on a half-precision base
    return tuner


def trained(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The parameters that take gradients."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def inject(
    model: torch.nn.Module,
    rank: int,
    alpha: float | None = None,
    targets: list[str] | None = None,
    init: bool | str = True,
) -> list[torch.nn.Parameter]:
    """Add a PEFT LoRA on ``targets`` (default: a UNet's attention projections); returns what it trains.

    ``init`` is PEFT's ``init_lora_weights``: its usual rule (Kaiming), or ``"gaussian"`` as in diffusers' scripts.
    """
    tune(model, lora_config(rank, alpha, targets, init))
    return trained(model)


def lora_config(
    rank: int, alpha: float | None = None, targets: list[str] | None = None, init: bool | str = True, **options: Any
) -> LoraConfig:
    """PEFT's LoRA with the scale 1 unless ``alpha`` says otherwise."""
    return LoraConfig(
        r=rank,
        lora_alpha=alpha or rank,  # type: ignore[arg-type]
        target_modules=targets or list(TARGETS),
        init_lora_weights=init,  # type: ignore[arg-type]
        **options,
    )


def fit_peft(family: Family, config: PeftConfig, tuned: Callable[[Any], Any] = lambda tuner: None) -> Fitted:
    """One of PEFT's methods on a family's model; ``tuned`` gets its tuner."""
    tuner = tune(family.model, config)
    tuned(tuner)

    @contextmanager
    def base() -> Iterator[None]:
        tuner.disable_adapter_layers()
        try:
            yield
        finally:
            tuner.enable_adapter_layers()

    def save(path: Path) -> None:
        tensors = get_peft_model_state_dict(family.model, adapter_name="default")
        save_file({name: value.contiguous() for name, value in tensors.items()}, path)

    return Fitted(trained(family.model), base, save)


def fit_lora(family: Family, config: TrainingConfig) -> Fitted:
    """PEFT's LoRA with the rank and alpha of ``config``."""
    return fit_peft(family, lora_config(config.rank, config.lora_alpha))


def batches(config: TrainingConfig, family: Family) -> BatchDrawer:
    """The micro-batches that a :class:`.Trainer` with these settings would train on."""
    examples, _ = scan_images(Path(str(config.instance_data_dir)), config.instance_prompt)
    classes, prior = [], preservation(config, config.train_batch_size)
    if prior is not None and config.class_data_dir is None:
        classes = without_images(examples, config.class_prompt)
    elif prior is not None:
        folder = ClassFolder(
            Path(str(config.class_data_dir)), config.class_prompt, config.num_class_images, config.seed
        )
        classes = class_examples(folder, sampler(config, family), print)
    sources = [
        ExampleSource(family, group, preparation(config, family), purpose) if group else None
        for group, purpose in ((examples, "instance"), (classes, "class"))
    ]
    for source in sources:
        if source is not None:
            source.fill()
    assert sources[0] is not None
    return BatchDrawer(family, make_objective(config, family), sources[0], sources[1], prior)


def train(config: TrainingConfig, fit: Fit = fit_lora) -> Outcome:
    """Train one method (PEFT's LoRA by default) with the settings of ``config``."""
    torch.manual_seed(config.seed)
    device = torch.device("cpu")
    family = make_family(load_base(config), device)
    drawer = batches(config, family)
    fitted = fit(family, config)
    optimizer = torch.optim.AdamW(
        fitted.parameters,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
        fused=True,
    )
    steps, size, losses = int(config.max_train_steps or 0), config.train_batch_size, list[float]()
    if fitted.after_step is not None:
        after = fitted.after_step
        optimizer.register_step_post_hook(lambda *_: after(len(losses)))

    def loss(batch: Batch) -> Tensor:
        fitted.route(batch.captions)
        found = batch_loss(family, drawer.objective, batch, device, drawer.prior, fitted.base)
        return found if fitted.penalty is None else found + fitted.penalty()

    loop = Loop(
        fitted.parameters,
        optimizer,
        learning_rates(config, steps, config.learning_rate),
        lambda step, micro: drawer.draw(step * size, size),
        loss,
        max_grad_norm=config.max_grad_norm,
    )
    began = time.process_time()
    loop.run(0, steps, lambda done, figures: losses.append(figures["loss"]))
    seconds = time.process_time() - began
    fitted.finish()
    return Outcome(family, fitted, losses, seconds)

"""PEFT's LoRA in our training loop's place: the same batches, loss, schedule and optimizer, another adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from effilora_diffusion.diffusion.config import TrainingConfig
from effilora_diffusion.diffusion.data.folder import scan_images
from effilora_diffusion.diffusion.data.latents import ExampleSource
from effilora_diffusion.diffusion.data.prior import ClassFolder, class_examples, without_images
from effilora_diffusion.diffusion.models import Family, make_family
from effilora_diffusion.diffusion.training.batches import BatchDrawer
from effilora_diffusion.diffusion.training.build import load_base, make_objective, preparation, sampler
from effilora_diffusion.diffusion.training.loop import Loop
from effilora_diffusion.diffusion.training.loss import batch_loss
from effilora_diffusion.diffusion.training.optim import learning_rates
from effilora_diffusion.diffusion.training.preservation import preservation


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
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha or rank,
        target_modules=targets or ["to_q", "to_k", "to_v", "to_out.0"],
        init_lora_weights=init,
    )
    model.add_adapter(config)  # type: ignore[operator]
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()  # as ours, also on a half-precision base
    return trained


@contextmanager
def _disabled(model: Any) -> Iterator[None]:
    """The model without its LoRA in this context."""
    model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()


def train(
    config: TrainingConfig,
    init: bool | str = True,
    after_step: Callable[[int, dict[str, float]], None] | None = None,
    seed: int | None = None,
) -> Family:
    """Train a PEFT LoRA with the settings of ``config`` (its rank, not its heads); returns the adapted model.

    ``init`` is as in :func:`inject`; ``after_step`` gets the number of steps done and the step's figures; ``seed``
    is A's, where it is not the run's.
    """
    torch.manual_seed(config.seed if seed is None else seed)
    device = torch.device("cpu")
    family = make_family(load_base(config), device)
    objective = make_objective(config, family)
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
        ExampleSource(family, group, preparation(config), purpose) if group else None
        for group, purpose in ((examples, "instance"), (classes, "class"))
    ]
    for source in sources:
        if source is not None:
            source.fill()
    assert sources[0] is not None
    drawer = BatchDrawer(family, objective, sources[0], sources[1], prior)
    parameters = inject(family.model, config.rank, config.lora_alpha, init=init)
    optimizer = torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        fused=True,
    )
    assert config.max_train_steps is not None
    size = config.train_batch_size
    Loop(
        parameters,
        optimizer,
        learning_rates(config, config.max_train_steps, config.learning_rate),
        lambda step, micro: drawer.draw(step * size, size),
        lambda batch: batch_loss(family, objective, batch, device, prior, partial(_disabled, family.model)),
        max_grad_norm=config.max_grad_norm,
    ).run(0, config.max_train_steps, after_step)
    return family

"""The methods of :mod:`.board`: how each is put on the embedded base, and the learning rates it is tried at.

All adapt the 56 attention projections, but "full UNet". Sizes are chosen to be near that of a LoRA of rank 4 (73,472
parameters) where the method allows it: token routing has 1.5 times as many at its defaults, AdaLoRA until it has dropped a third
of its ranks, and VeRA, whose two projections are random and frozen, a third (more would need a rank far above the layers' width).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, LoKrConfig, OFTConfig, PeftConfig, VeraConfig
from safetensors.torch import save_file
from torch import Tensor

from effilora_diffusion.core import AdapterFile, EffiLoRA, save_adapter_file
from effilora_diffusion.core.concepts import Concept
from effilora_diffusion.diffusion.adapters.processors import attach, create_adapter
from effilora_diffusion.diffusion.adapters.prompts import follow_prompts
from effilora_diffusion.diffusion.config import TrainingConfig
from effilora_diffusion.diffusion.models import Family

from .peft_baseline import TARGETS, Fit, Fitted, fit_lora, fit_peft, lora_config

SMALLER = (1e-3, 2e-3, 4e-3, 8e-3)
USUAL = (2e-3, 4e-3, 8e-3, 1.6e-2)
LARGER = (8e-3, 1.6e-2, 3.2e-2, 6.4e-2)
FULL = (1e-4, 2e-4, 4e-4, 8e-4)
"""Learning rates, each twice the one before; smaller ones where nothing holds the model to the base's own predictions."""


@dataclass(frozen=True)
class Method:
    """One method.

    Args:
        fit: puts it on a model.
        rates: that it is tried at, ascending.
        settings: that differ from the example's.
        trace_rate: of the short run that tells whether it is still the same method.
    """

    fit: Fit
    rates: tuple[float, ...] = USUAL
    settings: Mapping[str, Any] = field(default_factory=dict)
    trace_rate: float = 8e-3


def peft(make: Callable[[TrainingConfig], PeftConfig]) -> Fit:
    """One of PEFT's methods, of a run's settings."""
    return lambda family, config: fit_peft(family, make(config))


def fit_adalora(family: Family, config: TrainingConfig) -> Fitted:
    """AdaLoRA from rank 6 to an average of 4, with PEFT's penalty on bases that are not orthogonal.

    PEFT adds the penalty to losses that a model computes itself, which a denoiser does not.
    """
    steps = int(config.max_train_steps or 0)
    shape = AdaLoraConfig(
        init_r=6, target_r=4, lora_alpha=6, target_modules=list(TARGETS), total_step=steps, tinit=steps // 10,
        tfinal=steps // 2, deltaT=max(steps // 40, 1)
    )  # fmt: skip
    tuners: list[Any] = []
    fitted = fit_peft(family, shape, tuners.append)
    named = dict(family.model.named_parameters())
    bases = [p if ".lora_A." in name else p.T for name, p in named.items() if ".lora_A." in name or ".lora_B." in name]

    def penalty() -> Tensor:
        gaps = [torch.linalg.matrix_norm(one @ one.T - torch.eye(len(one))) for one in bases]
        return shape.orth_reg_weight * torch.stack(gaps).mean()

    def save(path: Path) -> None:  # as PEFT's files: the ranks that are kept, which it can only write of a PeftModel
        layers = {name.rpartition(".lora_E.")[0]: p.detach() for name, p in named.items() if ".lora_E." in name}
        tensors: dict[str, Tensor] = {}
        for layer, scales in layers.items():
            kept = scales[:, 0] != 0
            a, b = (named[f"{layer}.{part}.default"].detach() for part in ("lora_A", "lora_B"))
            tensors |= {f"{layer}.lora_E": scales[kept], f"{layer}.lora_A": a[kept], f"{layer}.lora_B": b[:, kept]}
        save_file({name: value.contiguous() for name, value in tensors.items()}, path)

    return replace(fitted, penalty=penalty, after_step=tuners[0].update_and_allocate, save=save)


def fit_full(wanted: Callable[[str], bool]) -> Fit:
    """The base's own weights of the modules that are ``wanted`` by name, without an adapter."""

    def fit(family: Family, config: TrainingConfig) -> Fitted:
        named = {name: p for name, p in family.model.named_parameters() if wanted(name.rpartition(".")[0])}
        family.model.requires_grad_(False)
        frozen = {name: parameter.detach().clone() for name, parameter in named.items()}
        for parameter in named.values():
            parameter.requires_grad_(True)

        @contextmanager
        def base() -> Iterator[None]:
            kept = {name: parameter.data for name, parameter in named.items()}
            try:
                for name, parameter in named.items():
                    parameter.data = frozen[name]
                yield
            finally:
                for name, parameter in named.items():
                    parameter.data = kept[name]

        def save(path: Path) -> None:
            save_file({name: parameter.detach().contiguous() for name, parameter in named.items()}, path)

        return Fitted(list(named.values()), base, save)

    return fit


def fit_ours(family: Family, config: TrainingConfig) -> Fitted:
    """The adapter that ``config`` describes."""
    return _fitted(
        family,
        attach(family.model, create_adapter(family.model, config.adapter_config(), config.seed, config.a_start)),
    )


def fit_concept(family: Family, config: TrainingConfig) -> Fitted:
    """A head that acts where a prompt has the trigger: the last word but one of the instance prompt."""
    prompt = str(config.instance_prompt)
    concept = Concept("subject", (prompt.split()[-2],), prompt)
    shape = replace(config.adapter_config(), routing="concept", heads=1, concepts=(concept,))
    adapter = attach(family.model, create_adapter(family.model, shape, config.seed, config.a_start))
    follow_prompts(family.pipe)

    @contextmanager
    def acting() -> Iterator[None]:
        adapter.set_concept(concept.name)
        try:
            yield
        finally:
            adapter.clear_concept()

    route = lambda captions: adapter.route(adapter.prompt_gates(captions))  # noqa: E731
    fitted = _fitted(family, adapter)
    return replace(fitted, route=route, acting=acting, finish=lambda: adapter.eval().clear_concept())


def _fitted(family: Family, adapter: EffiLoRA) -> Fitted:
    adapter.train()
    save = lambda path: save_adapter_file(path, AdapterFile(adapter, {}, {}))  # noqa: E731
    return Fitted(list(adapter.parameters()), adapter.disabled, save, finish=adapter.eval)


def is_attention(module: str) -> bool:
    """Whether a module of that name is one of the adapted projections."""
    return module.endswith(tuple(f".{target}" for target in TARGETS))


def of_block(**shape: Any) -> dict[str, Any]:
    """Options that all of PEFT's methods take."""
    return {"target_modules": list(TARGETS), **shape}


METHODS: dict[str, Method] = {
    "LoRA, standard": Method(fit_lora, SMALLER, {"rank": 4, "prior_target": "images"}),
    "LoRA": Method(fit_lora, settings={"rank": 4}),
    "DoRA": Method(peft(lambda config: lora_config(4, use_dora=True))),
    "LoKr": Method(peft(lambda config: LoKrConfig(r=16, alpha=16, decompose_factor=4, **of_block()))),
    "OFT": Method(peft(lambda config: OFTConfig(oft_block_size=16, use_cayley_neumann=True, **of_block()))),
    "VeRA": Method(peft(lambda config: VeraConfig(r=256, save_projection=False, **of_block())), LARGER),
    "AdaLoRA": Method(fit_adalora),
    "HydraLoRA": Method(fit_ours, settings={"a_sharing": "none", "rank": 2, "heads": 3}),
    "full attention": Method(fit_full(is_attention), FULL, trace_rate=4e-4),
    "full UNet": Method(fit_full(lambda name: True), FULL, trace_rate=4e-4),
    "EffiLoRA, token": Method(fit_ours, settings={"rank": 4, "heads": 3}),
    "EffiLoRA, one head": Method(fit_ours, settings={"rank": 8, "heads": 1}),
    "EffiLoRA, concept": Method(fit_concept, settings={"rank": 8, "heads": 1}),
}
"""Class rows are held to the base's own prediction, but for "LoRA, standard", which is diffusers' DreamBooth."""

STANDARD = "LoRA, standard"
"""What the others are compared with."""

MAIN = (STANDARD, "LoRA", "EffiLoRA, token", "EffiLoRA, one head", "EffiLoRA, concept")
"""Methods that are measured on several seeds; the others on fewer."""

"""Samplers by the names that people know, as diffusers' schedulers; a model's own scheduler is never changed."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import diffusers
from torch import Generator

from ...core import EffiLoRAError
from ..models import Family, family_class
from .sampler_names import KARRAS, NAMES, known_name

_KARRAS = {"use_karras_sigmas": True}
_EVEN = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
_SDE = {"algorithm_type": "sde-dpmsolver++"}
_MULTISTEP = {
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "final_sigmas_type": "zero",
    "lower_order_final": True,
}

DDPM: dict[str, tuple[str, dict[str, Any]]] = {
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler a": ("EulerAncestralDiscreteScheduler", {}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", _MULTISTEP),
    "DPM++ 2M SDE": ("DPMSolverMultistepScheduler", {**_MULTISTEP, **_SDE}),
    "DPM++ SDE": ("DPMSolverSinglestepScheduler", {**_MULTISTEP, **_SDE}),
    "DPM2": ("KDPM2DiscreteScheduler", {}),
    "DPM2 a": ("KDPM2AncestralDiscreteScheduler", {}),
    "UniPC": ("UniPCMultistepScheduler", {"solver_order": 2, "final_sigmas_type": "zero"}),
    "DEIS": ("DEISMultistepScheduler", {"algorithm_type": "deis", "solver_order": 2, "solver_type": "logrho"}),
    "PLMS": ("PNDMScheduler", {"skip_prk_steps": True}),
    "DDIM": ("DDIMScheduler", {}),
    "DDPM": ("DDPMScheduler", {}),
    "LCM": ("LCMScheduler", {}),
    "TCD": ("TCDScheduler", {}),
}
"""Of models that predict noise or v; names that end with Karras have his noise levels."""

_FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}

FLOW: dict[str, tuple[str, dict[str, Any]]] = {
    "Euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "Heun": ("FlowMatchHeunDiscreteScheduler", {}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {**_MULTISTEP, **_FLOW}),
    "UniPC": ("UniPCMultistepScheduler", {"solver_order": 2, "final_sigmas_type": "zero", **_FLOW}),
    "LCM": ("FlowMatchLCMScheduler", {}),
}
"""Of models of flow matching."""


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler is one of flow matching."""
    config = scheduler.config
    named = type(scheduler).__name__.startswith("FlowMatch")
    return named or bool(config.get("use_flow_sigmas")) or config.get("prediction_type") == "flow_prediction"


def sampler_names(pipe: Any) -> list[str]:
    """The samplers that ``pipe`` can draw with besides its own; empty for schedulers of other kinds.

    Example:
        >>> sampler_names(flux_pipeline)
        ['Euler', 'DPM++ 2M', 'UniPC', 'LCM']
    """
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None:
        return []
    if is_flow(scheduler):
        return _flow_names(family_class(pipe) or Family, bool(scheduler.config.get("use_dynamic_shifting")))
    if scheduler.config.get("beta_schedule") is None and scheduler.config.get("beta_start") is None:
        return []
    return [name for name in NAMES if _entry(name, DDPM) is not None]


def _flow_names(family: type[Family], shifts: bool) -> list[str]:
    """The family's samplers, ``shifts``: by the size of the image, which Heun can't; others' DPM++ 2M has no other way."""
    own = family.flow_samplers
    without = {"Heun"} if shifts else set() if "Heun" in own else {"DPM++ 2M"}
    return [name for name in own if name not in without]


def _entry(name: str, table: dict[str, tuple[str, dict[str, Any]]]) -> tuple[str, dict[str, Any]] | None:
    """Class and options of a name; ``None`` for Karras' noise levels where the class has none."""
    bare = name.removesuffix(f" {KARRAS}")
    if bare not in table:
        return None
    kind, options = table[bare]
    accepted = inspect.signature(getattr(diffusers, kind).__init__).parameters
    if bare != name:
        return (kind, {**options, **_EVEN, **_KARRAS}) if "use_karras_sigmas" in accepted else None
    return kind, {**{key: value for key, value in _EVEN.items() if key in accepted}, **options}


def make_scheduler(pipe: Any, name: str) -> Any:
    """A new scheduler for ``pipe`` by a sampler's name, with the noise schedule and prediction of its own.

    Raises :class:`EffiLoRAError` for names that the pipeline can't have.
    """
    named, possible = known_name(name), sampler_names(pipe)
    if named not in possible:
        raise EffiLoRAError(
            f"this model can't generate with the sampler {name[:40]!r}: leave it out, or choose one of {', '.join(possible)}"
            if possible
            else f"this model can only generate with its own sampler, not with {name[:40]!r}: leave it out"
        )
    own = pipe.scheduler
    flow = is_flow(own)
    entry = _entry(named, FLOW if flow else DDPM)
    assert entry is not None
    kind, options = getattr(diffusers, entry[0]), dict(entry[1])
    if flow and "flow_shift" in inspect.signature(kind.__init__).parameters:
        options["flow_shift"] = own.config.get("flow_shift") or own.config.get("shift") or 1.0
    if flow and "shift" in inspect.signature(kind.__init__).parameters:
        options["shift"] = own.config.get("shift") or own.config.get("flow_shift") or 1.0
    return kind.from_config({**own.config}, **options)


def own_sampler(pipe: Any) -> str | None:
    """The name of the pipeline's own scheduler, where it is one of the list."""
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None:
        return None
    kind, config = type(scheduler).__name__, scheduler.config
    for name, (of, options) in (FLOW if is_flow(scheduler) else DDPM).items():
        telling = {key: value for key, value in options.items() if key == "algorithm_type"}
        if of == kind and all(config.get(key) == value for key, value in telling.items()):
            return known_name(f"{name} {KARRAS}" if config.get("use_karras_sigmas") else name)
    return None


@contextlib.contextmanager
def drawing_with(pipe: Any, name: str | None, generators: list[Generator]) -> Iterator[None]:
    """Let ``pipe`` draw with another sampler in this context; ``None``: with its own.

    Noise that a sampler adds comes from the images' generators, also where the pipeline does not pass them on.
    """
    if name is None:
        yield
        return
    own, other = pipe.scheduler, make_scheduler(pipe, name)
    if "generator" in inspect.signature(other.step).parameters:
        other.step = functools.partial(other.step, generator=generators)
    pipe.scheduler = other
    try:
        yield
    finally:
        pipe.scheduler = own

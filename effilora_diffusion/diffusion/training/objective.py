"""From a run's settings to its objective: what its family's scheduler has no meaning for is refused."""

from __future__ import annotations

import functools
import inspect

from diffusers import DDIMScheduler

from ...core import EffiLoRAError
from ..loss_options import LossOptions
from ..models import Family
from .distance import Distance
from .loss import DDPMObjective, FlowObjective, Objective, flow_shift, is_flow
from .noise import Noise
from .timesteps import Timesteps

DDPM_ONLY = {
    **dict.fromkeys(("snr_gamma", "use_soft_min_snr", "debiased_estimation_loss"), "its loss has weights of its own"),
    **dict.fromkeys(
        ("noise_offset", "multires_noise_iterations"), "it starts from pure noise, whose mean it can shift"
    ),
    **dict.fromkeys(("prediction_type", "zero_terminal_snr"), "its scheduler has neither"),
    "timestep_bias_strategy": "--timestep_sampling and --discrete_flow_shift move its noise levels",
}
"""Settings without a meaning for flow matching, and why."""

FLOW_ONLY = ("weighting_scheme", "timestep_sampling", "discrete_flow_shift", "precondition_outputs")
"""Settings without a meaning for DDPM models."""

BIAS_ARGUMENTS = ("multiplier", "begin", "end", "portion")


def _given(config: LossOptions, names: tuple[str, ...]) -> list[str]:
    """Those of ``names`` that are not what they are by default."""
    return [name for name in names if getattr(config, name) != getattr(LossOptions, name)]


def set_scheduler(config: LossOptions, family: Family) -> None:
    """Let the pipeline's scheduler be what the settings say, for training and drawing alike.

    Raises :class:`EffiLoRAError` where the family's scheduler has no such thing.
    """
    if not _given(config, ("prediction_type", "zero_terminal_snr")):
        return
    scheduler = family.pipe.scheduler
    if is_flow(scheduler):
        raise _refused(_given(config, ("prediction_type", "zero_terminal_snr"))[0], family)
    changes: dict[str, object] = {}
    kind = type(scheduler)
    if config.prediction_type is not None:
        changes["prediction_type"] = config.prediction_type
    if config.zero_terminal_snr:
        if (config.prediction_type or scheduler.config.prediction_type) != "v_prediction":
            raise EffiLoRAError(
                "--zero_terminal_snr needs a model that predicts velocities: pure noise has no epsilon that tells the image; "
                "give --prediction_type v_prediction if this one does, or leave it out"
            )
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        if "rescale_betas_zero_snr" not in inspect.signature(kind.__init__).parameters:
            kind = DDIMScheduler
    family.pipe.scheduler = kind.from_config(scheduler.config, **changes)


def objective_of(config: LossOptions, family: Family, resolution: int) -> Objective:
    """The objective of the family's scheduler for images of ``resolution`` pixels, or of other sizes where it is asked for their
    timesteps.

    Raises :class:`EffiLoRAError` for options that it does not have.
    """
    scheduler = family.pipe.scheduler
    if type(scheduler).__name__.startswith("EDM"):
        raise EffiLoRAError(
            "models with an EDM scheduler (Playground 2.5) can't be trained: DDPM and flow matching can"
        )
    _check(config)
    objective = _flow(config, family, resolution) if is_flow(scheduler) else _ddpm(config, family)
    schedule = config.huber_schedule or ("constant" if is_flow(scheduler) else "snr")
    objective.distance = Distance(config.loss_type, config.huber_c, schedule)
    objective.noise = Noise(
        config.noise_offset,
        config.input_perturbation,
        config.multires_noise_iterations,
        config.multires_noise_discount,
    )
    return objective


def _check(config: LossOptions) -> None:
    """Raise :class:`EffiLoRAError` for settings that contradict each other, whatever the model is."""
    if config.use_soft_min_snr and config.snr_gamma is None:
        raise EffiLoRAError(
            "--use_soft_min_snr needs --snr_gamma, which says where the weights level off: 5.0 is usual"
        )
    first, end = config.min_timestep or 0, 1000 if config.max_timestep is None else config.max_timestep
    if first >= end:
        raise EffiLoRAError(f"--min_timestep {first} must be below --max_timestep {end}: nothing would be trained")
    if config.timestep_bias_strategy == "none" and config.timestep_bias_multiplier != 1:
        raise EffiLoRAError("--timestep_bias_multiplier needs --timestep_bias_strategy: earlier, later or range")
    if config.timestep_bias_strategy == "range" and config.timestep_bias_begin >= config.timestep_bias_end:
        raise EffiLoRAError(
            f"--timestep_bias_begin {config.timestep_bias_begin} must be below --timestep_bias_end {config.timestep_bias_end}"
        )
    if config.loss_type == "l2" and config.huber_schedule is not None:
        raise EffiLoRAError(
            f"--huber_schedule {config.huber_schedule} needs --loss_type huber or smooth_l1: squares have no threshold"
        )


def _refused(name: str, family: Family) -> EffiLoRAError:
    why = DDPM_ONLY[name]
    return EffiLoRAError(
        f"--{name} is for DDPM models, {family.title} is trained by flow matching ({why}): leave it out"
    )


def _timesteps(config: LossOptions) -> Timesteps:
    bias = (getattr(config, f"timestep_bias_{name}") for name in ("strategy", *BIAS_ARGUMENTS))
    return Timesteps(config.min_timestep, config.max_timestep, *bias)


def _ddpm(config: LossOptions, family: Family) -> DDPMObjective:
    for name in _given(config, FLOW_ONLY):
        raise EffiLoRAError(f"--{name} is for flow matching, {family.title} is not: leave it out")
    return DDPMObjective(
        family.pipe.scheduler.config,
        config.snr_gamma,
        config.use_soft_min_snr,
        config.debiased_estimation_loss,
        _timesteps(config),
    )


def _flow(config: LossOptions, family: Family, resolution: int) -> FlowObjective:
    for name in _given(config, tuple(DDPM_ONLY)):
        raise _refused(name, family)
    if config.huber_schedule == "snr":
        raise EffiLoRAError(
            f"--huber_schedule snr is for DDPM models, {family.title} is trained by flow matching: choose constant or exponential"
        )
    sampling, scheme = config.timestep_sampling, config.weighting_scheme or family.weighting_scheme
    if sampling != "sigma" and config.weighting_scheme in ("logit_normal", "mode"):
        raise EffiLoRAError(
            f"--weighting_scheme {config.weighting_scheme} and --timestep_sampling {sampling} both say how noise levels are "
            "drawn: leave one of them out"
        )
    if config.discrete_flow_shift is not None and sampling not in ("sigma", "shift"):
        raise EffiLoRAError(
            f"--discrete_flow_shift is for --timestep_sampling sigma and shift, not {sampling}: leave it out"
        )
    schedule = {"use_dynamic_shifting": True} if sampling == "flux_shift" else family.pipe.scheduler.config
    shift = config.discrete_flow_shift or flow_shift(schedule, resolution)
    by_size = config.discrete_flow_shift is None and schedule.get("use_dynamic_shifting")
    density, mean, deviation = scheme, config.logit_mean, config.logit_std
    if sampling in ("uniform", "sigmoid"):
        shift, by_size = 1.0, False
    if sampling == "uniform":
        density = "none"
    elif sampling != "sigma":
        density, mean, deviation = "logit_normal", 0.0, config.sigmoid_scale
    return FlowObjective(
        shift, scheme, mean, deviation, config.mode_scale, density, config.precondition_outputs, _timesteps(config),
        functools.partial(flow_shift, dict(schedule)) if by_size else None,
    )  # fmt: skip

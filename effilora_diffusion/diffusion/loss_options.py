"""Settings of what a run minimises: noise, timesteps, weights and the distance between prediction and target.

Names are those of diffusers' scripts, else of sd-scripts (kohya), else of SimpleTuner.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..core.options import NATURAL, POSITIVE, Bounds, option

LOSS = "Loss"
NOISE = "Noise and timesteps"
"""Groups of settings, as they stand in ``--help``."""

WEIGHTING_SCHEMES = ("none", "sigma_sqrt", "logit_normal", "mode", "cosmap")
"""Densities and weightings of flow matching, by diffusers' names."""

TIMESTEP_SAMPLINGS = ("sigma", "uniform", "sigmoid", "shift", "flux_shift")
"""How noise levels of flow matching are drawn, by sd-scripts' names."""

PREDICTION_TYPES = ("epsilon", "v_prediction")
LOSS_TYPES = ("l2", "huber", "smooth_l1")
HUBER_SCHEDULES = ("constant", "exponential", "snr")
BIASES = ("none", "earlier", "later", "range")

TIMESTEP = Bounds(at_least=0, at_most=1000)


@dataclass
class LossOptions:
    """The settings of :mod:`.training.objective`, which checks that the model's family has a meaning for them."""

    loss_type: str = option(
        "l2",
        "distance of prediction and target: squares, or sd-scripts' Huber losses, which outliers move less",
        LOSS,
        choices=LOSS_TYPES,
        fixed=True,
    )
    huber_c: float = option(
        0.1,
        "where the Huber losses turn from squares to absolute values; with a schedule: at pure noise",
        LOSS,
        bounds=Bounds(above=0, at_most=1),
        fixed=True,
    )
    huber_schedule: str | None = option(
        None,
        "how huber_c falls towards pure noise (default: snr for DDPM models, constant for flow matching)",
        LOSS,
        choices=HUBER_SCHEDULES,
        fixed=True,
    )
    snr_gamma: float | None = option(
        None, "min-SNR gamma (5.0 is usual) for DDPM models; none: unweighted loss", LOSS, bounds=POSITIVE, fixed=True
    )
    use_soft_min_snr: bool = option(
        False, "with snr_gamma: the smooth form of its weights, snr gamma / (snr + gamma)", LOSS, fixed=True
    )
    debiased_estimation_loss: bool = option(
        False, "weight the loss by 1 / sqrt(SNR), for DDPM models (of velocities by 1 / (SNR + 1))", LOSS, fixed=True
    )
    weighting_scheme: str | None = option(
        None,
        "density or weighting of the noise levels of flow matching (default: the family's own)",
        LOSS,
        choices=WEIGHTING_SCHEMES,
        fixed=True,
    )
    logit_mean: float = option(0.0, "mean of the logit_normal scheme", LOSS, fixed=True)
    logit_std: float = option(1.0, "deviation of the logit_normal scheme", LOSS, bounds=POSITIVE, fixed=True)
    mode_scale: float = option(1.29, "scale of the mode scheme", LOSS, bounds=NATURAL, fixed=True)
    precondition_outputs: bool = option(
        False,
        "flow matching: compare images instead of velocities, as diffusers' SD3 script does by default",
        LOSS,
        fixed=True,
    )
    guidance_scale: float = option(
        3.5, "guidance scale given to FLUX.1 dev and FLUX.2 dev while training", LOSS, bounds=NATURAL, fixed=True
    )
    prediction_type: str | None = option(
        None,
        "what a DDPM model predicts (default: what its scheduler says); for checkpoints that do not tell",
        NOISE,
        choices=PREDICTION_TYPES,
        fixed=True,
    )
    zero_terminal_snr: bool = option(
        False, "rescale the noise levels of a DDPM model so that the last one is pure noise", NOISE, fixed=True
    )
    noise_offset: float = option(
        0.0, "constant per channel added to the noise of DDPM models, 0.05 to 0.1 if any", NOISE, bounds=NATURAL, fixed=True
    )  # fmt: skip
    input_perturbation: float = option(
        0.0,
        "further noise in the model's input that the target does not have, 0.1 if any (sd-scripts: ip_noise_gamma)",
        NOISE,
        bounds=NATURAL,
        fixed=True,
    )
    multires_noise_iterations: int = option(
        0,
        "coarser layers added to the noise of DDPM models (pyramid noise), 6 to 10 if any",
        NOISE,
        bounds=Bounds(at_least=0, at_most=20),
        fixed=True,
    )
    multires_noise_discount: float = option(
        0.3, "strength of each coarser layer by that of the one before", NOISE, bounds=Bounds(above=0, at_most=1), fixed=True
    )  # fmt: skip
    min_timestep: int | None = option(
        None, "first timestep that is trained, of 1000", NOISE, bounds=TIMESTEP, fixed=True
    )
    max_timestep: int | None = option(
        None, "timestep before which training ends, of 1000, which is pure noise", NOISE, bounds=TIMESTEP, fixed=True
    )
    timestep_bias_strategy: str = option(
        "none",
        "which timesteps of a DDPM model are drawn more often: earlier (little noise), later, or a range",
        NOISE,
        choices=BIASES,
        fixed=True,
    )
    timestep_bias_multiplier: float = option(
        1.0, "how much more often the biased timesteps are drawn", NOISE, bounds=POSITIVE, fixed=True
    )
    timestep_bias_begin: int = option(0, "first timestep of the bias range", NOISE, bounds=TIMESTEP, fixed=True)
    timestep_bias_end: int = option(
        1000, "timestep before which the bias range ends", NOISE, bounds=TIMESTEP, fixed=True
    )
    timestep_bias_portion: float = option(
        0.25,
        "share of the timesteps that earlier and later mean",
        NOISE,
        bounds=Bounds(at_least=0, at_most=1),
        fixed=True,
    )
    timestep_sampling: str = option(
        "sigma",
        "density of the noise levels of flow matching: sigma is weighting_scheme's with the scheduler's shift, the others are "
        "sd-scripts'; flux_shift shifts by the resolution",
        NOISE,
        choices=TIMESTEP_SAMPLINGS,
        fixed=True,
    )
    sigmoid_scale: float = option(
        1.0, "deviation of timestep_sampling sigmoid, shift and flux_shift", NOISE, bounds=POSITIVE, fixed=True
    )
    discrete_flow_shift: float | None = option(
        None,
        "shift of the noise levels of flow matching, with timestep_sampling sigma and shift (default: the scheduler's, at the "
        "resolution)",
        NOISE,
        bounds=POSITIVE,
        fixed=True,
    )

"""Noise levels, targets and weights: the textbook's for DDPM, diffusers' own for flow matching."""

import math

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

from effilora_diffusion.core import EffiLoRAError
from effilora_diffusion.diffusion.training.loss import (
    DDPMObjective,
    FlowObjective,
    denoising_losses,
    flow_shift,
    is_flow,
)

SCHEMES = ["none", "sigma_sqrt", "logit_normal", "mode", "cosmap"]


def ddpm(prediction_type, gamma=None):
    """Three steps with cumulative alphas 1/2, 1/4 and 1/8: signal to noise 1, 1/3 and 1/7."""
    betas = {"num_train_timesteps": 3, "trained_betas": [0.5, 0.5, 0.5]}
    return DDPMObjective(DDPMScheduler(**betas, prediction_type=prediction_type).config, gamma)


def test_targets_are_the_noise_or_the_velocity():
    latents, noise = torch.full((2, 1, 1, 1), 2.0), torch.full((2, 1, 1, 1), 3.0)
    times = torch.tensor([0, 1])
    assert ddpm("epsilon").target(latents, noise, times).flatten().tolist() == [3.0, 3.0]
    found = ddpm("v_prediction").target(latents, noise, times).flatten().tolist()
    assert found == pytest.approx([0.5**0.5 * 3 - 0.5**0.5 * 2, 0.25**0.5 * 3 - 0.75**0.5 * 2])
    with pytest.raises(EffiLoRAError, match="'sample' can't be trained"):
        ddpm("sample")


@pytest.mark.parametrize(
    ("kind", "gamma", "expected"),
    [
        ("epsilon", None, [1, 1, 1]),
        ("epsilon", 0.5, [0.5, 1, 1]),
        ("epsilon", 0.2, [0.2, 0.6, 1]),
        ("v_prediction", None, [1, 1, 1]),
        ("v_prediction", 5.0, [1 / 2, 1 / 4, 1 / 8]),
        ("v_prediction", 0.2, [0.2 / 2, 0.2 / (4 / 3), 1 / 8]),
    ],
)
def test_min_snr_weights_are_the_paper_s(kind, gamma, expected):
    found = ddpm(kind, gamma).weights(torch.tensor([0, 1, 2]))
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


def test_loss_of_a_sample_is_its_weighted_mean_square_in_float():
    predicted = torch.tensor([[1.0, 3.0], [0.0, 0.0]], dtype=torch.bfloat16)
    found = denoising_losses(predicted, torch.zeros(2, 2), torch.tensor([0.5, 1.0]))
    assert found.tolist() == [2.5, 0.0]
    assert found.dtype == torch.float32


def test_flow_matching_goes_straight_from_the_image_to_the_noise():
    flow = FlowObjective()
    latents, noise = torch.tensor([[2.0], [2.0], [2.0]]), torch.tensor([[6.0], [6.0], [6.0]])
    times = torch.tensor([0.0, 250.0, 1000.0])
    assert flow.add_noise(latents, noise, times).flatten().tolist() == [2.0, 3.0, 6.0]
    assert flow.target(latents, noise, times).flatten().tolist() == [4.0, 4.0, 4.0]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_noise_levels_follow_the_distribution_of_diffusers_scripts(scheme, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    drawn = compute_density_for_timestep_sampling(
        scheme, 20000, 0.0, 1.0, 1.29, generator=torch.Generator().manual_seed(0)
    )
    theirs = scheduler.timesteps[(drawn * 1000).long().clamp(0, 999)]
    flow = FlowObjective(flow_shift(scheduler.config, 1024), scheme)
    ours = flow.timesteps((torch.arange(20000) + 0.5) / 20000)
    assert ours.min() > 0
    assert ours.max() <= 1000
    quantiles = torch.linspace(0.05, 0.95, 19)
    assert torch.allclose(ours.quantile(quantiles), theirs.quantile(quantiles), atol=12)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_of_the_schemes_are_diffusers_own(scheme):
    times = torch.tensor([100.0, 500.0, 900.0])
    expected = compute_loss_weighting_for_sd3(scheme, times / 1000)
    assert torch.allclose(FlowObjective(1.0, scheme).weights(times), expected)


def test_the_mean_of_logit_normal_moves_towards_the_image_as_in_diffusers():
    uniform = (torch.arange(999) + 0.5) / 999
    centre, moved = (FlowObjective(1.0, "logit_normal", mean).timesteps(uniform).median() for mean in (0.0, 1.0))
    assert centre == pytest.approx(500, abs=1)
    assert moved == pytest.approx(1000 * (1 - 1 / (1 + math.exp(-1))), abs=1)


@pytest.mark.parametrize("resolution", [512, 1024])
@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_a_dynamic_shift_is_the_one_that_sampling_uses_at_this_resolution(resolution, kind):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, time_shift_type=kind)
    tokens = (resolution // 16) ** 2
    mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
    if kind == "linear":  # CogView4's formula
        mu = (tokens / 256) ** 0.5 * 1.15 + 0.5
    scheduler.set_timesteps(sigmas=[0.9, 0.5, 0.1], mu=mu)
    flow = FlowObjective(flow_shift(scheduler.config, resolution))
    assert flow.timesteps(torch.tensor([0.1, 0.5, 0.9])).tolist() == pytest.approx(
        scheduler.timesteps.tolist(), rel=1e-4
    )


def test_the_scheduler_decides_which_objective_it_is():
    assert is_flow(FlowMatchEulerDiscreteScheduler())
    assert not is_flow(DDPMScheduler())

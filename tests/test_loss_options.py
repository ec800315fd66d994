"""Noise, timesteps, weights and distances by the formulas of the papers and of the scripts whose names the settings have."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, PNDMScheduler
from helpers import make_subject, trainer
from tiny_families import build

from effilora_diffusion.cli.train import parse_arguments
from effilora_diffusion.core import EffiLoRAError
from effilora_diffusion.core.rng import draw_normal, draw_uniform
from effilora_diffusion.diffusion.config import TrainingConfig
from effilora_diffusion.diffusion.training.build import make_objective
from effilora_diffusion.diffusion.training.distance import Distance
from effilora_diffusion.diffusion.training.loss import DDPMObjective, FlowObjective
from effilora_diffusion.diffusion.training.noise import Noise
from effilora_diffusion.diffusion.training.objective import set_scheduler
from effilora_diffusion.diffusion.training.timesteps import Timesteps

BETAS = {"num_train_timesteps": 3, "trained_betas": [0.5, 0.5, 0.5]}
"""Cumulative alphas 1/2, 1/4 and 1/8: signal to noise 1, 1/3 and 1/7."""


def of_scheduler(scheduler, **settings):
    """The objective of a model with ``scheduler``."""
    family = SimpleNamespace(pipe=SimpleNamespace(scheduler=scheduler), title="This model", weighting_scheme="none")
    config = TrainingConfig(**settings)
    set_scheduler(config, family)
    return make_objective(config, family)


def ddpm(prediction_type="epsilon", **settings):
    return of_scheduler(DDPMScheduler(**BETAS, prediction_type=prediction_type), **settings)


def flow(shift=1.0, **settings):
    return of_scheduler(FlowMatchEulerDiscreteScheduler(shift=shift), **settings)


# ------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize(
    ("kind", "settings", "expected"),
    [
        ("epsilon", {"snr_gamma": 1.0, "use_soft_min_snr": True}, [1 / 2, 3 / 4, 7 / 8]),
        ("v_prediction", {"snr_gamma": 1.0, "use_soft_min_snr": True}, [1 / 4, 3 / 16, 7 / 64]),
        ("epsilon", {"debiased_estimation_loss": True}, [1, 3**0.5, 7**0.5]),
        ("v_prediction", {"debiased_estimation_loss": True}, [1 / 2, 3 / 4, 7 / 8]),
        ("epsilon", {"debiased_estimation_loss": True, "snr_gamma": 0.5}, [0.5, 3**0.5, 7**0.5]),
    ],
)
def test_weights_by_the_signal_to_noise_ratio(kind, settings, expected):
    found = ddpm(kind, **settings).weights(torch.tensor([0, 1, 2]))
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "expected"), [("l2", [9.0, 0.0]), ("huber", [2 * 4 * (5 - 4), 0.0]), ("smooth_l1", [2 * (5 - 4), 0.0])]
)
def test_huber_losses_are_sd_scripts(kind, expected):
    found = Distance(kind, 4.0)(torch.tensor([[3.0], [1.0]]), torch.tensor([[0.0], [1.0]]), torch.tensor([4.0, 4.0]))
    assert found.flatten().tolist() == pytest.approx(expected)


def test_the_threshold_follows_its_schedule():
    times = torch.tensor([0, 500, 1000])
    assert Distance("huber", 0.01, "constant").thresholds(times, None).tolist() == pytest.approx([0.01] * 3)
    assert Distance("huber", 0.01, "exponential").thresholds(times, None).tolist() == pytest.approx([1, 0.1, 0.01])
    objective = ddpm(loss_type="smooth_l1", huber_c=0.2)  # snr: noise by signal is 1, 3^0.5, 7^0.5
    thresholds = [0.8 / (1 + sigma) ** 2 + 0.2 for sigma in (1, 3**0.5, 7**0.5)]
    expected = [2 * (math.sqrt(4 + c**2) - c) for c in thresholds]
    found = objective.losses(torch.full((3, 2), 2.0), torch.zeros(3, 2), torch.tensor([0, 1, 2]))
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("settings", [{}, {"loss_type": "huber", "huber_c": 0.5}])
def test_preconditioned_outputs_are_compared_as_images(settings):
    latents, noise, predicted = torch.tensor([[2.0]]), torch.tensor([[6.0]]), torch.tensor([[1.0]])
    objective, times = flow(precondition_outputs=True, **settings), torch.tensor([250.0])
    noisy = 0.75 * latents + 0.25 * noise
    difference = float((noisy - 0.25 * predicted) - latents)  # of the images; of the velocities it is 1 - 4
    expected = difference**2 if not settings else 2 * 0.5 * (math.sqrt(difference**2 + 0.25) - 0.5)
    found = objective.losses(predicted, objective.target(latents, noise, times), times)
    assert float(found) == pytest.approx(expected)
    assert float(found) != pytest.approx(9.0)


# --------------------------------------------------------------------------------------------------------- noise

SHAPE = (4, 8, 6)


def test_noise_without_settings_is_the_plain_draw():
    assert torch.equal(Noise().draw(SHAPE, 3, "row", 5), draw_normal(SHAPE, 3, "row", 5))


def test_a_noise_offset_is_a_constant_per_channel():
    added = torch.stack([Noise(0.1).draw(SHAPE, 0, "row", i) - draw_normal(SHAPE, 0, "row", i) for i in range(400)])
    assert added.flatten(2).std(2).max() < 1e-6
    constants = added[:, :, 0, 0]
    assert constants.std() == pytest.approx(0.1, rel=0.1)
    assert constants.mean().abs() < 0.01
    assert torch.equal(Noise(0.1).draw(SHAPE, 0, "row", 7), Noise(0.1).draw(SHAPE, 0, "row", 7))


def test_pyramid_noise_is_sd_scripts_per_image():
    plain = draw_normal(SHAPE, 0, "row", 2)
    ratio = 2 + 2 * float(draw_uniform(2, 0, "row layers", 2)[1])
    same = draw_normal((1, *SHAPE), 0, "row layer 0", 2)[0]
    coarse = draw_normal((1, 4, int(8 / ratio), int(6 / ratio)), 0, "row layer 1", 2)
    expected = plain + same + 0.5 * torch.nn.Upsample(SHAPE[1:], mode="bilinear")(coarse)[0]
    found = Noise(iterations=2, discount=0.5).draw(SHAPE, 0, "row", 2)
    assert torch.allclose(found, expected / expected.std(), atol=1e-6)
    assert float(found.std()) == pytest.approx(1, abs=1e-5)
    deep = Noise(iterations=10, discount=0.9).draw((4, 32, 32), 0, "row", 2)
    assert (deep[:, :, 1:] * deep[:, :, :-1]).mean() > 0.15  # neighbours agree; in plain noise they do not


def test_perturbed_input_has_more_noise_than_its_target():
    plain = draw_normal(SHAPE, 0, "row", 2)
    added = Noise(perturbation=0.1).of_input(plain, 0, "row", 2) - plain
    assert added.std() == pytest.approx(0.1, rel=0.15)
    assert torch.equal(Noise(perturbation=0.1).draw(SHAPE, 0, "row", 2), plain)
    assert (added * plain).mean().abs() < 0.02


# ----------------------------------------------------------------------------------------------------- timesteps


def test_a_window_has_all_its_timesteps_and_no_others():
    objective = of_scheduler(DDPMScheduler(), min_timestep=200, max_timestep=400)
    found = objective.timesteps((torch.arange(2000) + 0.5) / 2000)
    assert torch.equal(found.bincount()[200:], torch.full((200,), 10))
    assert found.min() == 200


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (Timesteps(bias="later", multiplier=2, portion=0.25), [2, 2, 2, 4]),
        (Timesteps(bias="earlier", multiplier=4, portion=0.5), [4, 4, 1, 1]),
        (Timesteps(bias="range", multiplier=3, begin=1, stop=3), [1, 3, 3, 1]),
        (Timesteps(first=1, end=3, bias="range", multiplier=4, begin=2, stop=3), [0, 2, 8, 0]),
    ],
)
def test_biased_timesteps_are_drawn_as_often_as_diffusers_draws_them(choice, expected):
    found = choice.draw((torch.arange(1000) + 0.5) / 1000, 4).bincount(minlength=4)
    assert found.tolist() == pytest.approx([1000 * share / sum(expected) for share in expected], abs=1)


def test_a_window_of_flow_matching_squeezes_its_noise_levels():
    half = torch.tensor([0.5])
    assert float(flow(min_timestep=200, max_timestep=400).timesteps(half)) == pytest.approx(300)
    assert float(flow(3.0, max_timestep=400).timesteps(half)) == pytest.approx(0.75 * 400)


@pytest.mark.parametrize(
    ("settings", "at_half", "at_one_deviation"),
    [
        ({"timestep_sampling": "uniform"}, 500, 841.3447),
        ({"timestep_sampling": "sigmoid", "sigmoid_scale": 2.0}, 500, 1000 / (1 + math.exp(-2))),
        ({"timestep_sampling": "shift", "discrete_flow_shift": 3.0}, 750, 1000 * 3 / (3 + math.exp(-1))),
        ({"timestep_sampling": "shift"}, 2000 / 3, 1000 * 2 / (2 + math.exp(-1))),  # the scheduler's own shift
        ({"timestep_sampling": "flux_shift", "resolution": 1024}, 1000 / (1 + math.exp(-1.15)), 895.6687),
        ({"timestep_sampling": "flux_shift", "resolution": 256}, 1000 / (1 + math.exp(-0.5)), 817.5745),
        ({"discrete_flow_shift": 4.0}, 800, 1000 * 4 * 0.8413447 / (1 + 3 * 0.8413447)),
        ({}, 2000 / 3, 1000 * 2 * 0.8413447 / (1 + 0.8413447)),
    ],
)
def test_noise_levels_of_flow_matching_are_drawn_as_in_sd_scripts(settings, at_half, at_one_deviation):
    """Medians, and the levels that 84 % stay below, at a scheduler's shift of 2."""
    found = flow(2.0, **settings).timesteps(torch.tensor([0.5, 1 - 0.8413447]))
    assert found.tolist() == pytest.approx([at_half, at_one_deviation], rel=1e-4)


def test_another_density_leaves_the_weights_of_the_scheme():
    times = torch.tensor([500.0])
    assert float(flow(timestep_sampling="uniform", weighting_scheme="sigma_sqrt").weights(times)) == 4


# ----------------------------------------------------------------------------------------------------- scheduler


def test_the_last_timestep_is_pure_noise_where_the_scheduler_or_a_setting_says_so():
    latents, noise, last = torch.full((1, 1), 2.0), torch.full((1, 1), 3.0), torch.tensor([999])
    said = DDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    family = SimpleNamespace(
        pipe=SimpleNamespace(scheduler=PNDMScheduler()), title="This model", weighting_scheme="none"
    )
    config = TrainingConfig(prediction_type="v_prediction", zero_terminal_snr=True)
    set_scheduler(config, family)
    for objective in (of_scheduler(said), make_objective(config, family)):
        assert float(objective.add_noise(latents, noise, last)) == pytest.approx(3.0, abs=1e-3)
        assert float(objective.target(latents, noise, last)) == pytest.approx(-2.0, abs=1e-3)
    kept = family.pipe.scheduler  # images are drawn with it too
    assert kept.config.prediction_type == "v_prediction"
    assert kept.config.timestep_spacing == "trailing"
    assert float(kept.alphas_cumprod[-1]) < 1e-6
    assert float(of_scheduler(DDPMScheduler()).add_noise(latents, noise, last)) != pytest.approx(3.0, abs=1e-3)


# ------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"snr_gamma": 5.0}, "--snr_gamma is for DDPM models"),
        ({"debiased_estimation_loss": True}, "--debiased_estimation_loss is for DDPM models"),
        ({"noise_offset": 0.1}, "--noise_offset is for DDPM models"),
        ({"multires_noise_iterations": 6}, "--multires_noise_iterations is for DDPM models"),
        ({"prediction_type": "epsilon"}, "--prediction_type is for DDPM models"),
        ({"zero_terminal_snr": True}, "--zero_terminal_snr is for DDPM models"),
        ({"timestep_bias_strategy": "later"}, "--timestep_bias_strategy is for DDPM models"),
        ({"loss_type": "huber", "huber_schedule": "snr"}, "choose constant or exponential"),
        ({"timestep_sampling": "uniform", "weighting_scheme": "mode"}, "both say how noise levels are drawn"),
        (
            {"timestep_sampling": "flux_shift", "discrete_flow_shift": 2.0},
            "is for --timestep_sampling sigma and shift",
        ),
    ],
)
def test_flow_matching_refuses_what_it_has_no_meaning_for(settings, words):
    with pytest.raises(EffiLoRAError, match=words):
        flow(**settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"precondition_outputs": True}, "--precondition_outputs is for flow matching"),
        ({"timestep_sampling": "shift"}, "--timestep_sampling is for flow matching"),
        ({"discrete_flow_shift": 3.0}, "--discrete_flow_shift is for flow matching"),
        ({"zero_terminal_snr": True}, "needs a model that predicts velocities"),
        ({"use_soft_min_snr": True}, "needs --snr_gamma"),
        ({"min_timestep": 500, "max_timestep": 500}, "--min_timestep 500 must be below --max_timestep 500"),
        ({"timestep_bias_multiplier": 2.0}, "needs --timestep_bias_strategy"),
        ({"timestep_bias_strategy": "range", "timestep_bias_begin": 1000}, "must be below --timestep_bias_end"),
        ({"huber_schedule": "constant"}, "needs --loss_type huber"),
    ],
)
def test_ddpm_models_refuse_contradictions_and_what_they_have_no_meaning_for(settings, words):
    with pytest.raises(EffiLoRAError, match=words):
        ddpm(**settings)


# ---------------------------------------------------------------------------------------------------------- runs

MOVES = (
    {"loss_type": "huber"},
    {"loss_type": "smooth_l1", "huber_schedule": "exponential"},
    {"snr_gamma": 0.01},
    {"snr_gamma": 0.01, "use_soft_min_snr": True},
    {"debiased_estimation_loss": True},
    {"noise_offset": 0.5},
    {"input_perturbation": 0.5},
    {"multires_noise_iterations": 6},
    {"min_timestep": 990},
    {"max_timestep": 10},
    {"timestep_bias_strategy": "later", "timestep_bias_multiplier": 1000.0},
)


def test_every_setting_reaches_the_loss_of_a_step(tiny_pipeline, tmp_path):
    run = trainer(tiny_pipeline, make_subject(tmp_path / "s"), tmp_path / "out", train_batch_size=2)
    found = {}
    for settings in ({}, *MOVES):
        objective = make_objective(replace(run.config, **settings), run.family)
        run.objective = run.batches.objective = objective
        found[str(settings)] = float(run._loss(run._batch(0, 0)).detach())
    run.folder.release()
    assert len({round(value, 6) for value in found.values()}) == len(found), found


FLOW_MOVES = (
    {"loss_type": "huber"},
    {"loss_type": "huber", "huber_schedule": "exponential"},
    {"input_perturbation": 0.5},
    {"min_timestep": 900},
    {"max_timestep": 100},
    {"timestep_sampling": "uniform"},
    {"timestep_sampling": "sigmoid", "sigmoid_scale": 3.0},
    {"timestep_sampling": "shift", "discrete_flow_shift": 9.0},
    {"timestep_sampling": "flux_shift"},
    {"discrete_flow_shift": 1.5},
    {"precondition_outputs": True},
)


def test_every_setting_of_flow_matching_reaches_the_loss_of_a_step(tmp_path):
    build("sd3").save_pretrained(tmp_path / "sd3")
    options = {"train_batch_size": 2, "resolution": 64}
    run = trainer(tmp_path / "sd3", make_subject(tmp_path / "s"), tmp_path / "out", **options)
    run.folder.release()
    found = {}
    for settings in ({}, *FLOW_MOVES):
        run.objective = run.batches.objective = make_objective(replace(run.config, **settings), run.family)
        found[str(settings)] = float(run._loss(run._batch(0, 0)).detach())
    assert len({round(value, 6) for value in found.values()}) == len(found), found


def test_the_target_does_not_know_of_the_perturbation(tiny_pipeline, tmp_path, monkeypatch):
    run = trainer(tiny_pipeline, make_subject(tmp_path / "s"), tmp_path / "out", input_perturbation=0.3)
    run.folder.release()
    seen = []
    predict = run.family.predict
    monkeypatch.setattr(run.family, "predict", lambda noisy, *rest: seen.append(noisy) or predict(noisy, *rest))
    batch = run._batch(0, 0)
    loss = float(run._loss(batch).detach())
    alphas = run.objective.scheduler.alphas_cumprod[batch.timesteps].view(-1, 1, 1, 1)
    expected = alphas.sqrt() * batch.latents + (1 - alphas).sqrt() * batch.input_noise
    assert torch.allclose(seen[0], expected, atol=1e-5)
    assert (batch.input_noise - batch.noise).std() == pytest.approx(0.3, rel=0.2)
    with torch.no_grad():
        target = run.objective.target(batch.latents, batch.noise, batch.timesteps)
        own = (predict(seen[0], batch.timesteps, batch.conditions) - target).square().mean()
    assert loss == pytest.approx(float(own), rel=1e-5)


def test_flags_are_understood_as_diffusers_and_sd_scripts_write_them():
    words = (
        "--precondition_outputs 1 --noise_offset 0.0357 --loss_type smooth_l1 --huber_schedule snr --min_timestep=100"
    )
    bias = "--timestep_bias_strategy range --timestep_bias_begin 200"
    config = parse_arguments([*words.split(), *bias.split(), "--pretrained_model_name_or_path", "m"])
    assert (config.precondition_outputs, config.noise_offset, config.min_timestep) == (True, 0.0357, 100)
    with pytest.raises(EffiLoRAError, match="here it is --input_perturbation"):
        parse_arguments(["--ip_noise_gamma", "0.1"])


def test_plain_settings_leave_both_objectives_as_they_were():
    uniform = (torch.arange(50) + 0.5) / 50
    assert torch.equal(ddpm().timesteps(uniform), DDPMObjective(BETAS).timesteps(uniform))
    assert torch.equal(flow(3.0).timesteps(uniform), FlowObjective(3.0).timesteps(uniform))

"""What is said and refused before a run: the report, and options that do not fit the model."""

import pytest
from diffusers import EDMEulerScheduler
from helpers import arguments, make_subject, settings, trainer
from tiny_families import build

from effilora_diffusion import EffiLoRAError
from effilora_diffusion.cli.train import main
from effilora_diffusion.diffusion.training.dry_run import dry_run_report


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {}
    for name in ("sd15", "flux", "hunyuandit", "cogview4"):
        found[name] = tmp_path_factory.mktemp(name)
        build(name).save_pretrained(found[name])
    return found


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sd15", {"weighting_scheme": "logit_normal"}, "--weighting_scheme is for flow matching"),
        ("flux", {"snr_gamma": 5.0}, "--snr_gamma is for DDPM models, FLUX.1"),
        ("flux", {"resolution": 72}, "--resolution must be a multiple of 16 for FLUX.1, not 72"),
        ("sd15", {"max_sequence_length": 32}, "models do not support --max_sequence_length"),
        ("hunyuandit", {"max_sequence_length": 77}, "models do not support --max_sequence_length"),
        ("cogview4", {"gradient_checkpointing": True, "routing": "timestep"}, "can't have both"),
        ("hunyuandit", {"gradient_checkpointing": True}, "do not support --gradient_checkpointing"),
    ],
)
def test_options_that_do_not_fit_the_model_are_refused(folders, name, options, message, tmp_path):
    with pytest.raises(EffiLoRAError, match=message):
        trainer(folders[name], make_subject(tmp_path / "s"), tmp_path / "out", **{"resolution": 64, **options})


def test_playground_s_scheduler_is_refused(tmp_path):
    pipe = build("sdxl")
    pipe.register_modules(scheduler=EDMEulerScheduler())
    pipe.save_pretrained(tmp_path / "model")
    with pytest.raises(EffiLoRAError, match="EDM scheduler"):
        trainer(tmp_path / "model", make_subject(tmp_path / "s"), tmp_path / "out", resolution=64)


def test_a_dry_run_prints_the_report_and_writes_nothing(folders, tmp_path, capsys):
    subject = make_subject(tmp_path / "s", 3, captions=["a", "b", "b"], size=(40, 100))
    config = settings(folders["flux"], subject, tmp_path / "out", resolution=64, max_train_steps=6, dry_run=True)
    assert main(arguments(config)) == 0
    report = capsys.readouterr().out
    assert "FLUX.1 (FluxTransformer2DModel), flow matching" in report
    assert "3, 2 distinct captions, at 64 px, 3 smaller than that and enlarged" in report
    assert "6, batch size 1, 2.0 epochs" in report
    assert not (tmp_path / "out").exists()


def test_a_dry_run_names_what_would_stop_the_run(folders, tmp_path, capsys):
    options = {"resolution": 64, "max_train_steps": 1, "num_validation_images": 0}
    subject = make_subject(tmp_path / "s")
    trainer(folders["flux"], subject, tmp_path / "out", **options).run()
    config = settings(folders["flux"], subject, tmp_path / "out", **options, dry_run=True)
    assert main(arguments(config)) == 2
    assert "holds an earlier run" in capsys.readouterr().err
    assert main([*arguments(config), "--resume_from_checkpoint", "checkpoint-9"]) == 2
    assert "checkpoint-9" in capsys.readouterr().err


def test_the_parameters_in_the_report_are_those_that_are_stored(folders, tmp_path, capsys):
    run = trainer(folders["flux"], make_subject(tmp_path / "s"), tmp_path / "out", resolution=64)
    stored = sum(part.numel() for part in run.adapter.parameters())
    report = capsys.readouterr().out
    assert f"{stored:,} parameters" in report


def test_memory_is_the_sum_of_its_parts(folders, tmp_path):
    run = trainer(folders["flux"], make_subject(tmp_path / "s"), tmp_path / "out", resolution=64)
    report = dry_run_report(run.parts, 1)
    size = lambda part: sum(p.numel() * 4 for name, p in part.named_parameters() if "effilora" not in name)
    pipe = run.family.pipe
    assert report.weights == size(pipe.transformer)
    assert report.encoders == size(pipe.vae) + size(pipe.text_encoder) + size(pipe.text_encoder_2)
    assert report.activations > 0

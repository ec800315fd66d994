"""A training run as a whole: it learns, leaves what it promises, spares the base, and stops for every reason in words."""

import json
import os
import signal

import pytest
import torch
import yaml
from helpers import arguments, files_in, make_subject, metrics, settings, sharp_pipeline, trainer
from PIL import Image

from effilora_diffusion import detach
from effilora_diffusion.cli import train as launch
from effilora_diffusion.cli.train import parse_arguments
from effilora_diffusion.core import EffiLoRAError, load_adapter_file
from effilora_diffusion.core.run_folder import checkpoints
from effilora_diffusion.diffusion.models.pipelines import load_pipeline
from effilora_diffusion.diffusion.training.checkpoints import fault_of
from effilora_diffusion.diffusion.training.loop import Loop
from effilora_diffusion.diffusion.training.trainer import Trainer

CHECKPOINT = {"adapter.safetensors", "manifest.json", "optimizer.safetensors", "state.json"}
RESULT = {
    ".run.json",
    "README.md",
    "before_after.png",
    "config.yaml",
    "effilora.safetensors",
    "metrics.jsonl",
    "plain_lora.png",
    "pytorch_lora_weights.safetensors",
    "pytorch_lora_weights_kohya.safetensors",
    "report.html",
    "samples/step-000000.png",
    "scores.jsonl",
}


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    return make_subject(tmp_path_factory.mktemp("subject"))


@pytest.fixture(scope="module")
def finished(tiny_pipeline, subject, tmp_path_factory):
    """A run of two steps that has ended well: its settings, trainer and summary."""
    config = settings(tiny_pipeline, subject, tmp_path_factory.mktemp("run") / "out", learning_rate=1e-2)
    run = Trainer(config)
    return config, run, run.run()


def names(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def checkpoint_names(output):
    return [path.name for path in checkpoints(output)]


@torch.no_grad()
def velocity_loss(run, batches):
    """Mean squared error of the velocity on a fixed batch, computed without the trainer's own loss."""
    batch = batches.validation(0)
    alphas = run.objective.scheduler.alphas_cumprod[batch.timesteps].view(-1, 1, 1, 1)
    noisy = alphas.sqrt() * batch.latents + (1 - alphas).sqrt() * batch.noise
    target = alphas.sqrt() * batch.noise - (1 - alphas).sqrt() * batch.latents
    return float(
        (run.family.model(noisy, batch.timesteps, batch.conditions["encoder_hidden_states"]).sample - target)
        .square()
        .mean()
    )


def test_training_learns_its_image_and_not_another_one(tiny_pipeline, tmp_path):
    model = sharp_pipeline(tiny_pipeline, tmp_path / "model")
    options = {"learning_rate": 3e-2, "train_batch_size": 4, "max_train_steps": 50, "num_validation_images": 0}
    run = trainer(model, make_subject(tmp_path / "own", 1), tmp_path / "out", **options)
    other = trainer(model, make_subject(tmp_path / "other", 1, first=7), tmp_path / "none", **options).batches
    before, before_other = velocity_loss(run, run.batches), velocity_loss(run, other)
    run.run()
    after, after_other = velocity_loss(run, run.batches), velocity_loss(run, other)
    assert after < 0.75 * before
    assert before - after > 1.3 * (before_other - after_other)


def test_output_folder_holds_everything_promised_and_nothing_else(finished):
    config, run, _ = finished
    expected = RESULT | {"samples/step-000002.png"} | {f"checkpoint-2/{name}" for name in CHECKPOINT}
    assert names(run.output) == expected
    with Image.open(run.output / "before_after.png") as image:
        assert image.height > 3 * 128  # the subject, before, after
    assert parse_arguments(["--config", str(run.output / "config.yaml")]) == config


def test_native_file_tells_where_it_comes_from(finished, tiny_pipeline):
    _, run, summary = finished
    content = load_adapter_file(run.output / "effilora.safetensors")
    facts = content.metadata
    assert facts["base_model"] == str(tiny_pipeline)
    assert (facts["trigger_prompt"], facts["steps"], facts["images"]) == ("a sks cat", 2, 3)
    assert (facts["component"], facts["base_class"]) == ("unet", "UNet2DConditionModel")
    assert facts["export_error"] == summary.export_error
    assert content.calibration.keys() == {site.name for site in run.adapter.sites}
    for found, trained in zip(content.adapter.parameters(), run.adapter.parameters(), strict=True):
        assert torch.equal(found, trained)


def test_summary_and_model_card_state_the_run_s_figures(finished):
    _, run, summary = finished
    text = "\n".join(summary.lines(run.output))
    stored = sum(p.numel() for p in run.adapter.parameters())
    assert f"{stored:,} trained per step, {stored:,} ever, {stored:,} stored" in text
    assert f"of what the adapter changes, it misses {summary.plain.gap}" in text
    card = (run.output / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---")[1])
    assert front["instance_prompt"] == "a sks cat"
    assert "2 of batch 1 x 1" in card
    assert "![before and after](before_after.png)" in card


def test_metrics_have_one_line_per_step(finished):
    _, run, _ = finished
    lines = [json.loads(line) for line in (run.output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line.keys() == {"step", "loss", "lr", "grad_norm", "seconds", "active_layers"} for line in lines)
    assert all(line["lr"] == 1e-2 and line["active_layers"] == len(run.adapter.blocks) for line in lines)


def test_base_is_bit_identical_after_training_and_detaching(tiny_pipeline, subject, tmp_path):
    fresh = load_pipeline(str(tiny_pipeline))
    run = trainer(tiny_pipeline, subject, tmp_path / "out", learning_rate=0.1, reducer="random", reducer_warmup=0)
    run.run()
    detach(run.family.model)
    for part in ("unet", "vae", "text_encoder"):
        expected, found = getattr(fresh, part).state_dict(), getattr(run.family.pipe, part).state_dict()
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected), part
    processors = [
        {name: type(p) for name, p in pipe.unet.attn_processors.items()} for pipe in (fresh, run.family.pipe)
    ]
    assert processors[0] == processors[1]


def test_same_seed_repeats_the_run_and_another_seed_does_not(tiny_pipeline, subject, tmp_path):
    results = []
    for index, seed in enumerate((3, 3, 4)):
        trainer(tiny_pipeline, subject, tmp_path / str(index), seed=seed, lora_dropout=0.1).run()
        results.append((tmp_path / str(index) / "effilora.safetensors").read_bytes())
    assert results[0] == results[1] != results[2]


def test_gradient_checkpointing_changes_nothing_but_memory(tiny_pipeline, subject, tmp_path):
    found = {}
    for on in (False, True):
        run = trainer(tiny_pipeline, subject, tmp_path / str(on), gradient_checkpointing=on, lora_dropout=0.1)
        assert run.family.pipe.unet.is_gradient_checkpointing is on
        run.run()
        found[on] = metrics(tmp_path / str(on))
    for plain, recomputed in zip(found[False], found[True], strict=True):
        assert plain == pytest.approx(recomputed, rel=1e-4)


def test_learning_rate_follows_schedule_warm_up_and_scale(tiny_pipeline, subject, tmp_path):
    options = {"lr_scheduler": "linear", "lr_warmup_steps": 2, "max_train_steps": 6, "learning_rate": 1e-3}
    batches = {"scale_lr": True, "train_batch_size": 2, "gradient_accumulation_steps": 3}
    trainer(tiny_pipeline, subject, tmp_path / "out", **options, **batches, num_validation_images=0).run()
    expected = [6e-3 * factor for factor in (0, 0.5, 1, 0.75, 0.5, 0.25)]
    assert [line["lr"] for line in metrics(tmp_path / "out")] == pytest.approx(expected)


def test_reducer_trains_half_of_the_layers_after_its_warm_up(tiny_pipeline, subject, tmp_path):
    options = {"reducer": "importance", "reducer_warmup": 1, "reducer_interval": 2, "max_train_steps": 4}
    run = trainer(tiny_pipeline, subject, tmp_path / "out", **options, num_validation_images=0)
    summary = run.run()
    layers = len(run.adapter.blocks)
    assert [line["active_layers"] for line in metrics(run.output)] == [layers, *[layers // 2] * 3]
    events = [json.loads(line) for line in (run.output / "reducer.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "importance"] == [1, 3]
    assert summary.parameters["trained_per_step"] < summary.parameters["stored"]
    assert all(p.requires_grad for p in run.adapter.parameters())


def test_grids_and_checkpoints_come_as_often_as_asked(tiny_pipeline, subject, tmp_path):
    options = {"max_train_steps": 5, "checkpointing_steps": 2, "checkpoints_total_limit": 2}
    trainer(tiny_pipeline, subject, tmp_path / "a", **options, validation_steps=2).run()
    assert checkpoint_names(tmp_path / "a") == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]
    assert sorted(path.name for path in (tmp_path / "a" / "samples").iterdir()) == [
        f"step-00000{step}.png" for step in (0, 2, 4, 5)
    ]
    trainer(
        tiny_pipeline, subject, tmp_path / "b", num_train_epochs=2, max_train_steps=None, validation_epochs=1
    ).run()
    assert sorted(path.name for path in (tmp_path / "b" / "samples").iterdir()) == [
        f"step-00000{step}.png" for step in (0, 3, 6)
    ]
    trainer(tiny_pipeline, subject, tmp_path / "c", num_validation_images=0).run()
    assert not (tmp_path / "c" / "samples").exists()
    assert not (tmp_path / "c" / "before_after.png").exists()


def test_bf16_trains_a_float_adapter_on_a_half_base_and_fp16_is_refused(tiny_pipeline, subject, tmp_path, capsys):
    run = trainer(tiny_pipeline, subject, tmp_path / "out", mixed_precision="bf16", num_validation_images=0)
    assert "bf16 is very slow" in capsys.readouterr().out
    run.run()
    assert run.family.pipe.unet.dtype == torch.bfloat16
    assert {p.dtype for p in run.adapter.parameters()} == {torch.float32}
    with pytest.raises(EffiLoRAError, match="fp16 needs a GPU"):
        trainer(tiny_pipeline, subject, tmp_path / "no", mixed_precision="fp16")
    assert not (tmp_path / "no").exists()


def test_nan_loss_stops_the_run_and_leaves_the_last_checkpoint_as_it_was(tiny_pipeline, subject, tmp_path):
    run = trainer(tiny_pipeline, subject, tmp_path / "out", max_train_steps=5, checkpointing_steps=1)
    name = run.batches.draw(2, 1).names[0]
    (example,) = [example for example in run.parts.examples if example.path.name == name]
    for key, moments in run.batches.instance._moments.items():
        if key[0] == example.sha256:
            moments[0, 0, 0, 0] = float("nan")
    with pytest.raises(EffiLoRAError, match=rf"the loss became nan at step 3 \(images {name}\)"):
        run.run()
    assert checkpoint_names(run.output) == ["checkpoint-1", "checkpoint-2"]
    assert all(fault_of(folder) is None for folder in checkpoints(run.output))
    begun = {".run.json", "config.yaml", "metrics.jsonl", "report.html", "samples/step-000000.png", "scores.jsonl"}
    assert names(run.output) & RESULT == begun
    assert [line["step"] for line in metrics(run.output)] == [1, 2]


def test_nan_gradient_stops_the_run_before_it_reaches_the_weights(tiny_pipeline, subject, tmp_path):
    run = trainer(tiny_pipeline, subject, tmp_path / "out")
    run.adapter.B[0].register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(EffiLoRAError, match="the gradient became nan at step 1"):
        run.run()
    assert all(p.isfinite().all() for p in run.adapter.parameters())
    assert checkpoint_names(run.output) == []
    assert not (run.output / "effilora.safetensors").exists()


def test_run_that_changed_no_head_is_refused(tiny_pipeline, subject, tmp_path):
    run = trainer(tiny_pipeline, subject, tmp_path / "out")
    for heads in run.adapter.B:
        heads.register_hook(torch.zeros_like)
    with pytest.raises(EffiLoRAError, match="without changing a single head"):
        run.run()
    assert checkpoint_names(run.output) == []
    assert not names(run.output) & {"effilora.safetensors", "pytorch_lora_weights.safetensors", "README.md"}


def test_earlier_run_is_replaced_only_if_asked_and_then_only_its_own_files(tiny_pipeline, tmp_path, capsys):
    output = tmp_path / "out"
    inside = make_subject(output / "subject")  # images in the output folder must survive
    (output / "notes.txt").write_text("mine")
    config = settings(tiny_pipeline, inside, output, num_validation_images=0)
    words = arguments(config)
    assert launch.main(words) == 0
    (output / "checkpoint-99").mkdir()
    before = files_in(output)

    assert launch.main([*words, "--seed=1"]) == 2
    assert "holds an earlier run" in capsys.readouterr().err
    assert files_in(output) == before

    wrong = [*words, "--overwrite_output_dir", f"--instance_data_dir={tmp_path / 'typo'}"]
    assert launch.main(wrong) == 2  # a mistake must not cost the earlier run
    assert files_in(output) == before

    assert launch.main([*words, "--overwrite_output_dir", "--seed=1"]) == 2
    assert "no run wrote and that this one would replace: checkpoint-99" in capsys.readouterr().err
    assert files_in(output) == before
    (output / "checkpoint-99").rmdir()
    assert launch.main([*words, "--overwrite_output_dir", "--seed=1", "--max_train_steps=1"]) == 0
    after = files_in(output)
    assert checkpoint_names(output) == ["checkpoint-1"]
    assert after["effilora.safetensors"] != before["effilora.safetensors"]
    kept = {"notes.txt", *(f"subject/{index}.png" for index in range(3))}
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}


def test_bad_image_is_named_on_the_screen_and_the_rest_is_used(tiny_pipeline, tmp_path, capsys):
    folder = make_subject(tmp_path / "subject")
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:100])
    (folder / "words.jpg").write_text("no image at all")
    words = arguments(settings(tiny_pipeline, folder, tmp_path / "out", num_validation_images=0))
    assert launch.main(words) == 0
    out = capsys.readouterr().out
    assert "skipped  broken.png: " in out
    assert "skipped  words.jpg: it is a text file" in out
    assert load_adapter_file(tmp_path / "out" / "effilora.safetensors").metadata["images"] == 3


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_ends_the_run_after_its_step_with_a_checkpoint(
    tiny_pipeline, subject, tmp_path, monkeypatch, capsys, number, code
):
    take = Loop.step

    def interrupted(self, step):
        found = take(self, step)
        if step == 1:
            os.kill(os.getpid(), number)
        return found

    monkeypatch.setattr(Loop, "step", interrupted)
    before = signal.getsignal(number)
    words = arguments(settings(tiny_pipeline, subject, tmp_path / "out", max_train_steps=5))
    assert launch.main(words) == code
    assert signal.getsignal(number) == before
    assert checkpoint_names(tmp_path / "out") == ["checkpoint-2"]
    assert fault_of(tmp_path / "out" / "checkpoint-2") is None
    assert not (tmp_path / "out" / "effilora.safetensors").exists()
    assert "--resume_from_checkpoint latest" in capsys.readouterr().err


def test_second_signal_ends_the_run_at_once(tiny_pipeline, subject, tmp_path, monkeypatch):
    take = Loop.step

    def interrupted(self, step):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return take(self, step)

    monkeypatch.setattr(Loop, "step", interrupted)
    assert launch.main(arguments(settings(tiny_pipeline, subject, tmp_path / "out"))) == 130
    assert checkpoint_names(tmp_path / "out") == []


def test_run_without_images_names_the_missing_setting(tiny_pipeline, tmp_path, capsys):
    words = [f"--pretrained_model_name_or_path={tiny_pipeline}", f"--output_dir={tmp_path / 'out'}"]
    assert launch.main(words) == 2
    assert "--instance_data_dir is missing" in capsys.readouterr().err

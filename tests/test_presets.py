"""Presets: what is named wins, a run keeps what it began with, and every preset trains."""

from dataclasses import asdict

import pytest
import yaml
from helpers import make_subject, metrics
from tiny_families import build

from effilora_diffusion import cli
from effilora_diffusion.cli import train as launch
from effilora_diffusion.core import EffiLoRAError, load_adapter_file
from effilora_diffusion.core.files import ADAPTER_FILE
from effilora_diffusion.diffusion import presets
from effilora_diffusion.diffusion.config import TrainingConfig
from effilora_diffusion.diffusion.presets import NAMES, preset_settings, with_preset

NAMED = ["--pretrained_model_name_or_path", "model", "--instance_data_dir", "images", "--instance_prompt", "a sks cat"]


def parse(*words):
    return launch.parse_arguments([*NAMED, *words], None)


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_is_its_settings_over_the_defaults(name):
    config, plain = parse("--preset", name), parse()
    expected = preset_settings(name)
    assert {setting: getattr(config, setting) for setting in expected} == expected
    rest = asdict(plain).keys() - expected.keys() - {"preset"}
    assert {setting: getattr(config, setting) for setting in rest} == {
        setting: getattr(plain, setting) for setting in rest
    }


def test_what_is_named_wins_even_where_it_is_the_default(tmp_path):
    default = TrainingConfig()
    assert parse("--preset", "quality").heads == 3 != default.heads
    assert parse("--preset", "quality", "--heads", str(default.heads)).heads == default.heads
    assert parse("--preset", "small", "--no-gradient_checkpointing").gradient_checkpointing is False
    assert parse("--preset", "small", "--save_precision", "float").save_precision == "float"
    file = tmp_path / "s.yaml"
    file.write_text(f"heads: {default.heads}\nrank: 5\npreset: quality\n")
    config = parse("--config", str(file))
    assert (config.heads, config.rank, config.routing) == (default.heads, 5, "token")
    config = parse("--config", str(file), "--rank", "6", "--preset", "small")
    assert (config.heads, config.rank, config.save_precision) == (default.heads, 6, "fp16")


@pytest.mark.parametrize(
    ("named", "left_out"),
    [
        ({"init_from": "run"}, {"rank", "heads", "routing", "lora_alpha", "target_modules", "a_start"}),
        ({"learning_rate": 1e-3}, {"learning_rate", "a_start"}),
        ({"reducer_time": 0.7}, {"reducer", "reducer_active", "reducer_train_shared"}),
        ({"num_train_epochs": 3}, {"max_train_steps"}),
    ],
)
def test_what_another_setting_excludes_is_left_out(named, left_out):
    found = with_preset("paper", named)
    assert found.keys() == preset_settings("paper").keys() - left_out
    TrainingConfig(**{**found, **named})


def test_micro_batches_of_a_preset_give_way_together():
    assert with_preset("small", {})["gradient_accumulation_steps"] == 4
    for named in ({"train_batch_size": 3}, {"gradient_accumulation_steps": 2}):
        assert not {"train_batch_size", "gradient_accumulation_steps"} & with_preset("small", named).keys()


def test_the_embedded_example_has_presets_too():
    config = launch.parse_arguments(["--preset", "fast"])
    assert (config.heads, config.max_train_steps, config.learning_rate) == (
        1,
        125,
        presets.EMBEDDED_RATE["learning_rate"],
    )
    assert config.instance_prompt == "an emoji of sks cat"


def test_an_unknown_preset_is_refused():
    with pytest.raises(EffiLoRAError, match="--preset must be one of quality, plain, fast, small, paper, not 'quick'"):
        TrainingConfig(preset="quick")


def train(model, subject, output, *words):
    own = ["--resolution", "32", "--num_validation_images", "0", "--learning_rate", "0.05"]
    paths = ["--pretrained_model_name_or_path", str(model), "--instance_data_dir", str(subject)]
    named = ["--instance_prompt", "a sks cat", "--output_dir", str(output)]
    return cli.main(["train", *paths, *named, *own, *words])


def test_a_run_writes_what_its_preset_was_and_goes_on_with_that(tiny_pipeline, tmp_path, capsys, monkeypatch):
    subject, out = make_subject(tmp_path / "s", 3), tmp_path / "out"
    words = ["--preset", "plain", "--rank", "3", "--max_train_steps", "4", "--checkpointing_steps", "2"]
    assert train(tiny_pipeline, subject, out, *words) == 0
    said = capsys.readouterr().out
    assert "note: --preset plain: heads 1, routing static" in said
    assert "; set otherwise: rank 3, max_train_steps 4, learning_rate 0.05" in said
    assert (out / "config.yaml").read_text().startswith("# --preset plain, expanded\n")
    kept = yaml.safe_load((out / "config.yaml").read_text())
    assert "preset" not in kept
    assert (kept["heads"], kept["rank"], kept["with_prior_preservation"]) == (1, 3, True)
    whole = metrics(out)

    later = {**presets.PRESETS["plain"].settings, "heads": 2, "routing": "token"}
    monkeypatch.setitem(presets.PRESETS, "plain", presets.Preset("", "", later))
    again = [*words, "--resume_from_checkpoint", "checkpoint-2"]
    assert train(tiny_pipeline, subject, out, *again) == 0
    assert load_adapter_file(out / ADAPTER_FILE).adapter.config.heads == 1
    assert metrics(out) == whole
    capsys.readouterr()
    again = ["--preset", "quality", *again[2:]]
    assert train(tiny_pipeline, subject, out, *again) == 2  # another preset than the one it was begun with
    assert "belongs to another run" in capsys.readouterr().err


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of a small transformer, and of the embedded base as ``None``."""
    folder = tmp_path_factory.mktemp("hunyuandit")
    build("hunyuandit").save_pretrained(folder)
    return {"embedded": None, "hunyuandit": folder}


@pytest.mark.parametrize("base", ["embedded", "hunyuandit"])
@pytest.mark.parametrize("name", NAMES)
def test_every_preset_trains(bases, tmp_path, name, base, capsys):
    subject = make_subject(tmp_path / "s", 2, size=(64, 64))
    model = bases[base]
    words = [
        "--instance_data_dir",
        str(subject),
        "--instance_prompt",
        "a sks cat",
        "--resolution",
        "64",
        "--preset",
        name,
    ]
    words += ["--max_train_steps", "2", "--export_distillation_steps", "2", "--num_validation_images", "0"]
    words += ["--output_dir", str(tmp_path / "out")]
    words += ["--pretrained_model_name_or_path", str(model)] if model else []
    assert cli.main(["train", *words]) == 0
    said = capsys.readouterr().out
    config = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    adapter = load_adapter_file(tmp_path / "out" / ADAPTER_FILE).adapter.config
    expected = preset_settings(name, embedded=model is None)
    assert (adapter.rank, adapter.heads) == (expected["rank"], expected["heads"])
    assert (adapter.routing, adapter.alpha) == (expected["routing"], expected.get("lora_alpha"))
    assert config["with_prior_preservation"] is (name != "paper")
    if name != "paper":
        assert f"no images, {config['class_prompt'][0]!r} goes with the instance images" in said
    if name == "small" and base == "hunyuandit":  # which can't recompute activations
        assert "can't have the gradient checkpointing of --preset small" in said
        assert config["gradient_checkpointing"] is False


def test_the_class_prompt_is_the_instance_prompt_without_the_subject(tmp_path, capsys):
    words = ["train", "--instance_data_dir", str(make_subject(tmp_path / "s", 2)), "--resolution", "64", "--dry_run"]
    words += ["--with_prior_preservation", "--output_dir", str(tmp_path / "out"), "--instance_prompt"]
    assert cli.main([*words, "a photo of sks, a cat"]) == 0
    assert "no images, 'a photo of a cat' goes with the instance images" in capsys.readouterr().out
    assert cli.main([*words, "sks"]) == 2
    assert "names nothing but the subject" in capsys.readouterr().err

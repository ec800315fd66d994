"""Settings: diffusers' names and defaults, three sources in order, and one sentence for everything that can't work."""

import math
from dataclasses import asdict, replace

import pytest
import yaml

from effilora_diffusion.cli import settings_parser, train
from effilora_diffusion.core import EffiLoRAError
from effilora_diffusion.core.options import hints_of
from effilora_diffusion.diffusion.config import ONCE, PATHS, TrainingConfig
from effilora_diffusion.diffusion.presets import EMBEDDED_RATE
from effilora_diffusion.diffusion.run_options import SCHEDULES

DIFFUSERS_DEFAULTS = {
    "lora_dropout": 0.0,
    "learning_rate": 5e-4,
    "resolution": 512,
    "train_batch_size": 4,
    "sample_batch_size": 4,
    "num_train_epochs": 1,
    "max_train_steps": None,
    "checkpointing_steps": 500,
    "checkpoints_total_limit": None,
    "resume_from_checkpoint": None,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
    "scale_lr": False,
    "lr_num_cycles": 1,
    "lr_power": 1.0,
    "lr_scheduler": "constant",
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_weight_decay": 1e-2,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "num_class_images": 100,
    "num_validation_images": 4,
    "center_crop": False,
    "random_flip": False,
    "with_prior_preservation": False,
    "output_dir": "lora-dreambooth-model",
    "allow_tf32": False,
    "image_interpolation_mode": "lanczos",
}

EXAMPLE = {"instance_data_dir": "example", "resolution": 64, "max_train_steps": 300}


def example():
    return dict(EXAMPLE)


def parse_arguments(words, example=None):
    return train.parse_arguments(words, example)


def read_config_file(path):
    return settings_parser.read_config_file(path, hints_of([TrainingConfig]))


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_defaults_are_those_of_diffusers():
    config = TrainingConfig()
    assert {name: getattr(config, name) for name in DIFFUSERS_DEFAULTS} == DIFFUSERS_DEFAULTS
    assert parse_arguments([]) == config


def test_default_adapter_has_one_head_of_twice_diffusers_rank_and_others_are_routed():
    adapter = TrainingConfig().adapter_config()
    assert (adapter.rank, adapter.heads, adapter.a_sharing) == (8, 1, "width")
    assert TrainingConfig(heads=3).adapter_config().routing == "token"
    assert adapter.target_modules == ("attention",)
    assert adapter.reducer.mode == "off"


def test_adapter_settings_reach_the_adapter():
    adapter = TrainingConfig(
        rank=8,
        lora_alpha=4.0,
        lora_dropout=0.2,
        heads=2,
        routing="static",
        a_sharing="slice",
        target_modules=["to_q"],
        adapt_feed_forward=True,
        reducer="random",
        reducer_active=0.25,
        reducer_interval=3,
        reducer_warmup=7,
        reducer_train_shared=True,
    ).adapter_config()
    assert (adapter.rank, adapter.alpha, adapter.dropout, adapter.heads) == (8, 4.0, 0.2, 2)
    assert (adapter.routing, adapter.a_sharing) == ("static", "slice")
    assert adapter.target_modules == ("to_q", "feed_forward")
    reducer = adapter.reducer
    assert (reducer.mode, reducer.active, reducer.interval, reducer.warmup) == ("random", 0.25, 3, 7)
    assert reducer.train_shared is True


@pytest.mark.parametrize(
    ("suffix", "text"),
    [
        (".yaml", "rank: 6\nlearning_rate: 1e-4\nvalidation_prompt: [a cat, a dog]\nrandom_flip: true\nseed: 3\n"),
        (
            ".toml",
            'rank = 6\nlearning_rate = 1e-4\nvalidation_prompt = ["a cat", "a dog"]\nrandom_flip = true\nseed = 3\n',
        ),
    ],
)
def test_command_line_wins_over_config_file_wins_over_default(tmp_path, suffix, text):
    path = write(tmp_path / f"settings{suffix}", text)
    config = parse_arguments(["--config", path, "--rank", "2", "--no-random_flip", "--validation_prompt", "a toy"])
    assert (config.rank, config.random_flip, config.validation_prompt) == (2, False, ["a toy"])
    assert (config.learning_rate, config.seed) == (1e-4, 3)
    assert config.heads == TrainingConfig().heads
    assert parse_arguments(["--config", path]).validation_prompt == ["a cat", "a dog"]


@pytest.mark.parametrize("text", ["1e-4", "'1e-4'", "0.0001", "1.0e-4"])
def test_yaml_number_without_a_dot_is_a_number(tmp_path, text):
    value = read_config_file(tmp_path / write(tmp_path / "a.yaml", f"learning_rate: {text}\n"))["learning_rate"]
    assert value == 1e-4
    assert isinstance(value, float)


def test_whole_number_is_accepted_where_a_float_is_meant(tmp_path):
    found = read_config_file(tmp_path / write(tmp_path / "a.yaml", "snr_gamma: 5\nmax_train_steps: null\n"))
    assert found == {"snr_gamma": 5.0, "max_train_steps": None}
    assert isinstance(found["snr_gamma"], float)


def test_single_prompt_in_a_file_is_a_list_of_one(tmp_path):
    path = tmp_path / write(tmp_path / "a.yaml", "validation_prompt: a cat\n")
    assert read_config_file(path) == {"validation_prompt": ["a cat"]}


@pytest.mark.parametrize(
    ("name", "text", "phrase"),
    [
        ("a.yaml", "ranc: 4\n", r"ranc is no setting of --config .*: did you mean --rank\?"),
        ("a.toml", "ranc = 4\n", r"ranc is no setting of --config .*: did you mean --rank\?"),
        ("a.yaml", "1: 4\nrank: 4\nranc: 4\n", r"1 is no setting of --config .*: --help lists what there is"),
        ("a.yaml", "rank: four\n", "rank must be of type int, not 'four'"),
        ("a.yaml", "rank: 4.5\n", "rank must be of type int, not 4.5"),
        ("a.yaml", "rank: true\n", "rank must be of type int, not True"),
        ("a.yaml", "rank: null\n", "rank must be of type int, not None"),
        ("a.yaml", "max_train_steps: true\n", "max_train_steps must be of type int, not True"),
        ("a.yaml", "snr_gamma: 'five'\n", "snr_gamma must be of type float, not 'five'"),
        ("a.yaml", "instance_prompt: 5\n", "instance_prompt must be of type str, not 5"),
        ("a.yaml", "learning_rate: fast\n", "learning_rate must be of type float, not 'fast'"),
        ("a.yaml", "learning_rate: true\n", "learning_rate must be of type float, not True"),
        ("a.yaml", "random_flip: 1\n", "random_flip must be of type bool, not 1"),
        ("a.toml", "output_dir = 4\n", "output_dir must be of type str, not 4"),
        ("a.yaml", "a: [1\n", "can't be read"),
        ("a.toml", "rank: 4\n", "can't be read"),
        ("a.yaml", "just words\n", "must hold settings as 'name: value'"),
        ("a.yaml", "", "must hold settings as 'name: value'"),
        ("a.yaml", "mixed_precision: fp8\n", "--mixed_precision must be one of"),
        ("a.yaml", "lr_scheduler: piecewise_constant\n", "--lr_scheduler must be one of"),
    ],
)
def test_bad_config_file_is_refused_with_its_reason(tmp_path, name, text, phrase):
    with pytest.raises(EffiLoRAError, match=phrase):
        parse_arguments(["--config", write(tmp_path / name, text)])


def test_unreadable_config_file_is_refused_by_name(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"instance_prompt: caf\xe9\n")
    for path in (tmp_path / "missing.yaml", tmp_path, tmp_path / "latin.yaml"):
        with pytest.raises(EffiLoRAError, match="can't be read") as caught:
            parse_arguments(["--config", str(path)])
        assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        *(
            {name: 0}
            for name in ("resolution", "train_batch_size", "gradient_accumulation_steps", "sample_batch_size")
        ),
        *({name: 0} for name in ("num_train_epochs", "checkpointing_steps", "num_class_images", "lr_num_cycles")),
        *({name: 0} for name in ("max_train_steps", "checkpoints_total_limit", "validation_steps", "rank", "heads")),
        *({name: -1} for name in ("num_validation_images", "lr_warmup_steps", "seed", "adam_weight_decay")),
        *({"learning_rate": value} for value in (0, -1.0, math.nan, math.inf)),
        *({name: math.nan} for name in ("snr_gamma", "prior_loss_weight", "adam_beta1", "max_grad_norm")),
        {"seed": 2**63},
        {"resolution": 100},
        {"snr_gamma": 0.0},
        {"prior_loss_weight": -1.0},
        {"adam_beta2": 1.0},
        {"lora_dropout": 1.0},
        {"lora_alpha": 0.0},
        {"routing": "magic"},
        {"reducer": "magic"},
        {"mixed_precision": "fp8"},
        {"lr_scheduler": "magic"},
        {"target_modules": []},
        {"reducer_active": 0.0},
        {"with_prior_preservation": True},
        {"with_prior_preservation": True, "class_data_dir": "x"},
        {"with_prior_preservation": True, "class_prompt": "x", "prior_target": "images"},
    ],
    ids=str,
)
def test_value_that_cannot_work_is_refused_in_one_line(options):
    with pytest.raises(EffiLoRAError) as caught:
        TrainingConfig(**options)
    assert "\n" not in str(caught.value)


def test_values_at_their_limits_are_accepted():
    TrainingConfig(
        num_validation_images=0,
        max_train_steps=1,
        adam_weight_decay=0.0,
        prior_loss_weight=0.0,
        seed=2**63 - 1,
        resolution=8,
    )
    for name in SCHEDULES:
        TrainingConfig(lr_scheduler=name)


def test_resolved_settings_repeat_the_run_from_a_file(tmp_path):
    config = TrainingConfig(
        instance_prompt="ein süßer Hund: '猫'",
        validation_prompt=["a", "b: c"],
        learning_rate=1e-7,
        snr_gamma=5.0,
        reducer="importance",
        center_crop=True,
    )
    (tmp_path / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    assert parse_arguments(["--config", str(tmp_path / "config.yaml")]) == config
    assert asdict(config).keys() - yaml.safe_load(config.to_yaml()).keys() == set(ONCE)
    once = replace(config, overwrite_output_dir=True, resume_from_checkpoint="latest", dry_run=True)
    assert once.to_yaml() == config.to_yaml()  # repeating a run never replaces it


@pytest.mark.parametrize("name", PATHS)
def test_names_of_files_and_folders_are_not_empty_and_may_begin_at_home(monkeypatch, name):
    monkeypatch.setenv("HOME", "/home/me")
    assert getattr(parse_arguments([f"--{name}=~/a"]), name) == "/home/me/a"
    for empty in ("", "  "):
        with pytest.raises(EffiLoRAError, match=f"--{name} is empty: name it, or leave the setting out"):
            parse_arguments([f"--{name}={empty}"])


def test_example_is_used_only_if_neither_model_nor_images_are_named(tmp_path):
    plain = TrainingConfig()
    embedded = replace(plain, **EMBEDDED_RATE)
    assert parse_arguments([], example) == replace(embedded, **EXAMPLE)
    assert parse_arguments(["--resolution", "32"], example) == replace(embedded, **{**EXAMPLE, "resolution": 32})
    images = [(name, embedded) for name in ("instance_data_dir", "dataset_name", "dataset_config")]
    for name, base in (*images, ("pretrained_model_name_or_path", plain)):
        named = replace(base, **{name: "mine"})
        assert parse_arguments([f"--{name}", "mine"], example) == named
        assert parse_arguments(["--config", write(tmp_path / "a.yaml", f"{name}: mine\n")], example) == named


def test_example_function_is_not_called_when_it_is_not_needed():
    def missing():
        raise AssertionError("asked for the example")

    parse_arguments(["--instance_data_dir", "mine"], missing)
    with pytest.raises(AssertionError, match="asked"):
        parse_arguments([], missing)

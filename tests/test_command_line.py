"""The command line: diffusers' flags, other trainers' names, what is absent and what is misspelt."""

import shlex
from dataclasses import asdict

import pytest
from test_settings import EXAMPLE, parse_arguments, write

from effilora_diffusion.cli import settings_parser, train, train_llm
from effilora_diffusion.core import EffiLoRAError
from effilora_diffusion.core.options import hints_of, settings_of
from effilora_diffusion.diffusion.config import TrainingConfig
from effilora_diffusion.diffusion.training.diffusers_flags import NOT_NEEDED, NOT_SUPPORTED
from effilora_diffusion.language.config import kinds_of


@pytest.mark.parametrize("name", NOT_NEEDED)
def test_flag_of_diffusers_that_changes_nothing_is_accepted_with_a_note(name, capsys):
    assert parse_arguments([f"--{name}", "1"]) == TrainingConfig()
    assert f"--{name} is not needed: {NOT_NEEDED[name]}" in capsys.readouterr().out


@pytest.mark.parametrize("name", NOT_SUPPORTED)
def test_flag_of_diffusers_that_would_change_the_result_is_refused_with_the_reason(name):
    with pytest.raises(EffiLoRAError, match=f"--{name} is not supported"):
        parse_arguments([f"--{name}"])


def test_refusals_come_all_at_once():
    with pytest.raises(
        EffiLoRAError, match=r"--use_dora is not supported .*; --cache_dir is not supported .*leave them out"
    ):
        parse_arguments(["--use_dora", "--cache_dir", "c"])


def test_repeats_lengthen_epochs_as_in_diffusers():
    assert parse_arguments(["--repeats", "3", "--num_train_epochs", "2"]).num_train_epochs == 6
    steps = parse_arguments(["--repeats", "3", "--max_train_steps", "9", "--validation_epochs", "2"])
    assert (steps.num_train_epochs, steps.max_train_steps, steps.validation_epochs) == (1, 9, 6)
    with pytest.raises(EffiLoRAError, match="--repeats must be at least 1, not '0'"):
        parse_arguments(["--repeats", "0"])


def test_layers_named_as_in_diffusers_flux_script_become_targets():
    assert parse_arguments(["--lora_layers", "attn.to_k, attn.to_q"]).target_modules == ["attn.to_k", "attn.to_q"]


def test_layers_are_named_once():
    for flag in ("--lora_layers", "--lora_blocks"):
        with pytest.raises(EffiLoRAError, match=f"{flag} and --target_modules both name the layers"):
            parse_arguments([flag, "0", "--target_modules", "to_k"])


def test_blocks_named_as_in_diffusers_sd3_script_become_targets():
    asked = ["--lora_blocks", "0, 12", "--lora_layers", "attn.to_k,attn.to_q"]
    assert parse_arguments(asked).target_modules == [
        f"transformer_blocks.{block}.attn.{name}" for block in (0, 12) for name in ("to_k", "to_q")
    ]
    assert len(parse_arguments(["--lora_blocks", "3"]).target_modules) == 8
    with pytest.raises(EffiLoRAError, match="--lora_blocks must be numbers of blocks, as in 12,30, not 'all'"):
        parse_arguments(["--lora_blocks", "all"])


def test_the_layers_that_flux2_reads_anyway_may_be_named():
    for own in ("10 20 30", "9 18 27"):
        assert parse_arguments(["--text_encoder_out_layers", *own.split()]) == TrainingConfig()
    with pytest.raises(EffiLoRAError, match="--text_encoder_out_layers is not supported"):
        parse_arguments(["--text_encoder_out_layers", "1"])


def test_an_optimizer_is_known_by_any_spelling():
    assert parse_arguments(["--optimizer", "AdamW"]) == TrainingConfig()
    assert parse_arguments(["--optimizer", "AdamW_8bit"]).optimizer == "adamw8bit"


COMMANDS = {
    "sdxl": "--pretrained_vae_model_name_or_path vae --mixed_precision fp16 --resolution 1024 --snr_gamma 5.0 --random_flip",
    "sd3": "--weighting_scheme logit_normal --logit_mean 0 --logit_std 1 --max_sequence_length 77 --cache_latents",
    "flux": "--guidance_scale 1 --optimizer adamw --lora_alpha 16 --rank 16 --weighting_scheme none --mode_scale 1.29",
    "flux2": "--max_sequence_length 512 --offload --cache_latents --skip_final_inference --upcast_before_saving",
}


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_commands_of_diffusers_scripts_for_other_families_run_as_they_are(words):
    named = "--pretrained_model_name_or_path m --instance_data_dir d --instance_prompt p --output_dir o"
    config = parse_arguments([*named.split(), *words.split()])
    given = dict(pair.split(maxsplit=1) for pair in words.split("--")[1:] if " " in pair.strip())
    for name, value in given.items():
        if name in vars(config):
            found = getattr(config, name)
            assert found == type(found)(value.strip())


@pytest.mark.parametrize("words", [["--rank"], ["--rank", "four"], ["--routing", "magic"]])
def test_malformed_options_end_with_code_two(words, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_arguments(words)
    assert caught.value.code == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--ranc", "4"], "did you mean --rank?"),
        (["--ran", "4"], "did you mean --rank?"),
        (["--learning-rat", "4"], "did you mean --learning_rate?"),
        (["--nothing_like_it"], "--help lists what there is"),
        (["--network_dim", "8"], "here it is --rank"),
        (["--network-alpha=8"], "here it is --lora_alpha"),
        (["--train_data_dir", "x"], "here it is --instance_data_dir"),
        (["--unet_lr", "1"], "here it is --learning_rate"),
        (["--max_train_epochs", "1"], "here it is --num_train_epochs"),
        (["--save_every_n_steps", "1"], "here it is --checkpointing_steps"),
        (["--lr", "1"], "here it is --learning_rate"),
        (["--steps", "1"], "here it is --max_train_steps"),
        (["--trigger_word", "sks"], "here it is --trigger for [trigger] in captions, or the whole --instance_prompt"),
        (["stray"], "quote values that have spaces"),
    ],
    ids=str,
)
def test_unknown_names_are_answered_with_the_nearest_known_one(words, answer, capsys):
    assert train.main(words) == 2
    error = capsys.readouterr().err
    assert answer in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("kinds", [(TrainingConfig,), kinds_of(False), kinds_of(True)], ids=["image", "llm", "vlm"])
def test_names_of_other_trainers_lead_to_settings_that_exist(kinds):
    known = {*hints_of([TrainingConfig]), *hints_of(kinds_of(False))}
    assert {ours.split()[0] for ours in settings_parser.ELSEWHERE.values()} <= known
    assert not {entry.name for kind in kinds for entry in settings_of(kind) if not entry.metadata["help"]}


@pytest.mark.parametrize("spelling", ["--learning-rate", "--learning_rate"])
def test_dashes_and_underscores_are_alike(spelling):
    assert parse_arguments([spelling, "0.25"]).learning_rate == 0.25


@pytest.mark.parametrize("words", [["--no_center_crop"], ["--no-center-crop"], ["--center_crop", "False"]])
def test_what_a_preset_switches_on_can_be_switched_off(words):
    preset = {**EXAMPLE, "center_crop": True}
    assert parse_arguments([], lambda: preset).center_crop
    assert not parse_arguments(words, lambda: preset).center_crop


@pytest.mark.parametrize(
    ("launched", "words", "precision"),
    [
        (None, [], "no"),
        ("bf16", [], "bf16"),
        ("no", [], "no"),
        ("bf16", ["--mixed_precision", "no"], "no"),
        ("fp8", [], None),
    ],
)
def test_precision_of_accelerate_launch_is_the_default(monkeypatch, launched, words, precision):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if launched:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    if precision is None:
        with pytest.raises(EffiLoRAError, match="accelerate launch --mixed_precision fp8"):
            parse_arguments(words)
    else:
        assert parse_arguments(words).mixed_precision == precision


def test_the_config_file_s_precision_wins_over_accelerate_s(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    path = write(tmp_path / "a.yaml", "mixed_precision: fp16\n")
    assert parse_arguments(["--config", path]).mixed_precision == "fp16"


@pytest.mark.parametrize("images", [False, True])
def test_language_settings_come_from_a_file_too(tmp_path, images):
    path = write(tmp_path / "a.yaml", "rank: 2\ntrain_file: a.jsonl\nlearning_rate: 1e-4\nmax_steps: 3\nbf16: false\n")
    found = train_llm.parse_arguments(["--config", path, "--rank", "3"], images)
    assert (found.adapter.rank, found.data.train_file) == (3, "a.jsonl")
    assert (found.training.learning_rate, found.training.max_steps) == (1e-4, 3)
    with pytest.raises(EffiLoRAError, match=r"lora_r is no setting of --config .*: here it is --rank"):
        train_llm.parse_arguments(["--config", write(tmp_path / "b.yaml", "lora_r: 2\n")], images)
    with pytest.raises(EffiLoRAError, match="--max_length must be at least 2, not 1"):
        train_llm.parse_arguments(["--max_length", "1"], images)


def test_what_a_step_computes_is_fixed_when_a_run_is_resumed():
    fixed = {entry.name for entry in settings_of(TrainingConfig) if entry.metadata["fixed"]}
    free = {entry.name for entry in settings_of(TrainingConfig)} - fixed
    assert {"seed", "resolution", "learning_rate", "rank", "mixed_precision", "snr_gamma"} <= fixed
    assert {"output_dir", "max_train_steps", "checkpointing_steps", "validation_prompt", "dry_run"} <= free


def test_help_is_grouped_with_the_twenty_usual_settings_first(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    text = capsys.readouterr().out
    titles = [line[:-1] for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles[:3] == ["options", "Usual settings", "Model"]
    assert {"Model", "Optimizer", "Loss", "Reducer", "Validation"} <= set(titles)
    usual = text.split("Usual settings:")[1].split("\n\n")[0]
    assert usual.count("\n  --") == 20
    assert text.count("--learning-rate") == 0


def test_help_names_every_setting_with_its_default(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_arguments(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name in asdict(TrainingConfig()))
    assert "(default: 0.0005)" in text


def test_a_list_setting_that_is_named_again_is_added_to():
    named = ["--validation_prompt", "a dog", "a cat", "--validation_prompt", "dogs", "--class_prompt", "toy"]
    config = parse_arguments(named)
    assert config.validation_prompt == ["a dog", "a cat", "dogs"]
    assert config.class_prompt == ["toy"]


@pytest.mark.parametrize("words", ["--class_prompt a photo of dog", "--validation_prompt dog 'sks dog' cat"])
def test_a_prompt_without_quotes_is_caught(words):
    with pytest.raises(EffiLoRAError, match=r"among them single words .*: quote a prompt that has spaces"):
        parse_arguments(shlex.split(words))


def test_other_lists_may_be_of_single_words():
    assert parse_arguments(["--target_modules", "to_q", "to_k"]).target_modules == ["to_q", "to_k"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("validation_prompt:\nclass_prompt: []\ntarget_modules: [to_q, 1]\n", ([], [], ["to_q", "1"])),
        ("\ufeffvalidation_prompt: dog\n", (["dog"], [], ["attention"])),
    ],
)
def test_lists_of_a_config_file(tmp_path, text, expected):
    config = parse_arguments(["--config", write(tmp_path / "run.yaml", text)])
    assert (config.validation_prompt, config.class_prompt, config.target_modules) == expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "seed: 1\nrank: 2\nseed: 3\n", "'seed' stands there twice"),
        ("a.yaml", "validation_prompt: [a, null]\n", "must be a list of text"),
        ("a.yaml", "validation_prompt: [[a]]\n", "must be a list of text"),
        ("a.yaml", "validation_prompt: ['']\n", "--validation_prompt is empty"),
        ("a.yaml", "instance_prompt: ' '\n", "--instance_prompt is empty"),
        ("a.yaml", "seed: " + "[" * 5000 + "\n", "can't be read"),
        ("a.toml", "seed = 1\nseed = 2\n", "can't be read"),
        ("a.toml", "seed = " + "[" * 5000 + "\n", "can't be read"),
    ],
)
def test_config_files_that_are_not_what_was_meant(tmp_path, name, text, message):
    with pytest.raises(EffiLoRAError, match=message):
        parse_arguments(["--config", write(tmp_path / name, text)])


def test_a_toml_file_may_begin_with_a_byte_order_mark(tmp_path):
    assert parse_arguments(["--config", write(tmp_path / "run.toml", "\ufeffseed = 7\n")]).seed == 7

"""Captioned images by the flags of diffusers' text-to-image scripts, through the loop that all runs have."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from diffusers import StableDiffusionPipeline
from helpers import make_subject, metrics, same_content
from tiny_families import build

from effilora_diffusion.cli import main
from effilora_diffusion.cli.train import parse_arguments
from effilora_diffusion.cli.train_text_to_image import CAPTIONED
from effilora_diffusion.core import EffiLoRAError
from effilora_diffusion.core.files import load_adapter_file
from effilora_diffusion.diffusion.data.folder import scan_images
from effilora_diffusion.diffusion.training.held_out import some_of

ROOT = Path(__file__).parents[1]
PAPER = ROOT / "train_scripts" / "configs" / "paper_sd15.yaml"
SHORT = (
    "--resolution",
    "64",
    "--report_to",
    "none",
    "--num_validation_images",
    "0",
    "--export_distillation_steps",
    "0",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "sd15"
    build("sd15").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """Four images with captions as diffusers' guide to its script has them: ``metadata.jsonl`` with ``text``."""
    folder = make_subject(tmp_path_factory.mktemp("captioned") / "images", 4, size=(64, 64))
    lines = [json.dumps({"file_name": f"{number}.png", "text": f"a drawing of {number}"}) for number in range(4)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def settings(*words):
    return parse_arguments([str(word) for word in words], CAPTIONED.example, script=CAPTIONED)


def train(*words):
    return main(["train-text-to-image", *map(str, words)])


def test_the_paper_s_setting_trains_and_resumes_bit_for_bit(model, captioned, tmp_path):
    stated = yaml.safe_load(PAPER.read_text())
    facts = ("rank", "lora_alpha", "heads", "target_modules", "learning_rate", "max_train_steps", "train_batch_size")
    assert [stated[name] for name in facts] == [4, 8, 3, ["attention"], 1e-4, 20000, 1]
    tiny = ("--config", PAPER, "--pretrained_model_name_or_path", model, "--train_data_dir", captioned, *SHORT)
    tiny += ("--max_train_steps", "2", "--checkpointing_steps", "1")
    assert train(*tiny, "--output_dir", tmp_path / "whole") == 0
    config = load_adapter_file(tmp_path / "whole" / "effilora.safetensors").adapter.config
    assert (config.rank, config.alpha, config.heads, config.routing) == (4, 8.0, 3, "token")
    assert config.reducer.mode == "importance"
    assert {line["lr"] for line in metrics(tmp_path / "whole")} == {1e-4}

    shutil.copytree(tmp_path / "whole" / "checkpoint-1", tmp_path / "resumed" / "checkpoint-1")
    for name in ("config.yaml", "metrics.jsonl", "reducer.jsonl"):
        if (tmp_path / "whole" / name).exists():
            shutil.copy(tmp_path / "whole" / name, tmp_path / "resumed" / name)
    assert train(*tiny, "--output_dir", tmp_path / "resumed", "--resume_from_checkpoint", "checkpoint-1") == 0
    assert metrics(tmp_path / "resumed") == metrics(tmp_path / "whole")
    assert same_content(tmp_path / "resumed" / "effilora.safetensors", tmp_path / "whole" / "effilora.safetensors")

    pipe = StableDiffusionPipeline.from_pretrained(model)
    pipe.load_lora_weights(tmp_path / "whole")
    assert pipe.get_active_adapters() == ["default_0"]


def test_every_image_is_trained_with_its_own_caption_and_no_instance_prompt(model, captioned, tmp_path, capsys):
    words = ("--pretrained_model_name_or_path", model, "--train_data_dir", captioned, *SHORT)
    assert train(*words, "--output_dir", tmp_path / "out", "--dry_run") == 0
    said = capsys.readouterr().out
    assert all(f"{number}.png: 'a drawing of {number}'" in said for number in range(4)), said
    (bare := tmp_path / "bare").mkdir()
    (bare / "0.png").write_bytes((captioned / "0.png").read_bytes())
    words = ("--pretrained_model_name_or_path", model, "--train_data_dir", bare, *SHORT)
    assert train(*words, "--output_dir", tmp_path / "out") == 2
    assert "caption" in capsys.readouterr().err


def test_defaults_are_those_of_diffusers_script(captioned):
    found = settings("--train_data_dir", captioned, "--pretrained_model_name_or_path", "m")
    names = ("instance_data_dir", "learning_rate", "train_batch_size", "num_train_epochs", "output_dir")
    expected = [str(captioned), 1e-4, 16, 100, "sd-model-finetuned-lora"]
    assert [getattr(found, name) for name in names] == expected
    named = settings("--train_data_dir", captioned, "--pretrained_model_name_or_path", "m", "--learning_rate", "2e-5")
    assert named.learning_rate == 2e-5
    assert settings("--train_data_dir", captioned).learning_rate == 4e-3  # the embedded base's own


@pytest.mark.parametrize(
    "command",
    [
        "--pretrained_model_name_or_path m --dataset_name d --caption_column text --resolution 512 --random_flip "
        "--train_batch_size 1 --num_train_epochs 100 --checkpointing_steps 5000 --learning_rate 1e-04 --lr_scheduler constant "
        "--lr_warmup_steps 0 --seed 42 --output_dir o --validation_prompt=a --report_to wandb",
        "--pretrained_model_name_or_path m --dataset_name d --dataloader_num_workers 8 --resolution 512 --center_crop "
        "--random_flip --train_batch_size 1 --gradient_accumulation_steps 4 --max_train_steps 15000 --learning_rate 1e-04 "
        "--max_grad_norm 1 --lr_scheduler cosine --lr_warmup_steps 0 --output_dir o --push_to_hub --hub_model_id h "
        "--report_to wandb --checkpointing_steps 500 --validation_prompt=a --seed 1337",
        "--pretrained_model_name_or_path m --pretrained_vae_model_name_or_path v --train_data_dir d --image_column image "
        "--enable_xformers_memory_efficient_attention --mixed_precision fp16 --use_8bit_adam --debug_loss --noise_offset 0.05 "
        "--snr_gamma 5.0 --prediction_type epsilon --allow_tf32 --max_train_samples 10 --gradient_checkpointing",
    ],
)
def test_commands_of_diffusers_pages_are_taken_as_they_stand(command):
    settings(*command.split())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--dataset_name", "pokemon"), ("pokemon", "image", "text")),
        (("--dataset_name", "p", "--caption_column", "en", "--image_column", "png"), ("p", "png", "en")),
        (("--train_data_dir", "d", "--caption_column", "additional"), ("d", "image", "additional")),
    ],
)
def test_data_sets_have_their_columns(words, expected):
    found = settings(*words)
    assert (found.dataset_name, found.image_column, found.caption_column) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "name --train_data_dir FOLDER or --dataset_name NAME"),
        (("--train_data_dir", "a", "--dataset_name", "b"), "both name the images"),
        (("--train_data_dir", "a", "--cond_image_column", "b"), "is not supported"),
    ],
)
def test_mistakes_get_a_sentence(words, message):
    with pytest.raises(EffiLoRAError, match=message):
        settings(*words)


def test_the_folder_may_stand_in_the_config_file(captioned, tmp_path):
    (tmp_path / "c.yaml").write_text(f"train_data_dir: {captioned}\nrank: 2\n")
    found = settings("--config", tmp_path / "c.yaml")
    assert (found.instance_data_dir, found.rank) == (str(captioned), 2)
    (tmp_path / "c.yaml").write_text("train_data_dir: [a, b]\n")
    with pytest.raises(EffiLoRAError, match="must be one folder"):
        settings("--config", tmp_path / "c.yaml")


def test_some_of_the_images(captioned):
    examples, _ = scan_images(captioned, None)
    found = some_of(examples, 2, 0)
    assert len(found) == 2
    assert found == some_of(examples, 2, 0) == sorted(found, key=examples.index)
    assert len({tuple(one.path.name for one in some_of(examples, 2, seed)) for seed in range(20)}) > 3
    assert some_of(examples, None, 0) == some_of(examples, 9, 0) == examples
    assert settings("--train_data_dir", captioned, "--max_train_samples", "2").max_train_samples == 2


def test_the_script_is_the_command():
    text = (ROOT / "train_scripts" / "train_text_to_image_effilora.py").read_text()
    assert 'main(["train-text-to-image", *sys.argv[1:]])' in text


def test_a_data_set_s_file_names_the_images_too():
    assert settings("--dataset_config", "sets.toml").dataset_config == "sets.toml"
    with pytest.raises(EffiLoRAError, match="--train_data_dir and --dataset_config both name the images"):
        settings("--train_data_dir", "images", "--dataset_config", "sets.toml")

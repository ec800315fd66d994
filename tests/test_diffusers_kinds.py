"""What diffusers' own tests of its DreamBooth scripts ask of a run, by kind: names in the file, layers, checkpoints, metadata."""

import json

import pytest
from helpers import make_subject
from safetensors import safe_open
from tiny_families import build

from effilora_diffusion.cli import main

FILE = "pytorch_lora_weights.safetensors"
ALWAYS = (
    "--resolution 64 --train_batch_size 1 --num_validation_images 0 --learning_rate 5.0e-04 --lr_scheduler constant"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    make_subject(folder / "images", 1)
    for family in ("sd15", "sdxl", "sd3", "flux"):
        build(family).save_pretrained(folder / family)
    return folder


@pytest.fixture
def run(place, tmp_path):
    """Trains in the test's folder with the flags of a command; returns names and metadata of the plain LoRA."""

    def trained(family, flags, prompt="photo", steps=2):
        told = f"{ALWAYS} --max_train_steps {steps} {flags}".split()
        paths = ["--pretrained_model_name_or_path", str(place / family), "--instance_data_dir", str(place / "images")]
        assert main(["train", *paths, "--instance_prompt", prompt, "--output_dir", str(tmp_path / "out"), *told]) == 0
        with safe_open(str(tmp_path / "out" / FILE), "pt") as file:
            return list(file.keys()), file.metadata()

    return trained


def checkpoints(folder):
    return {path.name for path in folder.glob("checkpoint-*")}


@pytest.mark.parametrize(
    ("family", "flags", "prefixes"),
    [
        ("sd15", "--scale_lr --lr_warmup_steps 0", {"unet"}),
        ("flux", "--cache_latents", {"transformer"}),
        ("sd3", "--train_text_encoder", {"transformer", "text_encoder", "text_encoder_2"}),
    ],
)
def test_all_names_are_of_loras_of_the_trained_parts(run, family, flags, prefixes):
    names, _ = run(family, flags)
    assert all("lora" in name for name in names)
    assert {name.partition(".")[0] for name in names} == prefixes


@pytest.mark.parametrize(
    ("family", "flags", "inside"),
    [
        ("sd3", "--lora_blocks 0", "transformer.transformer_blocks.0.attn."),
        ("sd3", "--lora_layers attn.to_k", ".attn.to_k."),
        ("flux", "--lora_layers single_transformer_blocks.0.attn.to_k", "single_transformer_blocks.0.attn.to_k."),
    ],
)
def test_only_the_named_layers_are_in_the_file(run, family, flags, inside):
    names, _ = run(family, flags)
    assert names
    assert all(inside in name for name in names)


def test_a_limit_keeps_the_newest_checkpoints(run, tmp_path, place):
    run("sd15", "--checkpointing_steps 2 --checkpoints_total_limit 2", steps=6)
    assert checkpoints(tmp_path / "out") == {"checkpoint-4", "checkpoint-6"}
    run("sd15", "--checkpointing_steps 2 --checkpoints_total_limit 2 --overwrite_output_dir", steps=7)
    # diffusers has none of the last step; here it is there, and drives none out
    assert checkpoints(tmp_path / "out") == {"checkpoint-4", "checkpoint-6", "checkpoint-7"}


def test_a_limit_on_resuming_removes_several(run, tmp_path):
    run("sd15", "--checkpointing_steps 2", steps=4)
    assert checkpoints(tmp_path / "out") == {"checkpoint-2", "checkpoint-4"}
    resumed = "--checkpointing_steps 2 --resume_from_checkpoint checkpoint-4 --checkpoints_total_limit 2"
    run("sd15", resumed, steps=8)
    assert checkpoints(tmp_path / "out") == {"checkpoint-6", "checkpoint-8"}


def test_the_file_says_its_rank_and_strength(run):
    _, metadata = run("flux", "--rank 4 --lora_alpha 8")
    found = json.loads(metadata["lora_adapter_metadata"])
    # diffusers writes alpha 8, and programs that don't read it draw too weakly; here it is in the weights
    assert (found["transformer.r"], found["transformer.lora_alpha"]) == (4, 4)


def test_an_empty_prompt_is_a_prompt(run):
    names, _ = run("sdxl", "", prompt="")
    assert names

"""The commands of diffusers' DreamBooth pages, as they stand there, train, resume and load in stock pipelines.

What is replaced: model, images, output folder and prompts by tiny ones, the size of the images and the number of steps, and what
needs a GPU, an account or a network.
"""

import pytest
from accelerate import Accelerator
from helpers import make_subject, metrics
from tiny_families import build

from effilora_diffusion.cli.train import parse_arguments
from effilora_diffusion.core import EffiLoRAError
from effilora_diffusion.diffusion.training.trainer import Trainer

COMMANDS = (
    (
        "sd15",
        "--resolution 512 --train_batch_size 1 --gradient_accumulation_steps 1 --checkpointing_steps 100 "
        "--learning_rate 1e-4 --report_to wandb --lr_scheduler constant --lr_warmup_steps 0 --max_train_steps 500 "
        "--validation_epochs 50 --seed 0 --push_to_hub",
    ),
    (
        "flux",
        "--mixed_precision bf16 --resolution 512 --train_batch_size 1 --guidance_scale 1 --gradient_accumulation_steps "
        "4 --optimizer prodigy --learning_rate 1. --report_to wandb --lr_scheduler constant --lr_warmup_steps 0 "
        "--max_train_steps 500 --validation_epochs 25 --seed 0 --push_to_hub",
    ),
    (
        "flux2",
        "--do_fp8_training --gradient_checkpointing --remote_text_encoder --cache_latents --resolution 1024 "
        "--train_batch_size 1 --guidance_scale 1 --use_8bit_adam --gradient_accumulation_steps 4 --optimizer adamW "
        "--learning_rate 1e-4 --report_to wandb --lr_scheduler constant --lr_warmup_steps 100 --max_train_steps 500 "
        "--validation_epochs 25 --seed 0 --push_to_hub",
    ),
    (
        "flux2-klein",
        "--do_fp8_training --gradient_checkpointing --cache_latents --resolution 1024 --train_batch_size 1 "
        "--guidance_scale 1 --use_8bit_adam --gradient_accumulation_steps 4 --optimizer adamW --learning_rate 1e-4 "
        "--report_to wandb --lr_scheduler constant --lr_warmup_steps 100 --max_train_steps 500 --validation_epochs 25 "
        "--seed 0 --push_to_hub",
    ),
    (
        "flux2",
        "--do_fp8_training --gradient_checkpointing --remote_text_encoder --cache_latents --resolution 512 "
        "--train_batch_size 1 --guidance_scale 1 --gradient_accumulation_steps 4 --optimizer prodigy --learning_rate 1. "
        "--report_to wandb --lr_scheduler constant_with_warmup --lr_warmup_steps 100 --max_train_steps 500 "
        "--validation_epochs 25 --seed 0 --push_to_hub",
    ),
    (
        "krea2",
        "--mixed_precision bf16 --resolution 1024 --train_batch_size 1 --gradient_checkpointing --cache_latents --rank "
        "32 --lora_alpha 32 --optimizer adamW --use_8bit_adam --learning_rate 3e-4 --lr_scheduler constant "
        "--lr_warmup_steps 0 --max_train_steps 1000 --validation_model_path vae --validation_epochs 25 --seed 0 "
        "--push_to_hub",
    ),
    (
        "lumina2",
        "--mixed_precision bf16 --resolution 1024 --train_batch_size 1 --gradient_accumulation_steps 4 --use_8bit_adam "
        "--learning_rate 1e-4 --report_to wandb --lr_scheduler constant --lr_warmup_steps 0 --max_train_steps 500 "
        "--validation_epochs 25 --seed 0 --push_to_hub",
    ),
    (
        "qwen-image",
        "--mixed_precision bf16 --resolution 1024 --train_batch_size 1 --gradient_accumulation_steps 4 --use_8bit_adam "
        "--learning_rate 2e-4 --report_to wandb --lr_scheduler constant --lr_warmup_steps 0 --max_train_steps 500 "
        "--validation_epochs 25 --seed 0 --push_to_hub",
    ),
    (
        "sana",
        "--mixed_precision bf16 --resolution 1024 --train_batch_size 1 --gradient_accumulation_steps 4 --use_8bit_adam "
        "--learning_rate 1e-4 --report_to wandb --lr_scheduler constant --lr_warmup_steps 0 --max_train_steps 500 "
        "--validation_epochs 25 --seed 0 --push_to_hub",
    ),
    (
        "sd3",
        "--mixed_precision fp16 --resolution 512 --train_batch_size 1 --gradient_accumulation_steps 4 --learning_rate "
        "4e-4 --report_to wandb --lr_scheduler constant --lr_warmup_steps 0 --max_train_steps 500 --validation_epochs "
        "25 --seed 0 --push_to_hub",
    ),
    (
        "sdxl",
        "--pretrained_vae_model_name_or_path vae --mixed_precision fp16 --resolution 1024 --train_batch_size 1 "
        "--gradient_accumulation_steps 4 --learning_rate 1e-4 --report_to wandb --lr_scheduler constant "
        "--lr_warmup_steps 0 --max_train_steps 500 --validation_epochs 25 --seed 0 --push_to_hub",
    ),
    (
        "sdxl",
        "--mixed_precision fp16 --resolution 1024 --train_batch_size 1 --gradient_accumulation_steps 4 --learning_rate "
        "1e-4 --use_8bit_adam --report_to wandb --lr_scheduler constant --lr_warmup_steps 0 --max_train_steps 500 "
        "--validation_epochs 25 --seed 0 --push_to_hub",
    ),
    (
        "z-image",
        "--mixed_precision bf16 --gradient_checkpointing --cache_latents --resolution 1024 --train_batch_size 1 "
        "--guidance_scale 5.0 --use_8bit_adam --gradient_accumulation_steps 4 --optimizer adamW --learning_rate 1e-4 "
        "--report_to wandb --lr_scheduler constant --lr_warmup_steps 100 --max_train_steps 500 --validation_epochs 25 "
        "--seed 0 --push_to_hub",
    ),
    (
        "z-image",
        "--do_fp8_training --gradient_checkpointing --cache_latents --resolution 1024 --train_batch_size 1 "
        "--guidance_scale 5.0 --use_8bit_adam --gradient_accumulation_steps 4 --optimizer adamW --learning_rate 1e-4 "
        "--report_to wandb --lr_scheduler constant --lr_warmup_steps 100 --max_train_steps 500 --validation_epochs 25 "
        "--seed 0 --push_to_hub",
    ),
    (
        "z-image",
        "--mixed_precision bf16 --gradient_checkpointing --cache_latents --resolution 1024 --train_batch_size 1 "
        "--guidance_scale 5.0 --gradient_accumulation_steps 4 --optimizer prodigy --learning_rate 1.0 --report_to wandb "
        "--lr_scheduler constant_with_warmup --lr_warmup_steps 100 --max_train_steps 500 --validation_epochs 25 --seed "
        "0 --push_to_hub",
    ),
)
"""Family, and what a command names besides."""

SMALL = [
    *("--resolution", "64", "--max_train_steps", "2", "--checkpointing_steps", "1", "--mixed_precision", "no"),
    *("--no-push_to_hub", "--report_to", "none", "--num_validation_images", "1"),
    *("--validation_inference_steps", "1", "--export_distillation_steps", "1"),
]


@pytest.mark.parametrize(("family", "words"), COMMANDS, ids=lambda value: value[:12])
def test_a_command_of_diffusers_pages_trains_resumes_and_loads(family, words, tmp_path):
    pipe = build(family)
    pipe.save_pretrained(tmp_path / "model")
    subject = make_subject(tmp_path / "s", 2, size=(64, 64))
    named = ["--pretrained_model_name_or_path", str(tmp_path / "model"), "--instance_data_dir", str(subject),
             "--output_dir", str(tmp_path / "out"), "--instance_prompt", "a photo of sks toy",
             "--validation_prompt", "a photo of sks toy on a table"]  # fmt: skip
    given = [*named, *words.split(), *SMALL]
    config = parse_arguments(given)
    assert config.learning_rate == float(words.split("--learning_rate ")[1].split()[0])
    Trainer(config, Accelerator(cpu=True)).run()
    whole = metrics(tmp_path / "out")
    assert len(whole) == 2
    Trainer(parse_arguments([*given, "--resume_from_checkpoint", "checkpoint-1"]), Accelerator(cpu=True)).run()
    assert metrics(tmp_path / "out") == whole
    if hasattr(pipe, "load_lora_weights"):
        pipe.load_lora_weights(str(tmp_path / "out"))
        assert sum(map(len, pipe.get_list_adapters().values())) == 1


REFUSED = {
    "sdxl-ti": "--train_text_encoder_ti --train_text_encoder_ti_frac 0.5 --text_encoder_lr 1.0 --optimizer prodigy",
    "deepfloyd": "--tokenizer_max_length 77 --text_encoder_use_attention_mask --class_labels_conditioning timesteps",
    "kontext": "--cond_image_column cond --do_edm_style_training",
}


@pytest.mark.parametrize("words", REFUSED.values(), ids=REFUSED)
def test_what_is_not_supported_is_told_at_once_before_anything_is_loaded(words, tmp_path):
    given = [
        "--pretrained_model_name_or_path",
        str(tmp_path / "nowhere"),
        "--instance_data_dir",
        str(tmp_path / "nowhere"),
    ]
    with pytest.raises(EffiLoRAError) as told:
        parse_arguments([*given, *words.split()])
    for flag in ("train_text_encoder_ti_frac", "text_encoder_use_attention_mask", "do_edm_style_training"):
        assert (f"--{flag} is not supported" in str(told.value)) == (flag in words)

"""The commands of diffusers' DreamBooth pages, as they stand there, train, resume and load in stock pipelines.

What is replaced: model, images, output folder and prompts by tiny ones, the size of the images and the number of steps, and what
needs a GPU, an account or a network.
"""

import pytest
from accelerate import Accelerator
from helpers import make_subject, metrics
from tiny_families import build

from effilora_diffusion.cli import main
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
    (
        "sdxl",
        "--pretrained_vae_model_name_or_path vae --mixed_precision bf16 --resolution 1024 --train_batch_size 3 --repeats 1 "
        "--report_to wandb --gradient_accumulation_steps 1 --gradient_checkpointing --learning_rate 1.0 --text_encoder_lr 1.0 "
        "--optimizer prodigy --train_text_encoder_ti --train_text_encoder_ti_frac 0.5 --snr_gamma 5.0 --lr_scheduler constant "
        "--lr_warmup_steps 0 --rank 8 --max_train_steps 1000 --checkpointing_steps 2000 --seed 0 --push_to_hub",
    ),
    *(
        (
            "flux",
            "--mixed_precision bf16 --resolution 1024 --train_batch_size 1 --repeats 1 --report_to wandb "
            "--gradient_accumulation_steps 1 --gradient_checkpointing --learning_rate 1.0 --text_encoder_lr 1.0 --optimizer "
            f"prodigy --train_text_encoder_ti {more} --lr_scheduler constant --lr_warmup_steps 0 --rank 8 --max_train_steps 700 "
            "--checkpointing_steps 2000 --seed 0 --push_to_hub",
        )
        for more in (
            "--train_text_encoder_ti_frac 0.5",
            "--enable_t5_ti --train_text_encoder_ti_frac 0.5",
            "--enable_t5_ti --train_text_encoder_ti_frac 0.5 --train_transformer_frac 0",
        )
    ),
    (
        "flux",
        "--mixed_precision bf16 --train_text_encoder --resolution 512 --train_batch_size 1 --guidance_scale 1 "
        "--gradient_accumulation_steps 4 --optimizer prodigy --learning_rate 1. --report_to wandb --lr_scheduler constant "
        "--lr_warmup_steps 0 --max_train_steps 500 --seed 0 --push_to_hub",
    ),
    (
        "sd3",
        "--resolution 1024 --train_batch_size 1 --train_text_encoder --gradient_accumulation_steps 1 --optimizer prodigy "
        "--learning_rate 1.0 --text_encoder_lr 1.0 --report_to wandb --lr_scheduler constant --lr_warmup_steps 0 "
        "--max_train_steps 1500 --rank 32 --seed 0 --push_to_hub",
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
    if "_ti" in words:
        named = [word.replace("sks", "TOK") for word in named]
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
        parts = pipe.get_list_adapters()
        assert all(len(names) == 1 for names in parts.values())
        assert any(name.startswith("text_encoder") for name in parts) == ("--train_text_encoder " in words)
    assert (tmp_path / "out" / "out_emb.safetensors").exists() == ("_ti" in words)


REFUSED = {
    "sdxl, edm": "--train_text_encoder_ti --train_text_encoder_ti_frac 0.5 --do_edm_style_training --optimizer prodigy",
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
    for flag in ("text_encoder_use_attention_mask", "do_edm_style_training"):
        assert (f"--{flag} is not supported" in str(told.value)) == (flag in words)


OUT_OF_SCOPE = {
    "kontext": ("FluxKontextPipeline", "--guidance_scale 1 --optimizer adamw --use_8bit_adam --cache_latents"),
    "kontext, edited images": ("FluxKontextPipeline", "--image_column output --cond_image_column cond"),
    "hidream": ("HiDreamImagePipeline", "--use_8bit_adam --rank 8 --cache_latents --validation_epochs 25"),
    "ideogram, fp8": ("Ideogram4Pipeline", "--do_fp8_training --optimizer adamw --disable_training_autocast"),
    "ideogram": ("Ideogram4Pipeline", "--optimizer adamw --disable_training_autocast"),
}


@pytest.mark.parametrize(("pipeline", "words"), OUT_OF_SCOPE.values(), ids=OUT_OF_SCOPE)
def test_a_model_without_a_trainer_is_told_with_all_its_flags_before_anything_is_loaded(
    pipeline, words, tmp_path, capsys
):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text(f'{{"_class_name": "{pipeline}"}}')
    data = [
        "--dataset_name",
        str(tmp_path / "nowhere"),
        "--caption_column",
        "prompt",
        "--instance_prompt",
        "a sks toy",
    ]
    given = ["--pretrained_model_name_or_path", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out")]
    assert main(["train", *given, *data, *words.split()]) == 2
    told = capsys.readouterr().err
    assert f"{pipeline} models can't be trained; supported are" in told
    assert ("--cond_image_column is not supported" in told) == ("cond_image_column" in words)
    assert not (tmp_path / "out").exists()


def test_flags_may_stand_in_the_config_file_too(tmp_path, capsys):
    words = [
        "--use_8bit_adam",
        "--dataloader_num_workers",
        "4",
        "--lora_layers",
        "to_k,to_q",
        "--prodigy_beta3",
        "0.9",
    ]
    words += ["--optimizer", "prodigy", "--repeats", "2", "--num_train_epochs", "3"]
    expected, told = parse_arguments([*words]), capsys.readouterr().out
    file = tmp_path / "flags.yaml"
    file.write_text(
        "use_8bit_adam: true\ndataloader_num_workers: 4\nlora_layers: to_k,to_q\nprodigy_beta3: 0.9\noptimizer: prodigy\n"
        "repeats: 2\nnum_train_epochs: 3\noffload: false\n"
    )
    assert parse_arguments(["--config", str(file)]) == expected
    assert capsys.readouterr().out == told
    assert parse_arguments(["--config", str(file), "--repeats", "1"]).num_train_epochs == 3
    file.write_text("cond_image_column: cond\nclass_labels_conditioning: timesteps\n")
    with pytest.raises(
        EffiLoRAError, match=r"--cond_image_column is not supported .*--class_labels_conditioning is not"
    ):
        parse_arguments(["--config", str(file)])

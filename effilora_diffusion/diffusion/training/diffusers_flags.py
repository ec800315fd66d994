"""Flags of diffusers' DreamBooth scripts that are no settings here: old commands run, or say why they can't."""

from __future__ import annotations

from typing import Any

from ...core.errors import EffiLoRAError

NOT_NEEDED = {
    "dataloader_num_workers": "latents are cached, nothing is loaded while training",
    "pre_compute_text_embeddings": "text states are always computed once and cached",
    "cache_latents": "latents are always cached",
    "enable_xformers_memory_efficient_attention": "torch's own memory-efficient attention is used",
    "enable_npu_flash_attention": "torch's own memory-efficient attention is used",
    "use_8bit_adam": "the optimizer only holds the adapter, a few megabytes at most",
    "local_rank": "accelerate sets it",
    "prior_generation_precision": "class images are drawn in the precision of training",
    "pretrained_vae_model_name_or_path": "the model's own autoencoder is used, in float32, which does not overflow",
    "offload": "encoders always leave the GPU once their outputs are cached",
    "upcast_before_saving": "adapters are always trained and saved in float32",
    "output_kohya_format": "`effilora export --format kohya` writes it",
    "text_encoder_lr": "only the UNet or transformer is trained",
    "adam_weight_decay_text_encoder": "only the UNet or transformer is trained",
    "do_fp8_training": "it only saves time, on some GPUs; --quantization torchao-float8 saves memory",
    "remote_text_encoder": "prompts are encoded here, once, and the encoder leaves the GPU",
    "fsdp_text_encoder": "prompts are encoded once, and the encoder leaves the GPU",
    "enable_vae_tiling": "images are encoded one by one, before training",
    "disable_training_autocast": "nothing is trained under autocast",
    "validation_model_path": "validation images are drawn with the model that is trained",
    "skip_final_inference": "--num_validation_images 0 draws nothing",
}
"""Flags that change nothing here: accepted with a note."""

NOT_SUPPORTED = {
    "train_text_encoder": "only the UNet or transformer is trained",
    **dict.fromkeys(
        (
            *(
                "train_text_encoder_ti",
                "train_text_encoder_ti_frac",
                "train_text_encoder_frac",
                "train_transformer_frac",
            ),
            *("enable_t5_ti", "token_abstraction", "num_new_tokens_per_abstraction", "initializer_concept"),
        ),
        "no words and no text encoder are trained",
    ),
    "cond_image_column": "models that edit images can't be trained",
    "pretrained_text_encoder_4_name_or_path": "HiDream can't be trained",
    "pretrained_tokenizer_4_name_or_path": "HiDream can't be trained",
    "tokenizer_name": "the model's own tokenizer is used",
    "tokenizer_max_length": "the tokenizer's own length is used",
    "text_encoder_use_attention_mask": "DeepFloyd IF can't be trained",
    "class_labels_conditioning": "DeepFloyd IF can't be trained",
    "validation_images": "upscalers can't be trained",
    "bnb_quantization_config_path": "use --quantization bnb-8bit or bnb-4bit",
    "aspect_ratio_buckets": "images are cropped to squares",
    "use_aspect_ratio_buckets": "images are cropped to squares",
    "use_dora": "the adapter is EffiLoRA",
    "do_edm_style_training": "models with an EDM scheduler can't be trained",
    "precondition_outputs": "the loss is that of the velocity, as in the paper of Stable Diffusion 3",
    "final_validation_prompt": "use --validation_prompt",
    "cache_dir": "set HF_HOME instead",
    "lora_blocks": "name the layers with --target_modules",
    "text_encoder_out_layers": "the pipeline's own layers are used, in training as in sampling",
    "validation_num_inference_steps": "use --validation_inference_steps",
    "caption_dropout": "captions are never dropped",
    "complex_human_instruction": "the pipeline's own is used, in training as in sampling",
    "system_prompt": "the pipeline's own is used, in training as in sampling",
}
"""Flags that would change the result: refused with the reason."""


PRODIGY = {
    "prodigy_beta3": "beta3",
    "prodigy_decouple": "weight_decouple",
    "prodigy_use_bias_correction": "bias_correction",
    "prodigy_safeguard_warmup": "safeguard_warmup",
}
"""Flags that are arguments of Prodigy, and change nothing with any other optimizer."""


FLAGS = (*NOT_NEEDED, *NOT_SUPPORTED, *PRODIGY, "lora_layers", "repeats")
"""Every flag of this module."""


def translate_diffusers_flags(given: dict[str, Any]) -> dict[str, Any]:
    """``given`` without these flags: notes for some, :class:`EffiLoRAError` for others, some become settings of ours."""
    refused = [f"--{name} is not supported ({NOT_SUPPORTED[name]})" for name in given if name in NOT_SUPPORTED]
    if refused:
        raise EffiLoRAError(f"{'; '.join(refused)}: leave {'it' if len(refused) == 1 else 'them'} out")
    for name in [name for name in given if name in NOT_NEEDED]:
        print(f"note: --{name} is not needed: {NOT_NEEDED[name]}")
    kept = {name: value for name, value in given.items() if name not in NOT_NEEDED}
    prodigy = {name: " ".join(kept.pop(name)) for name in PRODIGY if name in kept}
    if prodigy and str(kept.get("optimizer", "")).lower() == "prodigy":
        arguments = [f"{PRODIGY[name]}={value or True}" for name, value in prodigy.items()]
        kept["optimizer_args"] = [*arguments, *kept.get("optimizer_args", [])]
    kept = _repeated(kept, kept.pop("repeats", None))
    layers = kept.pop("lora_layers", None)
    if layers is not None and "target_modules" in kept:
        raise EffiLoRAError("--lora_layers and --target_modules mean the same: give one of them")
    if layers is not None:
        kept["target_modules"] = [name.strip() for word in layers for name in word.split(",") if name.strip()]
    return kept


def _repeated(given: dict[str, Any], words: list[str] | None) -> dict[str, Any]:
    """``given`` with epochs of diffusers' length, in which every image comes ``--repeats`` times."""
    if words is None:
        return given
    if len(words) != 1 or not words[0].isdecimal() or int(words[0]) < 1:
        raise EffiLoRAError(f"--repeats must be at least 1, not {' '.join(words)[:50]!r}")
    longer = {name: int(given[name]) * int(words[0]) for name in ("validation_epochs",) if name in given}
    if "max_train_steps" not in given:
        longer["num_train_epochs"] = int(given.get("num_train_epochs", 1)) * int(words[0])
    return {**given, **longer}

"""Flags of diffusers' DreamBooth scripts that are no settings here: old commands run, or say why they can't."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...core.errors import EffiLoRAError

NOT_NEEDED = {
    "dataloader_num_workers": "latents are cached, nothing is loaded while training",
    "pre_compute_text_embeddings": "text states are always computed once and cached",
    "cache_latents": "latents are always cached",
    "cache_text_encoder_outputs": "text states are always computed once and cached",
    "enable_xformers_memory_efficient_attention": "torch's own memory-efficient attention is used",
    "enable_npu_flash_attention": "torch's own memory-efficient attention is used",
    "use_8bit_adam": "the optimizer only holds the adapter, a few megabytes at most",
    "local_rank": "accelerate sets it",
    "prior_generation_precision": "class images are drawn in the precision of training",
    "pretrained_vae_model_name_or_path": "the model's own autoencoder is used, in float32, which does not overflow",
    "offload": "encoders always leave the GPU once their outputs are cached",
    "upcast_before_saving": "adapters are always trained and saved in float32",
    "output_kohya_format": "`effilora export --format kohya` writes it",
    "do_fp8_training": "it only saves time, on some GPUs; --quantization torchao-float8 saves memory",
    "remote_text_encoder": "prompts are encoded here, once, and the encoder leaves the GPU",
    "fsdp_text_encoder": "prompts are encoded once, and the encoder leaves the GPU",
    "enable_vae_tiling": "images are encoded one by one, before training",
    "disable_training_autocast": "nothing is trained under autocast",
    "validation_model_path": "validation images are drawn with the model that is trained",
    "debug_loss": "the loss is that of the whole step; --validation_split measures it on images of their own",
    "skip_final_inference": "--num_validation_images 0 draws nothing",
}
"""Flags that change nothing here: accepted with a note."""

NOT_SUPPORTED = {
    "cond_image_column": "models that edit images can't be trained",
    "pretrained_text_encoder_4_name_or_path": "HiDream can't be trained",
    "pretrained_tokenizer_4_name_or_path": "HiDream can't be trained",
    "tokenizer_name": "the model's own tokenizer is used",
    "tokenizer_max_length": "the tokenizer's own length is used",
    "text_encoder_use_attention_mask": "DeepFloyd IF can't be trained",
    "class_labels_conditioning": "DeepFloyd IF can't be trained",
    "validation_images": "upscalers can't be trained",
    "bnb_quantization_config_path": "use --quantization bnb-8bit or bnb-4bit",
    "use_dora": "the adapter is EffiLoRA",
    "do_edm_style_training": "models with an EDM scheduler can't be trained",
    "final_validation_prompt": "use --validation_prompt",
    "cache_dir": "set HF_HOME instead",
    "text_encoder_out_layers": "the pipeline's own layers are used, in training as in sampling",
    "validation_num_inference_steps": "use --validation_inference_steps",
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


SWITCHES = {"enable_bucket": "use_aspect_ratio_buckets"}
"""Switches of sd-scripts, and the settings that they are here."""

WORDS = {"conditioning_data_dir": "mask_dir"}
"""Further flags of sd-scripts that have another name here."""

FLAGS = (
    *NOT_NEEDED,
    *NOT_SUPPORTED,
    *PRODIGY,
    *SWITCHES,
    *WORDS,
    "lora_layers",
    "lora_blocks",
    "repeats",
    "caption_dropout",
)
"""Every flag of this module."""


OWN_LAYERS = (["10", "20", "30"], ["9", "18", "27"])
"""What FLUX.2's pipelines, dev and klein, read of their text encoders, and the defaults of ``--text_encoder_out_layers``."""

SD3_LAYERS = (
    *("attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out"),
    *("attn.to_k", "attn.to_out.0", "attn.to_q", "attn.to_v"),
)
"""Default of ``--lora_layers`` in the script for Stable Diffusion 3, the one that has ``--lora_blocks``."""


def translate_diffusers_flags(given: dict[str, Any]) -> dict[str, Any]:
    """``given`` without these flags: notes for some, :class:`EffiLoRAError` for others, some become settings of ours."""
    if given.get("text_encoder_out_layers") in OWN_LAYERS:
        given = {name: value for name, value in given.items() if name != "text_encoder_out_layers"}
    refused = [f"--{name} is not supported ({NOT_SUPPORTED[name]})" for name in given if name in NOT_SUPPORTED]
    if refused:
        model = _refused_model(given.get("pretrained_model_name_or_path"))
        reasons = f"{'; '.join(refused)}: leave {'it' if len(refused) == 1 else 'them'} out"
        raise EffiLoRAError(reasons if model is None else f"{model}; {reasons}")
    for name in [name for name in given if name in NOT_NEEDED]:
        print(f"note: --{name} is not needed: {NOT_NEEDED[name]}")
    kept = {name: value for name, value in given.items() if name not in NOT_NEEDED}
    prodigy = {name: " ".join(kept.pop(name)) for name in PRODIGY if name in kept}
    if prodigy and str(kept.get("optimizer", "")).lower() == "prodigy":
        arguments = [f"{PRODIGY[name]}={value or True}" for name, value in prodigy.items()]
        kept["optimizer_args"] = [*arguments, *kept.get("optimizer_args", [])]
    for name in [name for name in kept if name in SWITCHES]:
        kept[SWITCHES[name]] = " ".join(kept.pop(name)).lower() not in ("false", "0", "no")
    for name in [name for name in kept if name in WORDS]:
        kept[WORDS[name]] = " ".join(kept.pop(name))
    kept = _repeated(kept, kept.pop("repeats", None))
    kept = _dropped(kept, kept.pop("caption_dropout", None))
    return _with_layers(kept, kept.pop("lora_layers", None), kept.pop("lora_blocks", None))


def _with_layers(given: dict[str, Any], layers: list[str] | None, blocks: list[str] | None) -> dict[str, Any]:
    """``given`` with the layers that two flags name, of all blocks or of some: numbers of ``transformer_blocks``."""
    if layers is None and blocks is None:
        return given
    if "target_modules" in given:
        flag = "lora_blocks" if layers is None else "lora_layers"
        raise EffiLoRAError(f"--{flag} and --target_modules both name the layers: give one of them")
    names = list(SD3_LAYERS) if layers is None else _listed(layers)
    if blocks is not None:
        numbers = _listed(blocks)
        if not numbers or not all(number.isdecimal() for number in numbers):
            raise EffiLoRAError(f"--lora_blocks must be numbers of blocks, as in 12,30, not {' '.join(blocks)[:50]!r}")
        names = [f"transformer_blocks.{int(number)}.{name}" for number in numbers for name in names]
    return {**given, "target_modules": names}


def _listed(words: list[str]) -> list[str]:
    return [name.strip() for word in words for name in word.split(",") if name.strip()]


def _refused_model(model: str | None) -> str | None:
    """Why a model in a folder can't be trained at all, if that is so; others are told of when they are looked up."""
    from ..models.pipelines import check_trainable  # late: it imports torch

    try:
        if model is not None and Path(model).is_dir():
            check_trainable(model)
    except EffiLoRAError as error:
        return str(error)
    return None


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


def _dropped(given: dict[str, Any], words: list[str] | None) -> dict[str, Any]:
    """``given`` with diffusers' name of ``--caption_dropout_rate`` replaced."""
    if words is None:
        return given
    try:
        return {"caption_dropout_rate": float(" ".join(words)), **given}
    except ValueError:
        raise EffiLoRAError(f"--caption_dropout must be a number from 0 to 1, not {' '.join(words)[:50]!r}") from None

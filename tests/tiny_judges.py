"""Tiny random judges, from the real transformers classes, with their image processors."""

import transformers as t
from tiny_text import clip_tokenizer

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**SIZES, "image_size": 28, "patch_size": 14}
CROP = {"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}}


def dino(folder):
    """A DINOv2 without training."""
    t.set_seed(0)
    t.Dinov2Model(t.Dinov2Config(**VISION)).save_pretrained(folder)
    t.BitImageProcessor(**CROP).save_pretrained(folder)
    return folder


def clip(folder):
    """A CLIP without training."""
    t.set_seed(0)
    tokenizer = clip_tokenizer()
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {**SIZES, **ends, "intermediate_size": 32, "vocab_size": len(tokenizer)}
    config = t.CLIPConfig(text_config=text, vision_config={**VISION, "intermediate_size": 32}, projection_dim=16)
    t.CLIPModel(config).save_pretrained(folder)
    t.CLIPImageProcessor(**CROP).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder

"""Tiny random vision-language models in their real transformers classes, with their real processors."""

import json

import torch
import transformers as t
from PIL import Image
from tiny_language import GQA, VOCAB, WIDTH, tokenizer

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}MARK{% else %}{{ part['text'] }}{% endif %}{% endfor %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
"""A typical chat template for messages with content parts."""

_SIZE = {"height": 16, "width": 16}
_VISION = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "image_size": 16}
_GRID = [[16, 32], [32, 16], [32, 32]]
_CLIP = {"patch_size": 8, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}


def _clip():
    return t.CLIPVisionConfig(**_VISION, num_attention_heads=4, patch_size=8, projection_dim=WIDTH)


def _tokenizer(*special):
    found = tokenizer(False)
    found.add_special_tokens({"additional_special_tokens": list(special)})
    return found, {name: found.convert_tokens_to_ids(name) for name in special}


def _llava(chat):
    config = t.LlavaConfig(vision_config=_clip(), text_config=t.LlamaConfig(**GQA), image_token_index=VOCAB - 1,
                           image_seq_length=4, vision_feature_layer=-1)  # fmt: skip
    images = t.CLIPImageProcessor(size=_SIZE, crop_size=_SIZE)
    return t.LlavaForConditionalGeneration(config), t.LlavaProcessor(
        images, tokenizer(False), chat_template=chat, **_CLIP
    )


def _llava_next(chat):
    config = t.LlavaNextConfig(vision_config=_clip(), text_config=t.LlamaConfig(**GQA), image_token_index=VOCAB - 1,
                               image_grid_pinpoints=_GRID, vision_feature_layer=-1)  # fmt: skip
    images = t.LlavaNextImageProcessor(size={"shortest_edge": 16}, crop_size=_SIZE, image_grid_pinpoints=_GRID)
    processor = t.LlavaNextProcessor(images, tokenizer(False), chat_template=chat, **_CLIP)
    return t.LlavaNextForConditionalGeneration(config), processor


def _idefics3(chat):
    rows = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    words, _ = _tokenizer("<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *rows)
    images = t.Idefics3ImageProcessor(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    config = t.Idefics3Config(
        vision_config={**_VISION, "num_attention_heads": 2, "patch_size": 8},
        text_config=t.LlamaConfig(**{**GQA, "vocab_size": len(words)}), image_token_id=VOCAB - 1, scale_factor=2,
    )  # fmt: skip
    return t.Idefics3ForConditionalGeneration(config), t.Idefics3Processor(
        images, words, image_seq_len=1, chat_template=chat
    )


def _gemma3(chat):
    words, ids = _tokenizer("<boi>", "<eoi>", "<soft>")
    for name, token in (("boi", "<boi>"), ("eoi", "<eoi>"), ("image", "<soft>")):
        setattr(words, f"{name}_token", token)
        setattr(words, f"{name}_token_id", ids[token])
    config = t.Gemma3Config(
        text_config={**GQA, "vocab_size": len(words), "head_dim": 8, "sliding_window": 32},
        vision_config={**_VISION, "num_attention_heads": 4, "patch_size": 4}, mm_tokens_per_image=4,
        image_token_id=ids["<soft>"], boi_token_index=ids["<boi>"], eoi_token_index=ids["<eoi>"],
    )  # fmt: skip
    images = t.Gemma3ImageProcessor(size=_SIZE)
    chat = chat and chat.replace("<image>", "<boi>")
    return t.Gemma3ForConditionalGeneration(config), t.Gemma3Processor(
        images, words, image_seq_length=4, chat_template=chat
    )


_TABLE = {"llava": _llava, "llava_next": _llava_next, "idefics3": _idefics3, "gemma3": _gemma3}

VISION_MODELS = tuple(_TABLE)


def build_vision(name="llava", seed=0, chat=True):
    """Build a frozen model in evaluation mode with seeded weights, and its processor."""
    torch.manual_seed(seed)
    model, processor = _TABLE[name](CHAT.replace("MARK", "<image>") if chat else None)
    return model.eval().requires_grad_(False), processor


def save_vision(folder, name="llava"):
    """Save a model and its processor to ``folder``."""
    for part in build_vision(name):
        part.save_pretrained(folder)
    return folder


COLOURS = {"red": (220, 20, 20), "blue": (20, 20, 220), "green": (20, 220, 20), "white": (250, 250, 250)}


def processor(chat=True):
    return build_vision(chat=chat)[1]


def talk(*turns, **more):
    names = ("human", "gpt")
    return {**more, "conversations": [{"from": names[i % 2], "value": text} for i, text in enumerate(turns)]}


def make_place(folder):
    """A model folder, images of four colours in two shades, and questions about them."""
    save_vision(folder / "model")
    (folder / "images").mkdir()
    records = []
    for name, colour in COLOURS.items():
        for shade in (0, 30):
            file = f"{name}{shade}.png"
            Image.new("RGB", (24, 20), tuple(max(0, c - shade) for c in colour)).save(folder / "images" / file)
            records.append(talk("which?\n<image>", name[0], image=file))
    (folder / "train.json").write_text(json.dumps(records[::2]))
    (folder / "held.json").write_text(json.dumps(records[1::2]))
    return folder

"""Tiny tokenizers and random text encoders, from the real transformers classes."""

import re
import string
from collections.abc import Callable
from functools import partial

import transformers as t
from tokenizers.pre_tokenizers import ByteLevel

WIDTH = 32
"""Width of the denoisers and of their text states."""

CLIP_TOKENS = 77

CORPUS = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"
    "<think>\n\n</think>\n\n",
    "You are an AI that reasons about image descriptions. You give structured responses focusing on object "
    "relationships, object\nattribution and actions without speculation.",
    "You are an assistant designed to generate superior images with the superior degree of image-text alignment based "
    "on textual prompts or user prompts. <Prompt Start> ",
    "a photo of a red cat, a blue dog, a green house; an icon of a small yellow car on a big white table in the style "
    "of sks. A painting with a tree, the sun and two people! 0 1 2 3 4 5 6 7 8 9 b c e j k q v w x y z -",
)
"""Training corpus of the tokenizers, with the pipelines' templates, so that their words are single tokens."""

WORDS = sorted(set(re.findall(r"\w+", " ".join(CORPUS).lower())))
LETTERS = [letter for letter in string.ascii_letters + string.digits + string.punctuation if letter != "_"]

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.content is string %}"
    "{{ message.content }}{% else %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def clip_tokenizer():
    """A byte tokenizer; trained ones would differ from run to run."""
    letters = [letter + end for letter in sorted(ByteLevel.alphabet()) for end in ("", "</w>")]
    vocab = {token: index for index, token in enumerate(["<|startoftext|>", "<|endoftext|>", *letters])}
    return t.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=CLIP_TOKENS)


def bert_tokenizer():
    pieces = [start + letter for letter in LETTERS for start in ("", "##")]
    vocab = dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces, *WORDS])
    return t.BertTokenizer(vocab={token: index for index, token in enumerate(vocab)}, model_max_length=CLIP_TOKENS)


def t5_tokenizer():
    vocab = [(token, 0.0) for token in ("<pad>", "</s>", "<unk>")] + [("▁", -4.0)]
    vocab += [(letter, -8.0) for letter in LETTERS] + [(f"▁{word}", -3.0) for word in WORDS]
    return t.T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=512)


def gemma_tokenizer():
    """A tokenizer trained on the corpus."""
    tokenizer = t.GemmaTokenizer().train_new_from_iterator(CORPUS, 400)
    tokenizer.model_max_length, tokenizer.add_bos_token = 8192, True
    return tokenizer


def chat_tokenizer(side: str = "right", **options):
    """A byte-level tokenizer like Qwen's, trained on the corpus; a ``bos_token`` is prepended, as by GLM's."""
    specials = ["<|im_start|>", "<|im_end|>", "[IMG]", "<|image_pad|>", "<|video_pad|>"]
    bare = t.Qwen2Tokenizer(padding_side=side, **options)
    tokenizer = bare.train_new_from_iterator(CORPUS, 2000, new_special_tokens=specials)
    tokenizer.model_max_length, tokenizer.add_bos_token = 4096, "bos_token" in options
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def encoder_options(tokenizer, width: int = WIDTH) -> dict:
    """Return the common configuration of the text encoders."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 2}
    return {name: getattr(tokenizer, name) for name in names} | sizes | {"vocab_size": len(tokenizer)}


def clip_text(model: type, tokenizer, width: int = WIDTH // 2):
    options = {"max_position_embeddings": CLIP_TOKENS, "projection_dim": width}
    return model(t.CLIPTextConfig(**encoder_options(tokenizer, width), **options))


def bert_text(tokenizer):
    options = {"max_position_embeddings": CLIP_TOKENS}
    return t.BertModel(t.BertConfig(**encoder_options(tokenizer), **options), add_pooling_layer=False)


def t5_text(config: type, model: type, tokenizer):
    options = {"vocab_size": len(tokenizer), "d_model": WIDTH, "d_kv": 8, "d_ff": 2 * WIDTH, "num_layers": 2}
    return model(config(num_heads=2, feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1, **options))


def decoder_options(tokenizer, layers: int = 3, width: int = WIDTH) -> dict:
    """Return the common configuration of the decoder-only language models."""
    heads = {"num_key_value_heads": 1, "head_dim": width // 2, "max_position_embeddings": 4096}
    return encoder_options(tokenizer, width) | heads | {"num_hidden_layers": layers}


def decoder_text(config: type, model: type, tokenizer, **sizes):
    return model(config(**decoder_options(tokenizer, **sizes)))


def qwen_vl_text(config: type, model: type, tokenizer, **vision):
    """A vision-language Qwen; only its language model is used."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
    text = decoder_options(tokenizer) | {"rope_parameters": rope}
    vision |= {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH}
    image, video = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])
    return model(config(text_config=text, vision_config=vision, image_token_id=image, video_token_id=video))


def mistral3_text(model: type, tokenizer, **sizes):
    """A Mistral 3 with an unused Pixtral vision tower."""
    text = decoder_options(tokenizer, **sizes) | {"model_type": "mistral", "sliding_window": None}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"model_type": "pixtral", "patch_size": 14, "image_size": 28}
    image = tokenizer.convert_tokens_to_ids("[IMG]")
    return model(t.Mistral3Config(text_config=text, vision_config=vision, image_token_index=image))


_DEEP_MISTRAL = partial(mistral3_text, t.Mistral3ForConditionalGeneration, layers=31, width=WIDTH // 2)
_DEEP_QWEN = partial(decoder_text, t.Qwen3Config, t.Qwen3ForCausalLM, layers=28, width=WIDTH // 2)
_GLM = partial(decoder_text, t.GlmConfig, t.GlmModel)
_QWEN25_VL = partial(qwen_vl_text, t.Qwen2_5_VLConfig, t.Qwen2_5_VLForConditionalGeneration)
_QWEN3_VL = partial(qwen_vl_text, t.Qwen3VLConfig, t.Qwen3VLModel)

TEXTS: dict[str, tuple[Callable, Callable]] = {
    "bert": (bert_tokenizer, bert_text),
    "clip": (clip_tokenizer, partial(clip_text, t.CLIPTextModel)),
    "clip-wide": (clip_tokenizer, partial(clip_text, t.CLIPTextModel, width=WIDTH)),
    "clip-projected": (clip_tokenizer, partial(clip_text, t.CLIPTextModelWithProjection)),
    "clip-wide-projected": (clip_tokenizer, partial(clip_text, t.CLIPTextModelWithProjection, width=WIDTH)),
    "gemma2": (gemma_tokenizer, partial(decoder_text, t.Gemma2Config, t.Gemma2Model)),
    "glm": (partial(chat_tokenizer, "left", bos_token="<|im_start|>"), _GLM),
    "mistral3": (chat_tokenizer, partial(mistral3_text, t.Mistral3Model)),
    "mistral3-deep": (partial(chat_tokenizer, "left"), _DEEP_MISTRAL),
    "qwen2.5-vl": (chat_tokenizer, partial(_QWEN25_VL, fullatt_block_indexes=[0])),
    "qwen3": (chat_tokenizer, partial(decoder_text, t.Qwen3Config, t.Qwen3Model)),
    "qwen3-deep": (chat_tokenizer, _DEEP_QWEN),
    "qwen3-vl": (chat_tokenizer, partial(_QWEN3_VL, num_position_embeddings=16, deepstack_visual_indexes=[0])),
    "t5": (t5_tokenizer, partial(t5_text, t.T5Config, t.T5EncoderModel)),
    "umt5": (t5_tokenizer, partial(t5_text, t.UMT5Config, t.UMT5EncoderModel)),
}
"""Tokenizers and encoders; some are deep because FLUX.2 uses layers 10, 20, 30 or 9, 18, 27."""

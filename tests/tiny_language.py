"""Tiny random language models from the real transformers classes, with a tokenizer."""

import gguf
import numpy
import torch
import transformers as t
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

VOCAB = 96
WIDTH = 32

_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_COMMON = {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4,
           "intermediate_size": 48, "max_position_embeddings": 64, **_SPECIAL}  # fmt: skip
GQA = {**_COMMON, "num_key_value_heads": 2}
_GPT2 = {"vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 64, **_SPECIAL}
_BLOOM = {"vocab_size": VOCAB, "hidden_size": WIDTH, "n_layer": 2, "n_head": 4, "pad_token_id": 0}

_TABLE = {
    "llama": (t.LlamaForCausalLM, lambda: t.LlamaConfig(**GQA)),
    "mistral": (t.MistralForCausalLM, lambda: t.MistralConfig(**GQA, sliding_window=None)),
    "qwen2": (t.Qwen2ForCausalLM, lambda: t.Qwen2Config(**GQA)),
    "qwen3": (t.Qwen3ForCausalLM, lambda: t.Qwen3Config(**GQA, head_dim=8)),
    "gemma2": (t.Gemma2ForCausalLM, lambda: t.Gemma2Config(**GQA, head_dim=8)),
    "smollm3": (t.SmolLM3ForCausalLM, lambda: t.SmolLM3Config(**GQA)),
    "phi3": (t.Phi3ForCausalLM, lambda: t.Phi3Config(**GQA)),
    "gpt2": (t.GPT2LMHeadModel, lambda: t.GPT2Config(**_GPT2)),
    "gpt_neox": (t.GPTNeoXForCausalLM, lambda: t.GPTNeoXConfig(**_COMMON)),
    "opt": (t.OPTForCausalLM, lambda: t.OPTConfig(**{**_COMMON, "ffn_dim": 48, "word_embed_proj_dim": WIDTH})),
    "bloom": (
        t.BloomForCausalLM,
        lambda: t.BloomConfig(**_BLOOM),
    ),
    "falcon": (t.FalconForCausalLM, lambda: t.FalconConfig(**_COMMON, multi_query=True)),
}

LANGUAGE_MODELS = tuple(_TABLE)


def build(name, seed=0):
    """Build a frozen model in evaluation mode with seeded weights, scaled up so that every layer matters."""
    kind, config = _TABLE[name]
    torch.manual_seed(seed)
    model = kind(config())
    with torch.no_grad():
        for path, value in model.named_parameters():
            if value.ndim == 2 and "emb" not in path and "wte" not in path and "wpe" not in path:
                value.mul_(4)
    return model.eval().requires_grad_(False)


def rows(count=2, tokens=9, seed=1):
    """Return random token ids ``(count, tokens)`` without special tokens."""
    return torch.randint(3, VOCAB - 2, (count, tokens), generator=torch.Generator().manual_seed(seed))


CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
"""A typical chat template."""


def tokenizer(chat=True):
    """A character tokenizer with role tokens, an EOS token that is also the stop token, and an image token."""
    special = ["<pad>", "<s>", "</s>", "<system>", "<user>", "<assistant>"]
    letters = [chr(code) for code in range(32, 32 + VOCAB - len(special)) if chr(code) != "`"]
    vocabulary = {token: index for index, token in enumerate([*special, *letters, "<image>"])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = decoders.Fuse()
    inner.add_special_tokens([*special, "<image>"])
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "?"}
    return t.PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=CHAT if chat else None, **names)


def save(folder, name="llama", chat=True):
    """Save a model and its tokenizer to ``folder``."""
    build(name).save_pretrained(folder)
    tokenizer(chat).save_pretrained(folder)
    return folder


def write_gguf(path, seed=0):
    """Write a tiny LLaMA with 8-bit weights and a character tokenizer as GGUF; returns some dequantised weights."""
    width, layers, hidden = 32, 2, 64
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_block_count, layers), (writer.add_context_length, 64), (writer.add_embedding_length, width),
        (writer.add_feed_forward_length, hidden), (writer.add_head_count, 4), (writer.add_head_count_kv, 2),
        (writer.add_layer_norm_rms_eps, 1e-5), (writer.add_rope_dimension_count, 8), (writer.add_vocab_size, VOCAB),
    ):  # fmt: skip
        add(value)
    special = ["<pad>", "<s>", "</s>"]
    letters = ["Ġ" if code == 32 else chr(code) for code in range(32, 32 + VOCAB - len(special) - 1)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*special, *letters, "ab"])
    writer.add_token_types([3] * len(special) + [1] * (VOCAB - len(special)))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    shapes = {"token_embd": (VOCAB, width), "output_norm": (width,), "output": (VOCAB, width)}
    for block in range(layers):
        shapes |= {f"blk.{block}.{name}": shape for name, shape in {
            "attn_norm": (width,), "ffn_norm": (width,), "attn_q": (width, width), "attn_k": (width // 2, width),
            "attn_v": (width // 2, width), "attn_output": (width, width), "ffn_gate": (hidden, width),
            "ffn_up": (hidden, width), "ffn_down": (width, hidden),
        }.items()}  # fmt: skip
    rng, kept = numpy.random.default_rng(seed), {}
    for name, shape in shapes.items():
        values = numpy.ones(shape, numpy.float32) if len(shape) == 1 else rng.normal(0, 0.15, shape).astype("float32")
        kind = gguf.GGMLQuantizationType.F32 if len(shape) == 1 else gguf.GGMLQuantizationType.Q8_0
        packed = gguf.quants.quantize(values, kind)
        kept[name] = gguf.quants.dequantize(packed, kind)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return kept

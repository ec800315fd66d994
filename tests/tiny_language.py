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


_MIXTURE = {**GQA, "intermediate_size": 24, "num_experts_per_tok": 2}
_DEEPSEEK = {**_MIXTURE, "num_key_value_heads": 4, "moe_intermediate_size": 24, "n_routed_experts": 4, "n_group": 2,
             "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 12, "qk_rope_head_dim": 8,
             "qk_nope_head_dim": 8, "v_head_dim": 8}  # fmt: skip
_YARN = {"rope_type": "default", "rope_theta": 10000.0}

_MIXTURES = {
    "mixtral": (t.MixtralForCausalLM, lambda: t.MixtralConfig(**_MIXTURE, num_local_experts=4)),
    "qwen3_moe": (
        t.Qwen3MoeForCausalLM,
        lambda: t.Qwen3MoeConfig(**_MIXTURE, head_dim=8, moe_intermediate_size=24, num_experts=4),
    ),
    "gpt_oss": (
        t.GptOssForCausalLM,
        lambda: t.GptOssConfig(**_MIXTURE, head_dim=8, num_local_experts=4, rope_parameters=_YARN),
    ),
    "granitemoe": (t.GraniteMoeForCausalLM, lambda: t.GraniteMoeConfig(**_MIXTURE, num_local_experts=4)),
    "deepseek_v3": (t.DeepseekV3ForCausalLM, lambda: t.DeepseekV3Config(**_DEEPSEEK)),
}

MIXTURES = tuple(_MIXTURES)
"""Models with experts in three-dimensional parameters."""


def build_mixture(name, seed=0):
    """Build a frozen mixture of four experts in two blocks with seeded weights of a size that makes every layer matter."""
    kind, config = _MIXTURES[name]
    torch.manual_seed(seed)
    model = kind(config())
    with torch.no_grad():
        for path, value in model.named_parameters():
            if value.ndim > 1 and "emb" not in path:
                value.normal_(0, 0.15)
            elif path.endswith("bias"):
                value.normal_(0, 0.05)
    return model.eval().requires_grad_(False)


def write_gguf_of(model, path):
    """Write a model as GGUF the way transformers reads it: the names of its own tables, rows of q and k as they are."""
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    kind = model.config.model_type
    name = {"qwen3_moe": "qwen3moe"}.get(kind, kind)
    writer = gguf.GGUFWriter(path, name)
    for key, setting in GGUF_CONFIG_MAPPING[kind].items():
        value = getattr(model.config, setting or "", None)
        if setting == "rope_theta":
            value = model.config.rope_parameters["rope_theta"]
        if isinstance(value, float):
            writer.add_float32(f"{name}.{key}", value)
        elif isinstance(value, int):
            writer.add_uint32(f"{name}.{key}", value)
    names = gguf.get_tensor_name_map(next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == name), 2)
    for key, value in model.state_dict().items():
        values = {key: value}
        if key.endswith("experts.gate_up_proj"):
            values = dict(
                zip((key.replace("gate_up", "gate"), key.replace("gate_up", "up")), value.chunk(2, 1), strict=True)
            )
        for one, part in values.items():
            stem, suffix = (one, "weight") if one.endswith("_proj") else one.rsplit(".", 1)
            part = part + 1 if kind == "gemma2" and "norm" in one else part
            part = part.t() if kind == "gpt2" and (".attn.c" in one or ".mlp.c" in one) and part.ndim == 2 else part
            if one != "lm_head.weight" or not model.config.tie_word_embeddings:
                writer.add_tensor(f"{names.get_name(stem)}.{suffix}", part.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

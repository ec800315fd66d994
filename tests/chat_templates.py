"""Chat templates that behave as those of known models, written from their documented behaviour, and a tokenizer for all."""

import re
from dataclasses import dataclass

import transformers as t
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

LLAMA3 = """{{ bos_token }}{% for m in messages -%}
<|start_header_id|>{{ m.role }}<|end_header_id|>

{{ m.content | trim }}<|eot_id|>
{%- endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""

CHATML_TOOLS = """
{%- if tools %}{{ '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}{% endif %}
{{- '# Tools\\n<tools>' }}
{%- for tool in tools %}{{ '\\n' + tool | tojson }}{% endfor %}
{{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}{{ '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}DEFAULT{% endif %}"""
"""The head of Qwen's: tools in the system message."""

CALLS = """
{%- for call in m.tool_calls or [] %}
{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}{{ call.function.arguments | tojson }}
{{- '}\\n</tool_call>' }}
{%- endfor %}"""

QWEN25 = (
    CHATML_TOOLS.replace("DEFAULT", "{% else %}{{ '<|im_start|>system\\nYou are Qwen.<|im_end|>\\n' }}")
    + """
{%- for m in messages %}
{%- if m.role == 'tool' %}{{ '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}
{%- elif m.role != 'system' or not loop.first %}{{ '<|im_start|>' + m.role + '\\n' + (m.content or '') }}"""
    + CALLS
    + """{{ '<|im_end|>\\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
)

QWEN3 = (
    CHATML_TOOLS.replace("DEFAULT", "")
    + """
{%- set ns = namespace(asked=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'tool' %}{{ '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}
{%- elif m.role == 'assistant' %}
{%- set content = m.content or '' %}{% set thought = '' %}
{%- if m.reasoning_content %}{% set thought = m.reasoning_content %}
{%- elif '</think>' in content %}
{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip() %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{{- '<|im_start|>assistant\\n' }}
{%- if loop.index0 > ns.asked and (loop.last or thought) %}{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}
{{- content }}"""
    + CALLS
    + """{{ '<|im_end|>\\n' }}
{%- elif m.role != 'system' or not loop.first %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"""
)

ALTERNATE = """
{%- for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('roles must alternate user/assistant') }}{% endif %}{% endfor %}"""

MISTRAL = (
    "{{ bos_token }}"
    + ALTERNATE
    + "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}"
    + "{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}"
)

GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    + ALTERNATE
    + "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}"
    + "{{ m.content | trim + '<end_of_turn>\\n' }}{% endfor %}"
    + "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)

PHI = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)

R1 = """{{ bos_token }}{% for m in messages %}
{%- if m.role == 'system' %}{{ m.content }}
{%- elif m.role == 'user' %}{{ '<|User|>' + m.content }}
{%- else %}{{ '<|Assistant|>' + m.content.split('</think>')[-1] + '<|eos|>' }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|Assistant|><think>\\n' }}{% endif %}"""

SMOLLM3 = """
{%- set think = enable_thinking is not defined or enable_thinking %}
{{- '<|im_start|>system\\nToday Date: ' + strftime_now("%d %B %Y") + '\\nReasoning Mode: ' }}
{{- ('/think' if think else '/no_think') + '\\n' }}
{%- if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}{{ '<|im_end|>\\n' }}
{%- for m in messages %}
{%- if m.role == 'assistant' %}{% generation %}
{{- '<|im_start|>assistant\\n' + ('' if think else '<think>\\n\\n</think>\\n\\n') + m.content.lstrip('\\n') + '<|im_end|>\\n' }}
{%- endgeneration %}
{%- elif m.role == 'user' %}{{ '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{%- if not think %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"""


@dataclass(frozen=True)
class Kind:
    """A template and how it treats answers.

    Args:
        source: the template.
        end: the mark after an answer.
        before: what is learned before an answer without reasoning.
        thought: what is learned of an answer ``A`` with the reasoning ``R``; ``None``: that is a part of its text, and refused
            in a field of its own.
        together: whether all answers of a conversation fit in one example.
        system: whether it takes a system prompt.
        tools: whether it renders tools.
        trims: whether it drops space around an answer.
        alternates: whether questions and answers must take turns.
    """

    source: str
    end: str
    before: str = ""
    thought: str | None = None
    together: bool = True
    system: bool = True
    tools: bool = False
    trims: bool = False
    alternates: bool = False


KINDS = {
    "llama3": Kind(LLAMA3, "<|eot_id|>", trims=True),
    "qwen25": Kind(QWEN25, "<|im_end|>", tools=True),
    "qwen3": Kind(
        QWEN3, "<|im_end|>", "<think>\n\n</think>\n\n", "<think>\nR\n</think>\n\nA", together=False, tools=True
    ),
    "mistral": Kind(MISTRAL, "</s>", " ", system=False, trims=True, alternates=True),
    "gemma": Kind(GEMMA, "<end_of_turn>", system=False, trims=True, alternates=True),
    "phi": Kind(PHI, "<|end|>"),
    "r1": Kind(R1, "<|eos|>", "\n</think>\n\n", "R\n</think>\n\nA", together=False),
    "smollm3": Kind(SMOLLM3, "<|im_end|>", thought="<think>\nR\n</think>\n\nA"),
}
"""The templates by the names of their models."""

SPECIAL = (
    *("<pad>", "<s>", "</s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>"),
    *(
        "<start_of_turn>",
        "<end_of_turn>",
        "<|user|>",
        "<|assistant|>",
        "<|system|>",
        "<|end|>",
        "<|User|>",
        "<|Assistant|>",
    ),
    *("<|eos|>", "[INST]", "[/INST]"),
)
ADDED = ("<think>", "</think>", "<tool_call>", "</tool_call>")
"""Tokens that are not special, as in Qwen's tokenizers: they stay in decoded answers."""

_WORDS = re.compile(r"\w+|[^\w]")
TEXTS = "abcdefghijklmnopqrstuvwxyz again hint because be brief add number weather Berlin 0 1 2 3 4 5 6 7 8 9"


def reader(name=None):
    """A tokenizer of words with the special tokens of all templates; its end-of-text token is ``</s>`` (of r1 its own)."""
    words = {
        word for text in (TEXTS, *TEXTS, *(kind.source for kind in KINDS.values())) for word in _WORDS.findall(text)
    }
    words |= {chr(code) for code in range(32, 127)}
    vocabulary = {token: place for place, token in enumerate([*SPECIAL, *ADDED, "<unk>", *sorted(words - {*SPECIAL})])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w]"), "isolated")
    inner.decoder = decoders.Fuse()
    inner.add_special_tokens([*SPECIAL])
    inner.add_tokens([*ADDED])
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    source = KINDS[name].source if name else None
    return t.PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=source, **names)

"""Instruction data: reading, labels, errors, truncation and packing."""

import json

import pytest
import torch
from tiny_language import build, tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import LlamaTokenizer

from effilora_diffusion import EffiLoRAError
from effilora_diffusion.language.batches import IGNORED, Example, PackedExamples, collate, collate_packed
from effilora_diffusion.language.encoding import Encoder
from effilora_diffusion.language.examples import Examples
from effilora_diffusion.language.lessons import learn
from effilora_diffusion.language.sources import read_records

SUM = {"instruction": "add 1 and 2", "input": "", "output": "3"}
MESSAGES = (("system", "be brief"), ("user", "1+1"), ("assistant", "2"), ("user", "2+2"), ("assistant", "4"))
CHAT = {"messages": [{"role": role, "content": text} for role, text in MESSAGES]}
LLAVA = {"conversations": [{"from": "human", "value": "1+1"}, {"from": "gpt", "value": "2"}]}


def labelled(example, reader):
    """Return the text of each run of tokens with loss."""
    parts, run = [], []
    for token, label in [*zip(example.ids, example.labels, strict=True), (None, IGNORED)]:
        if label != IGNORED:
            assert label == token
            run.append(token)
        elif run:
            parts.append(reader.decode(run))
            run = []
    return parts


def test_the_loss_is_on_answers_and_stop_tokens_only():
    reader = tokenizer()
    encoder = Encoder(reader)
    assert encoder.template == "chat"
    example = encoder.encode(SUM)
    assert reader.decode(example.ids) == "<user>add 1 and 2</s><assistant>3</s>"
    assert labelled(example, reader) == ["3</s>"]
    assert labelled(encoder.encode(CHAT), reader) == ["2</s>", "4</s>"]
    assert reader.decode(encoder.encode(LLAVA).ids) == "<user>1+1</s><assistant>2</s>"
    assert encoder.prompt(SUM) == "<user>add 1 and 2</s><assistant>"
    assert encoder.prompt({"instruction": "add 1 and 2"}) == encoder.prompt(SUM)


def test_the_alpaca_prompt_is_that_of_commonsense_170k():
    reader = tokenizer(chat=False)
    encoder = Encoder(reader, max_length=1000)
    assert encoder.template == "alpaca"
    text = encoder.prompt(SUM)
    assert text == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nadd 1 and 2\n\n### Response:\n"
    )
    assert "### Input:\n7\n\n### Response" in encoder.prompt({**SUM, "input": "7"})
    assert labelled(encoder.encode(SUM), reader) == ["3</s>"]
    with pytest.raises(EffiLoRAError, match="no chat template"):
        Encoder(reader, "chat")


def test_the_plain_template_is_instruction_and_answer():
    encoder = Encoder(tokenizer(), "plain")
    assert encoder.prompt(SUM) == "add 1 and 2\n"
    assert encoder.prompt({**SUM, "input": "7"}) == "add 1 and 2\n7\n"
    assert labelled(encoder.encode(SUM), tokenizer()) == ["3</s>"]


def test_long_examples_are_truncated_on_the_left():
    encoder = Encoder(tokenizer(), max_length=8)
    example = encoder.encode({"instruction": "x" * 50, "output": "yes"})
    assert len(example.ids) == 8
    assert labelled(example, tokenizer()) == ["yes</s>"]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "no records"),
        ('{"instruction": "a"', "line 1: invalid JSON"),
        ('{"a": 1}\nnot json', "line 2: invalid JSON"),
        ("[1, 2]", "record 1: it must be a JSON object"),
        ("[{]", "not a JSON list"),
        ("[" * 100000, "not a JSON list"),
    ],
)
def test_errors_in_files_name_the_line(tmp_path, text, word):
    (tmp_path / "data.jsonl").write_text(text)
    with pytest.raises(EffiLoRAError, match=word):
        read_records(tmp_path / "data.jsonl")
    with pytest.raises(EffiLoRAError, match="can't be read"):
        read_records(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("record", "word"),
    [
        ({"instruction": "a"}, "'instruction' and 'output'"),
        ({"output": "a"}, "'instruction' and 'output'"),
        ({"messages": []}, "no user message"),
        ({"messages": [{"role": "user", "content": "a"}]}, "it needs an answer"),
        ({"messages": [{"role": "user"}]}, "a role and a content"),
        ({"messages": [{"role": "assistant", "content": None}]}, "must be strings or lists of parts"),
        ({"messages": 5}, "a role and a content"),
        (
            {"messages": [{"role": "critic", "content": "a"}, {"role": "assistant", "content": "b"}]},
            "unknown message role 'critic'",
        ),
        ({"messages": [{"role": "assistant", "content": "b"}]}, "no user message"),
        ({**SUM, "history": [["a", "b"]]}, "'history'"),
        ({**CHAT, "tools": [{}]}, "'tools'"),
        ({**CHAT, "tools": [{"name": "add"}]}, "does not render its 'tools'"),
        ({**SUM, "output": " "}, "answer is empty"),
        ({**SUM, "system": ["be brief"]}, "'system' must be a string"),
        ({**SUM, "input": {"a": 1}}, "'input' must be a string"),
        ({"messages": [*CHAT["messages"][:-1], {**CHAT["messages"][-1], "reasoning_content": "hm"}]}, "reasoning"),
        ({**LLAVA, "image": "a.png"}, "train_vlm_effilora.py"),
    ],
)
def test_errors_in_records_name_the_record(record, word):
    with pytest.raises(EffiLoRAError, match=f"data, record 2: .*{word}"):
        Examples.of([SUM, record], Encoder(tokenizer()), "data")


@pytest.mark.parametrize("template", ["plain", "alpaca"])
@pytest.mark.parametrize(
    "record", [{**SUM, "output": None}, {**SUM, "output": ["a"]}, {**SUM, "instruction": None}, CHAT]
)
def test_templates_without_messages_need_strings(template, record):
    with pytest.raises(EffiLoRAError, match=r"data, record 1: .*'instruction' and 'output' as strings"):
        Examples.of([record], Encoder(tokenizer(), template), "data")
    with pytest.raises(EffiLoRAError, match="vicuna is for images"):
        Encoder(tokenizer(), "vicuna")


@pytest.mark.parametrize("template", ["plain", "alpaca"])
def test_templates_without_messages_accept_numbers_as_input_but_no_system_prompt(template):
    encoder = Encoder(tokenizer(), template)
    assert "\n0\n" in encoder.prompt({**SUM, "input": 0})
    with pytest.raises(EffiLoRAError, match=f"{template} does not support its 'system' prompt"):
        encoder.encode({**SUM, "system": "be brief"})


def test_system_prompts_are_used_and_leading_assistant_messages_dropped():
    encoder = Encoder(tokenizer())
    assert encoder.prompt({**SUM, "system": "be brief"}) == "<system>be brief</s><user>add 1 and 2</s><assistant>"
    greeted = {"conversations": [{"from": "gpt", "value": "hello"}, *LLAVA["conversations"]], "system": "be brief"}
    assert tokenizer().decode(encoder.encode(greeted).ids) == "<system>be brief</s><user>1+1</s><assistant>2</s>"


THINKING = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' and not loop.last %}"
    "{{ m['content'].split('=')[-1] }}{% else %}{{ m['content'] }}{% endif %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
"""A template that removes the reasoning from earlier answers."""


def test_if_a_template_rewrites_answers_each_has_an_example():
    reader = tokenizer()
    reader.chat_template = THINKING
    turns = [("user", "1+1"), ("assistant", "hm=2"), ("user", "2+2"), ("assistant", "so=4")]
    record = {"messages": [{"role": role, "content": text} for role, text in turns]}
    found = learn(Encoder(reader), record)
    first, example = found.examples
    assert found.notes == {"split": 1}
    assert reader.decode(first.ids) == "<user>1+1</s><assistant>hm=2</s>"
    assert reader.decode(example.ids) == "<user>1+1</s><assistant>2</s><user>2+2</s><assistant>so=4</s>"
    assert labelled(example, reader) == ["so=4</s>"]
    assert labelled(first, reader) == ["hm=2</s>"]
    assert Encoder(reader).prompt(record) == "<user>1+1</s><assistant>2</s><user>2+2</s><assistant>"
    assert not learn(Encoder(reader), {"messages": record["messages"][:2]}).notes
    reader.chat_template = CHAT_OPENED
    (example,) = (found := learn(Encoder(reader), SUM)).examples
    assert reader.decode(example.ids) == Encoder(reader).prompt(SUM) + "3</s>"
    assert (labelled(example, reader), found.notes) == (["3</s>"], {"written": 1})


CHAT_OPENED = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>[think]{% endif %}"
)
"""A template whose generation prompt opens a reasoning block that the answer does not have."""


def test_errors_of_a_template_name_the_record():
    reader = tokenizer()
    reader.chat_template = (
        "{% if messages|length > 2 %}{{ raise_exception('one turn only') }}{% endif %}" + reader.chat_template
    )
    with pytest.raises(EffiLoRAError, match=r"data, record 1: .*rejects its messages: one turn only"):
        Examples.of([CHAT], Encoder(reader), "data")
    with pytest.raises(EffiLoRAError, match=r"here: .*rejects its messages: one turn only"):
        Encoder(reader).prompt(CHAT, "here")


def test_the_bos_token_is_added_once_and_survives_truncation():
    reader = tokenizer(chat=False)
    reader.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    assert reader("a")["input_ids"][0] == 1
    encoder = Encoder(reader, "plain", max_length=9)
    assert reader.decode(encoder.encode({"instruction": "abc", "output": "d"}).ids) == "<s>abc?d</s>"
    long = encoder.encode({"instruction": "x" * 30, "output": "d"})
    assert (len(long.ids), len(long.labels), long.truncated) == (9, 9, True)
    assert reader.decode(long.ids) == "<s>xxxxx?d</s>"
    assert encoder.encode_prompt({"instruction": "y" * 30}).ids[0] == 1
    reader.chat_template = "<s>{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert Encoder(reader).encode(SUM).ids.count(1) == 1
    cut = Encoder(reader, max_length=5).encode(SUM)
    assert (reader.decode(cut.ids), labelled(cut, reader)) == ("<s> 23</s>", ["3</s>"])


SPACED = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[{{ m['content'] }}]{% else %} {{ m['content'] }}</s>{% endif %}"
    "{% endfor %}"
)
"""A template whose answers begin with a space, as LLaMA 2's."""


def test_tokens_of_the_pieces_are_those_of_the_whole_text():
    letters = "▁[]abcdefghijklmnopqrstuvwxyz\n"
    vocabulary = {token: place for place, token in enumerate(["<unk>", "<s>", "</s>", *letters, "ye", "yes", "▁yes"])}
    merges = [("y", "e"), ("ye", "s"), ("▁", "yes")]
    reader = LlamaTokenizer(vocab=vocabulary, merges=merges)  # like SentencePiece: adds a space before a text
    reader.chat_template = SPACED
    turns = [("user", "hi"), ("assistant", "yes")] * 2
    messages = [{"role": role, "content": text} for role, text in turns]
    example = Encoder(reader).encode({"messages": messages})
    assert example.ids == reader.apply_chat_template(messages, tokenize=True)["input_ids"]
    yes = reader.convert_tokens_to_ids(["▁yes", "</s>"])
    assert [label for label in example.labels if label != IGNORED] == [*yes, *yes]
    plain = Encoder(reader, "plain").encode({"instruction": "hi", "output": "yes"})
    assert reader.convert_ids_to_tokens(plain.ids)[-3:] == ["\n", "yes", "</s>"]


def test_lines_end_at_line_feeds_only(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({**SUM, "output": "a\u2028b\u0085c"}, ensure_ascii=False) + "\r\n")
    assert read_records(tmp_path / "a.jsonl")[0]["output"] == "a\u2028b\u0085c"


def test_json_lists_and_lines_are_the_same(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([SUM, CHAT]))
    (tmp_path / "b.jsonl").write_text("\ufeff" + json.dumps(SUM) + "\n\n" + json.dumps(CHAT) + "\n")
    assert read_records(tmp_path / "a.json") == read_records(tmp_path / "b.jsonl") == [SUM, CHAT]


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_packed_examples_do_not_attend_to_each_other(name):
    encoder = Encoder(tokenizer())
    items = [encoder.encode({"instruction": "x" * n, "output": "y" * (n % 3 + 1)}) for n in (3, 9, 1, 6)]
    rows = PackedExamples(items, [len(item.ids) for item in items], 30)
    assert sorted(len(item.ids) for row in rows for item in row) == sorted(len(item.ids) for item in items)
    assert all(sum(len(item.ids) for item in row) <= 30 for row in rows)
    assert len(rows) < len(items)
    items[1] = Example(items[1].ids[-4:], items[1].ids[-4:])  # truncated so that it begins with its answer
    model = build(name)
    with torch.no_grad():
        packed = model(**collate_packed([items])).loss
        losses = [model(**collate([item], 0)).loss * item.num_label_tokens for item in items]
        together = model(**collate(items, 0)).loss
    alone = sum(losses) / sum(item.num_label_tokens for item in items)
    torch.testing.assert_close(packed, alone, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)

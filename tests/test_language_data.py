"""Instruction data: what is read, what is answered, what is refused, and packing that keeps examples apart."""

import json

import pytest
import torch
from tiny_language import build, tokenizer

from effilora_diffusion import EffiLoRAError
from effilora_diffusion.language.data import (
    IGNORED,
    Encoder,
    Example,
    Examples,
    collate,
    collate_packed,
    pack,
    read_records,
)

SUM = {"instruction": "add 1 and 2", "input": "", "output": "3"}
TURNS = (("system", "be brief"), ("user", "1+1"), ("assistant", "2"), ("user", "2+2"), ("assistant", "4"))
CHAT = {"messages": [{"role": role, "content": text} for role, text in TURNS]}
LLAVA = {"conversations": [{"from": "human", "value": "1+1"}, {"from": "gpt", "value": "2"}]}


def answered(example, reader):
    """The answered parts of an example, one text per run of answered tokens."""
    parts, run = [], []
    for token, label in [*zip(example.ids, example.labels, strict=True), (None, IGNORED)]:
        if label != IGNORED:
            assert label == token
            run.append(token)
        elif run:
            parts.append(reader.decode(run))
            run = []
    return parts


def test_only_answers_and_the_end_of_a_turn_are_learned():
    reader = tokenizer()
    encoder = Encoder(reader)
    assert encoder.template == "chat"
    example = encoder.encode(SUM)
    assert reader.decode(example.ids) == "<user>add 1 and 2</s><assistant>3</s>"
    assert answered(example, reader) == ["3</s>"]
    assert answered(encoder.encode(CHAT), reader) == ["2</s>", "4</s>"]
    assert reader.decode(encoder.encode(LLAVA).ids) == "<user>1+1</s><assistant>2</s>"
    assert encoder.prompt(SUM) == "<user>add 1 and 2</s><assistant>"
    assert encoder.prompt({"instruction": "add 1 and 2"}) == encoder.prompt(SUM)


def test_the_alpaca_form_is_that_of_commonsense_170k():
    reader = tokenizer(chat=False)
    encoder = Encoder(reader, max_length=1000)
    assert encoder.template == "alpaca"
    text = encoder.prompt(SUM)
    assert text == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nadd 1 and 2\n\n### Response:\n"
    )
    assert "### Input:\n7\n\n### Response" in encoder.prompt({**SUM, "input": "7"})
    assert answered(encoder.encode(SUM), reader) == ["3</s>"]
    with pytest.raises(EffiLoRAError, match="no chat template"):
        Encoder(reader, "chat")


def test_the_plain_form_is_instruction_and_answer():
    encoder = Encoder(tokenizer(), "plain")
    assert encoder.prompt(SUM) == "add 1 and 2\n"
    assert encoder.prompt({**SUM, "input": "7"}) == "add 1 and 2\n7\n"
    assert answered(encoder.encode(SUM), tokenizer()) == ["3</s>"]


def test_long_examples_lose_their_beginning():
    encoder = Encoder(tokenizer(), max_length=8)
    example = encoder.encode({"instruction": "x" * 50, "output": "yes"})
    assert len(example.ids) == 8
    assert answered(example, tokenizer()) == ["yes</s>"]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "no records"),
        ('{"instruction": "a"', "line 1: no JSON"),
        ('{"a": 1}\nnot json', "line 2: no JSON"),
        ("[1, 2]", "record 1: it must be an object"),
        ("[{]", "no JSON list"),
        ("[" * 100000, "no JSON list"),
    ],
)
def test_files_that_are_no_data_are_named_with_their_line(tmp_path, text, word):
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
        ({"messages": []}, "last one the assistant"),
        ({"messages": [{"role": "user", "content": "a"}]}, "last one the assistant"),
        ({"messages": [{"role": "user"}]}, "a role and a content"),
        ({"messages": [{"role": "assistant", "content": None}]}, "must be texts"),
        ({"messages": 5}, "a role and a content"),
    ],
)
def test_records_that_can_t_be_learned_are_named(record, word):
    with pytest.raises(EffiLoRAError, match=f"data, record 2: .*{word}"):
        Examples([SUM, record], Encoder(tokenizer()), "data")


def test_json_lists_and_lines_are_the_same(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([SUM, CHAT]))
    (tmp_path / "b.jsonl").write_text("\ufeff" + json.dumps(SUM) + "\n\n" + json.dumps(CHAT) + "\n")
    assert read_records(tmp_path / "a.json") == read_records(tmp_path / "b.jsonl") == [SUM, CHAT]


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_packed_examples_do_not_see_one_another(name):
    encoder = Encoder(tokenizer())
    items = [encoder.encode({"instruction": "x" * n, "output": "y" * (n % 3 + 1)}) for n in (3, 9, 1, 6)]
    rows = pack(items, 30)
    assert sorted(len(item.ids) for row in rows for item in row) == sorted(len(item.ids) for item in items)
    assert all(sum(len(item.ids) for item in row) <= 30 for row in rows)
    items[1] = Example(items[1].ids[-4:], items[1].ids[-4:])  # cut so far that it begins with its answer
    model = build(name)
    with torch.no_grad():
        packed = model(**collate_packed([items])).loss
        losses = [model(**collate([item], 0)).loss * item.answered for item in items]
        together = model(**collate(items, 0)).loss
    alone = sum(losses) / sum(item.answered for item in items)
    torch.testing.assert_close(packed, alone, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)

"""What chat templates make of records: whole turns that fit, marks, dates, variables, ends, and what is said before step 1."""

import json
from collections import Counter

import pytest
from chat_templates import KINDS, SMOLLM3, reader
from language_runs import same, weights, words
from test_language_records import bot, chat, runs, user
from tiny_language import CHAT, save, tokenizer
from transformers import LlamaTokenizer

from effilora_diffusion import EffiLoRAError
from effilora_diffusion.cli.train_llm import main
from effilora_diffusion.core import load_adapter_file
from effilora_diffusion.language.encoders import as_metadata, encoder_of, template_facts
from effilora_diffusion.language.encoding import Encoder
from effilora_diffusion.language.examples import Examples
from effilora_diffusion.language.generate import after, until, without
from effilora_diffusion.language.lessons import asked_otherwise, learn
from effilora_diffusion.language.notes import SENTENCES, describe, describe_ends
from effilora_diffusion.language.template_file import check_options, dated, read_options, read_template
from effilora_diffusion.language.thinking import shown, split, spoken, state_of

LONG = chat(*[turn for letter in "abcdef" for turn in (user(letter), bot(letter + " 1"))], system="be brief")
"""Six questions with their answers."""


@pytest.mark.parametrize("name", KINDS)
def test_long_conversations_lose_whole_turns_only_and_every_answer_is_learned(name):
    kind, words = KINDS[name], reader(name)
    whole = learn(Encoder(words, max_length=1000), LONG).examples
    fits = len(learn(Encoder(words, max_length=1000), {**LONG, "messages": LONG["messages"][:4]}).examples[-1].ids) + 3
    encoder = Encoder(words, max_length=fits)  # two turns, not three
    assert fits < len(whole[-1].ids)
    found = learn(encoder, LONG)
    learned = [text for example in found.examples for _, text in runs(example, words)]
    assert learned == [kind.before + letter + " 1" + kind.end for letter in "abcdef"]
    assert found.notes["too_long"] == 0
    assert found.notes["shortened"] == 1
    start = words.decode(whole[0].ids)
    start = start[: start.index("be brief") + len("be brief")]
    for example in found.examples:
        text = words.decode(example.ids)
        assert len(example.ids) <= fits
        assert text.startswith(start)
        first = next(letter for letter in "abcdef" if f"{letter} 1" in text)  # the question is there, too
        assert text.index(first) < text.index(f"{first} 1")
    assert any(example.truncated for example in found.examples)
    assert found.examples[0].truncated is False


def test_single_turns_that_are_too_long_are_left_out_and_counted():
    encoder = Encoder(reader("llama3"), max_length=40)
    long, short = chat(user("a " * 60), bot()), chat(user(), bot())
    examples = Examples.of([long, short], encoder, "data")
    assert (len(examples), examples.notes) == (1, {"too_long": 1})
    mixed = chat(user(), bot(), user("a " * 60), bot("4"), user("5"), bot("6"))
    found = learn(encoder, mixed)
    assert [text for one in found.examples for _, text in runs(one, encoder.tokenizer)] == [
        "2<|eot_id|>",
        "6<|eot_id|>",
    ]
    assert found.notes == {"shortened": 1, "too_long": 1}
    plain = learn(Encoder(reader(), "plain", max_length=20), {"instruction": "a " * 30, "output": "b"})
    assert (plain.examples, plain.notes) == ([], {"too_long": 1})
    with pytest.raises(EffiLoRAError, match=r"data: none of its 1 records has an answer that fits .* in 40 tokens"):
        Examples.of([long], encoder, "data")


def test_a_long_text_is_learned_in_pieces():
    encoder = Encoder(reader("llama3"), max_length=8)
    found = learn(encoder, {"text": "a b c d e f g h i j"})
    text = "".join(encoder.tokenizer.decode(example.ids) for example in found.examples)
    assert text == "a b c d e f g h i j</s>"
    assert all(example.ids == example.labels and len(example.ids) <= 8 for example in found.examples)
    assert found.notes == {"windows": 1}


def test_a_conversation_that_is_asked_loses_its_oldest_turns():
    words = reader("llama3")
    encoder = Encoder(words, max_length=60)
    asked = {**LONG, "messages": [*LONG["messages"], user("g")]}
    text = words.decode(encoder.encode_prompt(asked).ids)
    assert encoder.encode_prompt(asked).truncated
    assert text.startswith(
        "<s><|start_header_id|>system<|end_header_id|>\n\nbe brief<|eot_id|><|start_header_id|>user"
    )
    assert text.endswith("g<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")
    assert "f 1" in text
    assert "a 1" not in text
    with pytest.warns(UserWarning, match="longer than 60 tokens, it lost its beginning"):
        assert len(encoder.encode_prompt(chat(user("a " * 60))).ids) == 60


MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>{{ m.content.split('/')[0] }}{% generation %}/"
    "{{ m.content.split('/')[-1] }}{% endgeneration %}<|end|>{% else %}<|user|>{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""A template that marks a part of its answers as generated, and not their end."""


def test_generation_marks_choose_what_is_learned_and_an_end_always_is():
    words = reader()
    words.chat_template = MARKED
    (example,) = learn(Encoder(words), chat(user(), bot("a/b"), user("3"), bot("c/d"))).examples
    assert runs(example, words) == [
        ("<|user|>1<|assistant|>a", "/b<|end|>"),
        ("<|user|>1<|assistant|>a/b<|end|><|user|>3<|assistant|>c", "/d<|end|>"),
    ]
    words.chat_template = MARKED.replace("{% generation %}", "{% if m.content != 'a/b' %}{% generation %}").replace(
        "{% endgeneration %}", "{% endgeneration %}{% else %}/b{% endif %}"
    )
    found = learn(Encoder(words), chat(user(), bot("a/b"), user("3"), bot("c/d")))
    assert [text for _, text in runs(found.examples[0], words)] == ["/d<|end|>"]
    assert found.notes == {"unmarked": 1}


def test_templates_get_the_day_that_the_run_began():
    encoder = Encoder(reader("smollm3"), date="2025-01-31")
    assert "Today Date: 31 January 2025\n" in encoder.prompt({"instruction": "1"})
    assert encoder.facts["template_date"] == "2025-01-31"
    assert dated(SMOLLM3, "2024-02-29").count('"29 February 2024"') == 1
    assert Encoder(reader("llama3"), date="2025-01-31").facts["template_date"] is None
    saved = as_metadata(encoder.facts)
    assert "Today Date: 31 January 2025" in encoder_of(reader("smollm3"), saved).prompt({"instruction": "1"})


def test_what_an_adapter_was_trained_with_is_used_again_unless_replaced():
    own, off = KINDS["qwen3"].source, {"enable_thinking": False}
    saved = as_metadata(Encoder(reader(), chat_template=own, options=off).facts)
    assert template_facts(saved) == {"prompt_template": "chat", "chat_template": own, "chat_template_kwargs": off}
    asked = {"instruction": "1"}
    closed = "<think>\n\n</think>\n\n"
    assert encoder_of(reader(), saved).prompt(asked).endswith(closed)
    assert not encoder_of(reader(), saved, options={"enable_thinking": True}).prompt(asked).endswith(closed)
    other = encoder_of(reader(), saved, {"chat_template": KINDS["phi"].source})
    assert other.prompt(asked) == "<|user|>\n1<|end|>\n<|assistant|>\n"
    assert encoder_of(reader(), saved, {"prompt_template": "plain"}).prompt(asked) == "1\n"
    plain = {"prompt_template": "plain"}
    assert encoder_of(reader(), plain, {"chat_template": KINDS["phi"].source}).prompt(asked) == other.prompt(asked)
    with pytest.raises(EffiLoRAError, match="need a chat template, not --prompt_template plain"):
        encoder_of(reader(), saved, {**plain, "chat_template": KINDS["phi"].source})
    with pytest.raises(EffiLoRAError, match="chat template can't be read"):
        encoder_of(reader(), {**saved, "chat_template_kwargs": "[1]"})


def test_a_record_may_bring_its_own_variables():
    encoder = Encoder(reader("qwen3"))
    record = {**chat(user(), bot()), "chat_template_kwargs": {"enable_thinking": False}}
    ((before, learned),) = runs(learn(encoder, record).examples[0], encoder.tokenizer)
    assert (before[-20:], learned) == ("\n<think>\n\n</think>\n\n", "2<|im_end|>")
    assert encoder.prompt(record) == before


def test_reasoning_is_not_learned_after_a_prompt_that_closes_it():
    off = Encoder(
        reader("smollm3"), options={"enable_thinking": False}
    )  # a template that leaves blocks in texts alone
    for message in (bot("<think>\nhint\n</think>\n\n2"), bot(reasoning_content="hint")):
        found = learn(off, chat(user(), message))
        assert [text for _, text in runs(found.examples[0], off.tokenizer)] == ["2<|im_end|>"]
        assert found.notes == {"thought": 1}


@pytest.mark.parametrize(
    ("pieces", "opened", "expected"),
    [
        (["a", " b"], False, "a b"),
        ([" a", " b"], False, "a b"),
        (["<", "b>"], False, "<b>"),
        (["<think>", "\n\n", "</think>", "\n\n", "a"], False, "a"),
        (["<think>\n\n</think>\n\na b"], False, "a b"),
        (["<think>", "\nhm\n", "</think>", "\n\n", "a"], False, "<think>\nhm\n</think>\n\na"),
        (["\n</think>", "\n\na"], True, "a"),
        (["hm", "\n</think>\n\na"], True, "<think>\nhm\n</think>\n\na"),
        ([], True, ""),
        ([], False, ""),
        (["<think>", "\n"], False, ""),
        (["<th"], False, "<th"),
    ],
)
def test_an_empty_reasoning_block_is_not_shown(pieces, opened, expected):
    assert "".join(shown(iter(pieces), opened)) == expected


def test_what_a_template_writes_before_answers_is_learned_and_not_shown():
    words = reader()
    words.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"  # it knows no prompt
    encoder = Encoder(words)
    (example,) = learn(encoder, chat(user(), bot())).examples
    assert runs(example, words) == [("user: 1</s>", "assistant: 2</s>")]
    assert encoder.spoken(encoder.tokens("assistant: 2</s>")) == "2"
    assert "".join(without(iter(["assist", "ant", ": 2", " 3"]), encoder.start_text)) == " 2 3"
    assert "".join(without(iter(["ass", "et"]), encoder.start_text)) == "asset"
    assert "".join(without(iter([" a", " b"]), "")) == " a b"
    assert Encoder(reader("mistral")).start_text == Encoder(reader("qwen3")).start_text == ""


def test_a_streamed_answer_stops_before_the_end_that_is_text():
    assert "".join(until(iter(["2", " ", "#e", "nd", " more"]), "#end")) == "2 "
    assert "".join(until(iter(["2", " #e", "x"]), "#end")) == "2 #ex"
    assert "".join(until(iter(["2 #end"]), "#end")) == "2"
    assert "".join(until(iter(["2", "#"]), "")) == "2#"


CHANNELS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% if m.thinking and loop.last %}<|start_header_id|>assistant<|user|>hint<|end_header_id|>{{ m.thinking }}<|end|>{% endif %}"
    "<|start_header_id|>assistant<|user|>number<|end_header_id|>{{ m.content }}"
    "{{ '<|eos|>' if loop.last else '<|end|>' }}"
    "{% else %}<|start_header_id|>{{ m.role }}<|end_header_id|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant{% endif %}"
)
"""In the manner of gpt-oss: reasoning and answers are in channels, and the last answer ends with a mark of its own."""


def test_answers_in_channels_are_learned_whole_and_shown_alone():
    words = reader()
    words.chat_template = CHANNELS
    encoder = Encoder(words)
    assert (encoder.start_mark, encoder.end_mark) == ("<|user|>number<|end_header_id|>", "<|eos|>")
    found = learn(encoder, chat(user(), bot(reasoning="because"), user("3"), bot("4")))
    assert [text for example in found.examples for _, text in runs(example, words)] == [
        "<|user|>hint<|end_header_id|>because<|end|><|start_header_id|>assistant<|user|>number<|end_header_id|>2<|eos|>",
        "<|user|>number<|end_header_id|>4<|eos|>",
    ]
    pieces = ["<|user|>", "hint", "<|end_header_id|>", "because", "<|end|><|start_header_id|>assistant"]
    pieces += ["<|user|>number", "<|end_header_id|>", "a", " b", "<|eos|>"]
    assert encoder.spoken(words("".join(pieces))["input_ids"]) == "a b"
    assert "".join(after(iter(pieces), encoder.start_mark, encoder.plain_text)) == "a b"
    assert "".join(after(iter(["a", "<|eos|>"]), encoder.start_mark, encoder.plain_text)) == "a"


CALLING = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>{{ m.content }}"
    "{% for call in m.tool_calls or [] %}[INST]{{ call.function.name }}({{ call.function.arguments | tojson }})[/INST]END"
    "{% endfor %}{% if not m.tool_calls %}<|end|>{% endif %}{% else %}<|user|>{{ m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""A template whose calls end in special tokens of their own."""


def test_calls_are_learned_up_to_their_last_mark():
    record = chat(user(), bot(None, tool_calls=[{"name": "add", "arguments": {"a": 1}}]))
    for end, mark in (("<|eos|>", "<|eos|>"), ("<|eos|><|end|>", "<|end|>")):
        words = reader()
        words.chat_template = CALLING.replace("END", end)
        encoder = Encoder(words)
        (example,) = learn(encoder, record).examples
        assert [text for _, text in runs(example, words)] == [f'[INST]add({{"a": 1}})[/INST]{end}']
        assert words.convert_ids_to_tokens(encoder.stop_tokens) == list(dict.fromkeys(["</s>", "<|end|>", mark]))
        words.chat_template = CALLING.replace("END", end).replace(
            "call.function.arguments | tojson", "'' + call.function.arguments"
        )
        (example,) = learn(Encoder(words), record).examples  # one that takes arguments as JSON
        assert [text for _, text in runs(example, words)] == [f'[INST]add({{"a": 1}})[/INST]{end}']


def test_reasoning_is_split_from_answers():
    assert split("<think>\nhm\n</think>\n\na") == split("hm\n</think>\n\na") == ("hm", "a")
    assert split("a") == ("", "a")
    assert spoken("hm") == "hm"
    assert spoken("hm\n</think>\n\n a ") == "a"
    assert state_of("x<think>\n") == ("x", "open")
    assert state_of("x<think>\n\n</think>\n\n") == ("x", "closed")
    assert state_of("<think>a</think>x") == ("<think>a</think>x", "")


def test_ends_that_can_t_be_learned_are_said():
    words = reader("llama3")
    assert describe_ends(Encoder(words).stop_tokens, Encoder(words).end_text) == []
    words.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }} #end\n{% endfor %}"
    encoder = Encoder(words)
    assert [text for _, text in runs(learn(encoder, chat(user(), bot())).examples[0], words)] == [
        "assistant: 2 #end</s>"
    ]
    assert encoder.end_text == "#end"
    assert encoder.spoken(encoder.tokens("2 #end</s>")) == "2"
    (sentence,) = describe_ends(encoder.stop_tokens, encoder.end_text)
    assert "'#end', which the chat template writes after an answer, is no special token" in sentence
    words.eos_token = None
    (sentence,) = describe_ends(Encoder(words).stop_tokens, Encoder(words).end_text)
    assert "has no end-of-text token" in sentence
    words.chat_template = KINDS["llama3"].source  # its own mark is enough
    assert describe_ends(Encoder(words).stop_tokens, Encoder(words).end_text) == []


def test_tokens_that_differ_from_those_that_are_asked_are_counted():
    letters = "▁abcdefghijklmnopqrstuvwxyz"
    vocabulary = {token: place for place, token in enumerate(["<unk>", "<s>", "</s>", *letters, "ye", "yes"])}
    words = LlamaTokenizer(vocab=vocabulary, merges=[("y", "e"), ("ye", "s")])
    words.eos_token = None
    words.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    record = chat(user("hi"), bot("y"), user("es"), bot("no"))
    assert asked_otherwise(Encoder(words), [record, chat(user("hi"), bot("y"))], "data") == [
        "data: the answers of 1 of the first 2 records are learned after other tokens than those that are asked, as the "
        "tokenizer joins the end of an answer with what follows it"
    ]
    assert asked_otherwise(Encoder(reader("llama3")), [LONG], "data") == []
    assert asked_otherwise(Encoder(reader(), "plain"), [{"prompt": "1", "completion": "2"}], "data") == []


def test_every_note_has_a_sentence():
    notes = Counter(dict.fromkeys(SENTENCES, 1200))
    found = describe(notes, "data")
    assert len(found) == len(SENTENCES)
    assert all(sentence.startswith("data: ") and "1,200" in sentence for sentence in found)
    assert describe(Counter(masked=2)) == ["2 answers are not learned, as the record says; context only"]


@pytest.mark.parametrize(
    ("name", "text", "word"),
    [
        ("a.jinja", "{% for m in messages %}", "line 1: it is no Jinja template"),
        ("a.jinja", "hello", "does not use 'messages'"),
        ("a.json", '{"a": 1}', "must have 'chat_template'"),
        ("a.json", '{"chat_template": }', "--chat_template .*a.json is no JSON: Expecting value"),
        ("none.jinja", None, "can't be read"),
    ],
)
def test_files_that_are_no_chat_templates_are_refused(tmp_path, name, text, word):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(EffiLoRAError, match=word):
        read_template(str(tmp_path / name))


def test_a_tokenizer_may_have_several_templates():
    words = reader()
    words.chat_template = {"default": KINDS["llama3"].source, "tool_use": KINDS["qwen25"].source}
    encoder = Encoder(words)
    assert encoder.prompt({"instruction": "1"}) == Encoder(reader("llama3")).prompt({"instruction": "1"})
    with_tools = chat(user(), bot(), tools=[{"name": "add"}])
    assert [text for _, text in runs(learn(encoder, with_tools).examples[0], words)] == ["2<|im_end|>"]
    words.chat_template = {"a": "{{ messages }}", "b": "{{ messages }}"}
    with pytest.raises(EffiLoRAError, match="has the chat templates a, b: give one with --chat_template"):
        Encoder(words)


def test_a_variable_is_what_the_template_looks_for_and_no_key_of_that_name():
    source = "{% if deep is not defined %}{% set deep = 1 %}{% endif %}{% set own = messages[0].key %}{{ own }} text"
    check_options(source, {"deep": 2})
    for name in ("key", "own", "text", "namespace"):
        with pytest.raises(EffiLoRAError, match=f"reads no variable '{name}'"):
            check_options(source, {name: 1})


def test_chat_templates_are_read_from_jinja_and_from_tokenizers_files(tmp_path):
    for name in ("smollm3", "qwen3"):
        (tmp_path / "a.jinja").write_text(KINDS[name].source)
        assert read_template(str(tmp_path / "a.jinja")) == KINDS[name].source
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": KINDS["phi"].source}))
    assert read_template(str(tmp_path / "tokenizer_config.json")) == KINDS["phi"].source
    assert read_options(None) == {}
    for text in ("{", "[1]", "true"):
        with pytest.raises(EffiLoRAError, match="--chat_template_kwargs must be"):
            read_options(text)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lessons")
    save(folder / "model")
    (folder / "train.jsonl").write_text(json.dumps({"instruction": "a", "output": "b"}))
    return folder


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"chat_template": "/nowhere.jinja"}, "--chat_template /nowhere.jinja can't be read"),
        ({"chat_template_kwargs": '{"enable_thinking":false}'}, "reads no variable 'enable_thinking'"),
        ({"chat_template_kwargs": '{"messages":1}'}, "'messages' is given by the records"),
        ({"chat_template_kwargs": "enable_thinking"}, "--chat_template_kwargs must be JSON"),
        ({"chat_template_kwargs": '{"messages":1}', "prompt_template": "plain"}, "need a chat template"),
        ({"enable_thinking": "false"}, "here it is --chat_template_kwargs"),
        ({"max_length": 5}, "none of its 1 records has an answer that fits"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(place, tmp_path, capsys, change, word):
    assert main(words(place, tmp_path / "out", **change)) == 2
    error = capsys.readouterr().err
    assert word in error
    assert "Traceback" not in error
    assert not (tmp_path / "out" / "effilora.safetensors").exists()


def test_a_resumed_run_has_the_day_of_its_start(place, tmp_path, monkeypatch):
    (tmp_path / "dated.jinja").write_text("{{ strftime_now('%Y') }}" + CHAT)
    told = {"chat_template": tmp_path / "dated.jinja"}
    with monkeypatch.context() as patch:
        patch.setattr("effilora_diffusion.language.encoding.today", lambda: "2001-01-01")
        assert main(words(place, tmp_path / "whole", **told)) == 0
    again = {**told, "resume_from_checkpoint": tmp_path / "whole" / "checkpoint-3"}
    assert main(words(place, tmp_path / "again", **again)) == 0
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "again"))
    metadata = load_adapter_file(tmp_path / "again" / "effilora.safetensors").metadata
    assert metadata["template_date"] == "2001-01-01"
    assert "2001<user>" in encoder_of(tokenizer(), metadata).prompt({"instruction": "a"})

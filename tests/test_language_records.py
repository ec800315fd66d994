"""Records of every shape, good and bad, with the templates of known models: what is learned of each, or the sentence."""

import pytest
from chat_templates import KINDS, reader

from effilora_diffusion import EffiLoRAError
from effilora_diffusion.language.batches import IGNORED
from effilora_diffusion.language.conversations import to_conversation
from effilora_diffusion.language.encoding import Encoder
from effilora_diffusion.language.lessons import is_bare_text, learn


def user(text="1", **more):
    return {"role": "user", "content": text, **more}


def bot(text="2", **more):
    return {"role": "assistant", "content": text, **more}


def chat(*messages, **more):
    return {"messages": list(messages), **more}


def said(*pairs, key="conversations"):
    return {key: [{"from": role, "value": text} for role, text in pairs]}


def call(arguments):
    return bot(
        None, tool_calls=[{"id": "c1", "type": "function", "function": {"name": "add", "arguments": arguments}}]
    )


def part(text, kind="text"):
    return {"type": kind, "text": text}


SYSTEM = {"role": "system", "content": "be brief"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
RESULT = {"role": "tool", "content": "9", "tool_call_id": "c1", "name": "add"}
BLOCK = "<think>\nhint\n</think>\n\n2"
CALL = '\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'

TABLE = [
    # instructions
    ({"instruction": "1", "output": "2"}, ["2"]),
    ({"instruction": "1", "input": "3", "output": "2"}, ["2"]),
    ({"instruction": "1", "input": 0, "output": "2"}, ["2"]),
    ({"instruction": "1", "input": None, "output": "2", "id": 7, "source": "x"}, ["2"]),
    ({"instruction": "1", "output": "2", "system": "be brief"}, ["2"]),
    ({"instruction": "1", "output": "a b\nc"}, ["a b\nc"]),
    # chats
    (chat(user(), bot()), ["2"]),
    (chat(user(), bot(), user("3"), bot("4")), ["2", "4"]),
    (chat(user(), bot(), user("3"), bot("4"), user("5"), bot("6")), ["2", "4", "6"]),
    (chat(SYSTEM, user(), bot(), user("3"), bot("4")), ["2", "4"]),
    (chat(user(), bot(), system="be brief"), ["2"]),
    (chat({"role": "developer", "content": "be brief"}, user(), bot()), ["2"]),
    (chat(user(), {"role": "model", "content": "2"}), ["2"]),
    (said(("human", "1"), ("gpt", "2")), ["2"]),
    (said(("system", "be brief"), ("human", "1"), ("gpt", "2")), ["2"]),
    (said(("gpt", "hi"), ("human", "1"), ("gpt", "2"), ("human", "3"), ("gpt", "4")), ["2", "4"]),
    ({"messages": said(("human", "1"), ("gpt", "2"))["conversations"]}, ["2"]),
    (chat(user(), bot(" 2 ")), {"trims": ["2"], "": [" 2 "]}),
    (chat(user(), bot(weight=None, tool_calls=None, name=None, refusal=None)), ["2"]),
    (chat(user(), bot(), user("3")), ["2"]),
    (chat(user(), bot(), user("3"), bot("4"), user("5"), SYSTEM), ["2", "4"]),
    (chat(user(), user("3"), bot()), {"alternates": "rejects its messages: roles must alternate", "": ["2"]}),
    # prompts with completions
    ({"prompt": "1", "completion": "2"}, ["2"]),
    ({"prompt": [user()], "completion": [bot()]}, ["2"]),
    ({"prompt": [SYSTEM, user(), bot(), user("3")], "completion": [bot("4")]}, ["4"]),
    ({"prompt": [user()], "completion": [bot(), user("3"), bot("4")]}, ["2", "4"]),
    # parts
    (chat(user([part("1")]), bot([part("2")])), ["2"]),
    (chat(user([part("1"), part(" 3", "input_text")]), bot([part("2"), part(" 4")])), ["2 4"]),
    (chat(user([part("1")]), bot([part("2", "output_text")])), ["2"]),
    # flags
    (chat(user(), bot(weight=0), user("3"), bot("4", weight=1)), ["4"]),
    (chat(user(), bot(), user("3"), bot("4", weight=0)), ["2"]),
    (chat(user(train=False), bot(train=False), user("3"), bot("4", train=True)), ["4"]),
    (chat(user(training=False), bot(training=True), user("3"), bot("4", training=False)), ["2"]),
    (chat(user(), bot(trainable=False), user("3"), bot("4")), ["4"]),
    (chat(user(), bot(loss=False), user("3"), bot("4", loss=True)), ["4"]),
    (chat(user(), bot(loss_mask=0), user("3"), bot("4", loss_mask=1)), ["4"]),
    (chat(user(), bot(weight=0), user("3"), bot("4", weight=0)), []),
    (chat(user(), bot(" "), user("3"), bot("4")), ["4"]),
    # reasoning
    (chat(user(), bot(BLOCK)), {"thought": [("hint", "2")], "": [BLOCK]}),
    (chat(user(), bot(BLOCK), user("3"), bot("4")), {"thought": [("hint", "2"), "4"], "": [BLOCK, "4"]}),
    (chat(user(), bot(reasoning_content="hint")), {"thought": [("hint", "2")], "": "does not render the reasoning"}),
    (chat(user(), bot(reasoning="hint")), {"thought": [("hint", "2")], "": "does not render the reasoning"}),
    (chat(user(), bot(thinking="hint")), {"thought": [("hint", "2")], "": "does not render the reasoning"}),
    # tools
    (chat(user(), call({"a": 1}), RESULT, bot("9"), tools=[TOOL]), {"tools": [CALL, "9"], "": "does not render"}),
    (chat(user(), call('{"a": 1}'), RESULT, bot("9"), tools=[TOOL]), {"tools": [CALL, "9"], "": "does not render"}),
    (chat(user(), call({"a": 1}), tools=[TOOL]), {"tools": [CALL], "": "does not render the tool_calls"}),
    (chat(user(), bot(), tools=[TOOL]), {"tools": ["2"], "": r"does not render its 'tools' \(add\)"}),
    (chat(user(), bot(), tools='[{"name": "add"}]'), {"tools": ["2"], "": "does not render its 'tools'"}),
    (chat(user(), bot(), functions=[{"name": "add"}]), {"tools": ["2"], "": "does not render its 'tools'"}),
    # text alone
    ({"text": "a b c"}, ["a b c"]),
    # what can't be learned
    ({"text": " "}, "its 'text' is empty"),
    ({"instruction": "1"}, "'instruction' and 'output'"),
    ({"instruction": "1", "output": None}, "'instruction' and 'output'"),
    ({"question": "1", "answer": "2"}, "it needs 'messages', 'prompt' and 'completion'"),
    ({"instruction": "1", "output": " \n"}, "its answer is empty"),
    (chat(user(), bot("")), "its answer is empty"),
    (chat(), "no user message"),
    (chat(user()), "it needs an answer"),
    (chat(bot()), "no user message"),
    (chat(bot(), user()), "it needs an answer"),
    (chat(user(), bot(None)), "must be strings or lists of parts"),
    (chat(user(5), bot()), "must be strings or lists of parts"),
    (chat(user(), {"role": "critic", "content": "2"}), "unknown message role 'critic'"),
    (chat(user(), "2"), "every message needs a role and a content"),
    ({"messages": "1"}, "they must be a list"),
    (chat(user(), bot(weight=0.5)), "'weight' of a message must be true, false, 0 or 1, not 0.5"),
    (chat(user(weight=1), bot()), "only answers of the assistant are learned"),
    (chat(user(), bot(train=True, weight=0)), "contradict each other"),
    (chat(user(), bot(train_detail=[{}])), "'train_detail'"),
    (chat(user([{"type": "image_url", "image_url": {"url": "a.png"}}]), bot()), "train_vlm_effilora.py"),
    (chat(user([{"type": "audio"}]), bot()), "a part of a content must be"),
    ({"instruction": "1", "output": "2", "image": "a.png"}, "train_vlm_effilora.py"),
    ({"instruction": "1", "output": "2", "history": [["a", "b"]]}, "'history'"),
    ({"prompt": "1", "chosen": "2", "rejected": "3"}, "'chosen', 'rejected'"),
    ({"instruction": "1", "output": "2", "system": ["be brief"]}, "'system' must be a string"),
    ({"instruction": "1", "input": {"a": 1}, "output": "2"}, "'input' must be a string"),
    ({"prompt": "1", "completion": [bot()]}, "both be strings, or both lists"),
    ({"prompt": "1"}, "both be strings, or both lists"),
    (chat(user(), bot(reasoning_content=["hint"])), "reasoning of a message must be a string"),
    (chat(user(reasoning="hint"), bot()), "belongs to messages of the assistant"),
    (chat(user(), bot(function_call={"name": "add"})), "'function_call'"),
    (chat(user(), call("{a: 1}")), "the arguments of add are not JSON"),
    (chat(user(), bot(None, tool_calls=[{"id": "c1"}])), "needs a function with a name"),
    (chat(user(), bot(), tools=[{}]), "'tools' must be a list of JSON schemas"),
    (chat(user(), bot(), chat_template_kwargs=5), "'chat_template_kwargs' must be an object"),
    (chat(user(), bot(), chat_template_kwargs={"no_such": 1}), "reads no variable 'no_such'"),
]
"""Records and the answers that are learned of them, or a part of the sentence that refuses them.

Where templates differ, the expectation is that of the first property of :class:`.Kind` that holds, else that under "". An
answer is its text, or a pair of reasoning and text.
"""


def expectation(found, kind):
    if not isinstance(found, dict):
        return found
    return next((value for name, value in found.items() if name and getattr(kind, name)), found[""])


def learned_text(answer, kind):
    """What is learned of an answer by hand-made rules."""
    if isinstance(answer, tuple):
        return kind.thought.replace("R", answer[0]).replace("A", answer[1]) + kind.end
    return kind.before + answer + kind.end


def runs(example, words):
    """The text before and the text of every run of tokens with loss."""
    found, start = [], 0
    labels = [*example.labels, IGNORED]
    for place, label in enumerate(labels):
        if label == IGNORED:
            if start < place:
                found.append((words.decode(example.ids[:start]), words.decode(example.ids[start:place])))
            start = place + 1
    return found


@pytest.mark.parametrize("name", KINDS)
def test_every_shape_is_learned_as_expected_or_refused_in_a_sentence(name):
    kind, words = KINDS[name], reader(name)
    encoder = Encoder(words)
    assert len(TABLE) >= 60
    for number, (record, expected) in enumerate(TABLE):
        expected = expectation(expected, kind)
        if isinstance(expected, str):
            with pytest.raises(EffiLoRAError, match=f"record {number}: .*{expected}"):
                learn(encoder, record, f"record {number}")
            continue
        examples = learn(encoder, record, f"record {number}").examples
        found = [runs(example, words) for example in examples]
        texts = [text for example in found for _, text in example]
        if is_bare_text(record):
            assert texts == [f"{expected[0]}</s>"]
            continue
        assert texts == [learned_text(answer, kind) for answer in expected], record
        assert len(examples) == (min(1, len(expected)) if kind.together else len(expected)), record
        check_prompts(record, found, words, kind)


def check_prompts(record, found, words, kind):
    """Every learned text follows the very prompt that transformers asks with."""
    conversation = to_conversation(record, "here")
    messages = conversation.messages
    if messages[0]["role"] == "system" and not kind.system:
        question = f"{messages[0]['content']}\n\n{messages[1]['content']}"
        messages = [{"role": "user", "content": question}, *messages[2:]]
    places = [place for place, learned in enumerate(conversation.learned) if learned]
    places = [place - len(conversation.messages) + len(messages) for place in places]
    places = [place for place in places if messages[place]["content"].strip() or "tool_calls" in messages[place]]
    before = [text for example in found for text, _ in example]
    assert len(before) == len(places)
    for place, text in zip(places, before, strict=True):
        asked = words.apply_chat_template(
            messages[:place], tools=conversation.tools, add_generation_prompt=True, tokenize=True
        )["input_ids"]
        assert text == words.decode(asked)

"""Multiple-choice questions: the formats of the commonsense tasks, and scoring by likelihood."""

import pytest
import torch
from tiny_language import build, tokenizer

from effilora_diffusion import EffiLoRAError, attach
from effilora_diffusion.core import EffiLoRAConfig
from effilora_diffusion.language.batches import collate
from effilora_diffusion.language.encoding import Encoder
from effilora_diffusion.language.multiple_choice import Question, grade, log_likelihoods, parse_question
from effilora_diffusion.language.targets import create_adapter

PIQA = {"instruction": "How do you cut? Solution1: with a knife Solution2: with a spoon Answer format: solution1/solution2",
        "input": "", "output": "the correct answer is solution1", "answer": "solution1"}  # fmt: skip


def test_choices_of_the_commonsense_tasks_are_parsed():
    found = parse_question(PIQA)
    assert found.answers == ["the correct answer is solution1", "the correct answer is solution2"]
    assert found.correct == 0
    boolq = parse_question({"instruction": "is water wet? Answer format: true/false", "answer": "false"})
    assert (boolq.answers[boolq.correct], len(boolq.answers)) == ("the correct answer is false", 2)
    own = parse_question({"instruction": "cat in German", "choices": ["Hund", "Katze"], "answer": "Katze"})
    assert (own.answers, own.correct) == (["Hund", "Katze"], 1)


@pytest.mark.parametrize(
    ("record", "word"),
    [
        ({"instruction": "why?"}, "needs 'choices'"),
        ({"instruction": "x", "choices": ["a"], "answer": "a"}, "at least two strings"),
        ({"instruction": "x", "choices": ["a", 2], "answer": "a"}, "at least two strings"),
        ({"instruction": "x", "choices": ["a", "b"], "answer": "c"}, "is not one of"),
        ({**PIQA, "answer": "solution3"}, "is not one of"),
    ],
)
def test_errors_in_questions_name_the_record(record, word):
    with pytest.raises(EffiLoRAError, match=f"line 3: .*{word}"):
        parse_question(record, "line 3")


def test_likelihoods_are_those_of_the_answers_only():
    model, encoder = build("llama"), Encoder(tokenizer())
    questions = [Question({"instruction": "x" * n}, ["a", "bcd", "ef"], 0) for n in (2, 7)]
    found = log_likelihoods(model, encoder, questions, batch_size=4)
    for one, row in zip(questions, found, strict=True):
        for answer, value in zip(one.answers, row, strict=True):
            item = encoder.encode({**one.record, "output": answer})
            with torch.no_grad():
                loss = model(**collate([item], 0)).loss  # the mean over the answer's tokens
            assert value == pytest.approx(-float(loss), abs=1e-4)


def test_truncated_questions_and_non_finite_outputs_are_refused():
    model, encoder = build("llama"), Encoder(tokenizer(), max_length=12)
    asked = {"choices": ["yes", "no"], "answer": "yes"}
    with pytest.warns(UserWarning, match="data, record 1: truncated on the left to 12 tokens"):
        assert len(grade(model, encoder, [parse_question({"instruction": "x" * 30, **asked}, "data, record 1")])) == 1
    long = parse_question({"instruction": "x", "choices": ["y" * 30, "n" * 30], "answer": "y" * 30}, "data, record 2")
    with pytest.raises(EffiLoRAError, match="data, record 2: longer than the model's 12 tokens"):
        grade(model, encoder, [long])
    model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(EffiLoRAError, match="data, record 3: the model's output is not finite"):
        grade(model, encoder, [parse_question({"instruction": "x", **asked}, "data, record 3")])


def test_a_trained_model_chooses_the_correct_answers():
    model, encoder = build("llama"), Encoder(tokenizer())
    pairs = {"a": "z", "b": "y", "c": "x", "d": "w"}
    questions = [Question({"instruction": key}, list(pairs.values()), index) for index, key in enumerate(pairs)]
    adapter = attach(model, create_adapter(model, EffiLoRAConfig(rank=4, target_modules=("paper",))))
    optimizer = torch.optim.AdamW(adapter.parameters(), 3e-2)
    batch = collate([encoder.encode({"instruction": key, "output": value}) for key, value in pairs.items()], 0)
    for _ in range(60):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert grade(model, encoder, questions) == [True] * 4
    adapter.strength = 0
    assert not all(grade(model, encoder, questions))
    with pytest.raises(EffiLoRAError, match="no questions"):
        grade(model, encoder, [])

"""Adapters trained with the templates of known models: asked by every command, and merged into plain transformers models."""

import io
import json

import pytest
import torch
import transformers as t
from chat_templates import KINDS, reader
from language_runs import words

from effilora_diffusion.cli import main as cli
from effilora_diffusion.cli.train_llm import main
from effilora_diffusion.core import load_adapter_file
from effilora_diffusion.language.template_file import with_defaults

PAIRS = {"a": "z", "b": "y y", "c": "x"}
SECOND = "again"


def turns(*texts):
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]


def records(reasoning=False):
    """Questions with their answers, and conversations in which the second answer is the first one again."""
    thought = "<think>\nbecause\n</think>\n\n" if reasoning else ""
    single = [turns(key, thought + value) for key, value in PAIRS.items()]
    double = [turns(key, thought + value, SECOND, thought + value) for key, value in PAIRS.items()]
    return [{"messages": messages} for messages in single + double]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base without a chat template, whose end-of-text token is that of no chat, and a template per file."""
    folder = tmp_path_factory.mktemp("templates")
    words = reader()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = t.LlamaConfig(vocab_size=len(words), **sizes, **ends, max_position_embeddings=256, initializer_range=0.2)
    model = t.LlamaForCausalLM(config)
    model.save_pretrained(folder / "model")
    words.save_pretrained(folder / "model")
    for name, kind in KINDS.items():
        (folder / f"{name}.jinja").write_text(kind.source)
    for reasoning in (False, True):
        (folder / f"train{reasoning}.jsonl").write_text("\n".join(map(json.dumps, records(reasoning))))
    choices = {"choices": [*PAIRS.values(), "w"]}
    asked = [{"messages": turns(key), "answer": value, **choices} for key, value in PAIRS.items()]
    asked += [{"messages": turns(key, value, SECOND), "answer": value, **choices} for key, value in PAIRS.items()]
    (folder / "asked.jsonl").write_text("\n".join(map(json.dumps, asked)))
    return folder


def trained(place, output, name, reasoning=False, **options):
    """Train on :func:`records` to convergence with one of the templates."""
    told = {"chat_template": place / f"{name}.jinja", "train_file": place / f"train{reasoning}.jsonl", "heads": 1, "rank": 8,
            "target_modules": "all-linear", "max_steps": 60, "learning_rate": 3e-2, "per_device_train_batch_size": 12,
            "save_strategy": "no", "logging_steps": 60, **options}  # fmt: skip
    assert main(words(place, output, **told)) == 0


def check_commands(place, output, capsys, monkeypatch, reasoning=False, more=()):
    """``evaluate`` and ``chat`` give every answer, the second of a conversation included.

    An answer's likelihood is taken without reasoning before it, which was never learned if all answers have some.
    """
    capsys.readouterr()
    command = ["--adapter", str(output), *more]
    assert cli(["evaluate", *command, "--data", str(place / "asked.jsonl"), "--exact_match", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["asked"]
    assert found["exact match"] == 1.0
    assert reasoning or found["choice"] == 1.0
    monkeypatch.setattr("sys.stdin", io.StringIO(f"b\n{SECOND}\n/reset\nc\n"))
    assert cli(["chat", *command]) == 0
    thought = "<think>\nbecause\n</think>\n\n" if reasoning else ""
    assert capsys.readouterr().out == f"{thought}y y\n{thought}y y\n{thought}x\n"


def check_merged(output, folder, reasoning=False, **options):
    """The merged model, asked in plain transformers, gives every answer and stops after it."""
    assert cli(["export", str(output), str(folder), "--format", "merged"]) == 0
    model, words = t.AutoModelForCausalLM.from_pretrained(folder), t.AutoTokenizer.from_pretrained(folder)
    for key, value in PAIRS.items():
        for messages in (turns(key), turns(key, value, SECOND)):
            inputs = words.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", **options)
            found = model.generate(**inputs, max_new_tokens=30, do_sample=False)[0, inputs["input_ids"].shape[1] :]
            said = words.decode(found)
            assert said.rpartition("</think>")[2].strip() == value + words.decode(found[-1:])
            assert len(found) < 30
            assert ("because" in said) == reasoning


@pytest.mark.parametrize("name", KINDS)
def test_what_is_learned_is_answered_by_every_command_and_stops(place, tmp_path, capsys, monkeypatch, name):
    trained(place, tmp_path / "run", name)
    said = capsys.readouterr().err
    assert ("its prompt opens a reasoning block: the block of 9 answers" in said) == (name == "r1")
    assert ("3 conversations are learned as several examples" in said) == (not KINDS[name].together)
    check_commands(place, tmp_path / "run", capsys, monkeypatch)
    check_merged(tmp_path / "run", tmp_path / "merged")


@pytest.mark.parametrize("name", ["qwen3", "r1"])
def test_reasoning_is_learned_shown_and_left_out_of_comparisons(place, tmp_path, capsys, monkeypatch, name):
    trained(place, tmp_path / "run", name, reasoning=True)
    check_commands(place, tmp_path / "run", capsys, monkeypatch, reasoning=True)
    check_merged(tmp_path / "run", tmp_path / "merged", reasoning=True)


def test_thinking_that_is_off_in_training_is_off_when_asked(place, tmp_path, capsys, monkeypatch):
    off = '{"enable_thinking":false}'
    trained(place, tmp_path / "run", "qwen3", reasoning=True, chat_template_kwargs=off)
    assert "the reasoning of 9 answers is left out" in capsys.readouterr().err
    metadata = load_adapter_file(tmp_path / "run" / "effilora.safetensors").metadata
    assert json.loads(metadata["chat_template_kwargs"]) == {"enable_thinking": False}
    assert json.loads(metadata["chat_template"]) == KINDS["qwen3"].source
    assert cli(["inspect", str(tmp_path / "run")]) == 0
    assert 'chat, a chat template of its own, {"enable_thinking": false}' in capsys.readouterr().out
    check_commands(place, tmp_path / "run", capsys, monkeypatch)
    check_merged(tmp_path / "run", tmp_path / "merged")  # its template has thinking off unless it is switched on
    on = ["--chat_template_kwargs", '{"enable_thinking": true}']
    assert cli(["chat", "--adapter", str(tmp_path / "run"), "--prompt", "b", *on, "--max_new_tokens", "9"]) == 0
    assert capsys.readouterr().out != "y y\n"  # that prompt was not learned


def test_defaults_of_a_template_are_what_was_given():
    options = {"a": None, "b": '😀 it\'s "q"\n', "c": {"d": [None, True, 0.5]}}
    said = (
        "{% if a is none %}none{% endif %} {{ b }} {% if c.d[0] is none and c.d[1] is true %}{{ c.d[2] }}{% endif %}"
    )
    words = reader()
    words.chat_template = with_defaults("{% if messages %}" + said + "{% endif %}", options)
    assert words.apply_chat_template(turns("a"), tokenize=False) == f"none {options['b']} 0.5"
    assert words.apply_chat_template(turns("a"), tokenize=False, b="c", a=1) == " c 0.5"

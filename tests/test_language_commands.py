"""Generation, and the commands for language models: chat, evaluate, export, inspect."""

import io
import json

import pytest
import torch
from conftest import randomise
from tiny_language import build, save, tokenizer

from effilora_diffusion import EffiLoRAConfig, attach, load_adapter
from effilora_diffusion.cli import main
from effilora_diffusion.core import AdapterFile, calibrate, load_adapter_file, save_adapter_file
from effilora_diffusion.language.encoding import Encoder
from effilora_diffusion.language.generate import _encode_prompt, generate_answers, stream_answer
from effilora_diffusion.language.models import load_model
from effilora_diffusion.language.targets import create_adapter

PAIRS = {"ab": "u", "bc": "yy", "cdef": "x", "d": "www"}
CHOICES = [*PAIRS.values(), "v"]


def trained(folder, template="chat"):
    """Save a base model and an adapter trained on :data:`PAIRS` to ``folder``."""
    save(folder / "model")
    model, encoder = build("llama"), Encoder(tokenizer(), template)
    adapter = attach(model, create_adapter(model, EffiLoRAConfig(rank=4, target_modules=("paper",))))
    optimizer = torch.optim.AdamW(adapter.parameters(), 3e-2)
    items = [encoder.encode({"instruction": key, "output": value}) for key, value in PAIRS.items()]
    for _ in range(60):
        model(**encoder.collate(items)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    inputs = encoder.collate(items)
    calibration, error = calibrate(model, adapter, lambda: model(input_ids=inputs["input_ids"]))
    metadata = {"base_model": str(folder / "model"), "component": "language", "prompt_template": template,
                "export_error": error}  # fmt: skip
    save_adapter_file(folder / "run" / "effilora.safetensors", AdapterFile(adapter, metadata, calibration))
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = trained(tmp_path_factory.mktemp("commands"))
    records = [{"instruction": key, "choices": CHOICES, "answer": value} for key, value in PAIRS.items()]
    (folder / "letters.jsonl").write_text("\n".join(map(json.dumps, records)))
    boolq = {"instruction": "is it? Answer format: true/false", "input": "", "answer": "true"}
    (folder / "boolq").mkdir()
    (folder / "boolq" / "test.json").write_text(json.dumps([boolq, {**boolq, "answer": "false"}]))
    return folder


@pytest.mark.parametrize("template", ["chat", "alpaca", "plain"])
def test_batched_single_and_streamed_answers_are_equal(template):
    model, encoder = build("llama"), Encoder(tokenizer(), template)
    randomise(attach(model, create_adapter(model, EffiLoRAConfig(rank=4, target_modules=("paper",)))), 4)
    records = [{"instruction": text} for text in ("a", "what is it", "hm?", "one more")]
    single = [generate_answers(model, encoder, [record], 6)[0] for record in records]
    assert generate_answers(model, encoder, records, 6, batch_size=3) == single
    assert ["".join(stream_answer(model, encoder, record, max_new_tokens=6)).strip() for record in records] == single
    assert len(set(single)) > 1


def test_an_answer_ends_with_the_stop_token(place):
    model, encoder = load_model(str(place / "model"))[0], Encoder(tokenizer())
    load_adapter(model, place / "run")
    assert generate_answers(model, encoder, [{"instruction": key} for key in PAIRS], 30) == list(PAIRS.values())
    turns = [{"role": "user", "content": "ab"}]
    asked = [{"messages": turns}, {"messages": [*turns, {"role": "assistant", "content": "no"}]}]
    assert generate_answers(model, encoder, asked, 30) == ["u", "u"]  # an existing answer is ignored


def test_the_model_s_generation_config_adds_stop_tokens(place):
    model, encoder = load_model(str(place / "model"))[0], Encoder(tokenizer())
    load_adapter(model, place / "run")
    (full,) = generate_answers(model, encoder, [{"instruction": "d"}], 30)
    assert full == "www"
    model.generation_config.eos_token_id = [2, *encoder.tokens("w")]
    assert generate_answers(model, encoder, [{"instruction": "d"}], 30) == ["w"]


def test_the_chat_template_s_stop_token_ends_an_answer(place):
    model, encoder = load_model(str(place / "model"))[0], Encoder(tokenizer())
    load_adapter(model, place / "run")
    assert generate_answers(model, encoder, [{"instruction": "d"}], 30) == ["www"]
    encoder = Encoder(tokenizer())
    encoder.tokenizer.add_special_tokens({"additional_special_tokens": ["w"]})
    encoder.tokenizer.chat_template = OWN_STOP_TOKEN
    assert encoder.stop_tokens == [2, *encoder.tokens("w")]
    assert generate_answers(model, encoder, [{"instruction": "d"}], 30) == [""]  # special tokens are removed


OWN_STOP_TOKEN = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% if m['role'] == 'assistant' %}w{% else %}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
"""A template whose stop token is not the EOS token, like ChatML on a base model."""


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_an_answer_ends_at_max_position_embeddings(name):
    model, encoder = build(name), Encoder(tokenizer(), max_length=64)
    model.generation_config.eos_token_id = None
    record = {"instruction": "x" * 200}
    prompt = len(_encode_prompt(model, encoder, record, 40).ids)
    assert prompt == 64 - 16  # a quarter of 64 positions is reserved for the answer
    assert len(encoder.tokens(generate_answers(model, encoder, [record], 40)[0])) <= 16
    assert "".join(stream_answer(model, encoder, record, max_new_tokens=40)) is not None
    assert len(_encode_prompt(model, encoder, {"instruction": "x"}, 40).ids) < 48


def test_every_adapter_is_compared_with_the_base(place, tmp_path, caplog):
    content = load_adapter_file(place / "run" / "effilora.safetensors")
    content.metadata |= {"base_hash": "0123456789abcdef"}
    save_adapter_file(tmp_path / "other.safetensors", content)
    adapters = ["--adapter", str(place / "run"), "--adapter", str(tmp_path / "other.safetensors")]
    assert main(["chat", *adapters, "--prompt", "ab", "--max_new_tokens", "2"]) == 0
    assert "the adapter other was trained on" in caplog.text


def test_sampling_depends_on_the_seed(place):
    model, encoder = load_model(str(place / "model"))[0], Encoder(tokenizer())
    options = {"do_sample": True, "temperature": 2.0, "max_new_tokens": 12}
    generated = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        generated += generate_answers(model, encoder, [{"instruction": "ab"}], **options)
    assert generated[0] == generated[1] != generated[2]


def test_errors_while_streaming_are_raised(place):
    model, encoder = load_model(str(place / "model"))[0], Encoder(tokenizer())
    with pytest.raises(ValueError, match="temperature"):
        list(stream_answer(model, encoder, {"instruction": "ab"}, do_sample=True, temperature=-1.0))


def test_chat_answers_a_single_question(place, capsys):
    assert main(["chat", "--adapter", str(place / "run"), "--prompt", "bc"]) == 0
    assert capsys.readouterr().out == "yy\n"
    assert main(["chat", "--adapter", f"{place / 'run'}:0", "--prompt", "bc"]) == 0
    base = capsys.readouterr().out
    assert main(["chat", "--model", str(place / "model"), "--prompt", "bc"]) == 0
    assert capsys.readouterr().out == base != "yy\n"


def test_chat_runs_until_the_input_ends(place, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("ab\n\n/reset\nd\n/quit\nbc\n"))
    assert main(["chat", "--adapter", str(place / "run")]) == 0
    assert capsys.readouterr().out == "u\nwww\n"


def test_chat_keeps_the_conversation_until_it_is_reset(place, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "effilora_diffusion.language.generate.stream_answer",
        lambda model, encoder, record, **options: seen.append(json.loads(json.dumps(record))) or iter(["ok"]),
    )
    monkeypatch.setattr("sys.stdin", io.StringIO("ab\nd\n/reset\nbc\n"))
    assert main(["chat", "--adapter", str(place / "run"), "--system", "be brief"]) == 0
    roles = [[f"{turn['role']}:{turn['content']}" for turn in record["messages"]] for record in seen]
    assert roles == [
        ["system:be brief", "user:ab"],
        ["system:be brief", "user:ab", "assistant:ok", "user:d"],
        ["system:be brief", "user:bc"],
    ]


def test_evaluate_reports_accuracy_by_task(place, capsys):
    data = ["--data", str(place / "letters.jsonl"), str(place / "boolq" / "test.json"), "--exact_match", "--json"]
    assert main(["evaluate", "--adapter", str(place / "run"), *data]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["letters"] == {"questions": 4, "choice": 1.0, "exact match": 1.0}
    assert found["boolq"]["questions"] == 2
    assert found["boolq"]["choice"] == 0.5  # the same question with both answers
    assert main(["evaluate", "--model", str(place / "model"), *data]) == 0
    assert json.loads(capsys.readouterr().out)["letters"]["exact match"] == 0.0
    assert main(["evaluate", "--adapter", str(place / "run"), *data[:-1], "--limit", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["questions", "letters", "boolq", "mean"]
    assert lines[1].split()[1:] == ["1", "100.0%", "100.0%"]


def test_choices_replace_the_answer_of_a_conversation(place, capsys):
    turns = [{"role": "user", "content": "bc"}, {"role": "assistant", "content": "x"}]
    records = [
        {"messages": turns, "choices": ["x", " yy "], "answer": " yy "},
        {"messages": turns[:1], "choices": ["u", "yy"], "answer": "yy"},
    ]
    (place / "turns.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert (
        main(
            [
                "evaluate",
                "--adapter",
                str(place / "run"),
                "--data",
                str(place / "turns.jsonl"),
                "--exact_match",
                "--json",
            ]
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out)["turns"] == {"questions": 2, "choice": 1.0, "exact match": 1.0}


def test_ctrl_c_ends_a_chat(place, capsys, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.stdin.readline", interrupted, raising=False)
    assert main(["chat", "--adapter", str(place / "run")]) == 0


def test_merging_into_another_base_warns(place, tmp_path, caplog):
    build("llama", seed=5).save_pretrained(tmp_path / "other")
    tokenizer().save_pretrained(tmp_path / "other")
    content = load_adapter_file(place / "run" / "effilora.safetensors")
    content.metadata["base_hash"] = "0123456789abcdef"
    save_adapter_file(tmp_path / "a.safetensors", content)
    command = ["export", str(tmp_path / "a.safetensors"), str(tmp_path / "merged"), "--format", "merged", "--model"]
    assert main([*command, str(tmp_path / "other")]) == 0
    assert "another model of the same shape" in caplog.text


def test_a_merged_model_needs_no_adapter(place, tmp_path, capsys):
    output = tmp_path / "merged"
    assert main(["export", str(place / "run"), str(output), "--format", "merged"]) == 0
    assert "a fit" in capsys.readouterr().out
    merged, reader = load_model(str(output))
    assert merged.config.model_type == "llama"
    assert not [key for key in merged.state_dict() if "effilora" in key]
    generated = generate_answers(merged, Encoder(reader), [{"instruction": key} for key in PAIRS], 6)
    before = generate_answers(build("llama"), Encoder(tokenizer()), [{"instruction": key} for key in PAIRS], 6)
    assert sum(map(str.__eq__, generated, PAIRS.values())) > sum(map(str.__eq__, before, PAIRS.values()))
    assert main(["export", str(place / "run"), str(output), "--format", "merged"]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_export_writes_a_peft_folder_by_default(place, tmp_path, capsys):
    from peft import PeftModel

    assert main(["export", str(place / "run"), str(tmp_path / "peft")]) == 0
    assert "(peft, a fit" in capsys.readouterr().out
    plain = PeftModel.from_pretrained(build("llama"), tmp_path / "peft")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert not torch.allclose(plain(ids).logits, build("llama")(ids).logits, atol=1e-2)
    assert main(["export", str(place / "run"), str(tmp_path / "a.safetensors"), "--format", "kohya"]) == 2
    assert "peft, merged, gguf or merged-gguf" in capsys.readouterr().err


def test_inspect_prints_an_adapter_of_a_language_model(place, capsys):
    assert main(["inspect", str(place / "run")]) == 0
    generated = capsys.readouterr().out
    assert "template        chat" in generated
    assert "model.layers.1" in generated


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["chat", "--prompt", "a"], "--model is missing"),
        (["chat", "--model", "/nowhere", "--prompt", "a"], "can't be loaded"),
        (["chat", "--adapter", "/nowhere", "--prompt", "a"], "no such file"),
        (["chat", "--adapter", "RUN", "--prompt", " "], "--prompt is empty"),
        (["chat", "--adapter", "RUN", "--prompt", "a", "--max_new_tokens", "0"], "--max_new_tokens"),
        (["chat", "--adapter", "RUN", "--prompt", "a", "--temperature", "-1"], "--temperature"),
        (["chat", "--adapter", "RUN", "--prompt", "a", "--temperature", "nan"], "--temperature"),
        (["chat", "--adapter", "RUN", "--prompt", "a", "--top_p", "0"], "--top_p"),
        (["chat", "--adapter", "RUN", "--prompt", "a", "--image", "/nowhere.png"], "--image /nowhere.png"),
        (["chat", "--adapter", "IMAGES", "--prompt", "a"], "is for images"),
        (["chat", "--adapter", "RUN", "--prompt", "a", "--prompt_template", "plain", "--system", "b"], "--system"),
        (["chat", "--adapter", "RUN", "--prompt", "a", "--prompt_template", "vicuna"], "is for images"),
        (["evaluate", "--adapter", "RUN", "--data", "/nowhere.json"], "--data /nowhere.json can't be read"),
        (["evaluate", "--adapter", "RUN", "--data", "BAD"], "record 1: it needs 'choices'"),
        (["evaluate", "--adapter", "RUN", "--data", "BAD", "--batch_size", "0"], "--batch_size"),
        (["evaluate", "--adapter", "RUN", "--data", "BAD", "--limit", "0"], "--limit"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(place, tmp_path, capsys, words, message):
    content = AdapterFile(create_adapter(build("llama"), EffiLoRAConfig(target_modules=("paper",))))
    save_adapter_file(tmp_path / "images.safetensors", content)
    (tmp_path / "bad.jsonl").write_text('{"instruction": "why?"}')
    stand_ins = {"RUN": str(place / "run"), "IMAGES": str(tmp_path / "images.safetensors"),
                 "BAD": str(tmp_path / "bad.jsonl")}  # fmt: skip
    assert main([stand_ins.get(word, word) for word in words]) == 2
    generated = capsys.readouterr().err
    assert message in generated
    assert "Traceback" not in generated

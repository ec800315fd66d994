"""The training command of language models, on a tiny model that learns to copy, count and stop."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from language_runs import logs, make_place, same, weights, words
from tiny_language import VOCAB, save, tokenizer, write_gguf
from transformers import LlamaConfig, LlamaForCausalLM

from effilora_diffusion import detach, load_adapter
from effilora_diffusion.cli import main as cli
from effilora_diffusion.cli.train_llm import main
from effilora_diffusion.core import load_adapter_file
from effilora_diffusion.language.models import load_model

SCRIPT = str(Path(__file__).parents[1] / "train_scripts" / "train_llm_effilora.py")


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("language"))


def test_a_run_learns_and_writes_what_other_programs_load(place, tmp_path, capsys):
    from peft import PeftModel

    held = {"validation_file": place / "held.jsonl", "max_steps": 60}
    assert main(words(place, tmp_path / "out", **held)) == 0
    said = capsys.readouterr().out
    assert "eval_loss" in said
    history = logs(tmp_path / "out")
    assert history[-1][1] < 0.7 * history[0][1]
    content = load_adapter_file(tmp_path / "out" / "effilora.safetensors")
    assert content.metadata["examples"] == 28
    assert content.metadata["base_model"] == str(place / "model")
    assert 0 < content.metadata["export_error"] < 1
    model, _ = load_model(str(place / "model"))
    ids = torch.tensor([tokenizer()("<user>ab</s><assistant>")["input_ids"]])
    with torch.no_grad():
        before = model(ids).logits
        adapter = load_adapter(model, tmp_path / "out")
        learned = model(ids).logits
        adapter.strength = 0
        assert torch.equal(model(ids).logits, before)
        plain = PeftModel.from_pretrained(load_model(str(place / "model"))[0], tmp_path / "out")(ids).logits
    assert (learned - before).norm() > 1
    assert (plain - learned).norm() < 0.8 * (learned - before).norm()


def test_the_reducer_trains_the_layers_it_chooses(place, tmp_path):
    options = {
        "max_steps": 10,
        "reducer": "importance",
        "reducer_warmup": 2,
        "reducer_interval": 3,
        "reducer_active": 0.5,
    }
    assert main(words(place, tmp_path / "out", **options)) == 0
    events = [json.loads(line) for line in (tmp_path / "out" / "reducer.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "importance"] == [2, 5, 8]
    assert {len(event["layers"]) for event in events if event["event"] == "active"} == {1}
    state = json.loads((tmp_path / "out" / "checkpoint-9" / "trainer_state.json").read_text())
    assert [entry["active_layers"] for entry in state["log_history"]][:4] == [2, 2, 1, 1]


def test_packing_trains_on_every_example(place, tmp_path):
    options = {"packing": True, "max_length": 64, "validation_file": place / "held.jsonl", "per_device_train_batch_size": 1,
               "num_train_epochs": 1, "max_steps": -1}  # fmt: skip
    assert main(words(place, tmp_path / "out", **options)) == 0
    reader = tokenizer()
    tokens = sum(len(reader(f"<user>{r['instruction']}</s><assistant>{r['output']}</s>")["input_ids"])
                 for r in map(json.loads, (place / "train.jsonl").read_text().splitlines()))  # fmt: skip
    steps = len(logs(tmp_path / "out"))
    assert tokens / 64 <= steps <= tokens / 64 + 2  # rows are nearly full
    assert main(words(place, tmp_path / "more", **{**options, "max_steps": 60, "num_train_epochs": 3})) == 0
    assert logs(tmp_path / "more")[-1][1] < 0.7 * logs(tmp_path / "more")[0][1]


@pytest.mark.parametrize(
    ("name", "kept_apart"), [("llama", True), ("gpt2", True), ("opt", False), ("bloom", False), ("falcon", False)]
)
def test_packing_is_refused_where_examples_would_attend_to_each_other(place, tmp_path, capsys, name, kept_apart):
    save(tmp_path / "model", name)
    options = {"model_name_or_path": tmp_path / "model", "packing": True, "max_length": 48, "max_steps": 1}
    assert main(words(place, tmp_path / "out", **options)) == (0 if kept_apart else 2)
    assert ("would attend to each other" in capsys.readouterr().err) != kept_apart


def test_long_examples_are_counted_and_fit_the_model(place, tmp_path, capsys):
    (tmp_path / "long.jsonl").write_text(json.dumps({"instruction": "a" * 500, "output": "b"}))
    save(tmp_path / "model", "gpt2")  # 64 positions
    options = {"model_name_or_path": tmp_path / "model", "train_file": tmp_path / "long.jsonl", "max_steps": 1}
    assert main(words(place, tmp_path / "out", **options)) == 2
    assert "none of its 1 records has an answer that fits with its question in 64 tokens" in capsys.readouterr().err
    (tmp_path / "long.jsonl").write_text(
        "\n".join(json.dumps({"instruction": "a" * n, "output": "b"}) for n in (9, 500))
    )
    assert main(words(place, tmp_path / "out", **options)) == 0
    assert "1 answer is left out: with the question alone longer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"model_name_or_path": "/nowhere"}, "can't be loaded"),
        ({"train_file": "/nowhere.jsonl"}, "--train_file /nowhere.jsonl can't be read"),
        ({"validation_file": "/nowhere.jsonl"}, "--validation_file"),
        ({"target_modules": "to_q"}, "ends in to_q"),
        ({"routing": "timestep"}, "no timestep"),
        ({"rank": 0}, "rank"),
        ({"gguf_file": "none.gguf"}, "can't be loaded"),
        ({"max_length": 0}, "--max_length must be at least 2"),
        ({"lora_r": 8}, "--lora_r is no setting of this command: here it is --rank"),
        ({"nonsense": 8}, "--help lists"),
        ({"eval_strategy": "steps"}, "don't go together"),
        ({"save_strategy": "best"}, "don't go together"),
        ({"warmup_steps": -1}, "don't go together"),
        ({"report_to": "nothing_known"}, "don't go together"),
        ({"per_device_train_batch_size": 0}, "--per_device_train_batch_size must be at least 1"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps"),
        ({"do_eval": True}, "effilora evaluate"),
        ({"fsdp": "full_shard"}, "FSDP"),
        ({"target_modules": "q_proj upp_proj"}, "upp_proj"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(place, tmp_path, capsys, change, word):
    assert main(words(place, tmp_path / "out", **change)) == 2
    said = capsys.readouterr().err.strip()
    assert word in said
    assert "Traceback" not in said
    assert not (tmp_path / "out" / "effilora.safetensors").exists()


@pytest.mark.parametrize("kind", ["bnb-8bit", "bnb-4bit"])
def test_a_quantised_base_is_trained_and_left_as_it_is(place, tmp_path, kind):
    wide = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}  # kernels take blocks of 64
    LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, num_hidden_layers=2, **wide)).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    options = {"model_name_or_path": tmp_path / "model", "quantization": kind, "max_steps": 8}
    assert main(words(place, tmp_path / "out", **options)) == 0
    assert logs(tmp_path / "out")[-1][1] < 0.8 * logs(tmp_path / "out")[0][1]
    model, _ = load_model(str(tmp_path / "model"), quantization=kind)
    assert "bit" in type(model.model.layers[0].self_attn.q_proj).__name__
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        before = model(input_ids=ids).logits
        load_adapter(model, tmp_path / "out")
        assert not torch.allclose(model(input_ids=ids).logits, before, atol=1e-2)
        detach(model)
        assert torch.equal(model(input_ids=ids).logits, before)


def test_a_gguf_file_is_a_base(place, tmp_path):
    kept = write_gguf(tmp_path / "tiny.gguf")
    model, reader = load_model(str(tmp_path / "tiny.gguf"))
    for path, name in (("self_attn.v_proj", "attn_v"), ("mlp.down_proj", "ffn_down")):
        found = model.get_submodule(f"model.layers.1.{path}").weight
        torch.testing.assert_close(found, torch.from_numpy(kept[f"blk.1.{name}"]))
    assert reader("hi")["input_ids"] == [ord("h") - 29, ord("i") - 29]
    options = {"model_name_or_path": tmp_path, "gguf_file": "tiny.gguf", "prompt_template": "plain", "max_steps": 30}
    assert main(words(place, tmp_path / "out", **options)) == 0
    assert logs(tmp_path / "out")[-1][1] < 0.8 * logs(tmp_path / "out")[0][1]
    metadata = load_adapter_file(tmp_path / "out" / "effilora.safetensors").metadata
    assert (metadata["gguf_file"], metadata["prompt_template"]) == ("tiny.gguf", "plain")
    assert cli(["export", str(tmp_path / "out"), str(tmp_path / "merged"), "--format", "merged"]) == 0
    merged = load_model(str(tmp_path / "merged"))[0].model.layers[1]
    assert not torch.allclose(merged.self_attn.v_proj.weight, model.model.layers[1].self_attn.v_proj.weight, atol=1e-3)
    torch.testing.assert_close(merged.self_attn.o_proj.weight, model.model.layers[1].self_attn.o_proj.weight)


def test_torchrun_trains_what_one_process_does(place, tmp_path):
    options = {"max_steps": 4, "save_strategy": "no"}
    assert main(words(place, tmp_path / "one", **options)) == 0
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        str(free_port()),
        SCRIPT,
    ]
    told = {**options, "per_device_train_batch_size": 2}
    done = subprocess.run([*command, *words(place, tmp_path / "two", **told)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("export_error") == 1
    for one, two in zip(weights(tmp_path / "one"), weights(tmp_path / "two"), strict=True):
        torch.testing.assert_close(one, two, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"bf16": True},
    ],
)
def test_ways_to_save_memory_train_the_same(place, tmp_path, options):
    assert main(words(place, tmp_path / "plain", save_steps=6)) == 0
    assert main(words(place, tmp_path / "other", save_steps=6, **options)) == 0
    losses = [[loss for _, loss in logs(tmp_path / name)] for name in ("plain", "other")]
    assert losses[1] == pytest.approx(losses[0], abs=0.02 if "bf16" in options else 1e-4)


def test_the_best_checkpoint_is_the_result_if_asked_for(place, tmp_path):
    options = {"max_steps": 6, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True,
               "validation_file": place / "held.jsonl", "greater_is_better": True}  # fmt: skip
    assert main(words(place, tmp_path / "out", **options)) == 0
    state = json.loads((tmp_path / "out" / "checkpoint-6" / "trainer_state.json").read_text())
    evaluated = {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}
    best = max(evaluated, key=evaluated.get)  # the highest loss, so that it is not the last
    assert best == 2
    assert same(weights(tmp_path / "out"), weights(tmp_path / "out" / f"checkpoint-{best}"))


def test_the_base_s_type_can_be_chosen(place, tmp_path):
    assert load_model(str(place / "model"), dtype="bfloat16")[0].dtype == torch.bfloat16


def test_a_checkpoint_knows_what_it_was_trained_on(place, tmp_path, capsys):
    assert main(words(place, tmp_path / "out", max_steps=3)) == 0
    capsys.readouterr()
    assert (
        cli(["chat", "--adapter", str(tmp_path / "out" / "checkpoint-3"), "--prompt", "ab", "--max_new_tokens", "2"])
        == 0
    )
    metadata = load_adapter_file(tmp_path / "out" / "checkpoint-3" / "effilora.safetensors").metadata
    final = load_adapter_file(tmp_path / "out" / "effilora.safetensors").metadata
    assert metadata == {name: value for name, value in final.items() if name != "export_error"}


def test_an_evaluation_in_half_precision_leaves_the_result_whole(place, tmp_path):
    options = {"max_steps": 3, "validation_file": place / "held.jsonl", "bf16_full_eval": True}
    assert main(words(place, tmp_path / "out", **options)) == 0
    assert same(weights(tmp_path / "out"), weights(tmp_path / "out" / "checkpoint-3"))

"""The PEFT folder by the rules of vLLM and SGLang (serving_rules.json), and the notes where one is broken."""

import json
import re
from pathlib import Path

import pytest
from conftest import randomise
from safetensors.torch import load_file
from tiny_language import build, build_mixture

from effilora_diffusion import EffiLoRAConfig, attach, export_lora, save_adapter
from effilora_diffusion.cli import main
from effilora_diffusion.core import load_adapter_file
from effilora_diffusion.language.serving import VLLM_RANKS, serving_notes
from effilora_diffusion.language.targets import create_adapter

RULES = json.loads((Path(__file__).parent / "serving_rules.json").read_text())


def saved(model, path, **options):
    config = EffiLoRAConfig(
        **{"rank": 8, "heads": 2, "routing": "static", "target_modules": ("all-linear",), **options}
    )
    save_adapter(attach(model, randomise(create_adapter(model, config))), path, model, base_model="base")
    return path


def broken(folder, kind):
    """What vLLM and SGLang would refuse or leave out, by their rules."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors, found = load_file(folder / "adapter_model.safetensors"), []
    for server, rules in RULES.items():
        found += [f"{server}: {key}" for key in rules["required"] if key not in config]
        for key, value in rules["must_be"].items():
            if config.get(key, value) not in (value, None):
                found.append(f"{server}: {key}")
    vllm = RULES["vllm"]
    if config["r"] > 16:
        found.append("vllm: rank")
    paths = set()
    for name, value in tensors.items():
        path, _, side = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        paths.add(path)
        if not re.fullmatch(vllm["tensor_name"], name) or path.rpartition(".")[2] not in vllm["modules"][kind]:
            found.append(f"vllm: {name}")
        assert value.shape[0 if side == "lora_A" else 1] == config["r"]
    for one, other in RULES["sglang"]["stacked"]:
        if any(path.endswith(f".{one}") and path[: -len(one)] + other not in paths for path in paths):
            found.append(f"sglang: {one} without {other}")
    assert set(config["target_modules"]) == paths
    return found


@pytest.mark.parametrize("kind", ["llama", "qwen2", "phi3"])
def test_a_folder_of_all_linears_keeps_every_rule(kind, tmp_path):
    adapter = saved(build(kind), tmp_path / "a.safetensors")
    export_lora(adapter, tmp_path / "peft", "peft")
    assert broken(tmp_path / "peft", kind) == []
    assert serving_notes(load_adapter_file(adapter)) == []


def test_a_broken_rule_is_told_with_what_to_do(tmp_path, capsys):
    adapter = saved(build("llama"), tmp_path / "a.safetensors", rank=24, target_modules=("paper",))
    assert main(["export", str(adapter), str(tmp_path / "peft")]) in (0, None)
    printed = capsys.readouterr().out
    assert "note: rank 24: vLLM needs --max-lora-rank 32\n" in printed
    assert "note: SGLang applies up_proj only together with gate_proj" in printed
    assert broken(tmp_path / "peft", "llama") == ["vllm: rank", "sglang: up_proj without gate_proj"]


@pytest.mark.parametrize(
    ("model", "options", "word"),
    [
        ("llama", {"rank": 600}, "vLLM takes ranks up to 512, this one is 600: serve the merged model"),
        ("mixtral", {"target_modules": ("attention", "experts")}, "target_parameters, which PEFT 0.21 and later read"),
        ("gpt2", {}, "no LoRA on GPT-2's Conv1D"),
    ],
)
def test_what_servers_can_t_apply_is_served_merged(model, options, word, tmp_path):
    source = build_mixture(model) if model == "mixtral" else build(model)
    (note,) = serving_notes(load_adapter_file(saved(source, tmp_path / "a.safetensors", **options)))
    assert word in note
    assert "merged model" in note


def test_the_ranks_are_those_of_the_rules():
    assert list(VLLM_RANKS) == RULES["vllm"]["max_lora_rank"]

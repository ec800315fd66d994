"""GGUF: llama.cpp's LoRA and merged files, read back with the package gguf and with transformers' own reader."""

import gguf
import numpy
import pytest
import torch
from conftest import randomise
from tiny_language import build, build_mixture, rows, write_gguf, write_gguf_of

from effilora_diffusion import EffiLoRAConfig, EffiLoRAError, attach, export_lora, save_adapter
from effilora_diffusion.cli import main
from effilora_diffusion.core import load_adapter_file, to_lora
from effilora_diffusion.language.gguf_format import ARCHITECTURES, Form
from effilora_diffusion.language.models import load_model
from effilora_diffusion.language.targets import create_adapter

PLAIN = EffiLoRAConfig(rank=4, heads=2, routing="static", alpha=6, target_modules=("all-linear",))
READABLE = ("qwen2", "qwen3", "gemma2", "phi3", "gpt2", "qwen3_moe")


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def adapter_file(model, path, config=PLAIN, **facts):
    save_adapter(attach(model, randomise(create_adapter(model, config))), path, model, **facts)
    return path


def tensors(path):
    return {one.name: one for one in gguf.GGUFReader(path).tensors}


def read(path, config=None):
    from transformers import AutoModelForCausalLM

    options = {} if config is None else {"config": config}
    found = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32, **options)
    return found.eval()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A quantised LLaMA file with its tokenizer."""
    path = tmp_path_factory.mktemp("gguf") / "base.gguf"
    write_gguf(path)
    return path


def test_a_merged_file_of_a_quantised_base_gives_the_adapter_s_answers(base, tmp_path, capsys):
    model, ids = load_model(str(base))[0], rows()
    before = logits(model, ids)
    config = EffiLoRAConfig(rank=4, heads=2, routing="static", target_modules=("paper",))
    adapter = adapter_file(model, tmp_path / "a.safetensors", config, base_model=str(base))
    expected = logits(model, ids)
    assert main(["export", str(adapter), str(tmp_path / "m.gguf"), "--format", "merged-gguf"]) in (0, None)
    printed = capsys.readouterr().out
    share = export_lora(adapter, tmp_path / "m.gguf", "merged-gguf")
    assert f"a fit, {share:.1%} of the update missing" in printed
    assert 0 < share < 0.01
    found = logits(read(tmp_path / "m.gguf"), ids)
    assert (found - expected).norm() < 2 * share * (expected - before).norm()
    old, new = gguf.GGUFReader(base), gguf.GGUFReader(tmp_path / "m.gguf")
    assert {name: field.contents() for name, field in old.fields.items()} == {
        name: field.contents() for name, field in new.fields.items()
    }
    same = [one.name for one in old.tensors if "attn_output" in one.name or "_norm" in one.name or "embd" in one.name]
    changed = tensors(tmp_path / "m.gguf")
    assert all(numpy.array_equal(changed[one.name].data, one.data) for one in old.tensors if one.name in same)
    assert changed["blk.0.attn_q.weight"].tensor_type == gguf.GGMLQuantizationType.F16
    assert changed["blk.0.attn_output.weight"].tensor_type == gguf.GGMLQuantizationType.Q8_0


@pytest.mark.parametrize("name", READABLE)
def test_merged_files_and_loras_of_other_architectures_agree_with_the_adapter(name, tmp_path):
    source = build_mixture(name) if name == "qwen3_moe" else build(name)
    write_gguf_of(source, tmp_path / "base.gguf")
    model, ids = read(tmp_path / "base.gguf", source.config), rows()
    torch.testing.assert_close(logits(model, ids), logits(source, ids), atol=1e-4, rtol=1e-4)
    targets = ("all-linear", "experts") if name == "qwen3_moe" else ("all-linear",)
    config = EffiLoRAConfig(rank=4, heads=1, alpha=6, target_modules=targets)
    adapter = adapter_file(model, tmp_path / "a.safetensors", config)
    assert export_lora(adapter, tmp_path / "m.gguf", "merged-gguf", str(tmp_path / "base.gguf")) < 1e-5
    torch.testing.assert_close(
        logits(read(tmp_path / "m.gguf", source.config), ids), logits(model, ids), atol=1e-4, rtol=1e-4
    )
    assert export_lora(adapter, tmp_path / "lora.gguf", "gguf") == 0.0
    check_lora(tmp_path / "lora.gguf", tmp_path / "base.gguf", tmp_path / "m.gguf")


def check_lora(path, base, merged):
    """The LoRA's matrices fit the base's weights as llama.cpp demands, and add up to the merged file's."""
    reader, before, after = gguf.GGUFReader(path), tensors(base), tensors(merged)
    facts = {name: field.contents() for name, field in reader.fields.items()}
    assert facts["general.type"] == "adapter"
    assert facts["adapter.type"] == "lora"
    assert facts["general.architecture"] == gguf.GGUFReader(base).fields["general.architecture"].contents()
    found = {one.name: one for one in reader.tensors}
    names = {name.removesuffix(".lora_a").removesuffix(".lora_b") for name in found}
    assert names == {name for name in before if not numpy.array_equal(before[name].data, after[name].data)}
    assert len(found) == 2 * len(names)
    for name in names:
        a, b, weight = found[f"{name}.lora_a"], found[f"{name}.lora_b"], before[name]
        assert (weight.shape[0], weight.shape[1], a.shape[1]) == (a.shape[0], b.shape[1], b.shape[0])
        update = facts["adapter.lora.alpha"] / b.shape[0] * (b.data @ a.data)
        exact = gguf.quants.dequantize(weight.data, weight.tensor_type) + update
        numpy.testing.assert_allclose(exact, after[name].data.astype(numpy.float32), atol=2e-3, rtol=1e-3)


def test_a_lora_has_the_rows_of_q_and_k_where_llama_cpp_has_them(base, tmp_path):
    model = load_model(str(base))[0]
    adapter = adapter_file(model, tmp_path / "a.safetensors", base_model=str(base))
    export_lora(adapter, tmp_path / "m.gguf", "merged-gguf")
    export_lora(adapter, tmp_path / "lora.gguf", "gguf")
    check_lora(tmp_path / "lora.gguf", base, tmp_path / "m.gguf")
    factors = to_lora(load_adapter_file(adapter).adapter)
    stored = {name: torch.from_numpy(one.data.copy()) for name, one in tensors(tmp_path / "lora.gguf").items()}
    for letter, heads in (("q", 4), ("k", 2)):
        rows_of = factors[f"model.layers.1.self_attn.{letter}_proj"].up
        size = len(rows_of) // heads  # rows i and i + size / 2 of a head become neighbours
        order = [
            head * size + half * size // 2 + i for head in range(heads) for i in range(size // 2) for half in (0, 1)
        ]
        assert torch.equal(stored[f"blk.1.attn_{letter}.weight.lora_b"], rows_of[order])
    assert torch.equal(stored["blk.1.attn_v.weight.lora_b"], factors["model.layers.1.self_attn.v_proj"].up)


def test_every_architecture_has_a_name_in_the_package_and_an_order():
    known = set(gguf.MODEL_ARCH_NAMES.values())
    assert {name for name, _ in ARCHITECTURES.values()} <= known
    up = torch.arange(12.0).view(12, 1)
    assert Form("llama", 2, 1).ordered("blk.0.attn_q", up).flatten().tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert torch.equal(Form("qwen2").ordered("blk.0.attn_q", up), up)


def test_an_older_adapter_s_model_is_asked_for_its_kind(base, tmp_path):
    model = load_model(str(base))[0]
    adapter = adapter_file(model, tmp_path / "a.safetensors", base_model=str(base))
    content = load_adapter_file(adapter)
    export_lora(content, tmp_path / "one.gguf", "gguf")
    for name in ("model_type", "attention_heads", "key_value_heads"):
        del content.metadata[name]
    export_lora(content, tmp_path / "two.gguf", "gguf")
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()
    content.metadata["base_model"] = "/nowhere"
    with pytest.raises(EffiLoRAError, match="does not say what model it is for, and /nowhere can't be read"):
        export_lora(content, tmp_path / "three.gguf", "gguf")
    del content.metadata["base_model"]
    with pytest.raises(EffiLoRAError, match="does not say what model it is for: name it with --model"):
        export_lora(content, tmp_path / "three.gguf", "gguf")


def with_key(base, path, add):
    """A copy of ``base`` with another entry, which ``add(writer)`` gives."""
    reader, writer = gguf.GGUFReader(base), gguf.GGUFWriter(path, "llama")
    add(writer)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            writer.add_key_value(
                name, field.contents(), field.types[0], sub_type=field.types[-1] if len(field.types) > 1 else None
            )
    for one in reader.tensors:
        writer.add_tensor(one.name, one.data, raw_dtype=one.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_lists_of_nothing_and_files_of_no_architecture_are_told(base, tmp_path):
    adapter = adapter_file(load_model(str(base))[0], tmp_path / "a.safetensors")
    with_key(base, tmp_path / "list.gguf", lambda writer: writer.add_array("own.list", b"\x07"))
    reader, raw = gguf.GGUFReader(tmp_path / "list.gguf"), (tmp_path / "list.gguf").read_bytes()
    one = (1).to_bytes(8, "little") + b"\x07"  # its length and only element, which are taken out of the header
    place, start = raw.index(one, raw.index(b"own.list")), reader.data_offset
    empty = raw[:place] + bytes(8) + raw[place + len(one) : start] + b"\0" + raw[start:]
    (tmp_path / "list.gguf").write_bytes(empty)
    assert gguf.GGUFReader(tmp_path / "list.gguf").fields["own.list"].contents() == []
    with pytest.warns(UserWarning, match=r"own.list, an empty list, is left out"):
        export_lora(adapter, tmp_path / "m.gguf", "merged-gguf", str(tmp_path / "list.gguf"))
    export_lora(adapter, tmp_path / "plain.gguf", "merged-gguf", str(base))
    assert (tmp_path / "m.gguf").read_bytes() == (tmp_path / "plain.gguf").read_bytes()
    (tmp_path / "none.gguf").write_bytes(base.read_bytes().replace(b"general.architecture", b"general.architectura"))
    with pytest.raises(EffiLoRAError, match=r"is of the architecture \(it names none\), the adapter of llama"):
        export_lora(adapter, tmp_path / "m.gguf", "merged-gguf", str(tmp_path / "none.gguf"))


@pytest.mark.parametrize(
    ("name", "format", "model", "word"),
    [
        ("falcon", "gguf", None, "no GGUF of an adapter for falcon: llama.cpp keeps its weights in a form of its own"),
        ("qwen2", "merged-gguf", None, "name it with --model FILE.gguf; without one, export --format merged, and run"),
        ("qwen2", "merged-gguf", "/none.gguf", "/none.gguf: no such GGUF file"),
        ("qwen2", "merged-gguf", "BASE", "is of the architecture llama, the adapter of qwen2"),
        ("mistral", "merged-gguf", "BASE", "is another model than the adapter's: blk.0.ffn_gate.weight"),
        ("qwen2", "kohya", None, "exported as peft, merged, gguf or merged-gguf, not as kohya"),
    ],
)
def test_what_can_t_be_a_gguf_file_is_refused(name, format, model, word, base, tmp_path):
    adapter = adapter_file(build(name), tmp_path / "a.safetensors")
    with pytest.raises(EffiLoRAError, match=word):
        export_lora(adapter, tmp_path / "out.gguf", format, str(base) if model == "BASE" else model)
    assert not (tmp_path / "out.gguf").exists()


def test_the_base_and_what_is_no_gguf_file_stay_as_they_are(base, tmp_path):
    adapter = adapter_file(load_model(str(base))[0], tmp_path / "a.safetensors", base_model=str(base))
    before = base.read_bytes()
    with pytest.raises(EffiLoRAError, match="is the base itself: give another name"):
        export_lora(adapter, base, "merged-gguf")
    assert base.read_bytes() == before
    (tmp_path / "text.gguf").write_text("no weights")
    with pytest.raises(EffiLoRAError, match=r"text.gguf can't be read as GGUF"):
        export_lora(adapter, tmp_path / "m.gguf", "merged-gguf", str(tmp_path / "text.gguf"))


def test_peft_opens_the_folder_of_an_adapter_on_a_gguf_file(base, tmp_path):
    from peft import AutoPeftModelForCausalLM

    model, ids = load_model(str(base))[0], rows()
    adapter = adapter_file(model, tmp_path / "a.safetensors", base_model=str(base))
    export_lora(adapter, tmp_path / "peft", "peft")
    opened = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "peft", gguf_file=base.name)
    torch.testing.assert_close(logits(opened, ids), logits(model, ids), atol=1e-4, rtol=1e-4)

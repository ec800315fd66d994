"""Attach, train, save, load, generate, detach and export with every language model architecture."""

import pytest
import torch
from conftest import randomise
from tiny_language import LANGUAGE_MODELS, build, rows

from effilora_diffusion import EffiLoRAConfig, EffiLoRAError, attach, detach, load_adapter
from effilora_diffusion.core import AdapterFile, EffiLoRA, calibrate, merge, save_adapter_file, to_lora, unmerge
from effilora_diffusion.core.peft_format import add_to_weights, write_peft
from effilora_diffusion.language.targets import create_adapter, find_sites

PAPER = EffiLoRAConfig(rank=4, heads=3, target_modules=("paper",))


def adapted(model, config=PAPER, seed=2):
    return attach(model, randomise(create_adapter(model, config), seed))


def logits(model, ids, **more):
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


def generated(model, ids, **more):
    """Generate eight tokens greedily."""
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad():
        return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options, **more)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_an_untrained_adapter_changes_nothing_and_detaching_restores_the_base(name):
    model, ids = build(name), rows()
    before, hooks = logits(model, ids), sum(len(part._forward_hooks) for part in model.modules())
    adapter = attach(model, create_adapter(model, PAPER))
    assert torch.equal(logits(model, ids), before)
    randomise(adapter)
    assert not torch.allclose(logits(model, ids), before, atol=1e-3)
    adapter.strength = 0.0
    assert torch.equal(logits(model, ids), before)
    detach(model)
    assert torch.equal(logits(model, ids), before)
    assert sum(len(part._forward_hooks) for part in model.modules()) == hooks
    assert not [key for key in model.state_dict() if "effilora" in key]
    assert not any(hasattr(part, "_effilora_scope") for part in model.modules())


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_every_head_learns_and_the_loss_falls(name):
    model, ids = build(name), rows(4, 12)
    adapter = attach(model, create_adapter(model, PAPER))
    optimizer = torch.optim.AdamW(adapter.parameters(), 2e-2)
    losses = []
    for _ in range(30):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if len(losses) == 5:
            dead = [key for key, value in adapter.named_parameters() if value.grad is None or not value.grad.any()]
            assert dead == []
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    assert all(value.grad is None for key, value in model.named_parameters() if "effilora" not in key)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_generation_is_the_same_with_and_without_cache(name):
    model, ids = build(name), rows(2, 5)
    adapted(model)
    cached = generated(model, ids, use_cache=True)
    assert cached.shape == (2, 13)
    assert torch.equal(cached, generated(model, ids, use_cache=False))


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_padding_does_not_change_the_output(name):
    model = build(name)
    adapted(model)
    long, short = rows(1, 9), rows(1, 5, seed=7)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), short], 1)
    ids, mask = torch.cat([long, padded]), torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    more = {} if name == "bloom" else {"position_ids": positions}
    together = logits(model, ids, attention_mask=mask, **more)
    torch.testing.assert_close(together[0], logits(model, long)[0], atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(together[1, 4:], logits(model, short)[0], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_a_saved_adapter_gives_the_same_output_on_a_new_model(name, tmp_path):
    model, ids = build(name), rows()
    adapter = adapted(model)
    expected = logits(model, ids)
    save_adapter_file(tmp_path / "effilora.safetensors", AdapterFile(adapter, {"base_model": name}))
    fresh = build(name)
    load_adapter(fresh, tmp_path)
    assert torch.equal(logits(fresh, ids), expected)
    with pytest.raises(EffiLoRAError, match="another base model"):
        load_adapter(build("opt" if name != "opt" else "gpt2"), tmp_path)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
@pytest.mark.parametrize("routing", ["static", "token"])
def test_the_exported_folder_loads_in_peft(name, routing, tmp_path):
    from peft import PeftModel

    model, ids = build(name), rows()
    config = EffiLoRAConfig(rank=4, heads=3, routing=routing, target_modules=("paper",))
    adapter = adapted(model, config)
    base, expected = logits(build(name), ids), logits(model, ids)
    calibration, error = calibrate(model, adapter, lambda: logits(model, ids))
    content = AdapterFile(adapter, {"base_model": name}, calibration)
    write_peft(
        tmp_path, to_lora(adapter, calibration), content, error, fan_in_fan_out=name == "gpt2", task_type="CAUSAL_LM"
    )
    plain = PeftModel.from_pretrained(build(name), tmp_path)
    difference = (logits(plain, ids) - expected).norm() / (expected - base).norm()
    assert difference < (1e-4 if routing == "static" else 0.9)
    assert (error == 0) == (routing == "static")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_static_gates_merge_and_unmerge_exactly(name):
    model, ids = build(name), rows()
    before = logits(model, ids)
    adapted(model, EffiLoRAConfig(rank=4, heads=3, routing="static", target_modules=("paper",)))
    expected = logits(model, ids)
    merge(model)
    torch.testing.assert_close(logits(model, ids), expected, atol=2e-4, rtol=1e-4)
    unmerge(model)
    detach(model)
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_plain_lora_can_be_added_to_the_weights(name):
    model, ids = build(name), rows()
    adapter = adapted(model, EffiLoRAConfig(rank=4, heads=3, routing="static", target_modules=("paper",)))
    merged = build(name)
    add_to_weights(merged, to_lora(adapter))
    torch.testing.assert_close(logits(merged, ids), logits(model, ids), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_gradients_are_the_same_with_checkpointing(name):
    ids, found = rows(), []
    for checkpointing in (False, True):
        model = build(name)
        adapter = adapted(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        found.append([value.grad.clone() for value in adapter.parameters()])
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(recomputed, plain, atol=1e-6, rtol=1e-4)


def test_linears_with_the_same_input_compute_a_x_once(monkeypatch):
    model, ids = build("llama"), rows()
    adapted(model)
    calls, original = [], EffiLoRA.activations
    monkeypatch.setattr(
        EffiLoRA, "activations", lambda self, index, x: calls.append(index) or original(self, index, x)
    )
    logits(model, ids)
    sites = find_sites(build("llama"), ["paper"])
    assert sorted(calls) == sorted(range(len(sites)))  # q, k and v are one call
    assert [len(site.linears) for site in sites] == [3, 1, 1] * 2


def test_targets_are_groups_suffixes_or_all_linear():
    model = build("llama")
    suffixes = lambda targets: {
        path.rpartition(".")[2] for site in find_sites(model, targets) for path, _ in site.linears
    }
    assert suffixes(["paper"]) == {"q_proj", "k_proj", "v_proj", "up_proj", "down_proj"}
    assert suffixes(["attention"]) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert suffixes(["feed_forward"]) == {"gate_proj", "up_proj", "down_proj"}
    assert suffixes(["o_proj"]) == {"o_proj"}
    assert suffixes(["all-linear"]) == suffixes(["attention"]) | suffixes(
        ["feed_forward"]
    )  # never the output embedding
    with pytest.raises(EffiLoRAError, match=r"ends in to_q; .* of \['down_proj'"):
        find_sites(model, ["to_q"])
    with pytest.raises(EffiLoRAError, match="no timestep"):
        create_adapter(model, EffiLoRAConfig(routing="timestep", target_modules=("paper",)))


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_model_with_an_encoder_and_a_decoder_is_refused_at_once(name, tmp_path):
    import transformers as t
    from tiny_language import tokenizer

    from effilora_diffusion.language.models import load_model

    config = {
        "t5": lambda: t.T5Config(vocab_size=96, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2),
        "bart": lambda: t.BartConfig(
            vocab_size=96, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16,
            encoder_attention_heads=2, decoder_attention_heads=2,
        ),
    }[name]()  # fmt: skip
    model = t.AutoModelForSeq2SeqLM.from_config(config)
    with pytest.raises(EffiLoRAError, match="is a model with an encoder and a decoder"):
        create_adapter(model, PAPER)
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(EffiLoRAError, match=r"--model_name_or_path .*: a model with an encoder and a decoder"):
        load_model(str(tmp_path))

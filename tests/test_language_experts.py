"""Mixtures of experts: updates of stacked weights, through training, files and other forms."""

import copy

import pytest
import torch
from conftest import assert_same, footprint, randomise
from language_runs import make_place, same, weights, words
from tiny_language import MIXTURES, build, build_mixture, rows, tokenizer

from effilora_diffusion import EffiLoRAConfig, EffiLoRAError, attach, detach, load_adapter, save_adapter
from effilora_diffusion.cli.train_llm import main
from effilora_diffusion.core import Reducer, ReducerConfig, Site, load_adapter_file, merge, to_lora, unmerge
from effilora_diffusion.core.depth import execution_order
from effilora_diffusion.core.weights import experts_of
from effilora_diffusion.language.coverage import describe_coverage, parts_of_blocks
from effilora_diffusion.language.export import export
from effilora_diffusion.language.targets import create_adapter, find_sites

EXPERTS = EffiLoRAConfig(rank=4, heads=3, routing="static", target_modules=("paper", "experts"))


def logits(model, ids, **more):
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


def adapted(name, config=EXPERTS):
    model = build_mixture(name)
    return model, attach(model, randomise(create_adapter(model, config)))


def by_hand(model, adapter):
    """The model's weights with every update added, from the adapter's parameters, by plain loops and gradients."""
    found = dict(model.named_parameters())
    for index, site in enumerate(adapter.sites):
        gates = adapter.G[index].softmax(0) if adapter.config.heads > 1 else torch.ones(1)
        shared = adapter.A[str(site.in_features)]
        heads = sum(gates[number] * adapter.B[index][:, number] for number in range(adapter.config.heads))
        for path, _ in site.linears:
            update = heads[site.rows(path)] @ shared * adapter.config.scale
            if site.experts:
                each = update.chunk(site.experts)
                swap = "gpt_oss" in type(model).__module__
                update = torch.stack([one.t() if swap else one for one in each])
            name = path if site.experts else f"{path}.weight"
            found[name] = found[name] + update
    return {name: value for name, value in found.items() if not name.startswith("effilora.")}


@pytest.mark.parametrize("name", MIXTURES)
def test_an_adapter_of_experts_comes_and_goes_and_its_forms_agree(name, tmp_path):
    from peft import PeftModel

    model, ids = build_mixture(name), rows()
    base, before = logits(model, ids), footprint(model)
    adapter = attach(model, create_adapter(model, EXPERTS))
    torch.testing.assert_close(logits(model, ids), base, atol=1e-6, rtol=1e-6)
    randomise(adapter)
    expected = logits(model, ids)
    assert (expected - base).norm() > 0.1 * base.norm()
    adapter.strength = 0.0
    assert torch.equal(logits(model, ids), base)
    adapter.strength = 1.0
    assert torch.equal(logits(copy.deepcopy(model), ids), expected)
    merge(model)
    torch.testing.assert_close(logits(model, ids), expected, atol=1e-4, rtol=1e-4)
    unmerge(model)
    build_mixture(name).save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    save_adapter(adapter, tmp_path / "a.safetensors", model, base_model=str(tmp_path / "base"))
    fresh = build_mixture(name)
    load_adapter(fresh, tmp_path / "a.safetensors")
    assert torch.equal(logits(fresh, ids), expected)
    content = load_adapter_file(tmp_path / "a.safetensors")
    assert content.adapter.sites == adapter.sites
    assert export(content, tmp_path / "peft", "peft") == 0.0
    plain = PeftModel.from_pretrained(build_mixture(name), tmp_path / "peft")
    torch.testing.assert_close(logits(plain, ids), expected, atol=1e-4, rtol=1e-4)
    export(content, tmp_path / "merged", "merged")
    whole = type(model).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(whole, ids), expected, atol=1e-4, rtol=1e-4)
    detach(model)
    assert_same(model, before)
    assert torch.equal(logits(model, ids), base)


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("heads", [1, 3])
def test_gradients_are_those_of_weights_updated_by_hand_also_with_checkpointing(name, heads):
    ids = rows(2, 12)
    config = EffiLoRAConfig(rank=4, heads=heads, routing="static", alpha=6, target_modules=("paper", "experts"))
    model, adapter = adapted(name, config)
    parts = list(adapter.parameters())
    detach(model)
    plain = torch.func.functional_call(model, by_hand(model, adapter), (), {"input_ids": ids, "labels": ids})
    expected = torch.autograd.grad(plain.loss, parts)
    attach(model, adapter)
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        torch.testing.assert_close(loss, plain.loss)
        for found, value in zip(torch.autograd.grad(loss, parts), expected, strict=True):
            assert value.any()
            torch.testing.assert_close(found, value, atol=1e-6, rtol=1e-3)
    assert all(value.grad is None for value in model.parameters())


@pytest.mark.parametrize("name", MIXTURES)
def test_the_loss_falls_and_a_frozen_block_keeps_its_experts(name):
    ids = rows(4, 12)
    config = EffiLoRAConfig(
        rank=4, heads=1, target_modules=("experts",), reducer=ReducerConfig(mode="random", active=0.5, warmup=3)
    )
    model = build_mixture(name)
    adapter = attach(model, create_adapter(model, config))
    reducer, optimizer = Reducer(adapter, 0), torch.optim.AdamW(adapter.parameters(), 2e-2, weight_decay=0.0)
    losses = []
    for step in range(12):
        reducer.begin_step(step)
        before = [value.detach().clone() for value in adapter.B]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        moved = [not torch.equal(old, new) for old, new in zip(before, adapter.B, strict=True)]
        assert moved == [site.block in reducer.active for site in adapter.sites]
    assert len(reducer.blocks) == (1 if name == "deepseek_v3" else 2)
    assert losses[-1] < losses[0] - 0.3


def test_blocks_of_experts_alone_are_in_the_order_of_their_execution():
    model = build_mixture("mixtral")
    adapter = attach(model, create_adapter(model, EffiLoRAConfig(rank=2, heads=1, target_modules=("experts",))))
    found = execution_order(model, adapter, lambda: logits(model, rows()))
    assert found == ("model.layers.0", "model.layers.1") == adapter.blocks


def test_two_adapters_on_experts_add_up_and_an_error_leaves_nothing_behind():
    model, ids = build_mixture("mixtral"), rows()
    first, second = (randomise(create_adapter(model, EXPERTS), seed) for seed in (2, 3))
    attach(model, first)
    attach(model, second, "other")
    both = logits(model, ids)
    merge(model)
    merge(model, "other")
    torch.testing.assert_close(logits(model, ids), both, atol=1e-4, rtol=1e-4)
    detach(model)
    attach(model, first)
    experts = model.model.layers[0].mlp.experts
    with pytest.raises(AttributeError):
        experts(None, None, None)
    assert not {"gate_up_proj", "down_proj"} & set(experts.__dict__)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_experts_take_an_update_in_float32(dtype):
    model, ids = build_mixture("qwen3_moe").to(dtype), rows()
    base = logits(model, ids)
    adapter = attach(model, randomise(create_adapter(model, EXPERTS)))
    assert adapter.B[0].dtype == torch.float32
    changed = logits(model, ids)
    assert changed.dtype == dtype
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(value.grad.dtype == torch.float32 and value.grad.any() for value in adapter.parameters())
    merge(model)
    assert (logits(model, ids) - changed).float().norm() < 0.05 * (changed - base).float().norm()


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"heads": 3}, "token routing has not: with experts in --target_modules use --routing static or --heads 1"),
        ({"heads": 1, "dropout": 0.1}, "--lora_dropout acts on the input of a linear"),
    ],
)
def test_what_is_no_update_of_weights_is_refused_for_experts(config, word):
    with pytest.raises(EffiLoRAError, match=word):
        create_adapter(build_mixture("mixtral"), EffiLoRAConfig(rank=2, target_modules=("paper", "experts"), **config))


def test_experts_can_be_named_and_are_not_chosen_by_the_way():
    model = build_mixture("mixtral")
    chosen = {path for site in find_sites(model, ["experts.down_proj"]) for path, _ in site.linears}
    assert chosen == {f"model.layers.{block}.mlp.experts.down_proj" for block in (0, 1)}
    for targets in (["paper"], ["all-linear"], ["attention"], ["q_proj"]):
        assert not any(site.experts for site in find_sites(model, targets))


@pytest.mark.parametrize(
    ("model", "target", "word"),
    [
        ("mixtral", "feed_forward", "--target_modules has attention, paper, all-linear, experts, or of"),
        ("mixtral", "lm_head", "no linear of its blocks ends in lm_head"),
        ("llama", "experts", "LlamaForCausalLM: no experts are among its weights"),
    ],
)
def test_what_is_not_there_is_refused_and_not_offered(model, target, word):
    model = build(model) if model == "llama" else build_mixture(model)
    with pytest.raises(EffiLoRAError, match=word) as error:
        find_sites(model, [target])
    offered = str(error.value).partition("--target_modules has")[2]
    assert target not in offered


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_experts_of_another_form_and_past_their_modules_are_refused(dtype):
    model = build_mixture("gpt_oss")
    for layer in model.model.layers:
        for name in ("gate_up_proj", "down_proj"):
            value = layer.mlp.experts._parameters[name]
            layer.mlp.experts._parameters[name] = torch.nn.Parameter(value.to(dtype), requires_grad=False)
    with pytest.raises(EffiLoRAError, match="are quantised, or lie in a form that is not known here"):
        find_sites(model, ["experts"])
    model = build_mixture("gpt_oss")
    adapter = create_adapter(model, EXPERTS)
    model._use_kernels = True
    with pytest.raises(EffiLoRAError, match="use_kernels"):
        attach(model, adapter)
    assert not hasattr(model, "effilora")


def test_an_adapter_of_experts_is_refused_by_other_numbers_of_them(tmp_path):
    model, adapter = adapted("mixtral")
    save_adapter(adapter, tmp_path / "a.safetensors", model)
    for other in (build_mixture("granitemoe"), build("mistral")):
        with pytest.raises(EffiLoRAError, match="another base model"):
            load_adapter(other, tmp_path / "a.safetensors")
    path = "model.layers.0.mlp.experts.gate_up_proj"
    assert [
        (one.experts, one.in_features, one.out_features) for at, one in experts_of(model).items() if at == path
    ] == [(4, 32, 192)]
    assert to_lora(adapter)[path].up.shape == (192, 4)


def test_what_stays_as_it_is_is_said_with_its_share():
    model = build_mixture("mixtral")
    few = create_adapter(model, EffiLoRAConfig(rank=2, target_modules=("paper",)))
    numbers = {path: value.numel() for path, value in model.named_parameters() if ".layers." in path}
    experts = sum(count for path, count in numbers.items() if ".experts." in path) / sum(numbers.values())
    said = describe_coverage(model, few)
    assert f"experts {experts:.1%} (add experts to --target_modules, with --routing static or --heads 1)" in said
    assert "(k_proj, q_proj, v_proj); as they are: experts" in said
    assert sum(part.numbers for part in parts_of_blocks(model, set())) == sum(numbers.values())
    more = describe_coverage(model, create_adapter(model, EXPERTS))
    assert "experts, k_proj, q_proj, v_proj)" in more
    assert "add experts" not in more


@pytest.mark.parametrize("name", MIXTURES)
def test_a_run_on_experts_resumes_to_the_same_weights(name, tmp_path, capsys):
    place = make_place(tmp_path)
    build_mixture(name).save_pretrained(place / "model")
    more = {"heads": 1, "target_modules": "paper experts", "lr_scheduler_type": "constant"}
    assert main(words(place, tmp_path / "one", **more)) == 0
    assert "experts" in capsys.readouterr().err.partition("as they are")[0]
    half = tmp_path / "one" / "checkpoint-3"
    assert not same(weights(half), weights(tmp_path / "one"))
    assert main(words(place, tmp_path / "two", **more, resume_from_checkpoint=half)) == 0
    assert same(weights(tmp_path / "one"), weights(tmp_path / "two"))


@pytest.mark.parametrize("experts", [-1, True, "4", 5, 1 << 20, None])
def test_a_site_of_a_file_has_as_many_experts_as_its_width_can_be(experts):
    written = Site("m.experts.down_proj", "m", 24, (("m.experts.down_proj", 128),), 4).to_dict()
    assert Site.from_dict(written).experts == 4
    with pytest.raises(EffiLoRAError, match=r"is not one of .* experts"):
        Site.from_dict({**written, "experts": experts})
    with pytest.raises(EffiLoRAError, match="is not one of 4 experts"):
        Site.from_dict({**written, "maps": [["m.a", 128], ["m.b", 128]]})
    assert "experts" not in Site("m.q", "m", 24, (("m.q", 8),)).to_dict()

"""Concept routing in the core: which words name a concept, which heads act on which rows, and one plain LoRA per concept."""

import json

import pytest
import torch
from conftest import ToyModel, make_adapter, make_toy, toy_input, toy_sites
from test_convert import apply_factors

from effilora_diffusion import AdapterFile, EffiLoRAConfig, EffiLoRAError
from effilora_diffusion.core import (
    EffiLoRA,
    attach,
    detach,
    load_adapter_file,
    merge,
    save_adapter_file,
    to_lora,
    unmerge,
)
from effilora_diffusion.core.concept_gates import per_row
from effilora_diffusion.core.concepts import Concept, check_concepts, contains, find_concepts
from effilora_diffusion.core.convert import single_concept

CAT, DOG, MUG = Concept("cat", ("sks",)), Concept("dog", ("zwx", "große Dogge")), Concept("mug", ("杯子",))


def config(common=False, **options):
    return {
        "routing": "concept",
        "concepts": (CAT, DOG, MUG),
        "heads": 3 + common,
        "common_head": common,
        "alpha": 6.0,
        **options,
    }


@pytest.mark.parametrize(
    ("prompt", "trigger"),
    [
        ("a photo of sks cat", "sks"),
        ("SKS, sitting", "sks"),
        ("(sks:1.2) cat", "sks"),
        ("sks's bowl", "sks"),
        ("一只sks猫", "sks"),
        ("桌子上的杯子很好看", "杯子"),
        ("la bière", "bie\u0300re"),
        ("eine GROSSE  dogge", "große Dogge"),
        ("фото сбк.", "сбк"),
        ("스크스 고양이", "스크스"),
        ("a sks고양이", "sks"),
    ],
)
def test_a_trigger_is_found_as_a_whole_word_of_any_language(prompt, trigger):
    assert contains(prompt, trigger)


@pytest.mark.parametrize(
    ("prompt", "trigger"),
    [
        ("a photo of asks cat", "sks"),
        ("sks2", "sks"),
        ("sks_cat", "sks"),
        ("bières", "bière"),
        ("biere", "bière"),
        ("e\u0301te", "e"),
        ("сбка", "сбк"),
        ("스크스들", "스크스"),
        ("a cat", "sks"),
        ("", "sks"),
    ],
)
def test_a_part_of_a_word_is_no_trigger(prompt, trigger):
    assert not contains(prompt, trigger)


def test_several_triggers_in_one_prompt_are_all_found():
    assert find_concepts("zwx beside 杯子", (CAT, DOG, MUG)) == (1, 2)
    assert find_concepts("a große dogge", (CAT, DOG, MUG)) == (1,)
    assert find_concepts("a dog", (CAT, DOG, MUG)) == ()


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        (CAT, Concept("tom", ("sks cat",)), "share a trigger"),
        (CAT, Concept("tom", ("SKS",)), "share a trigger"),
        (CAT, Concept("CAT", ("tom",)), "two concepts are named"),
    ],
)
def test_concepts_that_can_not_be_told_apart_are_refused(one, other, words):
    with pytest.raises(EffiLoRAError, match=words):
        check_concepts((one, other))
    with pytest.raises(EffiLoRAError, match=words):
        check_concepts((other, one))


@pytest.mark.parametrize(
    "broken",
    [
        {"name": "../x"},
        {"name": ""}, {"name": 3}, {"name": "cat_kohya"}, {"triggers": []}, {"triggers": "sks"}, {"triggers": [" "]},
        {"triggers": ["a\nb"]}, {"triggers": [3]}, {"prompt": 3}, {"extra": 1}, {"class_prompt": "\x1b"},
    ],
)  # fmt: skip
def test_a_record_that_no_run_writes_is_refused(broken):
    with pytest.raises(EffiLoRAError):
        Concept.from_dict({"name": "cat", "triggers": ["sks"], **broken})


@pytest.mark.parametrize(
    "options",
    [{"heads": 4}, {"concepts": ()}, {"routing": "token"}, {"routing": "static", "concepts": (), "common_head": True}],
)
def test_heads_and_concepts_must_agree(options):
    with pytest.raises(EffiLoRAError, match="concept"):
        EffiLoRAConfig(**{**config(), **options})


def test_files_of_other_routings_have_no_new_keys_and_old_files_are_read():
    plain = EffiLoRAConfig().to_dict()
    assert "concepts" not in plain
    assert "common_head" not in plain
    assert EffiLoRAConfig.from_dict(plain) == EffiLoRAConfig()


@pytest.mark.parametrize("common", [False, True])
def test_the_native_file_keeps_concepts_and_heads(tmp_path, common):
    adapter = make_adapter(**config(common))
    assert not len(adapter.G)
    save_adapter_file(tmp_path / "a.safetensors", AdapterFile(adapter))
    found = load_adapter_file(tmp_path / "a.safetensors").adapter
    assert found.config == adapter.config
    assert [concept.triggers for concept in found.concepts] == [("sks",), ("zwx", "große Dogge"), ("杯子",)]
    assert all(torch.equal(one, other) for one, other in zip(found.B, adapter.B, strict=True))
    assert EffiLoRAConfig.from_json(json.dumps(json.loads(adapter.config.to_json()))) == adapter.config


def plain_model(adapter, name):
    """The toy model with one concept's plain LoRA merged into its weights."""
    return apply_factors(make_toy(), to_lora(adapter, concept=name))


@torch.no_grad()
@pytest.mark.parametrize("common", [False, True])
@pytest.mark.parametrize("sharing", ["width", "slice", "none"])
def test_one_concept_computes_its_plain_lora_and_none_the_base(common, sharing):
    model, x = make_toy(), toy_input(3)
    base = model(x)
    adapter = attach(model, make_adapter(**config(common, a_sharing=sharing)))
    for name in ("cat", "dog", "mug"):
        adapter.set_concept(name)
        found = model(x)
        assert torch.allclose(found, plain_model(adapter, name)(x), atol=1e-5)
        assert not torch.allclose(found, base, atol=1e-2)
    adapter.set_concept()
    assert torch.equal(model(x), base) != common
    adapter.set_concept("cat", "mug")
    both = model(x)
    adapter.set_concepts([["cat", "mug"]] * 3)
    assert torch.equal(model(x), both)
    detach(model)
    assert torch.equal(model(x), base)


@torch.no_grad()
@pytest.mark.parametrize("halves", [1, 2])
def test_rows_of_one_batch_have_concepts_of_their_own_and_rows_without_one_are_the_base_s(halves):
    model, x = make_toy(), toy_input(4)
    x = torch.cat([x] * halves)
    base = model(x)
    adapter = attach(model, make_adapter(**config()))
    adapter.set_concepts([["dog"], [], ["cat", "dog"], ["cat"]])
    found = model(x)
    for half in range(halves):
        assert torch.equal(found[4 * half + 1], base[4 * half + 1])
        for row, names in ((0, ("dog",)), (2, ("cat", "dog")), (3, ("cat",))):
            adapter.set_concept(*names)
            alone = model(x[4 * half + row : 4 * half + row + 1])[0]
            assert torch.allclose(found[4 * half + row], alone, atol=1e-5)
            assert not torch.allclose(alone, base[4 * half + row], atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("common", [False, True])
def test_two_concepts_share_a_row_and_the_common_head_acts_whole(common):
    model, x = make_toy(), toy_input(2)
    adapter = attach(model, make_adapter(**config(common)))
    mean = (adapter.B[0][:, 0] + adapter.B[0][:, 2]) / 2 + (adapter.B[0][:, 3] if common else 0)
    adapter.set_concept("cat", "mug")
    assert torch.allclose(adapter.mixed_heads(0), mean)
    together = model(x)
    adapter.set_concepts([["cat", "mug"], ["dog"]])
    assert adapter.routed.rows[:, 0].tolist() == [0.5, 0.0, 0.5, *[1.0] * common]
    assert torch.allclose(model(x)[0], together[0], atol=1e-5)


def test_a_batch_that_the_rows_do_not_divide_is_refused():
    model = make_toy()
    adapter = attach(model, make_adapter(**config()))
    adapter.set_concepts([["dog"], []])
    with pytest.raises(EffiLoRAError, match="2 rows, and the model is called with 3"):
        model(toy_input(3))


def test_a_model_called_before_anybody_said_which_concept_says_so():
    model = make_toy()
    adapter = attach(model, make_adapter(**config()))
    with pytest.raises(EffiLoRAError, match=r"set_concept\('cat'\)"):
        model(toy_input())
    with pytest.raises(EffiLoRAError, match="no concept 'fox'; it has cat, dog, mug"):
        adapter.set_concept("fox")
    adapter.strength = 0
    model(toy_input())
    other = make_adapter()
    with pytest.raises(EffiLoRAError, match="no concepts"):
        other.set_concept("cat")


def test_only_the_heads_that_act_are_computed():
    adapter = make_adapter(**config())
    adapter.set_concept("dog")
    assert adapter.mixed_heads(0).shape[1] == adapter.config.rank
    adapter.set_concepts([["dog"], ["cat"]])
    adapter.row_gates = adapter.routed.for_batch(4)
    assert adapter.mixed_heads(0).shape[1] == 2 * adapter.config.rank


def test_gates_follow_the_batch_wherever_it_stands_in_an_input():
    gates = torch.tensor([[1.0, 0.0, 1.0]])
    assert per_row(gates, torch.zeros(3, 5)).tolist() == [[1, 0, 1]]
    assert per_row(gates, torch.zeros(3, 2, 5)).tolist() == [[1, 1, 0, 0, 1, 1]]
    assert per_row(gates, torch.zeros(3, 3, 5), tokens_first=True).tolist() == [[1, 1, 1, 0, 0, 0, 1, 1, 1]]
    assert per_row(gates, torch.zeros(2, 3, 5), tokens_first=True).tolist() == [[1, 0, 1, 1, 0, 1]]
    assert per_row(gates, torch.zeros(6, 2, 5)).tolist() == [[1] * 4 + [0] * 4 + [1] * 4]
    with pytest.raises(EffiLoRAError, match="7 rows of a batch of 3"):
        per_row(gates, torch.zeros(7, 5))


def test_only_the_concepts_of_a_batch_learn():
    model, x = make_toy(), toy_input(2)
    adapter = attach(model, make_adapter(**config()))
    adapter.set_concepts([["mug"], ["cat"]])
    model(x).square().sum().backward()
    for heads in adapter.B:
        assert heads.grad[:, 0].any()
        assert heads.grad[:, 2].any()
        assert not heads.grad[:, 1].any()
    assert all(value.grad.any() for value in adapter.A.values())


def test_each_row_s_gradient_is_that_of_its_own_concept():
    def gradients(rows, x):
        model = make_toy()
        adapter = attach(model, make_adapter(**config()))
        adapter.set_concepts(rows)
        model(x).square().sum().backward()
        return [heads.grad for heads in adapter.B]

    x = toy_input(2)
    together = gradients([["mug"], ["cat"]], x)
    apart = zip(gradients([["mug"]], x[:1]), gradients([["cat"]], x[1:]), strict=True)
    for whole, (first, second) in zip(together, apart, strict=True):
        assert torch.allclose(whole, first + second, rtol=1e-4, atol=1e-4)


def test_a_joint_export_is_refused_and_each_concept_s_is_its_own_head():
    adapter = make_adapter(**config())
    with pytest.raises(EffiLoRAError, match=r"several concepts \(cat, dog, mug\).*name one"):
        to_lora(adapter)
    with pytest.raises(EffiLoRAError, match="no concept 'fox'"):
        to_lora(adapter, concept="fox")
    with pytest.raises(EffiLoRAError, match="no concept 'cat'"):
        to_lora(make_adapter(), concept="cat")
    single = single_concept(adapter, "dog")
    assert single.config.heads == 1
    assert single.config.scale == adapter.config.scale
    assert all(torch.equal(one[:, 0], other[:, 1]) for one, other in zip(single.B, adapter.B, strict=True))


@torch.no_grad()
def test_one_concept_can_be_merged_and_comes_off_bit_for_bit():
    model, x = make_toy(), toy_input()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    adapter = attach(model, make_adapter(**config()))
    with pytest.raises(EffiLoRAError, match="name one"):
        merge(model)
    assert not adapter.merged
    assert adapter.routed is None
    merge(model, concept="dog")
    assert torch.allclose(model(x), plain_model(adapter, "dog")(x), atol=1e-5)
    with pytest.raises(EffiLoRAError, match="unmerge"):
        adapter.set_concept("cat")
    unmerge(model)
    assert adapter.routed is None
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_a_fresh_adapter_of_several_concepts_is_the_base():
    model, x = ToyModel(), toy_input()
    base = model(x)
    adapter = attach(model, EffiLoRA(EffiLoRAConfig(**config()), toy_sites()))
    adapter.set_concept("cat")
    assert torch.equal(model(x), base)

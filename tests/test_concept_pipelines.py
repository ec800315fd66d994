"""Concept heads in the stock pipelines of every family: each image has the heads that its prompt names."""

import copy
import pickle

import numpy as np
import pytest
import torch
from conftest import randomise
from test_family_calls import IMAGE, family_of, image_condition
from tiny_families import FAMILIES, build, sampling

from effilora_diffusion import (
    AdapterFile,
    EffiLoRAConfig,
    EffiLoRAError,
    attach,
    create_adapter,
    detach,
    load_adapter,
    remove_adapter,
    save_adapter,
)
from effilora_diffusion.core.concepts import Concept
from effilora_diffusion.core.convert import single_concept
from effilora_diffusion.core.load import host_model
from effilora_diffusion.diffusion.adapters.active_adapters import ActiveAdapters, AdapterRef

PROMPTS = ["a sks cat", "a red cat on a big white table", "two zwx dogs"]
NAMES = ("cat", "", "dog")
CONFIG = EffiLoRAConfig(
    routing="concept",
    heads=2,
    concepts=(Concept("cat", ("sks",)), Concept("dog", ("zwx",))),
    target_modules=("attention", "feed_forward"),
    alpha=8.0,
)


def adapter_for(pipe, config=CONFIG):
    return randomise(create_adapter(pipe, config), heads=0.4)


def draw(pipe, name, prompts=PROMPTS, images=1, **options):
    """The images of each prompt, ``(prompts x images, h, w, 3)``."""
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)  # Z-Image writes into the list
    options = {**sampling(name), "num_images_per_prompt": images, **options}
    if "negative_prompt" in options:
        options["negative_prompt"] = [options["negative_prompt"]] * len(prompts)
    seeds = [torch.Generator().manual_seed(seed) for seed in range(len(prompts) * images)]
    found = pipe(prompt=prompts, generator=seeds, **options).images
    return np.stack([np.asarray(image) for image in found]).astype(int)


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_of_one_call_have_the_concepts_that_they_name_and_no_others(name):
    pipe, images = build(name), 2
    kind, base = type(pipe), draw(pipe, name, images=images)
    adapter = attach(pipe, adapter_for(pipe))
    mixed = draw(pipe, name, images=images)
    for number, concept in enumerate(NAMES):
        rows = slice(number * images, (number + 1) * images)
        if not concept:
            assert np.array_equal(mixed[rows], base[rows])
            continue
        adapter.set_concept(concept)
        alone = draw(pipe, name, images=images)
        adapter.clear_concept()
        assert np.abs(mixed[rows] - alone[rows]).max() <= 2
        assert np.abs(mixed[rows] - base[rows]).mean() > 0.5
    assert np.array_equal(draw(pipe, name, PROMPTS[1:2]), draw(build(name), name, PROMPTS[1:2]))
    detach(pipe)
    assert type(pipe) is kind
    assert np.array_equal(draw(pipe, name, images=images), base)


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_rows_of_a_training_batch_have_the_concepts_of_their_captions(name):
    family = family_of(name)
    latents = torch.randn(3, *family.encode_image(torch.zeros(3, 64, 64)).shape[1:])
    rows = [{**family.encode_prompt(prompt), IMAGE: image_condition(name)} for prompt in PROMPTS]
    inputs = latents, torch.tensor([100.0, 500.0, 900.0]).to(torch.long), family.collate(rows)
    base = family.predict(*inputs)
    adapter = attach(family.pipe, adapter_for(family.pipe))
    adapter.route(adapter.prompt_gates(PROMPTS))
    mixed = family.predict(*inputs)
    assert torch.equal(mixed[1], base[1])
    for number, concept in ((0, "cat"), (2, "dog")):
        adapter.set_concept(concept)
        alone = family.predict(*inputs)
        assert torch.allclose(mixed[number], alone[number], rtol=1e-3, atol=1e-4)
        assert not torch.allclose(mixed[number], base[number], rtol=1e-2, atol=1e-3)


def test_one_concept_draws_what_its_head_alone_draws_and_two_the_mean_of_both():
    pipe = build("sd15")
    adapter = attach(pipe, adapter_for(pipe))
    found, both = draw(pipe, "sd15", "a sks cat"), draw(pipe, "sd15", "a sks cat and a zwx dog")
    detach(pipe)
    attach(pipe, single_concept(adapter, "cat"))
    assert np.abs(draw(pipe, "sd15", "a sks cat") - found).max() <= 2
    detach(pipe)
    for name in ("cat", "dog"):
        attach(pipe, single_concept(adapter, name), name).strength = 0.5
    assert np.abs(draw(pipe, "sd15", "a sks cat and a zwx dog") - both).max() <= 2


def test_any_prompt_of_several_text_encoders_may_name_a_concept():
    pipe = build("sdxl")
    attach(pipe, adapter_for(pipe))
    one = draw(pipe, "sdxl", "a cat", prompt_2=["a sks cat"])
    assert np.abs(one - draw(build("sdxl"), "sdxl", "a cat", prompt_2=["a sks cat"])).mean() > 0.5


def test_a_common_head_acts_on_every_prompt():
    config = EffiLoRAConfig(**{**vars(CONFIG), "heads": 3, "common_head": True})
    pipe = build("sd15")
    base = draw(pipe, "sd15")
    attach(pipe, adapter_for(pipe, config))
    assert np.abs(draw(pipe, "sd15") - base).mean((1, 2, 3)).min() > 0.5


def test_prompt_embeds_need_a_concept_that_was_set():
    pipe = build("sd15")
    adapter = attach(pipe, adapter_for(pipe))
    expected = draw(pipe, "sd15", "a sks cat")
    states, negative = pipe.encode_prompt("a sks cat", "cpu", 1, True)

    def by_states():
        options = {**sampling("sd15"), "generator": torch.Generator().manual_seed(0)}
        return pipe(prompt_embeds=states, negative_prompt_embeds=negative, **options).images[0]

    with pytest.raises(EffiLoRAError, match=r"prompt_embeds do not tell which concepts are meant.*set_concept"):
        by_states()
    adapter.set_concept("cat")
    assert np.array_equal(np.asarray(by_states()).astype(int), expected[0])
    adapter.strength = 0
    adapter.clear_concept()
    by_states()


def test_what_was_set_wins_over_the_prompt_until_it_is_cleared():
    pipe = build("sd15")
    adapter = attach(pipe, adapter_for(pipe))
    cat = draw(pipe, "sd15", "a sks cat")
    base = draw(build("sd15"), "sd15", "a sks cat")
    adapter.set_concept()
    assert np.array_equal(draw(pipe, "sd15", "a sks cat"), base)
    adapter.clear_concept()
    assert np.array_equal(draw(pipe, "sd15", "a sks cat"), cat)
    assert adapter.routed is None


def test_an_error_within_a_call_leaves_no_concept_behind():
    pipe = build("sd15")
    adapter = attach(pipe, adapter_for(pipe))
    with pytest.raises(ValueError, match="divisible"):
        pipe(prompt="a sks cat", height=63, width=64)
    assert adapter.routed is None
    pipe = build("sd3")
    attach(pipe, adapter_for(pipe))
    with pytest.raises(TypeError, match="unexpected keyword argument 'promt'"):
        pipe(promt="a sks cat")


def test_loading_removing_and_reloading_leave_the_pipeline_s_own_class(tmp_path):
    pipe = build("sd15")
    kind, base = type(pipe), draw(pipe, "sd15")
    save_adapter(adapter_for(pipe), tmp_path / "two.safetensors", pipe)
    loaded = load_adapter(pipe, tmp_path / "two.safetensors")
    assert [concept.name for concept in loaded.concepts] == ["cat", "dog"]
    assert type(pipe) is not kind
    assert type(pipe).__name__ == kind.__name__
    first = draw(pipe, "sd15")
    other = load_adapter(pipe, AdapterFile(single_concept(adapter_for(pipe), "dog")), name="other")
    remove_adapter(pipe, other)
    assert np.array_equal(draw(pipe, "sd15"), first)
    remove_adapter(pipe, loaded)
    assert type(pipe) is kind
    assert np.array_equal(draw(pipe, "sd15"), base)
    active = ActiveAdapters(pipe)
    active.use([AdapterRef(tmp_path / "two.safetensors")])
    assert np.array_equal(draw(pipe, "sd15"), first)
    active.use([])
    assert type(pipe) is kind


def test_copies_and_saved_pipelines_are_usable(tmp_path):
    pipe = build("sd15")
    kind, base = type(pipe), draw(pipe, "sd15")
    attach(pipe, adapter_for(pipe))
    expected = draw(pipe, "sd15")
    for twin in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        assert np.array_equal(draw(twin, "sd15"), expected)
        detach(twin)
        assert np.array_equal(draw(twin, "sd15"), base)
    assert np.array_equal(draw(pipe, "sd15"), expected)
    pipe.save_pretrained(tmp_path / "saved")
    again = kind.from_pretrained(tmp_path / "saved", safety_checker=None)
    again.set_progress_bar_config(disable=True)
    assert np.array_equal(draw(again, "sd15"), base)


def test_a_compiled_model_follows_the_prompts():
    torch._dynamo.reset()
    pipe = build("sd15")
    attach(pipe, adapter_for(pipe))
    expected = draw(pipe, "sd15"), draw(pipe, "sd15", "a sks cat"), draw(pipe, "sd15", "a cat")
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    found = draw(pipe, "sd15"), draw(pipe, "sd15", "a sks cat"), draw(pipe, "sd15", "a cat")
    for one, other in zip(found, expected, strict=True):
        assert np.abs(one - other).max() <= 2
    torch._dynamo.reset()


def test_no_recompilation_for_another_concept():
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    pipe, counter = build("sd15"), CompileCounter()
    model = host_model(pipe)
    adapter = attach(pipe, adapter_for(pipe))
    compiled = torch.compile(model, backend=counter)
    inputs = torch.randn(2, 4, 8, 8), 10, torch.randn(2, 8, model.config.cross_attention_dim)
    outputs = []
    for name in ("cat", "dog"):
        adapter.set_concept(name)
        with torch.no_grad():
            outputs.append(compiled(*inputs).sample)
            assert torch.allclose(outputs[-1], model(*inputs).sample, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(*outputs, rtol=1e-2, atol=1e-2)
    assert counter.frame_count == 1
    torch._dynamo.reset()

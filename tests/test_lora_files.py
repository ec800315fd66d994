"""Plain LoRA files beside native ones: loaded by diffusers, checked by us, gone without a trace."""

import numpy as np
import pytest
import torch
from conftest import build_tiny_pipeline
from helpers import make_subject, trainer
from safetensors.torch import load_file, save_file
from tiny_families import FAMILIES, build

from effilora_diffusion import EffiLoRAError, cli, export_lora, load_adapter
from effilora_diffusion.core import load_adapter_file
from effilora_diffusion.diffusion.adapters.active_adapters import ActiveAdapters, AdapterRef
from effilora_diffusion.diffusion.adapters.lora_files import describe_plain, is_plain_lora, load_plain_lora
from effilora_diffusion.diffusion.sampling.generate import draw_images
from effilora_diffusion.diffusion.sampling.metadata import read_parameters


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model, its adapter with static gates (whose plain form is exact), and that in plain forms."""
    folder = tmp_path_factory.mktemp("plain")
    build_tiny_pipeline().save_pretrained(folder / "model")
    options = {"learning_rate": 0.2, "max_train_steps": 3, "num_validation_images": 0, "routing": "static"}
    trainer(folder / "model", make_subject(folder / "s", 2), folder / "cat", **options).run()
    options |= {"routing": "token", "seed": 1}
    trainer(folder / "model", make_subject(folder / "t", 2, first=5), folder / "dog", **options).run()
    for name in ("diffusers", "kohya"):
        export_lora(folder / "cat", folder / f"{name}.safetensors", name)
    return folder


@pytest.fixture
def stack():
    return ActiveAdapters(build_tiny_pipeline())


def draw(stack, *wanted):
    stack.use(list(wanted))
    return np.asarray(draw_images(stack.pipe, ["a sks cat"], [1], 2, 3.0)[0]).astype(int)


def far(one, other):
    return np.abs(one - other).mean()


@pytest.mark.parametrize("name", ["diffusers", "kohya"])
def test_a_plain_lora_draws_what_the_adapter_draws(files, stack, name):
    native = files / "cat" / "effilora.safetensors"
    base, adapted = draw(stack), draw(stack, AdapterRef(native))
    plain = draw(stack, AdapterRef(files / f"{name}.safetensors"))
    assert far(adapted, base) > 1
    assert far(plain, adapted) < 0.1 * far(adapted, base)
    half = draw(stack, AdapterRef(files / f"{name}.safetensors", 0.5))
    assert far(half, draw(stack, AdapterRef(native, 0.5))) < 0.1 * far(adapted, base)
    assert np.array_equal(draw(stack, AdapterRef(files / f"{name}.safetensors", 0.0)), base)
    assert np.array_equal(draw(stack), base)
    assert not stack.pipe.get_list_adapters()


def test_native_and_plain_adapters_act_together_in_any_order_of_coming(files, stack):
    cat, dog, plain = (
        files / "cat" / "effilora.safetensors",
        files / "dog" / "effilora.safetensors",
        files / "kohya.safetensors",
    )
    base = draw(stack)
    both = draw(stack, AdapterRef(plain), AdapterRef(dog))  # the plain one was asked for first: it is loaded after
    draw(stack, AdapterRef(plain))
    assert np.array_equal(draw(stack, AdapterRef(dog), AdapterRef(plain)), both)
    assert far(both, draw(stack, AdapterRef(plain))) > 0.5
    assert far(both, draw(stack, AdapterRef(dog))) > 0.5
    assert far(both, draw(stack, AdapterRef(dog), AdapterRef(cat))) < 0.1 * far(both, base)
    assert np.array_equal(draw(stack), base)


def test_adapters_are_added_in_the_order_asked_for(files):
    """Sums in another order round otherwise: what was attached before must not change the bytes."""
    cat, dog = files / "cat" / "effilora.safetensors", files / "dog" / "effilora.safetensors"
    fresh = ActiveAdapters(build_tiny_pipeline())
    fresh.use([AdapterRef(cat), AdapterRef(dog)])
    used = ActiveAdapters(build_tiny_pipeline())
    used.use([AdapterRef(dog)])
    used.use([AdapterRef(cat), AdapterRef(dog)])
    assert [mark[0] for mark in used.native] == [mark[0] for mark in fresh.native] == [cat, dog]
    used.use([AdapterRef(cat), AdapterRef(dog, 0.5)])
    kept = list(used.native.values())
    used.use([AdapterRef(cat)])
    assert next(iter(used.native.values())) is kept[0]  # what is still wanted stays
    with pytest.raises(EffiLoRAError, match="given twice"):
        used.use([AdapterRef(cat), AdapterRef(cat, 0.5)])


def test_a_file_that_changes_is_loaded_anew(files, stack, tmp_path):
    file = tmp_path / "lora.safetensors"
    tensors = load_file(files / "diffusers.safetensors")
    save_file(tensors, file)
    before = draw(stack, AdapterRef(file))
    save_file({key: value * 2 for key, value in tensors.items()}, file)
    assert far(draw(stack, AdapterRef(file)), before) > 0.5


def odd_files(folder):
    one = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    wide = {f"{one}.lora_A.weight": torch.ones(4, 77), f"{one}.lora_B.weight": torch.ones(77, 4)}
    save_file(wide, folder / "wide.safetensors")
    save_file(
        {key.replace("mid_block", "nowhere"): value for key, value in wide.items()}, folder / "nowhere.safetensors"
    )
    save_file({key.replace("unet", "transformer"): value for key, value in wide.items()}, folder / "flux.safetensors")
    save_file({"lora_A": torch.ones(3)}, folder / "bare.safetensors")
    return sorted(folder.glob("*.safetensors"))


def test_files_of_other_models_are_refused_and_leave_nothing_behind(files, stack, tmp_path):
    base = draw(stack)
    plain = AdapterRef(files / "kohya.safetensors")
    expected = draw(stack, plain)
    for file in odd_files(tmp_path):
        with pytest.raises(EffiLoRAError, match=r"made for another base|changes nothing"):
            draw(stack, plain, AdapterRef(file))
        assert np.array_equal(draw(stack), base)
        assert np.array_equal(draw(stack, plain), expected)


def test_what_is_plain_is_judged_by_content(files, tmp_path):
    assert is_plain_lora(files / "kohya.safetensors")
    assert not is_plain_lora(files / "cat" / "effilora.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    assert not is_plain_lora(tmp_path / "text.safetensors")
    save_file({"lora_unet_x.hada_w1_a": torch.ones(2, 2)}, tmp_path / "loha.safetensors")
    with pytest.raises(EffiLoRAError, match="diffusers can't load"):
        is_plain_lora(tmp_path / "loha.safetensors")
    facts = describe_plain(files / "kohya.safetensors")
    content = load_adapter_file(files / "cat" / "effilora.safetensors")
    assert facts["layers"] == sum(len(site.linears) for site in content.adapter.sites)
    assert (facts["ranks"], facts["trigger_prompt"]) == ([4], "a sks cat")


def test_native_adapters_follow_plain_ones(files):
    pipe, other = build_tiny_pipeline(), build_tiny_pipeline()
    assert load_plain_lora(pipe, files / "diffusers.safetensors", "plain") > 0
    load_adapter(pipe, files / "cat")
    load_adapter(other, files / "cat")
    assert load_plain_lora(other, files / "diffusers.safetensors", "plain") > 0
    first, second = (np.asarray(draw_images(one, ["a sks cat"], [0], 2)[0]) for one in (pipe, other))
    assert np.array_equal(first, second)
    pipe.unload_lora_weights()
    assert not np.array_equal(np.asarray(draw_images(pipe, ["a sks cat"], [0], 2)[0]), first)


def test_the_command_line_draws_with_plain_ones(files, tmp_path):
    words = ["generate", "--model", str(files / "model"), "--prompt", "a sks cat", "--num_inference_steps", "2"]
    for name, adapters in (("base", []), ("plain", ["--adapter", f"{files / 'kohya.safetensors'}:0.5"])):
        assert cli.main([*words, *adapters, "--output", str(tmp_path / f"{name}.png")]) == 0
    assert (tmp_path / "base.png").read_bytes() != (tmp_path / "plain.png").read_bytes()
    assert read_parameters(tmp_path / "plain.png")["adapters"] == [{"file": "kohya", "strength": 0.5}]
    for file in odd_files(tmp_path):
        assert cli.main([*words, "--adapter", str(file), "--output", str(tmp_path / "no.png")]) == 2


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_takes_its_plain_lora_or_says_why_not(name, tmp_path):
    build(name).save_pretrained(tmp_path / "model")
    options = {
        "resolution": 64,
        "learning_rate": 0.1,
        "max_train_steps": 2,
        "num_validation_images": 0,
        "routing": "static",
    }
    trainer(tmp_path / "model", make_subject(tmp_path / "s", 2, size=(64, 64)), tmp_path / "cat", **options).run()
    stack = ActiveAdapters(build(name))
    if not hasattr(stack.pipe, "load_lora_weights"):
        with pytest.raises(EffiLoRAError, match="no loader"):
            stack.use([AdapterRef(tmp_path / "cat" / "pytorch_lora_weights.safetensors")])
        return
    stack.use([AdapterRef(tmp_path / "cat" / "pytorch_lora_weights.safetensors", 0.5)])
    assert len(stack.plain) == 1
    stack.use([AdapterRef(tmp_path / "cat" / "effilora.safetensors")])
    stack.use([])
    assert not stack.native
    assert not stack.pipe.get_list_adapters()

"""The public API: one function each for pipelines and models of diffusers and transformers; the page shows a loop that runs."""

import re
from pathlib import Path

import pytest
import torch
from conftest import build_tiny_pipeline, make_toy, randomise, tiny_unet, toy_input, unet_input
from safetensors.torch import load_file
from tiny_language import build as build_language
from tiny_language import rows

import effilora_diffusion as api
from effilora_diffusion import EffiLoRAConfig, EffiLoRAError
from effilora_diffusion.core import adapters_of, load_adapter_file
from effilora_diffusion.core.load import host_model

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")


def predict(model):
    with torch.no_grad():
        if type(model).__name__.startswith("Llama"):
            return model(rows()).logits
        return model(toy_input()) if type(model).__name__ == "ToyModel" else model(**unet_input()).sample


HOSTS = {
    "pipeline": (build_tiny_pipeline, {}),
    "diffusers model": (tiny_unet, {}),
    "transformers model": (lambda: build_language("llama"), {"target_modules": ("paper",)}),
    "other module": (make_toy, {"target_modules": ("to_q", "to_k", "to_v", "fc1")}),
}


@pytest.fixture(params=HOSTS, ids=lambda name: name.replace(" ", "-"))
def host(request):
    make, options = HOSTS[request.param]
    return make(), EffiLoRAConfig(alpha=8.0, routing="static", **options)


def test_the_loop_on_the_page_trains_saves_and_exports(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(import torch.*?)```", PAGE, re.S)
    body = [line for line in code.splitlines() if line and not line.startswith(("import", "from"))]
    assert len(body) <= 20
    monkeypatch.chdir(tmp_path)
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    names = {}
    exec(compile(code, "docs/api.md", "exec"), names)
    assert all(heads.any() for heads in names["adapter"].B)
    content = load_adapter_file(tmp_path / "cat.safetensors")
    assert content.metadata["trigger_prompt"] == "an emoji of sks cat"
    pipe = names["StableDiffusionPipeline"].from_pretrained("assets/base")
    base = predict_base(pipe)
    api.load_adapter(pipe, "cat.safetensors")
    adapted = predict_base(pipe)
    assert not torch.equal(adapted, base)
    api.remove_adapter(pipe)
    assert api.export_lora("cat.safetensors", "lora.safetensors") == 0.0
    pipe.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    torch.testing.assert_close(predict_base(pipe), adapted, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def predict_base(pipe):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 16, 16, generator=generator)
    states = pipe.encode_prompt("an emoji of sks cat", "cpu", 1, False)[0]
    return pipe.unet(latents, torch.tensor([500]), states).sample


def test_every_public_function_has_an_example_and_stands_on_the_page():
    for name in api.__all__:
        found = getattr(api, name)
        if callable(found) and not isinstance(found, type):
            assert "Example:" in found.__doc__, name
            assert ">>>" in found.__doc__, name
        if name != "__version__":
            assert f"`{name}" in PAGE, name
    assert set(api.__all__) <= set(dir(api))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        api.nothing  # noqa: B018
    assert (ROOT / "effilora_diffusion" / "py.typed").is_file()


def test_every_kind_of_host_takes_and_gives_back_an_adapter(host, tmp_path):
    thing, config = host
    model = host_model(thing)
    before = predict(model)
    adapter = api.attach(thing, randomise(api.create_adapter(thing, config), heads=0.4), "cat")
    assert list(adapters_of(model)) == ["cat"]
    adapted = predict(model)
    assert not torch.allclose(adapted, before, rtol=1e-2, atol=1e-3)
    api.merge(thing, "cat")
    torch.testing.assert_close(predict(model), adapted, rtol=1e-3, atol=1e-4)
    api.unmerge(thing, "cat")
    assert torch.equal(predict(model), adapted)
    api.save_adapter(adapter, tmp_path / "cat.safetensors", thing)
    api.detach(thing, "cat")
    assert torch.equal(predict(model), before)

    loaded = api.load_adapter(thing, tmp_path / "cat.safetensors", scale=0.5)
    again = api.load_adapter(thing, tmp_path / "cat.safetensors", scale=0.5)
    assert list(adapters_of(model)) == ["cat", "cat_2"]
    torch.testing.assert_close(predict(model), adapted, rtol=1e-3, atol=1e-4)
    api.remove_adapter(thing, again)
    assert list(adapters_of(model)) == ["cat"]
    loaded.strength = 1.0
    assert torch.equal(predict(model), adapted)
    api.remove_adapter(thing, "cat")
    assert torch.equal(predict(model), before)
    with pytest.raises(EffiLoRAError, match="not attached"):
        api.remove_adapter(thing, loaded)


def test_what_is_neither_pipeline_nor_model_is_refused():
    with pytest.raises(EffiLoRAError, match="neither a UNet nor a transformer"):
        api.create_adapter(object())


def test_a_saved_adapter_knows_its_component_and_exports_for_stock_pipelines(tmp_path):
    pipe = build_tiny_pipeline()
    adapter = api.attach(
        pipe, randomise(api.create_adapter(pipe, EffiLoRAConfig(alpha=8.0), a_start="kaiming"), heads=0.3)
    )
    adapted = predict(pipe.unet)
    with pytest.raises(EffiLoRAError, match="give the model"):
        api.save_adapter(adapter, tmp_path / "cat.safetensors", run=lambda: predict(pipe.unet))
    api.save_adapter(adapter, tmp_path / "uncalibrated.safetensors", pipe)
    with pytest.raises(EffiLoRAError, match="needs calibration"):
        api.export_lora(tmp_path / "uncalibrated.safetensors", tmp_path / "lora.safetensors")
    api.save_adapter(adapter, tmp_path / "cat.safetensors", pipe, run=lambda: predict(pipe.unet))
    error = api.export_lora(tmp_path / "cat.safetensors", tmp_path / "lora.safetensors")
    assert 0 < error < 0.6
    api.detach(pipe)
    base = predict(pipe.unet)
    assert all(name.startswith("unet.") for name in load_file(tmp_path / "lora.safetensors"))
    pipe.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    fitted = predict(pipe.unet)
    assert (fitted - adapted).norm() < 0.7 * (adapted - base).norm()


def test_an_adapter_of_a_language_model_exports_as_a_peft_folder(tmp_path):
    model = build_language("llama")
    config = EffiLoRAConfig(alpha=8.0, routing="static", target_modules=("paper",))
    adapter = api.attach(model, randomise(api.create_adapter(model, config), heads=0.3))
    adapted = predict(model)
    api.save_adapter(adapter, tmp_path / "a.safetensors", model)
    api.detach(model)
    assert api.export_lora(tmp_path / "a.safetensors", tmp_path / "peft") == 0.0
    from peft import PeftModel

    with torch.no_grad():
        found = PeftModel.from_pretrained(model, tmp_path / "peft")(rows()).logits
    torch.testing.assert_close(found, adapted, rtol=1e-3, atol=1e-4)

"""Quantised bases: the adapter computes in its own dtype beside weights that it never touches."""

import importlib.util

import bitsandbytes as bnb
import pytest
import torch
from conftest import randomise
from helpers import make_subject, settings, trainer
from tiny_families import build, draw
from torch import nn

from effilora_diffusion import EffiLoRAConfig, EffiLoRAError, detach, load_adapter
from effilora_diffusion.core.attachment import merge
from effilora_diffusion.core.fingerprint import model_hash
from effilora_diffusion.core.load import host_model
from effilora_diffusion.diffusion.adapters.processors import attach, create_adapter
from effilora_diffusion.diffusion.config import TrainingConfig
from effilora_diffusion.diffusion.models import make_family
from effilora_diffusion.diffusion.models.pipelines import load_pipeline, quantization
from effilora_diffusion.diffusion.training.dry_run import activation_bytes

PROMPT = "a red cat"
KINDS = ("torchao-int8", "torchao-float8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("flux")
    build("flux").save_pretrained(place)
    return place


def weights(model):
    """Every weight as it is stored, the parts of quantised ones."""
    found = {}
    for name, value in model.named_parameters():
        if not name.startswith("effilora"):
            inner = value.__tensor_flatten__()[0] if hasattr(value, "__tensor_flatten__") else []
            parts = {f"{name}.{part}": getattr(value, part) for part in inner} or {name: value}
            found |= {key: part.detach().clone() for key, part in parts.items()}
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_base_is_trained_on_and_left_as_it_was(folder, kind, tmp_path, capsys):
    options = {"quantization": kind, "resolution": 64, "num_validation_images": 0, "learning_rate": 3e-2}
    subject = make_subject(tmp_path / "s", 2, size=(64, 64))
    run = trainer(folder, subject, tmp_path / "out", max_train_steps=20, **options)
    model, before, loss = run.family.model, weights(run.family.model), run._validation_loss(0)
    assert type(model.get_submodule("transformer_blocks.0.attn.to_q").weight.detach()) is not torch.Tensor
    assert all(part.dtype == torch.float32 for part in run.adapter.parameters())
    run.run()
    assert run._validation_loss(0) < 0.9 * loss
    run.family.pipe.to("cpu")  # what was looked at before the run can still be moved
    after = weights(model)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert "weights 0.1 MB" in capsys.readouterr().out  # a quarter of what float32 takes
    with pytest.raises(EffiLoRAError, match="quantised"):
        merge(host_model(adapted_with_static_gates(folder, kind)))


def adapted_with_static_gates(folder, kind):
    pipe = load_pipeline(str(folder), quantization_config=quantization(kind, torch.float32))
    model = host_model(pipe)
    attach(model, randomise(create_adapter(model, EffiLoRAConfig(routing="static"))))
    return pipe


def test_an_adapter_of_the_whole_base_fits_the_quantised_one_without_a_word(folder, tmp_path, caplog):
    subject = make_subject(tmp_path / "s", 2, size=(64, 64))
    options = {"resolution": 64, "num_validation_images": 0, "learning_rate": 3e-2, "max_train_steps": 20}
    run = trainer(folder, subject, tmp_path / "out", **options)
    run.run()
    expected = draw(run.family.pipe, "flux", PROMPT)
    pipe = load_pipeline(str(folder), quantization_config=quantization("torchao-int8", torch.float32))
    base = draw(pipe, "flux", PROMPT)
    load_adapter(pipe, tmp_path / "out")
    assert not [record for record in caplog.records if record.name.startswith("effilora")]
    found = draw(pipe, "flux", PROMPT)
    assert (found - expected).abs().mean() < 0.2 * (found - base).abs().mean()


def quantise_blocks(model, bits):
    """Replace the linear layers of the transformer blocks by those of bitsandbytes."""
    for path, part in list(model.named_modules()):
        if type(part) is nn.Linear and "blocks" in path:
            sizes = (part.in_features, part.out_features, part.bias is not None)
            if bits == 4:
                new = bnb.nn.Linear4bit(*sizes, compute_dtype=torch.float32, quant_type="nf4")
                new.weight = bnb.nn.Params4bit(part.weight.data, requires_grad=False, quant_type="nf4")
            else:
                new = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
                new.weight = bnb.nn.Int8Params(part.weight.data, requires_grad=False, has_fp16_weights=False)
            new.bias = part.bias
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, new.to("cpu"))


@pytest.mark.parametrize("bits", [4, 8])
def test_layers_of_bitsandbytes_are_adapted_exactly_and_give_gradients(bits):
    pipe = build("sd15")
    quantise_blocks(pipe.unet, bits)
    before = draw(pipe, "sd15", PROMPT)
    adapter = attach(pipe.unet, create_adapter(pipe.unet, EffiLoRAConfig(routing="static")))
    assert torch.equal(draw(pipe, "sd15", PROMPT), before)
    randomise(adapter)
    assert (draw(pipe, "sd15", PROMPT) - before).abs().mean() > 1
    states = torch.randn(1, 77, pipe.unet.config.cross_attention_dim)
    pipe.unet(torch.randn(1, 4, 8, 8), 500, states).sample.square().mean().backward()
    assert all(part.grad.abs().max() > 0 for part in adapter.parameters())
    with pytest.raises(EffiLoRAError, match="quantised"):
        merge(pipe.unet)
    detach(pipe.unet)
    assert torch.equal(draw(pipe, "sd15", PROMPT), before)


def test_layers_of_bitsandbytes_are_not_touched_by_the_report():
    family = make_family(build("flux"), torch.device("cpu"), 32)
    quantise_blocks(family.model, 4)
    family.model.hf_quantizer = object()  # as diffusers marks what it has quantised
    assert activation_bytes(TrainingConfig(resolution=64), family, PROMPT) is None
    assert model_hash(family.model) is None


def test_a_single_file_can_t_be_quantised(tmp_path):
    file, chosen = tmp_path / "model.safetensors", quantization("torchao-int8", torch.float32)
    file.write_bytes(b"")
    with pytest.raises(EffiLoRAError, match="not a single file"):
        load_pipeline(str(file), quantization_config=chosen)


@pytest.mark.parametrize("kind", ["bnb-8bit", "bnb-4bit"])
def test_bitsandbytes_is_refused_on_a_cpu(folder, kind, tmp_path):
    with pytest.raises(EffiLoRAError, match="needs a GPU"):
        trainer(folder, make_subject(tmp_path / "s"), tmp_path / "out", quantization=kind)


@pytest.mark.parametrize(("kind", "library"), [("bnb-4bit", "bitsandbytes"), ("torchao-int8", "torchao")])
def test_a_missing_library_is_named(kind, library, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EffiLoRAError, match=f"pip install {library}"):
        quantization(kind, torch.float32)


def test_unknown_quantisations_are_refused(folder, tmp_path):
    with pytest.raises(EffiLoRAError, match="--quantization must be one of"):
        settings(folder, tmp_path, tmp_path / "out", quantization="int2")

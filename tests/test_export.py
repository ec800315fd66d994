"""What a trained adapter is worth elsewhere: stock diffusers, kohya, PEFT, a merged model, and our own loader."""

import json

import numpy as np
import pytest
import torch
from conftest import build_tiny_pipeline, randomise, tiny_unet, unet_input
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from helpers import make_subject, same_content, trainer
from peft import PeftModel
from safetensors import safe_open

from effilora_diffusion import EffiLoRAConfig, EffiLoRAError, export_lora, load_adapter, remove_adapter
from effilora_diffusion.core import AdapterFile, adapters_of, load_adapter_file, save_adapter_file
from effilora_diffusion.diffusion.adapters.processors import create_adapter
from effilora_diffusion.diffusion.sampling.generate import draw_images

KINDS = {"static": {"routing": "static"}, "one head": {"heads": 1, "lora_alpha": 8.0}, "token": {"routing": "token"}}
EXACT = ("static", "one head")


@pytest.fixture(scope="module")
def runs(tiny_pipeline, tmp_path_factory):
    """Output folders of short runs at a high learning rate, by kind of adapter."""
    folder = tmp_path_factory.mktemp("runs")
    subject = make_subject(folder / "subject", 2)
    for kind, options in KINDS.items():
        run = trainer(
            tiny_pipeline,
            subject,
            folder / kind,
            **options,
            learning_rate=0.2,
            max_train_steps=4,
            num_validation_images=0,
        )
        run.run()
    return {kind: folder / kind for kind in KINDS}


def fresh(model):
    pipe = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe):
    (image,) = draw_images(pipe, ["a sks cat"], [0], 3, 3.0, width=32, height=32)
    return np.asarray(image).astype(int)


@pytest.fixture(scope="module")
def base(tiny_pipeline):
    return draw(fresh(tiny_pipeline))


@pytest.fixture(scope="module")
def adapted(tiny_pipeline, runs):
    """The image of each adapter, drawn with our own loader."""
    found = {}
    for kind, folder in runs.items():
        pipe = fresh(tiny_pipeline)
        load_adapter(pipe, folder)
        found[kind] = draw(pipe)
    return found


def distance(one, other):
    return np.abs(one - other).max()


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_change_the_image_clearly(base, adapted, kind):
    assert distance(base, adapted[kind]) > 20  # else nothing below would prove anything


# ------------------------------------------------------------------------------------------------ plain LoRA elsewhere


@pytest.mark.parametrize("kind", EXACT)
def test_stock_diffusers_loads_the_output_folder_and_draws_the_same(tiny_pipeline, runs, adapted, kind):
    pipe = fresh(tiny_pipeline)
    pipe.load_lora_weights(str(runs[kind]))
    assert distance(draw(pipe), adapted[kind]) <= 2


def test_token_routing_exports_with_a_small_stored_error(tiny_pipeline, runs, base, adapted):
    pipe = fresh(tiny_pipeline)
    pipe.load_lora_weights(str(runs["token"]))
    found = draw(pipe)
    assert np.abs(found - adapted["token"]).mean() < 0.5 * np.abs(base - adapted["token"]).mean()
    stored = load_adapter_file(runs["token"] / "effilora.safetensors").metadata["export_error"]
    assert 0 < stored < 0.8
    with safe_open(runs["token"] / "pytorch_lora_weights.safetensors", "pt") as file:
        facts = json.loads(file.metadata()["effilora_export"])
    assert facts["relative_output_error"] == stored
    assert facts["exact"] is False


@pytest.mark.parametrize("kind", KINDS)
def test_export_returns_the_stored_error_and_zero_where_it_is_exact(runs, tmp_path, kind):
    error = export_lora(runs[kind], tmp_path / "lora.safetensors")
    metadata = load_adapter_file(runs[kind] / "effilora.safetensors").metadata
    assert error == metadata["export_error"]
    assert (error == 0) == (kind in EXACT)
    with safe_open(tmp_path / "lora.safetensors", "pt") as file:
        facts = json.loads(file.metadata()["effilora_export"])
    assert facts["source_sha256"] == load_adapter_file(runs[kind] / "effilora.safetensors").sha256


def test_export_of_a_run_is_the_file_that_the_run_wrote(runs, tmp_path):
    (tmp_path / "folder").mkdir()
    for output in (tmp_path / "a.safetensors", tmp_path / "folder", tmp_path / "new"):
        export_lora(runs["token"] / "effilora.safetensors", output)
    expected = runs["token"] / "pytorch_lora_weights.safetensors"
    for name in ("a.safetensors", "folder/pytorch_lora_weights.safetensors", "new/pytorch_lora_weights.safetensors"):
        assert same_content(tmp_path / name, expected), name


@pytest.mark.parametrize("kind", KINDS)
def test_kohya_file_loads_in_diffusers_and_draws_the_same(tiny_pipeline, runs, tmp_path, kind):
    export_lora(runs[kind], tmp_path / "kohya.safetensors", "kohya")
    images = []
    for source in (runs[kind] / "pytorch_lora_weights.safetensors", tmp_path / "kohya.safetensors"):
        pipe = fresh(tiny_pipeline)
        pipe.load_lora_weights(str(source.parent), weight_name=source.name)
        images.append(draw(pipe))
    assert distance(*images) <= 1


def test_kohya_file_has_the_names_and_facts_that_other_programs_ask_for(runs, tmp_path):
    export_lora(runs["static"], tmp_path / "kohya.safetensors", "kohya")
    with safe_open(tmp_path / "kohya.safetensors", "pt") as file:
        metadata, keys = file.metadata(), set(file.keys())
        stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0"
        assert float(file.get_tensor(f"{stem}.alpha")) == 4.0
        assert file.get_tensor(f"{stem}.lora_down.weight").shape == (4, 64)
    assert {key.split(".", 1)[1] for key in keys} == {"alpha", "lora_down.weight", "lora_up.weight"}
    assert len(keys) == 3 * 32
    assert metadata["ss_network_module"] == "networks.lora"
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "4")
    assert metadata["modelspec.trigger_phrase"] == "a sks cat"


@pytest.mark.parametrize("kind", KINDS)
def test_peft_folder_gives_the_same_unet_output(tiny_pipeline, runs, tmp_path, kind):
    export_lora(runs[kind], tmp_path / "peft", "peft")
    unet = UNet2DConditionModel.from_pretrained(tiny_pipeline, subfolder="unet")
    plain = unet(**unet_input()).sample
    model = PeftModel.from_pretrained(unet, tmp_path / "peft").eval()
    pipe = fresh(tiny_pipeline)
    if kind in EXACT:
        load_adapter(pipe, runs[kind])
    else:
        pipe.load_lora_weights(str(runs[kind]))
    with torch.no_grad():
        found, expected = model(**unet_input()).sample, pipe.unet(**unet_input()).sample
    assert torch.allclose(found, expected, atol=1e-4)
    assert (found - plain).abs().max() > 0.05


@pytest.mark.parametrize("kind", EXACT)
def test_merged_model_draws_the_same_without_any_adapter(tiny_pipeline, runs, adapted, tmp_path, kind):
    export_lora(runs[kind], tmp_path / "merged", "merged")
    assert distance(draw(fresh(tmp_path / "merged")), adapted[kind]) <= 2
    with pytest.raises(EffiLoRAError, match="is not empty"):
        export_lora(runs[kind], tmp_path / "merged", "merged", str(tiny_pipeline))


def other_model(folder):
    """A pipeline whose UNet reads text of another width, and its folder."""
    pipe = build_tiny_pipeline()
    torch.manual_seed(0)
    pipe.unet = UNet2DConditionModel(**{**tiny_unet().config, "cross_attention_dim": 16})
    pipe.save_pretrained(folder)
    return pipe


def test_merging_into_another_architecture_is_refused_and_writes_nothing(runs, tmp_path):
    other_model(tmp_path / "model")
    with pytest.raises(EffiLoRAError, match="made for another base model"):
        export_lora(runs["static"], tmp_path / "merged", "merged", str(tmp_path / "model"))
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("format", ["diffusers", "kohya", "peft", "merged"])
def test_output_that_cannot_be_written_is_our_error(runs, tiny_pipeline, tmp_path, format):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(EffiLoRAError, match="could not be written"):
        export_lora(runs["static"], tmp_path / "file" / "x.safetensors", format, str(tiny_pipeline))


def test_routed_adapter_without_calibration_and_unknown_format_are_refused(runs, tmp_path):
    adapter = randomise(create_adapter(tiny_unet(), EffiLoRAConfig()))
    with pytest.raises(EffiLoRAError, match="needs calibration"):
        export_lora(AdapterFile(adapter), tmp_path / "a.safetensors")
    with pytest.raises(EffiLoRAError, match="--format must be one of"):
        export_lora(runs["static"], tmp_path / "a.safetensors", "onnx")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------ our own loader


def test_strength_zero_and_removal_give_the_base_bit_for_bit(tiny_pipeline, runs, base, adapted):
    pipe = fresh(tiny_pipeline)
    processors = {name: type(p) for name, p in pipe.unet.attn_processors.items()}
    adapter = load_adapter(pipe, runs["token"], scale=0.0)
    assert distance(draw(pipe), base) == 0
    adapter.strength = 1.0
    assert distance(draw(pipe), adapted["token"]) == 0
    adapter.enabled = False
    assert distance(draw(pipe), base) == 0
    adapter.enabled = True
    remove_adapter(pipe)
    assert distance(draw(pipe), base) == 0
    assert {name: type(p) for name, p in pipe.unet.attn_processors.items()} == processors
    assert not adapters_of(pipe.unet)


def test_strength_scales_the_change(tiny_pipeline, runs):
    outputs = []
    for scale in (0.0, 0.001, 0.002, -0.001):
        pipe = fresh(tiny_pipeline)
        load_adapter(pipe, runs["static"], scale=scale)
        with torch.no_grad():
            outputs.append(pipe.unet(**unet_input()).sample.double())
    changes = [output - outputs[0] for output in outputs[1:]]
    assert torch.allclose(changes[1], 2 * changes[0], atol=0.05 * float(changes[0].abs().max()))
    assert torch.allclose(changes[2], -changes[0], atol=0.05 * float(changes[0].abs().max()))


def test_stacked_adapters_act_together_and_leave_in_any_order(tiny_pipeline, runs, base, adapted):
    pipe = fresh(tiny_pipeline)
    first = load_adapter(pipe, runs["token"])
    second = load_adapter(pipe, runs["static"], name="style")
    both = draw(pipe)
    assert distance(both, adapted["token"]) > 5
    assert distance(both, adapted["static"]) > 5
    first.strength = 0
    assert distance(draw(pipe), adapted["static"]) <= 1
    first.strength = 1
    remove_adapter(pipe, "style")
    assert distance(draw(pipe), adapted["token"]) == 0
    remove_adapter(pipe, first)
    assert distance(draw(pipe), base) == 0
    with pytest.raises(EffiLoRAError, match="not attached"):
        remove_adapter(pipe, second)


def test_names_come_from_the_files_and_never_collide(tiny_pipeline, runs, monkeypatch):
    pipe = fresh(tiny_pipeline)
    monkeypatch.chdir(runs["static"])
    for path in (runs["token"], runs["token"], runs["one head"] / "effilora.safetensors", "."):
        load_adapter(pipe, path)
    assert list(adapters_of(pipe.unet)) == ["token", "token_2", "effilora", "static"]
    with pytest.raises(EffiLoRAError, match="'token' is already attached"):
        load_adapter(pipe, runs["static"], name="token")
    with pytest.raises(EffiLoRAError, match="no adapter named 'other'"):
        remove_adapter(pipe, "other")


def test_adapter_for_another_architecture_is_refused_and_the_pipeline_untouched(runs, tmp_path):
    pipe = other_model(tmp_path / "model")
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    processors = pipe.unet.attn_processors
    with pytest.raises(EffiLoRAError, match="made for another base model"):
        load_adapter(pipe, runs["token"])
    after = pipe.unet.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(pipe.unet.attn_processors[name] is processors[name] for name in processors)
    assert not hasattr(pipe.unet, "effilora")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pipe.unet.modules())


def test_another_model_of_the_same_shape_and_an_idle_adapter_are_warned_of(tiny_pipeline, runs, tmp_path, caplog):
    pipe = fresh(tiny_pipeline)
    load_adapter(pipe, runs["token"])
    assert caplog.text == ""
    remove_adapter(pipe)
    with torch.no_grad():
        pipe.unet.conv_in.weight.mul_(2)
    load_adapter(pipe, runs["token"])
    assert f"was trained on {tiny_pipeline}" in caplog.text
    save_adapter_file(tmp_path / "idle.safetensors", AdapterFile(create_adapter(pipe.unet, EffiLoRAConfig())))
    load_adapter(pipe, tmp_path / "idle.safetensors")
    assert "the adapter idle changes nothing" in caplog.text


def test_pipeline_without_a_network_to_adapt_is_refused(runs):
    with pytest.raises(EffiLoRAError, match="neither a UNet nor a transformer"):
        load_adapter(object(), runs["token"])

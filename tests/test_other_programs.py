"""Files for other programs: the names that their loaders know, and the facts by which they tell models apart."""

import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import build_tiny_pipeline, randomise
from diffusers import UNet2DConditionModel
from helpers import make_subject, trainer
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_families import build, draw
from tiny_families import randomise as randomise_model

from effilora_diffusion import EffiLoRAConfig, EffiLoRAError, create_adapter, export_lora
from effilora_diffusion.core import AdapterFile, load_adapter_file, save_adapter_file, to_lora
from effilora_diffusion.core.convert import PlainLoRA
from effilora_diffusion.diffusion.adapters.export import diffusers_tensors, kohya_tensors
from effilora_diffusion.diffusion.adapters.original_names import original_factors
from effilora_diffusion.diffusion.models import FAMILIES, family_class, make_family
from effilora_diffusion.diffusion.models.architectures import LUMINA, SDXL

RULES = json.loads((Path(__file__).parent / "loader_rules.json").read_text())
"""Names that ComfyUI's key maps hold for the transformers it knows, N for a number."""

BOTH = ("attention", "feed_forward")


def plain(pipe, component, targets=BOTH, **metadata):
    """A static adapter of random weights for ``pipe`` as a file's content."""
    config = EffiLoRAConfig(rank=2, heads=2, routing="static", target_modules=targets)
    adapter = randomise(create_adapter(pipe, config))
    return AdapterFile(adapter, {"component": component, **metadata})


@pytest.mark.parametrize("name", RULES)
def test_comfyui_knows_every_layer_of_the_diffusers_file(name):
    content = plain(build(name), "transformer")
    rules = [re.compile(re.escape(rule).replace("\\(", "(").replace("\\|", "|").replace("\\)", ")").replace("N", r"\d+"))
             for rule in RULES[name]]  # fmt: skip
    keys = diffusers_tensors({"transformer": to_lora(content.adapter)})
    layers = {key.removesuffix(".lora_A.weight").removesuffix(".lora_B.weight") for key in keys}
    assert len(keys) == 2 * len(layers)
    assert [layer for layer in layers if not any(rule.fullmatch(layer) for rule in rules)] == []
    assert [rule.pattern for rule in rules if not any(rule.fullmatch(layer) for layer in layers)] == []


def test_families_that_comfyui_reads_are_those_with_a_rule():
    known = {family_class(build(name)) for name in RULES} | {
        family for family in FAMILIES if family.component == "unet"
    }
    assert {family for family in FAMILIES if family.comfyui} == known | {family_class(build("lumina2"))}


def unet(**config):
    """A UNet at its full size, without values."""
    with torch.device("meta"):
        return UNet2DConditionModel(sample_size=64, **config)


SD15 = {"cross_attention_dim": 768}
XL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
LAYERS = [
    f"{attention}_{layer}"
    for attention, layer in itertools.product(("attn1", "attn2"), ("to_q", "to_k", "to_v", "to_out_0"))
]


def expected_sd15():
    """The modules of sd-scripts' UNet of Stable Diffusion 1.5."""
    places = [f"down_blocks_{block}_attentions_{index}" for block in range(3) for index in range(2)]
    places += ["mid_block_attentions_0"]
    places += [f"up_blocks_{block}_attentions_{index}" for block in range(1, 4) for index in range(3)]
    return {f"lora_unet_{place}_transformer_blocks_0_{layer}" for place in places for layer in LAYERS}


def expected_sdxl():
    """The modules of sd-scripts' UNet of SDXL, which are those of the original."""
    places = {f"input_blocks_{index}_1": depth for index, depth in ((4, 2), (5, 2), (7, 10), (8, 10))}
    places |= {"middle_block_1": 10}
    places |= {f"output_blocks_{index}_1": 10 if index < 3 else 2 for index in range(6)}
    return {
        f"lora_unet_{place}_transformer_blocks_{index}_{layer}"
        for place, depth in places.items()
        for index in range(depth)
        for layer in LAYERS
    }


@pytest.mark.parametrize(
    ("config", "expected"), [(SD15, expected_sd15()), (XL, expected_sdxl())], ids=["sd15", "sdxl"]
)
def test_the_kohya_file_names_every_attention_layer_as_sd_scripts_does(config, expected):
    content = plain(unet(**config), "unet", ("attention",), base_class="UNet2DConditionModel")
    found = kohya_tensors({"unet": to_lora(content.adapter)}, content)
    assert {key.split(".")[0] for key in found} == expected
    assert len(expected) == {768: 128, 2048: 560}[config["cross_attention_dim"]]
    assert {key.split(".", 1)[1] for key in found} == {"lora_down.weight", "lora_up.weight", "alpha"}


def test_every_other_linear_of_sdxl_has_its_original_name():
    model = unet(**XL)
    paths = [path for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    pair = PlainLoRA(torch.zeros(1, 1), torch.zeros(1, 1))
    names = list(original_factors(dict.fromkeys(paths, pair), SDXL))
    assert len(set(names)) == len(paths)
    places = ("time_embed.", "label_emb.0.", "input_blocks.", "middle_block.", "output_blocks.")
    assert [name for name in names if not name.startswith(places)] == []
    assert {"input_blocks.1.0.emb_layers.1", "input_blocks.4.0.emb_layers.1", "output_blocks.8.0.emb_layers.1"} <= set(
        names
    )
    assert {"middle_block.0.emb_layers.1", "middle_block.2.emb_layers.1", "input_blocks.8.1.proj_in"} <= set(names)


def test_diffusers_draws_the_same_from_the_original_names_of_sdxl(tmp_path):
    pipe = build("sdxl")
    config = {**pipe.unet.config, "layers_per_block": 2}
    pipe.register_modules(unet=UNet2DConditionModel.from_config(config))
    randomise_model(pipe.unet, torch.Generator().manual_seed(0))
    content = plain(pipe, "unet", architecture=SDXL)
    for name in ("diffusers", "kohya"):
        export_lora(content, tmp_path / f"{name}.safetensors", name)
    base, drawn = draw(pipe, "sdxl", "a cat"), []
    for name in ("diffusers", "kohya"):
        pipe.load_lora_weights(str(tmp_path), weight_name=f"{name}.safetensors")
        drawn.append(draw(pipe, "sdxl", "a cat"))
        pipe.unload_lora_weights()
    assert (drawn[0] - base).abs().max() > 5
    assert torch.equal(drawn[0], drawn[1])


def test_lumina_2_has_one_lora_for_its_fused_projection():
    pipe = build("lumina2")
    content = plain(pipe, "transformer", base_class="Lumina2Transformer2DModel")
    factors = to_lora(content.adapter)
    found = kohya_tensors({"unet": factors}, content)
    layers = {re.sub(r"_\d+_", "_N_", key.split(".")[0]) for key in found}
    kinds = [f"lora_unet_{kind}_N" for kind in ("layers", "context_refiner", "noise_refiner")]
    names = ("attention_qkv", "attention_out", "feed_forward_w1", "feed_forward_w2", "feed_forward_w3")
    assert layers == {f"{kind}_{name}" for kind in kinds for name in names}
    parts = [factors[f"layers.1.attn.{name}"] for name in ("to_q", "to_k", "to_v")]
    fused = (
        found["lora_unet_layers_1_attention_qkv.lora_up.weight"]
        @ found["lora_unet_layers_1_attention_qkv.lora_down.weight"]
    )
    torch.testing.assert_close(fused, torch.cat([pair.up @ pair.down for pair in parts]), rtol=0, atol=1e-6)
    assert len(found["lora_unet_layers_1_attention_qkv.lora_down.weight"]) == 2  # they share their A
    unshared = {path: PlainLoRA(pair.down + index, pair.up) for index, (path, pair) in enumerate(factors.items())}
    stacked = original_factors(unshared, LUMINA)["layers.1.attention.qkv"]
    parts = [unshared[f"layers.1.attn.{name}"] for name in ("to_q", "to_k", "to_v")]
    torch.testing.assert_close(
        stacked.up @ stacked.down, torch.cat([pair.up @ pair.down for pair in parts]), rtol=1e-5, atol=1e-4
    )
    del factors["layers.1.attn.to_k"]
    with pytest.raises(EffiLoRAError, match=r"does not act on to_k of layers\.1\.attn"):
        original_factors(factors, LUMINA)


def test_lumina_2_s_names_are_those_that_diffusers_converts_from():
    """The single-file loader's own conversion, the other way round."""
    from diffusers.loaders.single_file_utils import convert_lumina2_to_diffusers

    pair = PlainLoRA(torch.zeros(1, 1), torch.zeros(1, 1))
    model = build("lumina2").transformer
    ours = {path for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    others = [path for path in ours if not path.endswith(("to_q", "to_k", "to_v"))]
    names = list(original_factors(dict.fromkeys(others, pair), LUMINA))
    converted = convert_lumina2_to_diffusers({f"{name}.weight": torch.zeros(1) for name in names})
    assert {name.removesuffix(".weight") for name in converted} == set(others)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    build_tiny_pipeline().save_pretrained(folder / "secret" / "model")
    options = {"num_validation_images": 0, "learning_rate": 0.1, "max_train_steps": 2}
    for name in ("out", "again"):
        trainer(folder / "secret" / "model", make_subject(folder / "s", 1), folder / name, **options).run()
    return folder


def test_every_unet_run_writes_the_file_for_comfyui_and_a1111(run):
    with safe_open(run / "out" / "pytorch_lora_weights_kohya.safetensors", "pt") as file:
        facts, keys = file.metadata(), set(file.keys())
    assert {key.split(".")[0] for key in keys} >= {"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"}
    assert facts["ss_network_module"] == "networks.lora"
    assert (facts["ss_network_dim"], facts["ss_network_alpha"]) == ("4", "4")
    assert (facts["ss_base_model_version"], facts["ss_v2"]) == ("sd_v1", "False")
    assert facts["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert facts["modelspec.trigger_phrase"] == "a sks cat"
    assert facts["modelspec.resolution"] == "32x32"
    assert facts["ss_sd_model_name"] == "model"


def test_no_path_of_this_machine_stands_in_what_is_passed_on(run):
    for name in ("pytorch_lora_weights.safetensors", "pytorch_lora_weights_kohya.safetensors", "README.md"):
        assert b"secret" not in (run / "out" / name).read_bytes()


def test_plain_files_are_the_same_bytes_again(run):
    for name in ("pytorch_lora_weights.safetensors", "pytorch_lora_weights_kohya.safetensors"):
        assert (run / "out" / name).read_bytes() == (run / "again" / name).read_bytes()
        assert load_file(run / "out" / name)


def test_diffusers_reads_rank_and_alpha_of_its_own_metadata(run):
    state, facts = type(build_tiny_pipeline()).lora_state_dict(str(run / "out"), return_lora_metadata=True)[::2]
    assert {key.split(".")[0] for key in state} == {"unet"}
    assert (facts["unet.r"], facts["unet.lora_alpha"]) == (4, 4)
    assert set(facts["unet.target_modules"]) == {key.removeprefix("unet.").rsplit(".lora_", 1)[0] for key in state}


A1111 = {
    "sdxl": lambda facts: facts.get("ss_base_model_version", "").startswith("sdxl_"),
    "sd2": lambda facts: facts.get("ss_v2") == "True",
}
"""By which A1111 sorts the LoRAs in its list; all others are taken for Stable Diffusion 1."""


@pytest.mark.parametrize(
    ("name", "changes", "version"),
    [("sd15", {}, "sd1"), ("sdxl", {}, "sdxl"), ("sd21", {"cross_attention_dim": 1024}, "sd2")],
)
def test_a1111_takes_the_file_for_the_model_it_was_made_for(name, changes, version, tmp_path):
    pipe = build(name)
    if changes:
        pipe.register_modules(unet=UNet2DConditionModel.from_config({**pipe.unet.config, **changes}))
    family = make_family(pipe, torch.device("cpu"))
    facts = {"architecture": family.architecture, "prediction_type": pipe.scheduler.config.prediction_type}
    export_lora(plain(pipe, "unet", **facts), tmp_path / "a.safetensors", "kohya")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        written = file.metadata()
    assert next((kind for kind, rule in A1111.items() if rule(written)), "sd1") == version
    assert written["modelspec.prediction_type"] == ("v" if name == "sd21" else "epsilon")
    assert written["modelspec.architecture"] == f"{family.architecture}/lora"


def test_a_plain_file_with_nan_is_never_written(tmp_path):
    content = plain(build("sd15"), "unet")
    with torch.no_grad():
        content.adapter.B[0][0] = float("inf")
    with pytest.raises(EffiLoRAError, match="is not finite"):
        export_lora(content, tmp_path / "a.safetensors", "kohya")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_files_are_saved_in_half_precision_where_that_is_wanted(run, tmp_path, precision, dtype):
    options = {"num_validation_images": 0, "learning_rate": 0.1, "max_train_steps": 2, "save_precision": precision}
    trainer(run / "secret" / "model", make_subject(tmp_path / "s", 1), tmp_path / "out", **options).run()
    for name in ("pytorch_lora_weights.safetensors", "pytorch_lora_weights_kohya.safetensors"):
        weights = {
            key: value for key, value in load_file(tmp_path / "out" / name).items() if not key.endswith(".alpha")
        }
        assert {value.dtype for value in weights.values()} == {dtype}
    half, whole = (
        load_adapter_file(path / "effilora.safetensors").adapter for path in (tmp_path / "out", run / "out")
    )
    assert half.B[0].dtype == torch.float32  # a rounded value in a type that everything computes with
    torch.testing.assert_close(half.B[0], whole.B[0], rtol=1e-2, atol=1e-6)
    assert not torch.equal(half.B[0], whole.B[0])


def size(folder, name):
    return (folder / name).stat().st_size


@pytest.mark.parametrize(("heads", "dtype"), [(1, None), (3, None), (3, torch.float16)])
def test_the_native_file_is_no_larger_than_it_must_be(tmp_path, heads, dtype):
    """At Stable Diffusion 1.5's size: with one head smaller than its LoRA, else its parameters and a tenth at most."""
    adapter = randomise(create_adapter(unet(**SD15), EffiLoRAConfig(rank=8, heads=heads)))
    calibration = {site.name: torch.eye(8).repeat(heads + 1, 1, 1) for site in adapter.sites} if heads > 1 else {}
    content = AdapterFile(adapter, {"component": "unet"}, calibration)
    save_adapter_file(tmp_path / "native.safetensors", content, dtype)
    export_lora(content, tmp_path / "lora.safetensors", "diffusers")
    stored = sum(value.numel() for value in adapter.parameters()) * (dtype or torch.float32).itemsize
    assert size(tmp_path, "native.safetensors") < 1.1 * stored
    if heads == 1:
        assert size(tmp_path, "native.safetensors") < size(tmp_path, "lora.safetensors")

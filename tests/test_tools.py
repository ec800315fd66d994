"""merge, resize and extract: what their files do in stock diffusers, what they lack, and what is refused."""

import json

import pytest
import torch
from conftest import randomise
from diffusers import StableDiffusionPipeline
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers
from helpers import make_subject, trainer
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_families import build

from effilora_diffusion import EffiLoRAConfig, export_lora, save_adapter
from effilora_diffusion.cli import main
from effilora_diffusion.core import EffiLoRAError
from effilora_diffusion.core.convert import PlainLoRA
from effilora_diffusion.core.low_rank import Ranks, low_rank, reduced, weighted_sum
from effilora_diffusion.diffusion.adapters.lora_files import load_plain_lora
from effilora_diffusion.diffusion.adapters.processors import create_adapter

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def load(folder):
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def predicted(pipe):
    """What the UNet says of fixed latents, and the text encoder of a fixed prompt."""
    generator = torch.Generator().manual_seed(3)
    channels, width = pipe.unet.config.in_channels, pipe.unet.config.cross_attention_dim
    latents = torch.randn(2, channels, 8, 8, generator=generator)
    states = torch.randn(2, 5, width, generator=generator)
    return pipe.unet(latents, torch.tensor([10, 700]), states).sample


def with_loras(folder, files, weights):
    """A stock pipeline's prediction with LoRA files at weights."""
    pipe = load(folder)
    for number, file in enumerate(files):
        pipe.load_lora_weights(str(file), adapter_name=f"lora{number}")
    pipe.set_adapters([f"lora{number}" for number in range(len(files))], weights)
    return predicted(pipe)


def write_lora(folder, path, rank, seed, targets=ATTENTION):
    """A LoRA as diffusers' scripts save it: PEFT's on the UNet, with random weights."""
    pipe = load(folder)
    torch.manual_seed(seed)
    pipe.unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights=False))
    pipe.save_lora_weights(path.parent, get_peft_model_state_dict(pipe.unet), weight_name=path.name)
    return path


@pytest.fixture(scope="module")
def files(tiny_pipeline, tmp_path_factory):
    """LoRAs of ranks 4 and 2, the second on other layers as well; a native adapter, and its kohya file."""
    folder = tmp_path_factory.mktemp("loras")
    one = write_lora(tiny_pipeline, folder / "one.safetensors", 4, 0)
    two = write_lora(tiny_pipeline, folder / "two.safetensors", 2, 1, [*ATTENTION, "ff.net.2"])
    quick = {"rank": 2, "learning_rate": 0.1, "num_validation_images": 0, "export_distillation_steps": 0}
    run = trainer(tiny_pipeline, make_subject(folder / "s"), folder / "run", **quick)
    run.run()
    export_lora(folder / "run", folder / "kohya.safetensors", "kohya")
    return {"one": one, "two": two, "run": folder / "run", "kohya": folder / "kohya.safetensors"}


def effilora(*words):
    return main([str(word) for word in words])


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


# --------------------------------------------------------------------------------------------------------- merge


def test_a_sum_is_exactly_both_loras_at_their_weights(tiny_pipeline, files, tmp_path, capsys):
    out = tmp_path / "sum.safetensors"
    assert effilora("merge", files["one"], files["two"], "--weights", "0.7", "-0.3", "--output", out) == 0
    assert "ranks 2 to 6" in capsys.readouterr().out
    expected = with_loras(tiny_pipeline, [files["one"], files["two"]], [0.7, -0.3])
    found = with_loras(tiny_pipeline, [out], [1.0])
    assert torch.allclose(found, expected, atol=2e-5)
    assert (expected - with_loras(tiny_pipeline, [files["one"]], [0.7])).abs().max() > 1e-2
    stated = json.loads(metadata(out)["lora_adapter_metadata"])
    assert stated["unet.rank_pattern"]  # programs that go by it must not take the largest rank for all


def test_native_adapters_and_kohya_files_are_added_too(tiny_pipeline, files, tmp_path, capsys):
    plain, out = files["run"] / "pytorch_lora_weights.safetensors", tmp_path / "sum.safetensors"
    assert effilora("merge", files["run"], files["one"], "--weights", "2", "0.5", "--output", out) == 0
    said = capsys.readouterr().out
    assert "note: the plain form of adapter 1 is itself a fit" in said
    expected = with_loras(tiny_pipeline, [plain, files["one"]], [2.0, 0.5])
    assert torch.allclose(with_loras(tiny_pipeline, [out], [1.0]), expected, atol=2e-5)

    mixed = tmp_path / "mixed.safetensors"
    assert effilora("merge", files["kohya"], files["one"], "--weights", "2", "0.5", "--output", mixed) == 0
    assert "sd-scripts' naming" in capsys.readouterr().out
    assert all(name.startswith("lora_unet_") for name in load_file(mixed))
    assert metadata(mixed)["ss_network_module"] == "networks.lora"
    assert torch.allclose(with_loras(tiny_pipeline, [mixed], [1.0]), expected, atol=2e-5)


def test_text_encoders_of_diffusers_scripts_are_added_and_resized(tiny_pipeline, files, tmp_path):
    """Those scripts call the factors of text encoders otherwise, and state alpha in the file's metadata."""
    pipe, out, none = load(tiny_pipeline), tmp_path / "sum.safetensors", tmp_path / "none.safetensors"
    torch.manual_seed(5)
    options = {"r": 3, "lora_alpha": 6, "init_lora_weights": False}
    pipe.unet.add_adapter(LoraConfig(target_modules=ATTENTION, **options))
    pipe.text_encoder.add_adapter(LoraConfig(target_modules=["q_proj", "out_proj"], **options))
    models = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    saved = [convert_state_dict_to_diffusers(get_peft_model_state_dict(model)) for model in models.values()]
    pipe.save_lora_weights(tmp_path, *saved, weight_name="script.safetensors", **_collate_lora_metadata(models))
    script = tmp_path / "script.safetensors"
    assert any("lora_linear_layer.down" in name for name in load_file(script))

    def states(file, strength):
        stock = load(tiny_pipeline)
        stock.load_lora_weights(str(file), adapter_name="one")
        stock.set_adapters(["one"], [strength])
        return stock.text_encoder(torch.arange(4, 12)[None]).last_hidden_state

    base = load(tiny_pipeline).text_encoder(torch.arange(4, 12)[None]).last_hidden_state
    assert effilora("merge", script, files["one"], "--weights", "0.5", "2", "--output", out) == 0
    expected = with_loras(tiny_pipeline, [script, files["one"]], [0.5, 2.0])
    assert torch.allclose(with_loras(tiny_pipeline, [out], [1.0]), expected, atol=2e-5)
    assert torch.allclose(states(out, 1.0), states(script, 0.5), atol=2e-5)
    assert (states(script, 0.5) - base).abs().max() > 1e-2

    assert effilora("merge", out, script, "--weights", "1", "-0.5", "--rank", "3", "--output", none) == 0
    assert torch.allclose(states(none, 1.0), base, atol=1e-4)  # one layer, one name
    assert effilora("merge", script, "--format", "kohya", "--output", tmp_path / "kohya.safetensors") == 0
    named = {name.partition(".")[0] for name in load_file(tmp_path / "kohya.safetensors")}
    assert any(name.startswith("lora_te_text_model_encoder_layers_0_") for name in named)
    assert load_plain_lora(load(tiny_pipeline), script, "script") == len(named)


def test_a_shared_a_does_not_add_ranks():
    down = torch.randn(2, 5)
    parts = [(PlainLoRA(down, torch.randn(3, 2)), 0.7), (PlainLoRA(down.clone(), torch.randn(3, 2)), 0.3)]
    found = weighted_sum(parts)
    assert found.down.shape == (2, 5)
    expected = sum(weight * pair.up @ pair.down for pair, weight in parts)
    assert torch.allclose(found.up @ found.down, expected, atol=1e-6)


def test_a_sum_of_lower_rank_tells_what_it_lacks(files, tmp_path, capsys):
    out = tmp_path / "sum.safetensors"
    assert (
        effilora("merge", files["one"], files["two"], "--output", out, "--rank", "3", "--save_precision", "fp16") == 0
    )
    said = capsys.readouterr().out
    assert "% of the update missing" in said
    assert {value.dtype for value in load_file(out).values()} == {torch.float16}


@pytest.mark.parametrize("names", [("one", "two"), ("run", "kohya")])
def test_a_base_with_the_sum_in_its_weights(tiny_pipeline, files, tmp_path, names, capsys):
    parts, out = [files[name] for name in names], tmp_path / "model"
    words = ("merge", *parts, "--weights", "0.5", "0.25", "--into", tiny_pipeline, "--output", out)
    assert effilora(*words) == 0
    stock = [file / "pytorch_lora_weights.safetensors" if file.is_dir() else file for file in parts]
    expected = with_loras(tiny_pipeline, stock, [0.5, 0.25])
    assert torch.allclose(predicted(load(out)), expected, atol=2e-5)
    before = (out / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert effilora(*words) == 2
    assert "is not empty" in capsys.readouterr().err
    assert (out / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == before


@pytest.mark.parametrize(("family", "form"), [("sdxl", "kohya"), ("flux", "diffusers")])
def test_other_families_keep_the_names_that_their_programs_know(family, form, tmp_path):
    """A native adapter at a quarter and its own export at a half are three quarters of it, layer by layer."""
    pipe = build(family)
    model = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    adapter = create_adapter(model, EffiLoRAConfig(rank=2, heads=1))
    randomise(adapter)
    save_adapter(adapter, tmp_path / "native.safetensors", pipe)
    whole, out = tmp_path / "whole.safetensors", tmp_path / "sum.safetensors"
    export_lora(tmp_path / "native.safetensors", whole, form)
    words = ("--weights", "0.25", "0.5", "--format", form, "--output", out)
    assert effilora("merge", tmp_path / "native.safetensors", whole, *words) == 0
    expected, found = load_file(whole), load_file(out)
    down, up = ("lora_down", "lora_up") if form == "kohya" else ("lora_A", "lora_B")
    layers = [name for name in expected if down in name]
    assert [name for name in found if down in name] == layers
    for name in layers:
        assert found[name].shape == expected[name].shape  # A is shared, so ranks do not add up
        update, other = (one[name.replace(down, up)] @ one[name] for one in (expected, found))
        assert torch.allclose(other, 0.75 * update, atol=1e-5)
    pipe.load_lora_weights(str(out))
    assert sum(isinstance(part, BaseTunerLayer) for part in model.modules()) == len(layers)


# -------------------------------------------------------------------------------------------------------- resize


def known(values=(8.0, 4.0, 2.0, 1.0)):
    """A pair of rank 4 whose update has these singular values."""
    generator = torch.Generator().manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(9, 4, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(7, 4, generator=generator))
    mix = torch.randn(4, 4, generator=generator)
    return PlainLoRA(torch.linalg.inv(mix) @ right.t(), (left * torch.tensor(values)) @ mix)


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        (Ranks(3), 3),
        (Ranks(9), 4),
        (Ranks(4, "sv_ratio", 3.9), 2),  # above 8 / 3.9
        (Ranks(4, "sv_ratio", 4.1), 3),
        (Ranks(1, "sv_ratio", 4.1), 1),
        (Ranks(4, "sv_fro", 0.9), 2),  # 64 of 85 are less than 0.81, 80 are more
        (Ranks(4, "sv_fro", 0.8), 1),
        (Ranks(4, "sv_cumulative", 0.79), 2),  # 12 of 15 are 0.8
        (Ranks(4, "sv_cumulative", 0.81), 3),
        (Ranks(4, "sv_cumulative", 1.0), 4),
    ],
)
def test_the_rank_is_chosen_by_the_singular_values(ranks, expected):
    pair = known()
    found, error, whole = reduced(pair, ranks)
    assert len(found.down) == expected
    assert whole == pytest.approx(85, rel=1e-5)
    assert error == pytest.approx(sum(value**2 for value in (8, 4, 2, 1)[expected:]), rel=1e-4, abs=1e-6)
    missing = pair.up @ pair.down - found.up @ found.down
    assert float(missing.square().sum()) == pytest.approx(error, rel=1e-3, abs=1e-6)


def test_a_resized_file_is_the_best_of_its_rank(tiny_pipeline, files, tmp_path, capsys):
    out = tmp_path / "small.safetensors"
    assert effilora("resize", files["one"], "--rank", "2", "--output", out) == 0
    old, new, wrong, whole = load_file(files["one"]), load_file(out), 0.0, 0.0
    for name in old:
        if "lora_A" in name:
            up = name.replace("lora_A", "lora_B")
            values = torch.linalg.svdvals(old[up] @ old[name])
            difference = old[up] @ old[name] - new[up] @ new[name]
            assert float(difference.norm()) == pytest.approx(float(values[2:].norm()), rel=1e-3)
            wrong, whole = wrong + float(values[2:].square().sum()), whole + float(values.square().sum())
    assert f"rank 2, {(wrong / whole) ** 0.5:.1%} of the update missing" in capsys.readouterr().out
    with_loras(tiny_pipeline, [out], [1.0])


def test_convolutions_are_resized_in_their_shapes(tiny_pipeline, tmp_path):
    file = write_lora(tiny_pipeline, tmp_path / "conv.safetensors", 4, 0, ["conv1", "to_q"])
    out = tmp_path / "same.safetensors"
    assert (
        effilora("resize", file, "--rank", "4", "--dynamic_method", "sv_fro", "--dynamic_param", "1", "--output", out)
        == 0
    )
    expected = with_loras(tiny_pipeline, [file], [1.0])
    assert torch.allclose(with_loras(tiny_pipeline, [out], [1.0]), expected, atol=2e-5)


# ------------------------------------------------------------------------------------------------------- extract


@pytest.fixture(scope="module")
def tuned(tiny_pipeline, files, tmp_path_factory):
    out = tmp_path_factory.mktemp("tuned") / "model"
    assert effilora("merge", files["one"], "--into", tiny_pipeline, "--output", out) == 0
    return out


def test_what_was_merged_is_extracted_again(tiny_pipeline, tuned, tmp_path, capsys):
    out = tmp_path / "difference.safetensors"
    assert effilora("extract", tuned, tiny_pipeline, "--rank", "4", "--output", out) == 0
    assert "rank 4" in capsys.readouterr().out
    found = with_loras(tiny_pipeline, [out], [1.0])
    assert torch.allclose(found, predicted(load(tuned)), atol=1e-4)
    assert (found - predicted(load(tiny_pipeline))).abs().max() > 1e-2


def test_what_a_lora_can_t_hold_is_told(tiny_pipeline, tuned, tmp_path, capsys):
    pipe = load(tuned)
    with torch.no_grad():
        pipe.unet.conv_in.weight += 0.01 * torch.randn(pipe.unet.conv_in.weight.shape)
        pipe.unet.conv_out.bias += 1
        layer = next(part for name, part in pipe.text_encoder.named_modules() if name.endswith("self_attn.q_proj"))
        layer.weight += 0.1
    pipe.save_pretrained(tmp_path / "more")
    words = ("extract", tmp_path / "more", tiny_pipeline, "--rank", "4")
    assert effilora(*words, "--output", tmp_path / "linears.safetensors") == 0
    said = capsys.readouterr().out
    assert "note: 2 other tensors differ too" in said
    assert "% of the update missing" in said
    all_of_it = ("--conv_rank", "8", "--text_encoders", "--output", tmp_path / "all.safetensors")
    assert effilora(*words, *all_of_it) == 0
    assert "note: 1 other tensors differ too" in capsys.readouterr().out
    names = load_file(tmp_path / "all.safetensors")
    assert any(name.startswith("text_encoder.") for name in names)
    assert names["unet.conv_in.lora_A.weight"].shape[2:] == (3, 3)
    with_loras(tiny_pipeline, [tmp_path / "all.safetensors"], [1.0])


def test_large_matrices_are_approximated_as_well():
    generator = torch.Generator().manual_seed(0)
    update = torch.randn(1100, 5, generator=generator) @ torch.randn(5, 1200, generator=generator)
    state = torch.random.get_rng_state()
    found, error, whole = low_rank(update, 5)
    assert torch.equal(state, torch.random.get_rng_state())
    assert error < 1e-6 * whole
    assert torch.allclose(found.up @ found.down, update, atol=1e-3)


# ------------------------------------------------------------------------------------------------------ refusals


def refused(words, capsys):
    assert effilora(*words) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_mistakes_get_a_sentence(tiny_pipeline, files, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    other = tmp_path / "other.safetensors"
    save_file({"unet.no.such.lora_A.weight": torch.ones(2, 3), "unet.no.such.lora_B.weight": torch.ones(3, 2)}, other)
    wide = tmp_path / "wide.safetensors"
    one = load_file(files["one"])
    first = next(name for name in one if "lora_A" in name)
    save_file({**one, first: torch.ones(4, 99)}, wide)
    lokr = tmp_path / "lokr.safetensors"
    save_file({"lora_unet_x.lokr_w1": torch.ones(2, 2), "lora_unet_x.lokr_w2": torch.ones(2, 2)}, lokr)
    cases = {
        "give as many": ("merge", files["one"], files["two"], "--weights", "1", "--output", out),
        "not all 0": ("merge", files["one"], "--weights", "0", "--output", out),
        "must end in .safetensors": ("merge", files["one"], "--output", tmp_path / "x"),
        "is there already": ("merge", files["one"], "--output", other),
        "no such file": ("merge", tmp_path / "missing", "--output", out),
        "no layer in common": ("merge", files["one"], other, "--output", out),
        "has another size": ("merge", files["one"], wide, "--output", out),
        "LoKr and DoRA can't be added": ("merge", lokr, "--output", out),
        "not in this model": ("merge", other, "--into", tiny_pipeline, "--output", tmp_path / "model"),
        "leave --format out": ("merge", files["kohya"], files["one"], "--format", "diffusers", "--output", out),
        "would not make it smaller": ("resize", files["one"], "--rank", "4", "--output", out),
        "give both, or neither": (
            "resize",
            files["one"],
            "--rank",
            "2",
            "--dynamic_method",
            "sv_fro",
            "--output",
            out,
        ),
        "must be one of sv_ratio": (
            *(
                "resize",
                files["one"],
                "--rank",
                "2",
                "--dynamic_method",
                "sv",
                "--dynamic_param",
                "1",
                "--output",
                out,
            ),
        ),
        "at least 1 for sv_ratio": (
            *("resize", files["one"], "--rank", "2", "--dynamic_method", "sv_ratio"),
            *("--dynamic_param", "0.5", "--output", out),
        ),
        "the same linears": ("extract", tiny_pipeline, tiny_pipeline, "--rank", "2", "--output", out),
    }
    for words, case in cases.items():
        assert words in refused(case, capsys)
    assert not out.exists()
    assert not (tmp_path / "model").exists()
    assert set(load_file(other)) == {"unet.no.such.lora_A.weight", "unet.no.such.lora_B.weight"}


def test_models_of_two_architectures_have_no_difference(tiny_pipeline, tmp_path, capsys):
    pipe = load(tiny_pipeline)
    capsys.readouterr()
    pipe.unet = type(pipe.unet).from_config(pipe.unet.config, block_out_channels=(16, 64))
    pipe.save_pretrained(tmp_path / "wide")
    words = ("extract", tmp_path / "wide", tiny_pipeline, "--rank", "2", "--output", tmp_path / "out.safetensors")
    assert "not of one architecture" in refused(words, capsys)


def test_ranks_are_checked():
    with pytest.raises(EffiLoRAError, match="above 0 and at most 1 for sv_fro"):
        Ranks(4, "sv_fro", 1.5)

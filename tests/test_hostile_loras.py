"""Plain LoRA files made to break things: each is refused in words or taken as a LoRA, and the model stays what it was."""

import hashlib
import json
import struct

import pytest
import torch
from conftest import assert_same, build_tiny_pipeline, footprint, tiny_unet
from helpers import make_subject, trainer
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import nn

from effilora_diffusion import EffiLoRAError, export_lora
from effilora_diffusion.diffusion.adapters.active_adapters import ActiveAdapters, AdapterRef
from effilora_diffusion.diffusion.adapters.plain_file import MOST_TENSORS, read_plain
from effilora_diffusion.diffusion.adapters.restore import unchanged_on_error

HALF = "unet.up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
FINE = {"r": 4, "lora_alpha": 4}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A native adapter, and its plain form in diffusers' and kohya's names."""
    folder = tmp_path_factory.mktemp("good")
    build_tiny_pipeline().save_pretrained(folder / "model")
    options = {"learning_rate": 0.2, "max_train_steps": 2, "num_validation_images": 0, "routing": "static"}
    trainer(folder / "model", make_subject(folder / "s", 2), folder / "cat", **options).run()
    export_lora(folder / "cat", folder / "kohya.safetensors", "kohya")
    return folder


@pytest.fixture(scope="module")
def stack():
    return ActiveAdapters(build_tiny_pipeline())


def state_of(pipe):
    """A hash of all that the models of a pipeline are made of: names, classes and bits."""
    digest = hashlib.sha256()
    for part in (value for value in pipe.components.values() if isinstance(value, nn.Module)):
        for name, module in part.named_modules():
            digest.update(f"{name} {type(module)} {len(module._forward_hooks)}".encode())
        for name, value in part.state_dict().items():
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode() + value.numpy().tobytes())
    return digest.hexdigest()


def bare(text, data=b""):
    """A safetensors file of a header and data."""
    return struct.pack("<Q", len(text)) + text + data


def states(**stated):
    """Metadata of diffusers for the UNet."""
    return {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in stated.items()})}


def alpha(text):
    """Metadata with an alpha as it stands in JSON."""
    return {"lora_adapter_metadata": f'{{"unet.r": 4, "unet.lora_alpha": {text}}}'}


TAKEN_AS_A_LORA = {
    "modules_to_save": states(**FINE, modules_to_save=["conv_in", "time_embedding", "to_q"]),
    "use_dora": states(**FINE, use_dora=True),
    "bias": states(**FINE, bias="all", lora_bias=True),
    "init that changes the base": states(**FINE, init_lora_weights="pissa"),
    "a regular expression as target": states(**FINE, target_modules="(.*.*)*x"),
    "regular expressions as patterns": states(**FINE, rank_pattern={"(a+)+$": 1}, alpha_pattern={"((.*)*)*x": 1, "(": 2}),
    "targets of other components": states(**FINE, target_modules=["decoder", "encoder", "k_proj", ""]),
    "endless rank": states(r=10**12, lora_alpha=4),
    "rank that is none": states(r="many", lora_alpha=4),
    "layers": states(**FINE, layers_to_transform=list(range(1000)), layers_pattern="x", exclude_modules=".*"),
    "another kind": states(**FINE, peft_type="LOHA", task_type="CAUSAL_LM", auto_mapping={"a": "b"}, runtime_config=5),
    "replicated layers": states(**FINE, layer_replication=[[0, 10**6]], megatron_config={}, megatron_core="os"),
    "unknown settings": states(**FINE, no_such_setting=1),
    "token indices": states(**FINE, trainable_token_indices=[0], target_parameters=["weight"], corda_config={}),
    "nothing of this component": {"lora_adapter_metadata": '{"transformer.modules_to_save": ["x"]}'},
}  # fmt: skip

BAD_METADATA = {
    "no number": alpha("NaN"), "infinite": alpha("Infinity"), "minus infinite": alpha("-Infinity"), "1e400": alpha("1e400"),
    "list": alpha("[4]"), "text": alpha('"4"'), "zero": alpha("0"), "negative": alpha("-4"), "absurd": alpha("1e30"),
    "null": alpha("null"),
    "400 digits": alpha("9" * 400), "5000 digits": alpha("9" * 5000), "true": alpha("true"),
    "pattern": states(**FINE, alpha_pattern=[1]),
    "in a pattern": states(**FINE, alpha_pattern={"to_q": 1e300}), "no JSON": {"lora_adapter_metadata": "{"},
    "no dictionary": {"lora_adapter_metadata": "[]"}, "deep": {"lora_adapter_metadata": "[" * 100_000},
}  # fmt: skip


def changed(tensors, key, value):
    return {**tensors, key: value}


def bad_tensors(tensors):
    """What is wrong with the tensors, by a name for it."""
    down, up = f"{HALF}.lora_A.weight", f"{HALF}.lora_B.weight"
    a, b = tensors[down], tensors[up]
    no_up = {key: value for key, value in tensors.items() if key != up}
    no_down = {key: value for key, value in tensors.items() if key != down}
    vae = {key.replace("unet.", "vae."): value.clone() for key, value in tensors.items()}
    lokr = {f"{HALF}.lokr_w1": torch.ones(3, 5), f"{HALF}.lokr_w2": torch.ones(7, 9)}
    return {
        "one layer of another width": {**tensors, down: torch.ones(4, 77), up: torch.ones(len(b), 4)},
        "one layer of another height": {**tensors, up: torch.ones(999, 4)},
        "ranks that differ in a pair": changed(tensors, down, torch.ones(5, a.shape[1])),
        "rank zero": {**tensors, down: torch.ones(0, a.shape[1]), up: torch.ones(len(b), 0)},
        "vectors": {**tensors, down: torch.ones(4), up: torch.ones(4)},
        "cubes": {**tensors, down: torch.ones(4, a.shape[1], 2), up: torch.ones(len(b), 4, 2)},
        "matrix beside a cube": changed(tensors, up, b[:, :, None].clone()),
        "no up": no_up,
        "no down": no_down,
        "float8": changed(tensors, up, b.to(torch.float8_e4m3fn)),
        "float8 of the other kind": changed(tensors, down, a.to(torch.float8_e5m2)),
        "int8": changed(tensors, up, b.to(torch.int8)),
        "int64": {key: value.long() for key, value in tensors.items()},
        "bool": changed(tensors, up, b > 0),
        "complex": changed(tensors, up, b.to(torch.complex64)),
        "NaN": changed(tensors, up, b * float("nan")),
        "infinite": changed(tensors, down, a / 0),
        "nothing": {key: value * (0 if "lora_B" in key else 1) for key, value in tensors.items()},
        "infinite alpha": changed(tensors, f"{HALF}.alpha", torch.tensor(float("inf"))),
        "absurd alpha": changed(tensors, f"{HALF}.alpha", torch.tensor(1e30)),
        "negative alpha": changed(tensors, f"{HALF}.alpha", torch.tensor(-4.0)),
        "alphas": changed(tensors, f"{HALF}.alpha", torch.ones(4)),
        "weights of the base": changed(tensors, "unet.conv_in.weight", torch.ones(32, 4, 3, 3)),
        "a bias of the base": changed(tensors, "unet.conv_in.bias", torch.ones(32)),
        "a difference": changed(tensors, "unet.conv_in.diff", torch.ones(32, 4, 3, 3)),
        "a saved module": changed(tensors, "unet.conv_in.modules_to_save.x.weight", torch.ones(32, 4, 3, 3)),
        "a bias of another width": changed(tensors, f"{HALF}.lora_B.bias", torch.ones(3)),
        "a magnitude of another width": changed(tensors, f"{HALF}.lora_magnitude_vector", torch.ones(3)),
        "a regular expression as name": {"unet.(a+)+$.lora_A.weight": a, "unet.(a+)+$.lora_B.weight": b},
        "an endless name": {f"unet.{'a' * 400}.lora_A.weight": a, f"unet.{'a' * 400}.lora_B.weight": b},
        "lines in a name": {"unet.a\n.lora_A.weight": a, "unet.a\n.lora_B.weight": b},
        "another component": vae,
        "LoKr": lokr,
        "half of LoKr": {f"{HALF}.lokr_w2_a": torch.ones(4, 4)},
        "too many": {f"unet.x{number}.lora_A.weight": torch.ones(1, 1) for number in range(MOST_TENSORS + 1)},
    }  # fmt: skip


def entry(name, shape, first, last):
    """A tensor in a header."""
    return f'"{name}":{{"dtype":"F32","shape":{shape},"data_offsets":[{first},{last}]}}'


def raw(*entries, size=4):
    return bare(f"{{{','.join(entries)}}}".encode(), bytes(size))


A, B = "a.lora_A.weight", "a.lora_B.weight"
RAW = {
    "huge": raw(entry(A, [2**62, 2**62], 0, 4)),
    "huge and empty": raw(entry(A, [0, 2**40], 0, 0), entry(B, [2**40, 0], 0, 0), size=0),
    "twice": raw(entry(A, [1], 0, 4), entry(A, [1], 4, 8), size=8),
    "overlapping": raw(entry(A, [1], 0, 4), entry(B, [1], 0, 4)),
    "half a letter": raw('"__metadata__":{"lora_adapter_metadata":"\\ud800"}', entry(A, [1], 0, 4)),
    "negative": raw(entry(A, [-1], 0, 4)),
}


def check_unchanged(stack, good, expected):
    """The model is what it was, bit for bit, and good adapters of both kinds act."""
    stack.use([])
    assert state_of(stack.pipe) == expected
    plain = AdapterRef(good / "kohya.safetensors")
    stack.use([AdapterRef(good / "cat" / "effilora.safetensors"), plain])
    assert stack.layers(plain) == len(load_file(good / "kohya.safetensors")) // 3
    stack.use([])
    assert state_of(stack.pipe) == expected


def test_there_are_many_hostile_files(good):
    assert len(TAKEN_AS_A_LORA) + len(BAD_METADATA) + len(bad_tensors(plain_of(good))) + len(RAW) >= 60


def plain_of(good):
    return load_file(good / "cat" / "pytorch_lora_weights.safetensors")


@pytest.mark.parametrize("metadata", TAKEN_AS_A_LORA.values(), ids=TAKEN_AS_A_LORA)
def test_settings_of_peft_in_the_metadata_do_nothing(metadata, good, stack, tmp_path):
    expected = state_of(stack.pipe)
    save_file(plain_of(good), tmp_path / "bare.safetensors")
    save_file(plain_of(good), tmp_path / "x.safetensors", metadata)
    stack.use([AdapterRef(tmp_path / "bare.safetensors")])
    wanted = state_of(stack.pipe)
    stack.use([AdapterRef(tmp_path / "x.safetensors")])
    assert state_of(stack.pipe) == wanted  # what the LoRA alone makes of the model
    check_unchanged(stack, good, expected)


@pytest.mark.parametrize("metadata", BAD_METADATA.values(), ids=BAD_METADATA)
def test_strengths_that_no_training_writes_are_refused(metadata, good, stack, tmp_path):
    expected = state_of(stack.pipe)
    save_file(plain_of(good), tmp_path / "x.safetensors", metadata)
    with pytest.raises(EffiLoRAError, match=r"x.safetensors (states an alpha|has damaged metadata)"):
        stack.use([AdapterRef(tmp_path / "x.safetensors")])
    check_unchanged(stack, good, expected)


def test_tensors_that_are_no_lora_of_this_model_are_refused(good, stack, tmp_path):
    expected = state_of(stack.pipe)
    kohya = AdapterRef(good / "kohya.safetensors")
    for number, (name, tensors) in enumerate(bad_tensors(plain_of(good)).items()):
        file = tmp_path / f"{number}.safetensors"
        save_file({key: value.contiguous() for key, value in tensors.items()}, file)
        for beside in ([], [kohya]):  # alone, and beside one that fits
            with pytest.raises(EffiLoRAError) as caught:
                stack.use([*beside, AdapterRef(file)])
            said = str(caught.value)
            assert said.startswith(file.name), name
            assert "\n" not in said, name
            assert 30 < len(said) < 400, name
            assert state_of(stack.pipe) == expected, name
    check_unchanged(stack, good, expected)


@pytest.mark.parametrize("content", RAW.values(), ids=RAW)
def test_broken_headers_are_refused(content, good, stack, tmp_path):
    expected = state_of(stack.pipe)
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(EffiLoRAError):
        stack.use([AdapterRef(tmp_path / "x.safetensors")])
    with pytest.raises(EffiLoRAError):
        read_plain(tmp_path / "x.safetensors")
    check_unchanged(stack, good, expected)


SPECIAL = {"to_q": 8, "^down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k": 2}


@pytest.mark.parametrize("stated", [{"lora_alpha": 8}, {"lora_alpha": 2, "use_rslora": True}, {"lora_alpha": 3},
                                    {"lora_alpha": 4, "alpha_pattern": SPECIAL}],
                         ids=str)  # fmt: skip
def test_the_strength_is_the_one_that_diffusers_uses(stated, good, tmp_path):
    """A file's alpha, also by patterns and by the square root of the rank, acts as when diffusers reads it."""
    tensors = plain_of(good)
    modules = sorted({key.removeprefix("unet.").partition(".lora_")[0] for key in tensors})
    save_file(tensors, tmp_path / "x.safetensors", states(r=4, target_modules=modules, **stated))
    theirs, ours = build_tiny_pipeline(), ActiveAdapters(build_tiny_pipeline())
    theirs.load_lora_weights(str(tmp_path), weight_name="x.safetensors", adapter_name="plain_0")
    ours.use([AdapterRef(tmp_path / "x.safetensors")])
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    words = torch.randn(1, 5, 24, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted, found = (pipe.unet(x, 5, words).sample for pipe in (theirs, ours.pipe))
        ours.use([])
        base = ours.pipe.unet(x, 5, words).sample
    assert (found - wanted).abs().max() < 1e-3 * (wanted - base).abs().max()


def test_alphas_of_kohya_s_programs_may_be_whole_numbers(good, stack, tmp_path):
    tensors = load_file(good / "kohya.safetensors")
    whole = {key: value.long() if key.endswith(".alpha") else value for key, value in tensors.items()}
    save_file(whole, tmp_path / "x.safetensors")
    stack.use([AdapterRef(tmp_path / "x.safetensors")])
    stack.use([])


def test_what_fails_half_way_is_undone():
    unet = tiny_unet()
    pipe = type("Pipe", (), {"components": {"unet": unet}})()
    handle = unet.conv_in.register_forward_hook(print)
    before = footprint(unet)

    def half():
        with unchanged_on_error(pipe):
            config = LoraConfig(r=2, target_modules=["to_q"], modules_to_save=["conv_in"])
            inject_adapter_in_model(config, unet, adapter_name="x")
            unet.mark = 1
            unet.conv_out.register_forward_hook(print)
            unet.conv_out.weight.requires_grad_(True)
            raise KeyError

    with pytest.raises(KeyError):
        half()
    assert_same(unet, before)
    assert not any(value.requires_grad for value in unet.parameters())
    handle.remove()  # the handle still knows its hook
    assert not unet.conv_in._forward_hooks


def test_weights_that_were_overwritten_are_never_kept_quiet():
    unet = tiny_unet()
    pipe = type("Pipe", (), {"components": {"unet": unet}})()

    def overwrite():
        with unchanged_on_error(pipe):
            unet.conv_in.weight.data.mul_(2)
            raise KeyError

    with pytest.raises(RuntimeError, match="changed in place"):
        overwrite()

"""The native file: saving and loading are exact, and damaged or forged files are refused."""

import json
import os
import pickle
import random
from pathlib import Path

import pytest
import torch
from conftest import make_adapter, make_toy, toy_input
from safetensors import safe_open
from safetensors.torch import save_file

from effilora_diffusion.core import (
    AdapterFile,
    EffiLoRAError,
    ReducerConfig,
    attach,
    calibrate,
    load_adapter_file,
    save_adapter_file,
)
from effilora_diffusion.core.files import header_sha256, is_native, tensors_sha256
from effilora_diffusion.core.tensor_io import MAX_BYTES, MAX_HEADER

METADATA = {"base_model": "some/model", "trigger_prompt": "ein Bild von sks Kätzchen \N{CAT FACE}", "steps": 12}


def output_of(adapter):
    model = attach_to_toy(adapter)
    return model(toy_input(), torch.tensor([10, 800]))


def attach_to_toy(adapter):
    model = make_toy(len(adapter.blocks))
    attach(model, adapter)
    return model


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "subject.safetensors"
    save_adapter_file(path, AdapterFile(make_adapter(), dict(METADATA)))
    return path


def read_raw(path):
    with safe_open(str(path), "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return json.loads(file.metadata()["effilora"]), tensors


def forge(path, header=None, tensors=None):
    """Rewrite a native file with other contents and correct checksums."""
    old_header, old_tensors = read_raw(path)
    header, tensors = header or old_header, tensors or old_tensors
    header["sha256"] = tensors_sha256(tensors)
    header["header_sha256"] = header_sha256(header)
    save_file(tensors, path, metadata={"effilora": json.dumps(header)})


def assert_refused(path, match=None):
    with pytest.raises(EffiLoRAError, match=match) as caught:
        load_adapter_file(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("routing", ["token", "static", "timestep"])
@pytest.mark.parametrize(("heads", "sharing"), [(1, "width"), (3, "width"), (2, "slice"), (2, "none")])
def test_a_saved_adapter_loads_bit_for_bit(tmp_path, routing, heads, sharing):
    reducer = ReducerConfig(mode="importance", active=0.3)
    adapter = make_adapter(routing=routing, heads=heads, a_sharing=sharing, rank=2, alpha=3.0, reducer=reducer)
    path = tmp_path / "new folder" / "a.safetensors"
    digest = save_adapter_file(path, AdapterFile(adapter, dict(METADATA)))
    loaded = load_adapter_file(path)
    assert loaded.metadata == METADATA
    assert loaded.sha256 == digest
    assert loaded.calibration == {}
    assert loaded.adapter.config == adapter.config
    assert loaded.adapter.sites == adapter.sites
    assert torch.equal(output_of(loaded.adapter), output_of(adapter))


def test_the_checksum_depends_on_the_weights_only(tmp_path):
    digests = [save_adapter_file(tmp_path / "a", AdapterFile(make_adapter(seed=seed))) for seed in (3, 3, 4)]
    assert digests[0] == digests[1] != digests[2]


def test_calibration_is_saved(tmp_path):
    adapter = make_adapter()
    model = attach_to_toy(adapter)
    calibration, _ = calibrate(model, adapter, lambda: model(toy_input()))
    save_adapter_file(tmp_path / "a", AdapterFile(adapter, {}, calibration))
    loaded = load_adapter_file(tmp_path / "a").calibration
    assert set(loaded) == {site.name for site in adapter.sites}
    assert all(torch.equal(loaded[name], calibration[name]) for name in calibration)


@pytest.mark.parametrize("sharing", ["width", "slice", "none"])
def test_every_tensor_is_stored_once_under_a_name_that_lora_loaders_reject(tmp_path, sharing):
    adapter = make_adapter(a_sharing=sharing)
    save_adapter_file(tmp_path / "a", AdapterFile(adapter))
    header, tensors = read_raw(tmp_path / "a")
    assert sum(value.numel() for value in tensors.values()) == adapter.parameter_counts()["stored"]
    expected = {"width": 2, "slice": 1, "none": len(adapter.sites)}[sharing]
    assert sum(name.startswith("shared_A.") for name in tensors) == expected
    assert not [name for name in tensors if "lora" in name.lower()]
    assert header["format_version"] == 1
    assert is_native(tmp_path / "a")


def test_half_precision_storage_rounds_the_weights_and_halves_the_file(tmp_path):
    adapter = make_adapter(rank=16)
    full, half = tmp_path / "full", tmp_path / "half"
    calibration = {adapter.sites[0].name: torch.rand(4, 16, 16) * 1e6}
    save_adapter_file(full, AdapterFile(adapter, {}, calibration))
    save_adapter_file(half, AdapterFile(adapter, {}, calibration), torch.float16)
    tensors = read_raw(half)[1]
    assert {value.dtype for name, value in tensors.items() if "calibration" not in name} == {torch.float16}
    assert half.stat().st_size < 0.65 * full.stat().st_size
    loaded = load_adapter_file(half)
    for old, new in zip(adapter.parameters(), loaded.adapter.parameters(), strict=True):
        assert new.dtype == torch.float32
        assert torch.equal(new, old.half().float())
    assert torch.equal(loaded.calibration[adapter.sites[0].name], calibration[adapter.sites[0].name])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", ["A", "B", "G", "calibration"])
def test_weights_that_are_not_finite_are_not_saved_and_the_old_file_remains(saved, value, part):
    before = saved.read_bytes()
    content = AdapterFile(make_adapter(seed=9))
    if part == "calibration":
        content.calibration[content.adapter.sites[0].name] = torch.full((4, 4, 4), value)
    else:
        with torch.no_grad():
            list(getattr(content.adapter, part).parameters())[-1].view(-1)[3 if part != "G" else 0] = value
    with pytest.raises(EffiLoRAError, match=r"NaN or infinite.*nothing was written"):
        save_adapter_file(saved, content)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_weights_that_overflow_in_half_precision_are_refused(saved):
    before = saved.read_bytes()
    adapter = make_adapter()
    with torch.no_grad():
        adapter.B[0][0, 0, 0] = 70000.0
    with pytest.raises(EffiLoRAError, match="infinite"):
        save_adapter_file(saved, AdapterFile(adapter), torch.float16)
    assert saved.read_bytes() == before
    save_adapter_file(saved, AdapterFile(adapter))
    assert load_adapter_file(saved).adapter.B[0].max() == 70000.0


def test_a_flipped_bit_in_the_weights_is_detected(saved):
    data = bytearray(saved.read_bytes())
    data[-5] ^= 0x01
    saved.write_bytes(data)
    assert_refused(saved, "checksum")


def test_a_changed_value_in_the_header_is_detected(saved):
    data = saved.read_bytes()
    assert data.count(b'\\"rank\\": 4') == 1
    saved.write_bytes(data.replace(b'\\"dropout\\": 0.0', b'\\"dropout\\": 0.5'))
    assert_refused(saved, "checksum")


@pytest.mark.parametrize("keep", [0, 4, 8, 200, -1])
def test_a_truncated_file_is_refused(saved, keep):
    saved.write_bytes(saved.read_bytes()[:keep])
    assert_refused(saved, "not a readable safetensors file")


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs", b"<html>404</html>" * 50, bytes(5000)])
def test_a_file_of_another_kind_is_refused(tmp_path, content):
    path = tmp_path / "download.safetensors"
    path.write_bytes(content)
    assert_refused(path, "not a readable safetensors file")
    assert not is_native(path)


class Bomb:
    """Unpickling it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("write", [pickle.dump, torch.save])
def test_a_pickle_under_another_name_is_refused_and_not_executed(tmp_path, write):
    path, mark = tmp_path / "adapter.safetensors", tmp_path / "executed"
    with path.open("wb") as file:
        write(Bomb(mark), file)
    assert_refused(path, "not a readable safetensors file")
    assert not mark.exists()


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_the_refusal_of_plain_lora_says_how_to_load_it(tmp_path, metadata):
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save_file({"unet.to_q.lora_A.weight": torch.zeros(2, 8)}, path, metadata=metadata)
    assert_refused(path, "load_lora_weights")
    assert not is_native(path)


def test_a_missing_file_a_folder_and_a_huge_file_are_refused(tmp_path):
    assert_refused(tmp_path / "none.safetensors", "no such file")
    assert_refused(tmp_path, "no such file")
    huge = tmp_path / "huge.safetensors"
    with huge.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    assert_refused(huge, "too large")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["shared_A.12", "blocks.1.to_k.stacked_B", "blocks.2.out.0.router"])
def test_stored_weights_that_are_not_finite_are_refused(saved, name, value):
    tensors = read_raw(saved)[1]
    tensors[name].view(-1)[0] = value
    forge(saved, tensors=tensors)
    assert_refused(saved, f"{name} has NaN")


def test_stored_weights_beyond_float32_are_refused(saved):
    tensors = read_raw(saved)[1]
    tensors["shared_A.8"] = tensors["shared_A.8"].double() * 1e300
    forge(saved, tensors=tensors)
    assert_refused(saved, "infinite")


def test_a_missing_an_extra_and_a_misshapen_tensor_are_named(saved):
    original = saved.read_bytes()
    name = "blocks.0.to_v.stacked_B"
    for change, match in (
        (lambda tensors: tensors.update(surplus=torch.zeros(999)) or tensors.pop(name), f"{name} is missing"),
        (lambda tensors: tensors.update(surplus=torch.zeros(2)), "surplus"),
        (lambda tensors: tensors.update({name: torch.zeros(12, 4, 3)}), name),
        (lambda tensors: tensors.update({name: torch.zeros(12, 3, 4, dtype=torch.int32)}), name),
    ):
        saved.write_bytes(original)
        tensors = read_raw(saved)[1]
        change(tensors)
        forge(saved, tensors=tensors)
        assert_refused(saved, match)


@pytest.mark.parametrize("version", [0, 2, "1", None])
@pytest.mark.parametrize("place", ["file", "config"])
def test_other_format_versions_are_refused(saved, version, place):
    header = read_raw(saved)[0]
    (header if place == "file" else header["config"])["format_version"] = version
    forge(saved, header=header)
    assert_refused(saved, "format version")


def set_in(*keys, value):
    def change(header):
        for key in keys[:-1]:
            header = header[key]
        header[keys[-1]] = value

    return change


FORGERIES = {
    "huge rank": set_in("config", "rank", value=4096),
    "huge number of heads": set_in("config", "heads", value=64),
    "rank out of range": set_in("config", "rank", value=10**12),
    "huge output": set_in("sites", 0, "maps", 0, 1, value=1 << 45),
    "huge input": set_in("sites", 0, "in_features", value=1 << 45),
    "infinite input": set_in("sites", 0, "in_features", value=float("inf")),
    "no input": set_in("sites", 0, "in_features", value=0),
    "negative input": set_in("sites", 0, "in_features", value=-8),
    "negative output": set_in("sites", 0, "maps", 0, 1, value=-(1 << 45)),
    "width is text": set_in("sites", 0, "in_features", value="wide"),
    "no linears": set_in("sites", 0, "maps", value=[]),
    "linears are text": set_in("sites", 0, "maps", value="maps"),
    "linear without width": set_in("sites", 0, "maps", 0, value=["blocks.0.to_q"]),
    "no sites": set_in("sites", value=[]),
    "sites are null": set_in("sites", value=None),
    "sites are text": set_in("sites", value="blocks"),
    "config is null": set_in("config", value=None),
    "alpha is text": set_in("config", "alpha", value="four"),
    "alpha beyond floats": set_in("config", "alpha", value=10**400),
    "unknown option": set_in("config", "option", value=1),
    "reducer is a list": set_in("config", "reducer", value=[1]),
    "reducer value is text": set_in("config", "reducer", "active", value="half"),
    "metadata is text": set_in("metadata", value="abc"),
    "metadata is a number": set_in("metadata", value=5),
    "a width is a fraction": set_in("sites", 0, "in_features", value=8.0),
    "a width is true": set_in("sites", 0, "maps", 0, 1, value=True),
    "a path has a line break": set_in("sites", 0, "layer", value="a\nb"),
    "a path has an escape sequence": set_in("sites", 0, "layer", value="a\x1b[2J"),
    "a path is no text": set_in("sites", 0, "layer", value=5),
    "alpha beyond use": set_in("config", "alpha", value=1e300),
    "version is true": set_in("format_version", value=True),
    "deep metadata": set_in("metadata", "a", value=json.loads("[" * 20 + "]" * 20)),
}


@pytest.mark.parametrize("change", FORGERIES.values(), ids=FORGERIES.keys())
def test_a_forged_header_is_refused_before_anything_is_allocated(saved, change):
    header = read_raw(saved)[0]
    change(header)
    forge(saved, header=header)
    assert_refused(saved)


FLOAT8 = torch.float8_e4m3fn


@pytest.mark.parametrize("kind", [FLOAT8, torch.int8, torch.bool, torch.complex64])
def test_tensors_of_other_types_are_refused_in_words(saved, kind):
    tensors = {name: value.to(kind) for name, value in read_raw(saved)[1].items()}
    forge(saved, tensors=tensors)
    assert_refused(saved, "expected .* of F64 or F32 or F16 or BF16")


def test_a_header_that_claims_much_is_not_read(saved):
    data = saved.read_bytes()
    saved.write_bytes((MAX_HEADER + 1).to_bytes(8, "little") + data[8:] + bytes(MAX_HEADER))
    assert_refused(saved, f"its header claims {MAX_HEADER + 1} bytes")
    assert not is_native(saved)


def test_a_pipe_is_no_adapter(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert_refused(tmp_path / "pipe", "no such file")
    assert not is_native(tmp_path / "pipe")


def test_a_refusal_quotes_only_the_start_of_what_a_file_says(saved):
    header = read_raw(saved)[0]
    header["config"]["routing"] = "\x1b[2J" * 100_000
    forge(saved, header=header)
    with pytest.raises(EffiLoRAError) as caught:
        load_adapter_file(saved)
    assert len(str(caught.value)) < 1000
    assert str(caught.value).isprintable()


def test_metadata_are_facts_of_known_types_or_not_known(saved):
    header = read_raw(saved)[0]
    header["metadata"] = {
        "base_model": "\x1b]0;a\x07\u202eb\ud800",
        "trigger_prompt": "a\tcat\r\non two\u2028lines \u3000\N{CAT FACE}",
        "steps": 7,
        "pictures": 3,
        "export_error": 0.25,
        "component": "unet",
        "other": "kept",
        "number": -1.5,
        "nothing": None,
    }
    refused = {
        "base_hash": ["0"], "base_hash_bfloat16": 5, "base_dtype": {}, "base_class": "x" * 201, "single_file_config": False,
        "gguf_file": None, "dtype": "device", "prompt_template": "x" * 41, "examples": -1, "max_length": 1.5,
        "fan_in_fan_out": 1, "list": [1], "object": {}, "long": "x" * 1001, "large": 10**30, "\x1b": 1, "x" * 101: 1,
    }  # fmt: skip
    header["metadata"] |= refused
    forge(saved, header=header)
    assert load_adapter_file(saved).metadata == {
        "base_model": "\ufffd]0;a\ufffd\ufffdb\ufffd",
        "trigger_prompt": "a cat  on two lines \u3000\N{CAT FACE}",
        "steps": 7,
        "images": 3,
        "export_error": 0.25,
        "component": "unet",
        "other": "kept",
        "number": -1.5,
        "nothing": None,
    }
    wrong = [
        ("export_error", 1e7),
        ("export_error", -1),
        ("export_error", "nan"),
        ("component", "../unet"),
        ("steps", "12"),
    ]
    for name, value in (*wrong, ("component", ["unet"]), ("steps", 10**400), ("trigger_prompt", "x" * 10_001)):
        header["metadata"] = {name: value}
        forge(saved, header=header)
        assert load_adapter_file(saved).metadata == {}, name


def test_of_unknown_facts_a_hundred_are_kept(saved):
    header = read_raw(saved)[0]
    header["metadata"] = {f"fact {number}": number for number in range(101)} | {"steps": 1}
    forge(saved, header=header)
    found = load_adapter_file(saved).metadata
    assert len(found) == 101
    assert found["steps"] == 1


@pytest.mark.parametrize("part", ["name", "maps"])
def test_a_site_or_linear_that_is_named_twice_is_refused(saved, part):
    header, tensors = read_raw(saved)
    first, second = header["sites"][0], header["sites"][2]
    gone = f"{second['name']}.router" if part == "name" else [f"{path}.stacked_B" for path, _ in second["maps"]]
    second[part] = first[part]
    forge(saved, header, {name: value for name, value in tensors.items() if name not in gone})
    assert_refused(saved, "names a site or a linear twice")


@pytest.mark.parametrize("name", ["training", "keys", "_parameters"])
def test_a_site_whose_own_a_torch_could_not_hold_is_refused(tmp_path, name):
    path = tmp_path / "a.safetensors"
    save_adapter_file(path, AdapterFile(make_adapter(a_sharing="none")))
    header, tensors = read_raw(path)
    old = header["sites"][0]["name"]
    header["sites"][0]["name"] = name
    renamed = {
        key.replace(f"shared_A.{old.replace('.', '/')}", f"shared_A.{name}").replace(
            f"{old}.router", f"{name}.router"
        ): value
        for key, value in tensors.items()
    }
    forge(path, header, renamed)
    assert_refused(path, "names a site as no module can be named")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "[" * 100_000, "{}"])
def test_a_header_that_is_not_a_json_object_is_refused(tmp_path, text):
    path = tmp_path / "a.safetensors"
    save_file({"shared_A.8": torch.zeros(1)}, path, metadata={"effilora": text})
    assert_refused(path)


def test_random_damage_is_detected_or_harmless(tmp_path):
    path, rng = tmp_path / "a.safetensors", random.Random(0)
    adapter = make_adapter(blocks=1, rank=1, heads=2)
    digest = save_adapter_file(path, AdapterFile(adapter, dict(METADATA)))
    original, refused, harmless = path.read_bytes(), 0, 0
    for trial in range(300):
        data = bytearray(original)
        if trial % 6 == 0:
            del data[rng.randrange(len(data)) :]
        else:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:
            loaded = load_adapter_file(path)
        except EffiLoRAError as error:
            refused += str(path) in str(error)
            continue
        harmless += 1
        assert (loaded.adapter.config, loaded.adapter.sites) == (adapter.config, adapter.sites)
        assert (loaded.metadata, loaded.sha256) == (METADATA, digest)
        assert all(torch.equal(a, b) for a, b in zip(loaded.adapter.parameters(), adapter.parameters(), strict=True))
    assert refused + harmless == 300  # every refusal names the file
    assert refused > 280

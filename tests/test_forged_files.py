"""Native files that somebody has forged: refused in words, before anything is allocated."""

import json
import os
import random

import pytest
import torch
from conftest import make_adapter
from native_files import METADATA, assert_refused, forge, read_raw, save_native
from safetensors.torch import save_file

from effilora_diffusion.core import (
    AdapterFile,
    EffiLoRAError,
    load_adapter_file,
    save_adapter_file,
)
from effilora_diffusion.core.files import is_native
from effilora_diffusion.core.tensor_io import MAX_HEADER


@pytest.fixture
def saved(tmp_path):
    return save_native(tmp_path / "subject.safetensors")


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
        "fan_in_fan_out": 1, "list": [1], "object": {}, "chat_template": ["a"],
        "chat_template_kwargs": {"a": 1}, "template_date": "today", "long": "x" * 1001, "large": 10**30, "\x1b": 1, "x" * 101: 1,
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

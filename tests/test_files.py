"""The native file: saving and loading are exact, and damaged or forged files are refused."""

import pickle
from pathlib import Path

import pytest
import torch
from conftest import make_adapter, make_toy, toy_input
from native_files import METADATA, assert_refused, forge, read_raw, save_native
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
from effilora_diffusion.core.files import is_native
from effilora_diffusion.core.tensor_io import MAX_BYTES


def output_of(adapter):
    model = attach_to_toy(adapter)
    return model(toy_input(), torch.tensor([10, 800]))


def attach_to_toy(adapter):
    model = make_toy(len(adapter.blocks))
    attach(model, adapter)
    return model


@pytest.fixture
def saved(tmp_path):
    return save_native(tmp_path / "subject.safetensors")


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

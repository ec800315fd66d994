"""Native adapter files that nobody should have made: random mutations with right checksums, and files made by hand."""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save
from torch import Tensor, nn

from effilora_diffusion import create_adapter, export_lora, load_adapter, remove_adapter
from effilora_diffusion.core import AdapterFile, EffiLoRAConfig, calibrate, load_adapter_file, save_adapter_file
from effilora_diffusion.core.attachment import attach, detach
from effilora_diffusion.core.errors import EffiLoRAError
from effilora_diffusion.core.files import header_sha256, tensors_sha256
from effilora_diffusion.core.inspection import describe, inspect_adapter

Parts = tuple[dict[str, Any], dict[str, Tensor]]
"""The header's JSON and the tensors of a native file."""

TRAINED = {"base_model": "some/model", "trigger_prompt": "a sks cat", "component": "unet", "steps": 8, "images": 3,
           "base_hash": "0" * 16, "base_dtype": "float32", "export_error": 0.2}  # fmt: skip

VARIANTS: list[dict[str, Any]] = [
    {"rank": 2, "heads": 2},
    {"rank": 1, "heads": 1, "alpha": 2.0},
    {"rank": 2, "heads": 2, "routing": "static", "a_sharing": "slice"},
    {"rank": 1, "heads": 3, "routing": "timestep", "a_sharing": "none", "scaling": "rslora"},
]

VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 4, 64, 65, 4096, 1 << 31, 1 << 63, 10**30, -(10**30), int("9" * 400), 0.0, -0.0, 0.5, 1.5,
    1e-320, 1e-30, 1e30, 1e308, float("nan"), float("inf"), -float("inf"), "", "a", "4", "1e9", "\0", "\x1b[31m", "\ud800",
    "\u202e", "x" * 5000, "a.b", "..", "training", "keys", "a/b", "line\nline", "token", "static", [], [[]], [1], ["a", 1],
    ["to_q", 8], {}, {"a": 1}, {"a": {"b": []}}, [None] * 50,
]  # fmt: skip
"""What an entry of a header becomes."""

TYPES = [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.int64, torch.bool, torch.complex64,
         torch.float16, torch.bfloat16, torch.float64, torch.uint8]  # fmt: skip

NUMBERS = [float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 1e20, 1e-45, 0.0, -0.0, -1.0]


class Base:
    """A tiny UNet, its weights and what it computes, and files of adapters that fit it."""

    def __init__(self, folder: Path):
        torch.manual_seed(0)
        self.model: nn.Module = UNet2DConditionModel(
            sample_size=4, down_block_types=("CrossAttnDownBlock2D",), up_block_types=("UpBlock2D",), mid_block_type=None,
            block_out_channels=(8,), layers_per_block=1, cross_attention_dim=12, attention_head_dim=2, norm_num_groups=2,
        ).eval().requires_grad_(False)  # fmt: skip
        self.inputs = {
            "sample": torch.randn(1, 4, 4, 4),
            "timestep": torch.tensor([500]),
            "encoder_hidden_states": torch.randn(1, 3, 12),
        }
        self.state = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.output = self.run()
        self.folder = folder
        self.parts = [self._parts(index, options) for index, options in enumerate(VARIANTS)]

    @torch.no_grad()
    def run(self) -> Tensor:
        """One call of the model."""
        return self.model(**self.inputs).sample

    def _parts(self, seed: int, options: dict[str, Any]) -> Parts:
        adapter = create_adapter(self.model, EffiLoRAConfig(**options))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for heads in adapter.B:
                heads.copy_(torch.randn(heads.shape, generator=generator) * 0.1)
        attach(self.model, adapter)
        calibration, _ = calibrate(self.model, adapter, self.run)
        detach(self.model)
        path = self.folder / f"variant-{seed}.safetensors"
        save_adapter_file(path, AdapterFile(adapter, dict(TRAINED), calibration))
        return read_parts(path)

    def use(self, path: Path, export: bool = False) -> None:
        """Do with the file what commands do; raises :class:`EffiLoRAError` if it is refused, others for whatever breaks."""
        content = load_adapter_file(path)
        facts = inspect_adapter(content)
        for text in (describe(facts), *(value for value in content.metadata.values() if isinstance(value, str))):
            text.encode()
            assert all(letter == "\n" or letter.isprintable() or letter > "\xa0" for letter in text), "controls"
        json.dumps(facts, allow_nan=False)
        adapter = load_adapter(self.model, content)
        try:
            assert self.run().shape == self.output.shape
        finally:
            remove_adapter(self.model, adapter)
        state = self.model.state_dict()
        assert state.keys() == self.state.keys(), "the base has other weights"
        assert all(torch.equal(value, self.state[name]) for name, value in state.items()), "the base was changed"
        assert torch.equal(self.run(), self.output), "the base computes something else"
        for format in ("diffusers", "kohya", "peft") if export else ():
            try:
                export_lora(content, self.folder / f"export-{format}", format)
            except EffiLoRAError:
                continue


def read_parts(path: Path) -> Parts:
    """Header and tensors of a native file, unchecked."""
    from safetensors import safe_open

    with safe_open(str(path), "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        return json.loads(file.metadata()["effilora"]), tensors


def whole(header: Any, tensors: dict[str, Tensor]) -> bytes:
    """The bytes of a native file with right checksums."""
    if isinstance(header, dict):
        header = {**header, "sha256": tensors_sha256(tensors)}
        header["header_sha256"] = header_sha256(header)
    return save({name: value.contiguous() for name, value in tensors.items()}, {"effilora": json.dumps(header)})


def mutated(parts: list[Parts], number: int, seed: int) -> bytes:
    """The file of mutation ``number``: by turns raw bytes, header, metadata, tensors."""
    rng = random.Random(f"{seed} {number}")
    header, tensors = rng.choice(parts)
    kind = number % 4
    if kind == 0:
        return _bytes(bytearray(whole(header, tensors)), rng)
    header, tensors = copy.deepcopy(header), dict(tensors)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if kind == 1:
            _change(header, rng)
        elif kind == 2:
            known = [
                *TRAINED,
                "dtype",
                "prompt_template",
                "gguf_file",
                "single_file_config",
                f"other{rng.randrange(9)}\x1b",
            ]
            header["metadata"][rng.choice(known)] = rng.choice(VALUES)
        else:
            _change_tensors(tensors, rng)
    return whole(header, tensors)


def _bytes(data: bytearray, rng: random.Random) -> bytes:
    for _ in range(rng.choice((1, 1, 2, 8))):
        place, length = rng.randrange(len(data)), rng.choice((1, 2, 8, 100))
        head = int.from_bytes(data[:8], "little")
        way = rng.randrange(6)
        if way == 0:
            data[place] ^= 1 << rng.randrange(8)
        elif way == 1:
            data[rng.randrange(min(len(data), 8 + head))] = rng.randrange(256)
        elif way == 2:
            data[place : place + length] = rng.randbytes(length)
        elif way == 3:
            del data[place : place + length]
        elif way == 4:
            data[place:place] = data[:length]
        else:
            claim = rng.choice((head + 1, head - 1, 0, len(data), 100 << 20, 1 << 62, 2**64 - 1))
            data[:8] = (claim % 2**64).to_bytes(8, "little")
        data = data or bytearray(b"\0")
    return bytes(data)


def _change(header: dict[str, Any], rng: random.Random) -> None:
    """Replace, remove or add one entry anywhere in the header."""
    holder: Any = header
    while True:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        if not keys:
            return
        key = rng.choice(keys)
        if isinstance(holder[key], dict | list) and rng.random() < 0.8:
            holder = holder[key]
            continue
        way = rng.random()
        if way < 0.1:
            del holder[key]
        elif way < 0.2 and isinstance(holder, dict):
            holder[str(rng.choice(VALUES))] = copy.deepcopy(rng.choice(VALUES))
        elif way < 0.25 and isinstance(holder, list):
            holder.append(copy.deepcopy(rng.choice(holder)))
        else:
            holder[key] = copy.deepcopy(rng.choice(VALUES))
        return


def _change_tensors(tensors: dict[str, Tensor], rng: random.Random) -> None:
    name = rng.choice(list(tensors))
    value, way = tensors[name], rng.randrange(8)
    if way == 0:
        tensors[name] = value.to(rng.choice(TYPES))
    elif way == 1:
        tensors[name] = value.flatten()
    elif way == 2:
        tensors[name] = value[:0]
    elif way == 3:
        tensors[name] = value.transpose(0, -1).clone()
    elif way == 4 and value.numel():
        value = value.clone()
        value.view(-1)[rng.randrange(value.numel())] = rng.choice(NUMBERS)
        tensors[name] = value
    elif way == 5:
        tensors[name] = torch.full_like(value, rng.choice(NUMBERS))
    elif way == 6:
        tensors[rng.choice(("x", f"{name}2", "\x1b", "lora", name.upper()))] = tensors.pop(name)
    elif len(tensors) > 1:
        del tensors[name]


# ---------------------------------------------------------------------------------------------------------- by hand


def _set(*keys: Any, value: Any) -> Callable[[Path, Parts], object]:
    """A file whose header has ``value`` at ``keys``."""

    def write(path: Path, parts: Parts) -> None:
        header = copy.deepcopy(parts[0])
        holder = header
        for key in keys[:-1]:
            holder = holder[key]
        holder[keys[-1]] = value
        path.write_bytes(whole(header, parts[1]))

    return write


def _all(change: Callable[[Tensor], Tensor], part: str = "") -> Callable[[Path, Parts], object]:
    """A file whose tensors (those with ``part`` in their names) are changed."""

    def write(path: Path, parts: Parts) -> None:
        tensors = {name: change(value) if part in name else value for name, value in parts[1].items()}
        path.write_bytes(whole(parts[0], tensors))

    return write


def _header(text: str) -> Callable[[Path, Parts], object]:
    return lambda path, parts: path.write_bytes(save(parts[1], {"effilora": text}))


def _raw(content: bytes) -> Callable[[Path, Parts], object]:
    return lambda path, parts: path.write_bytes(content)


def _sparse(size: int) -> Callable[[Path, Parts], object]:
    def write(path: Path, parts: Parts) -> None:
        path.touch()
        os.truncate(path, size)

    return write


def _claim(count: int) -> bytes:
    """A header that claims ``count`` tensors of no bytes."""
    text = json.dumps({str(n): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(count)}).encode()
    return len(text).to_bytes(8, "little") + text


HAND_MADE: dict[str, Callable[[Path, Parts], object]] = {
    "a pipe": lambda path, parts: os.mkfifo(path),
    "a folder": lambda path, parts: path.mkdir(),
    "a link to /dev/zero": lambda path, parts: path.symlink_to("/dev/zero"),
    "a link to itself": lambda path, parts: path.symlink_to(path),
    "nothing": _raw(b""),
    "nine gigabytes of nothing": _sparse(9 << 30),
    "a header of 100 MB": lambda path, parts: path.write_bytes((100 << 20).to_bytes(8, "little") + b" " * (100 << 20)),
    "a header that claims 2^63 bytes": _raw((1 << 63).to_bytes(8, "little") + b"{}"),
    "300,000 tensors of no bytes": _raw(_claim(300_000)),
    "JSON 100,000 deep": _header("[" * 100_000),
    "JSON 900 deep": _set("metadata", "deep", value=json.loads("[" * 900 + "]" * 900)),
    "an integer of 5,000 digits": _header('{"format_version": ' + "9" * 5000 + "}"),
    "an integer of 400 digits as steps": _set("metadata", "steps", value=int("9" * 400)),
    "images as an integer of 400 digits": _set("metadata", "images", value=int("9" * 400)),
    "a list as trigger prompt": _set("metadata", "trigger_prompt", value=["a"]),
    "no trigger prompt": _set("metadata", "trigger_prompt", value=None),
    "lone surrogates": _set("metadata", "trigger_prompt", value="a \ud800 cat"),
    "escape sequences": _set("metadata", "base_model", value="\x1b]0;owned\x07\x1b[2J"),
    "a reversed line": _set("metadata", "base_model", value="\u202egnp.exe"),
    "a megabyte of prompt": _set("metadata", "trigger_prompt", value="x" * 1_000_000),
    "100,000 facts": _set("metadata", value={str(n): n for n in range(100_000)}),
    "a list as base hash": _set("metadata", "base_hash", value=[1]),
    "an object as base dtype": _set("metadata", "base_dtype", value={"a": 1}),
    "text as export error": _set("metadata", "export_error", value="nan"),
    "an infinite export error": _set("metadata", "export_error", value=1e999),
    "a component that is no name": _set("metadata", "component", value="../unet"),
    "metadata is null": _set("metadata", value=None),
    "alpha 1e308": _set("config", "alpha", value=1e308),
    "alpha 1e-320": _set("config", "alpha", value=1e-320),
    "alpha is true": _set("config", "alpha", value=True),
    "timestep_range 1e-320": _set("config", "timestep_range", value=1e-320),
    "dropout is text": _set("config", "dropout", value="0.1"),
    "rank 4096": _set("config", "rank", value=4096),
    "a width as text": _set("sites", 0, "in_features", value="8"),
    "a site named as an escape sequence": _set("sites", 0, "name", value="\x1b[2J"),
    "a layer of a megabyte": _set("sites", 0, "layer", value="x" * 1_000_000),
    "float8": _all(lambda value: value.to(torch.float8_e4m3fn)),
    "integers": _all(lambda value: value.to(torch.int32), "stacked_B"),
    "weights of 3e38": _all(lambda value: torch.full_like(value, 3e38)),
    "a calibration of 3e38": _all(lambda value: torch.full_like(value, 3e38), "calibration"),
    "a negative calibration": _all(lambda value: -value, "calibration"),
    "a calibration of zeros": _all(torch.zeros_like, "calibration"),
    "a transposed A": _all(lambda value: value.t().clone(), "shared_A"),
}
"""Writers of files by what is wrong with them."""

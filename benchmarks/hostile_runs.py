"""Checkpoints and configurations that no run has written, each with a manifest that matches."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from effilora_diffusion.core import (
    AdapterFile,
    EffiLoRA,
    EffiLoRAConfig,
    EffiLoRAError,
    Reducer,
    ReducerConfig,
    Site,
    save_adapter_file,
)
from effilora_diffusion.diffusion.training.checkpoints import (
    CONTENT,
    TrainingState,
    fault_of,
    load_checkpoint,
    save_checkpoint,
)

FINGERPRINT = {"seed": 0, "images": [["0" * 16, "a cat", "0.png"]]}
SCALER = {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000, "_growth_tracker": 3}
STEPS = 3


def fresh(seed: int = 0, **options: Any) -> tuple[EffiLoRA, torch.optim.Optimizer]:
    """An untrained adapter and its optimizer, fused as the trainer's is."""
    sites = [
        Site(f"blocks.{n}.q", f"blocks.{n}", 8, ((f"blocks.{n}.to_q", 6), (f"blocks.{n}.to_k", 6))) for n in range(3)
    ]
    config = {"rank": 2, "heads": 2, "reducer": ReducerConfig(mode="random", active=0.5), **options}
    adapter = EffiLoRA(EffiLoRAConfig(**config), sites, seed)
    return adapter, torch.optim.AdamW(adapter.parameters(), lr=0.01, fused=True)


def checkpoint(folder: Path) -> Path:
    """What a run of three steps has left; the last block was never trained."""
    adapter, optimizer = fresh()
    reducer = Reducer(adapter)
    for _ in range(STEPS):
        adapter.set_active(["blocks.0", "blocks.1"])
        losses = [value.square().sum() + value.sum() for value in adapter.parameters() if value.requires_grad]
        torch.stack(losses).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    reducer.active, reducer.ever_active = ("blocks.0", "blocks.1"), {"blocks.0", "blocks.1"}
    state = TrainingState(STEPS, copy.deepcopy(FINGERPRINT), reducer.state_dict(), dict(SCALER), 4.5)
    return save_checkpoint(folder, adapter, optimizer, state)


def resume(folder: Path) -> None:
    """Continue from a checkpoint for a step, as a trainer does; what refuses it must not have changed anything."""
    fault = fault_of(folder)
    if fault is not None:
        raise EffiLoRAError(fault)
    adapter, optimizer = fresh()
    before = [value.detach().clone() for value in adapter.parameters()]
    reducer, scaler = Reducer(adapter), torch.amp.GradScaler("cpu")
    try:
        state = load_checkpoint(folder, adapter, optimizer, FINGERPRINT)
    except EffiLoRAError:
        same = all(torch.equal(old, new) for old, new in zip(before, adapter.parameters(), strict=True))
        assert same and not optimizer.state, "refused, but something was changed"  # noqa: PT018 (no test)
        raise
    reducer.load_state_dict(state.reducer)
    scaler.load_state_dict(state.scaler)
    adapter.set_active(None)
    torch.stack([value.square().sum() for value in adapter.parameters()]).sum().backward()
    optimizer.step()
    assert all(value.isfinite().all() for value in adapter.parameters()), "not finite after a step"


Edit = Callable[[Path], object]


def _state(*keys: str, value: Any) -> Edit:
    def edit(folder: Path) -> None:
        state = json.loads((folder / "state.json").read_text())
        holder = state
        for key in keys[:-1]:
            holder = holder[key]
        holder[keys[-1]] = value
        (folder / "state.json").write_text(json.dumps(state))

    return edit


def _text(text: str) -> Edit:
    return lambda folder: (folder / "state.json").write_text(text)


def _moments(change: Callable[[dict[str, Tensor]], object]) -> Edit:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "optimizer.safetensors")
        change(tensors)
        save_file(tensors, folder / "optimizer.safetensors")

    return edit


def _each(change: Callable[[Tensor], Tensor], key: str) -> Edit:
    """Change every tensor of one kind."""
    return _moments(
        lambda tensors: tensors.update({n: change(v) for n, v in tensors.items() if n.endswith(f":{key}")})
    )


def _adapter(**options: Any) -> Edit:
    """The adapter of a run with other options."""
    return lambda folder: save_adapter_file(folder / "adapter.safetensors", AdapterFile(fresh(**options)[0]))


def _special(name: str, make: Callable[[Path], object]) -> Edit:
    def edit(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return edit


def _drop(tensors: dict[str, Tensor], part: str) -> None:
    for name in [name for name in tensors if part in name]:
        del tensors[name]


CHECKPOINTS: dict[str, Edit] = {
    "step -1": _state("step", value=-1),
    "step of another folder": _state("step", value=7),
    "step is text": _state("step", value="3"),
    "step is a fraction": _state("step", value=3.0),
    "step of 400 digits": _state("step", value=int("9" * 400)),
    "seconds are negative": _state("seconds", value=-5),
    "seconds are NaN": _state("seconds", value=float("nan")),
    "seconds are a list": _state("seconds", value=[1]),
    "no reducer": _state("reducer", value=None),
    "a reducer of other blocks": _state("reducer", "scores", value={"x": 0.0}),
    "a score of 1e308": _state("reducer", "scores", "blocks.0", value=1e308),
    "a score of text": _state("reducer", "scores", "blocks.0", value="high"),
    "no active block": _state("reducer", "active", value=[]),
    "active blocks of another model": _state("reducer", "active", value=["mid"]),
    "a scaler of text": _state("scaler", value="x"),
    "a scale of zero": _state("scaler", "scale", value=0.0),
    "a scaler without a scale": _state("scaler", value={"growth_factor": 2.0}),
    "a fingerprint that is a list": _state("fingerprint", value=[]),
    "images that are numbers": _state("fingerprint", "images", value=[1, 2]),
    "images without captions": _state("fingerprint", "images", value=[["0"]]),
    "an unknown entry": _state("surprise", value=1),
    "state is a list": _text("[]"),
    "state is cut": _text('{"step": 3'),
    "state is 100,000 deep": _text("[" * 100_000),
    "moments of another shape": _each(lambda value: torch.zeros(1), "exp_avg"),
    "moments of too many values": _each(lambda value: torch.zeros(10_000), "exp_avg_sq"),
    "moments in half precision": _each(lambda value: value.half(), "exp_avg"),
    "moments that are not finite": _each(lambda value: value * float("nan"), "exp_avg"),
    "negative squares": _each(lambda value: -value - 1, "exp_avg_sq"),
    "negative steps": _each(lambda value: -value, "step"),
    "steps beyond the run": _each(lambda value: value + 1000, "step"),
    "steps as a list": _each(lambda value: torch.ones(3), "step"),
    "no moments": _moments(dict.clear),
    "one parameter without moments": _moments(lambda tensors: _drop(tensors, "A.8:")),
    "moments without squares": _moments(lambda tensors: _drop(tensors, ":exp_avg_sq")),
    "moments of a stranger": _moments(lambda tensors: tensors.update({"lora.down:exp_avg": torch.zeros(2)})),
    "moments of a block that was never trained": _moments(
        lambda tensors: tensors.update(
            {f"B.2:{key}": tensors[f"B.0:{key}"].clone() for key in ("step", "exp_avg", "exp_avg_sq")}
        )
    ),
    "no block was ever trained": lambda folder: (
        _state("reducer", "ever_active", value=[])(folder),
        _moments(lambda tensors: _drop(tensors, "B."))(folder),
    ),
    "an adapter of another rank": _adapter(rank=4),
    "an adapter of other routing": _adapter(routing="static"),
    "an adapter without a head": lambda folder: (folder / "adapter.safetensors").write_bytes(b""),
    "the manifest is a pipe": _special("manifest.json", os.mkfifo),
    "the state is a pipe": _special("state.json", os.mkfifo),
    "the state is /dev/zero": _special("state.json", lambda path: path.symlink_to("/dev/zero")),
    "the manifest is 100,000 deep": lambda folder: (folder / "manifest.json").write_text("[" * 100_000),
}
"""What is done to a checkpoint: every one of them must be refused, with adapter and optimizer untouched."""


def hostile_checkpoint(name: str, folder: Path) -> None:
    """Make the checkpoint ``name`` in ``folder``, try to resume from it, and fail if that works."""
    target = checkpoint(folder)
    CHECKPOINTS[name](target)
    manifest = target / "manifest.json"
    if "manifest" not in name:
        files = {
            part: hashlib.sha256((target / part).read_bytes()).hexdigest() if (target / part).is_file() else ""
            for part in CONTENT
            if not (target / part).is_symlink()
        }
        manifest.write_text(json.dumps({"step": STEPS, "files": files}))
    resume(target)
    raise AssertionError("accepted")


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "alpha 1e308": {"alpha": 1e308},
    "alpha of 400 digits": {"alpha": int("9" * 400)},
    "alpha is a list": {"alpha": [4]},
    "dropout is NaN": {"dropout": float("nan")},
    "dropout is an object": {"dropout": {}},
    "timestep_range is infinite": {"timestep_range": float("inf")},
    "targets are numbers": {"target_modules": [1]},
    "targets are an object": {"target_modules": {"a": 1}},
    "a target of a megabyte": {"target_modules": ["x" * 1_000_000]},
    "routing is a list": {"routing": ["token"]},
    "active is text": {"reducer": {"active": "half"}},
    "rollouts 10^12": {"reducer": {"rollouts": 10**12}},
    "train_shared is text": {"reducer": {"train_shared": "yes"}},
    "reducer is null": {"reducer": None},
}
"""Values that no configuration may have."""


def hostile_configuration(name: str) -> None:
    """Read one; fail if it is accepted."""
    EffiLoRAConfig.from_dict({"format_version": 1, **copy.deepcopy(CONFIGURATIONS[name])})
    raise AssertionError("accepted")

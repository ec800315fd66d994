"""Checkpoints: safetensors and JSON only, written aside and renamed whole, chosen by a valid manifest."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ...core import AdapterFile, EffiLoRA, EffiLoRAError, load_adapter_file, save_adapter_file
from ...core.adapter import a_key
from ...core.config import is_number
from ...core.files import ADAPTER_FILE, described
from ...core.reducer import check_state
from ...core.run_folder import (
    CARD_FILE,
    CHECKPOINT_ADAPTER,
    COMPARISON_FILE,
    CONCEPT_FILES,
    CONFIG_FILE,
    KOHYA_FILE,
    LORA_FILE,
    METRICS_FILE,
    PLAIN_COMPARISON_FILE,
    REDUCER_FILE,
    SAMPLES_FOLDER,
    Layout,
    checkpoints,
    step_of,
)
from ...core.scores import BEST_FILE, PAGE_FILE, SCORES_FILE
from ...core.text_io import open_regular, parse_json, printable, read_user_text
from ...core.writing import TEMPORARY, sync, sync_folder, writing
from ..adapters.new_words import WORDS_FILE
from .identity import RENAMED, check_same_run
from .optimizer_state import read_optimizer, restore_state, state_tensors

MANIFEST = "manifest.json"
CONTENT = (CHECKPOINT_ADAPTER, "optimizer.safetensors", "state.json")
MANIFEST_LIMIT = 1 << 20
STATE_LIMIT = 256 << 20
"""Bytes; the fingerprint in ``state.json`` holds every caption."""


@dataclass
class TrainingState:
    """What a resumed run continues from, besides the adapter's weights.

    ``fingerprint`` identifies model, data and settings; ``reducer`` and ``scaler`` are JSON-ready states.
    """

    step: int
    fingerprint: dict[str, Any]
    reducer: dict[str, Any]
    scaler: dict[str, Any]
    seconds: float = 0.0


def _sha256(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_checkpoint(
    output: Path,
    adapter: EffiLoRA,
    optimizer: torch.optim.Optimizer,
    state: TrainingState,
    limit: int | None = None,
    facts: dict[str, Any] | None = None,
    kept: str | None = None,
) -> Path:
    """Write ``output/checkpoint-<step>`` so that it appears whole or not at all; then drop the oldest over ``limit``.

    ``facts`` are what the adapter's file says of its origin; the checkpoint of the name ``kept`` stays, whatever its age.

    Raises:
        WriteError: the file system refused; earlier checkpoints are intact.
    """
    folder = output / f"checkpoint-{state.step}"
    aside, old = (output / f".{folder.name}{suffix}" for suffix in (TEMPORARY[2:], ".old"))
    with writing(folder):
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        try:
            _write_content(aside, AdapterFile(adapter, facts or {}), optimizer, state)
            if folder.exists():  # of an earlier resumption; a process that is killed here leaves one of the two
                shutil.rmtree(old, ignore_errors=True)
                os.replace(folder, old)
            os.replace(aside, folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        sync_folder(output)
        shutil.rmtree(old, ignore_errors=True)
        if limit is not None:
            # Later ones stem from a run that was resumed before them: counting those would drop the one just written.
            reached = [path for path in checkpoints(output) if step_of(path) <= state.step]
            for path in reached[:-limit]:
                if path.name != kept:
                    shutil.rmtree(path)
    return folder


def _write_content(folder: Path, content: AdapterFile, optimizer: torch.optim.Optimizer, state: TrainingState) -> None:
    save_adapter_file(folder / CHECKPOINT_ADAPTER, content)
    save_file(state_tensors(content.adapter.named_parameters(), optimizer), folder / "optimizer.safetensors")
    (folder / "state.json").write_text(json.dumps(state.__dict__, indent=1), encoding="utf-8")
    files = {name: _sha256(folder / name) for name in CONTENT}
    (folder / MANIFEST).write_text(json.dumps({"step": state.step, "files": files}, indent=1), encoding="utf-8")
    for path in folder.iterdir():
        sync(path)


def fault_of(folder: Path) -> str | None:
    """Why ``folder`` is not a whole checkpoint, or ``None``."""
    try:
        manifest = parse_json(read_user_text(folder / MANIFEST, MANIFEST_LIMIT, "it"))
        for name in CONTENT:
            if _sha256(folder / name) != manifest["files"][name]:
                return f"{name} does not match the manifest"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its manifest can't be used ({printable(error)[:200]})"
    return None


IMAGE_RUN = Layout(
    marks=(ADAPTER_FILE, METRICS_FILE),
    names=(
        LORA_FILE,
        KOHYA_FILE,
        CONCEPT_FILES,
        f"*{WORDS_FILE}",
        REDUCER_FILE,
        CONFIG_FILE,
        CARD_FILE,
        COMPARISON_FILE,
        PLAIN_COMPARISON_FILE,
        f"{SAMPLES_FOLDER}/step-*.png",
        SCORES_FILE,
        BEST_FILE,
        PAGE_FILE,
    ),
    finished=lambda folder: fault_of(folder) is None,
    fault=fault_of,
)
"""What an image run writes into its folder."""


def load_checkpoint(
    folder: Path,
    adapter: EffiLoRA,
    optimizer: torch.optim.Optimizer,
    fingerprint: dict[str, Any],
    fresh: Callable[[list[nn.Parameter]], torch.optim.Optimizer] = torch.optim.AdamW,
) -> TrainingState:
    """Restore ``adapter``, which is fresh, and its ``optimizer`` in place; ``fresh`` makes another of its kind.

    Raises:
        EffiLoRAError: the checkpoint is another run's, or anything in it is not what such a run can have written; nothing is
            changed then.
    """
    state = read_state(folder, adapter)
    check_same_run(folder, state.fingerprint, fingerprint)
    saved = load_adapter_file(folder / CHECKPOINT_ADAPTER).adapter
    if described(saved) != described(adapter):
        raise EffiLoRAError(
            f"{folder}: {CHECKPOINT_ADAPTER} has another configuration or other layers than this run's"
        )
    moments, counters = _read_moments(folder, adapter, saved, state, fresh, len(optimizer.param_groups))
    with torch.no_grad():
        for target, source in zip(adapter.parameters(), saved.parameters(), strict=True):
            target.copy_(source)
    restore_state(list(adapter.named_parameters()), optimizer, moments, counters)
    return state


def read_state(folder: Path, adapter: EffiLoRA) -> TrainingState:
    """A checkpoint's ``state.json``; raises :class:`EffiLoRAError` for values that no run of ``adapter`` writes."""
    path = folder / "state.json"
    try:
        found = parse_json(read_user_text(path, STATE_LIMIT, "it"), depth=8)
        if not isinstance(found, dict) or {*found} | {"seconds"} != {field.name for field in fields(TrainingState)}:
            raise EffiLoRAError("it has other entries than a run writes")
        state = TrainingState(**found)
        number = (
            step_of(folder) if folder.name.startswith("checkpoint-") and folder.name[11:].isdecimal() else state.step
        )
        if type(state.step) is not int or state.step < 0 or state.step != number:
            raise EffiLoRAError(f"its step is {state.step!r}")
        if not is_number(state.seconds, 0, 1e12):
            raise EffiLoRAError(f"its seconds are {state.seconds!r}")
        _check_fingerprint(state.fingerprint)
        check_state(state.reducer, adapter.blocks)
        if state.step and not state.reducer["ever_active"]:
            raise EffiLoRAError("no block was ever trained")
        if state.scaler and not _is_scaler(state.scaler):
            raise EffiLoRAError("its loss scaling is out of range")
    except EffiLoRAError as error:
        reason = printable(error)[:300]
        raise EffiLoRAError(f"{path} can't be continued from: {reason}; take another checkpoint") from error
    return state


def _check_fingerprint(found: Any) -> None:
    if not isinstance(found, dict):
        raise EffiLoRAError("its fingerprint is no object")
    for name in ("images", "class images", *RENAMED):
        entries = found.get(name) or []
        if not isinstance(entries, list) or not all(map(_is_entry, entries)):
            raise EffiLoRAError(f"its fingerprint lists {name} as no run does")


def _is_entry(entry: Any) -> bool:
    """Whether this is a content hash and a caption, and a file name since version 0.1.0."""
    return isinstance(entry, list) and len(entry) in (2, 3) and all(isinstance(part, str) for part in entry)


def _is_scaler(found: Any) -> bool:
    """Whether this is the state of a :class:`torch.amp.GradScaler`."""
    bounds = {
        "scale": (2.0**-126, 2.0**127),
        "growth_factor": (1.0, 1e3),
        "backoff_factor": (1e-3, 1.0),
        "growth_interval": (1, 10**9),
        "_growth_tracker": (0, 10**9),
    }
    if not isinstance(found, dict) or set(found) != set(bounds):
        return False
    whole = all(type(found[name]) is int for name in ("growth_interval", "_growth_tracker"))
    return whole and all(is_number(found[name], *limits) for name, limits in bounds.items())


def _blocks(adapter: EffiLoRA) -> dict[str, str]:
    """The blocks of the parameters that belong to one."""
    found: dict[str, str] = {}
    for index, site in enumerate(adapter.sites):
        found |= {f"B.{index}": site.block, f"G.{index}": site.block}
        if adapter.config.a_sharing == "none":
            found[f"A.{a_key(adapter.config, site)}"] = site.block
    return found


def _read_moments(
    folder: Path,
    adapter: EffiLoRA,
    saved: EffiLoRA,
    state: TrainingState,
    fresh: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    groups: int,
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """The optimizer's state by parameter: it must be there for what was trained, and for heads only if their block was."""
    path, blocks, ever = folder / "optimizer.safetensors", _blocks(adapter), {*state.reducer["ever_active"]}
    named, trained = [], set()
    for (name, parameter), old in zip(adapter.named_parameters(), saved.parameters(), strict=True):
        block = blocks.get(name)
        if not name.startswith("B.") or block in ever:
            named.append((name, parameter))
            if (block is None or block in ever) and not torch.equal(parameter.detach().cpu(), old.detach()):
                trained.add(name)
    moments, counters = read_optimizer(path, named, fresh, trained, groups)
    for name, entries in moments.items():
        for key, value in entries.items():
            whole = key != "step" or (float(value).is_integer() and 1 <= value <= max(1, state.step))
            if not whole or (key == "exp_avg_sq" and isinstance(value, Tensor) and (value < 0).any()):
                raise EffiLoRAError(f"{path}: {name}:{key} is out of range: take another checkpoint")
    return moments, counters

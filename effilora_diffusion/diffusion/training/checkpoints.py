"""Checkpoints: safetensors and JSON only, written aside and renamed whole, chosen by a valid manifest."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ...core import AdapterFile, EffiLoRA, EffiLoRAConfig, EffiLoRAError, load_adapter_file, save_adapter_file
from ...core.adapter import a_key
from ...core.config import is_number
from ...core.files import ADAPTER_FILE
from ...core.fingerprint import model_hash
from ...core.options import ADAPTER_SETTINGS, settings_of
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
    REDUCER_FILE,
    SAMPLES_FOLDER,
    Layout,
    checkpoints,
    step_of,
)
from ...core.tensor_io import open_tensors, read_tensors
from ...core.text_io import open_regular, parse_json, printable, read_user_text
from ...core.writing import TEMPORARY, sync, sync_folder, writing
from ..config import TrainingConfig
from ..data.folder import Example
from .build import RunParts

OF_THE_MODEL = {
    "base": "the base model",
    "encoders": "a text encoder or the autoencoder",
    "objective": "the scheduler",
}
"""Entries of a fingerprint whose values are hashes, in words."""

SPLIT = ("train_batch_size", "gradient_accumulation_steps", "processes")
"""Entries of a fingerprint whose product is the number of images per step: which images those are depends on nothing else."""

MANIFEST = "manifest.json"
CONTENT = (CHECKPOINT_ADAPTER, "optimizer.safetensors", "state.json")
MANIFEST_LIMIT = 1 << 20
STATE_LIMIT = 256 << 20
"""Bytes; the fingerprint in ``state.json`` holds every caption."""

_RENAMED = {"pictures": "images", "class pictures": "class images"}
"""Fingerprint names of version 0.1.0, and what they are called now."""


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


def _optimizer_tensors(adapter: EffiLoRA, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {}
    for name, parameter in adapter.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensor = value if isinstance(value, Tensor) else torch.tensor(float(value))
            tensors[f"{name}:{key}"] = tensor.detach().cpu().contiguous().clone()
    return tensors


def save_checkpoint(
    output: Path, adapter: EffiLoRA, optimizer: torch.optim.Optimizer, state: TrainingState, limit: int | None = None
) -> Path:
    """Write ``output/checkpoint-<step>`` so that it appears whole or not at all; then drop the oldest over ``limit``.

    Raises:
        WriteError: the file system refused; earlier checkpoints are intact.
    """
    folder = output / f"checkpoint-{state.step}"
    aside, old = (output / f".{folder.name}{suffix}" for suffix in (TEMPORARY[2:], ".old"))
    with writing(folder):
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        try:
            _write_content(aside, adapter, optimizer, state)
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
                shutil.rmtree(path)
    return folder


def _write_content(folder: Path, adapter: EffiLoRA, optimizer: torch.optim.Optimizer, state: TrainingState) -> None:
    save_adapter_file(folder / CHECKPOINT_ADAPTER, AdapterFile(adapter))
    save_file(_optimizer_tensors(adapter, optimizer), folder / "optimizer.safetensors")
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
        REDUCER_FILE,
        CONFIG_FILE,
        CARD_FILE,
        COMPARISON_FILE,
        f"{SAMPLES_FOLDER}/step-*.png",
    ),
    finished=lambda folder: fault_of(folder) is None,
    fault=fault_of,
)
"""What an image run writes into its folder."""


def _differences(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What makes two fingerprints differ, in words: every changed file and setting by name."""
    found = []
    for key in dict.fromkeys([*saved, *now]):
        old, new = saved.get(key), now.get(key)
        if key in ("images", "class images"):
            found += _changed_files(key, old or [], new or [])
        elif old != new and isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new)
        elif old != new and key in OF_THE_MODEL:
            found.append(f"{OF_THE_MODEL[key]} is a different one")
        elif old != new:
            found.append(f"{key} was {old!r} and is {new!r}"[:200])
    return found


def _images_per_step(fingerprint: dict[str, Any]) -> int | None:
    parts = [fingerprint.get(name) for name in SPLIT]
    return math.prod(parts) if all(isinstance(part, int) for part in parts) else None  # type: ignore[arg-type]


def _comparable(saved: dict[str, Any], now: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two fingerprints without what divides the same images differently, which changes sums in their last bits only.

    Dropout is drawn per micro-batch, and quantised layers scale by what is in it: then its size must stay.
    """
    if _images_per_step(saved) is None or _images_per_step(saved) != _images_per_step(now):
        return saved, now
    whole = now.get("quantization") is not None or bool(now.get("adapter", {}).get("dropout"))
    free = SPLIT[1:] if whole else SPLIT
    return tuple({name: value for name, value in one.items() if name not in free} for one in (saved, now))  # type: ignore[return-value]


def split_note(saved: dict[str, Any], now: dict[str, Any]) -> str | None:
    """What to tell of a run that goes on with its steps divided differently among micro-batches and processes."""
    changed = [f"{name} {saved.get(name)} to {now[name]}" for name in SPLIT if saved.get(name) != now[name]]
    if not changed:
        return None
    return (
        f"note: the steps are divided differently ({', '.join(changed)}): they see the same images, but sums are rounded "
        "differently, so that the result is not the same to the last bit"
    )


def _changed_files(kind: str, old: list[Any], new: list[Any]) -> list[str]:
    """How two lists of ``[content hash, caption, file name]`` differ; version 0.1.0 stored no names."""
    if [entry[:2] for entry in old] == [entry[:2] for entry in new]:
        return []
    before, after = ({entry[0]: entry for entry in entries} for entries in (old, new))
    gone = [_name(entry) for sha, entry in before.items() if sha not in after]
    added = [_name(entry) for sha, entry in after.items() if sha not in before]
    words = [f"{word} {', '.join(names[:5])}" for word, names in (("removed:", gone), ("added:", added)) if names]
    for sha, entry in after.items():
        if sha in before and before[sha][1] != entry[1]:
            words.append(f"the caption of {_name(entry)} was {before[sha][1]!r} and is {entry[1]!r}"[:200])
    return [f"the {kind} have changed ({'; '.join(words[:5]) or 'their order or number'})"]


def _name(entry: list[str]) -> str:
    return entry[2] if len(entry) > 2 else f"a file of hash {entry[0][:8]}"


def load_checkpoint(
    folder: Path, adapter: EffiLoRA, optimizer: torch.optim.Optimizer, fingerprint: dict[str, Any]
) -> TrainingState:
    """Restore ``adapter``, which is fresh, and its ``optimizer`` in place.

    Raises:
        EffiLoRAError: the checkpoint is another run's, or anything in it is not what such a run can have written; nothing is
            changed then.
    """
    state = read_state(folder, adapter)
    earlier = {_RENAMED.get(name, name): value for name, value in state.fingerprint.items()}
    different = _differences(*_comparable(earlier, json.loads(json.dumps(fingerprint))))
    if different:
        raise EffiLoRAError(
            f"{folder} belongs to another run: {printable('; '.join(different))[:2000]}. Continue with what it was trained with, "
            "or start anew in another --output_dir"
        )
    saved = load_adapter_file(folder / CHECKPOINT_ADAPTER).adapter
    if saved.config != adapter.config or saved.sites != adapter.sites:
        raise EffiLoRAError(
            f"{folder}: {CHECKPOINT_ADAPTER} has another configuration or other layers than this run's"
        )
    moments = _read_moments(folder, adapter, saved, state)
    with torch.no_grad():
        for target, source in zip(adapter.parameters(), saved.parameters(), strict=True):
            target.copy_(source)
    for name, parameter in adapter.named_parameters():
        if name in moments:
            optimizer.state[parameter] = {
                key: value if key == "step" else value.to(parameter.device) for key, value in moments[name].items()
            }
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
    for name in ("images", "class images", *_RENAMED):
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
    folder: Path, adapter: EffiLoRA, saved: EffiLoRA, state: TrainingState
) -> dict[str, dict[str, Tensor]]:
    """AdamW's state by parameter: it must be there for what was trained, and for heads only if their block was."""
    path, blocks, ever = folder / "optimizer.safetensors", _blocks(adapter), {*state.reducer["ever_active"]}
    shapes: dict[str, tuple[int, ...]] = {}
    trained = set()
    for (name, fresh), old in zip(adapter.named_parameters(), saved.parameters(), strict=True):
        block = blocks.get(name)
        if not name.startswith("B.") or block in ever:
            shapes |= {f"{name}:step": (), f"{name}:exp_avg": (*fresh.shape,), f"{name}:exp_avg_sq": (*fresh.shape,)}
            if (block is None or block in ever) and not torch.equal(fresh.detach().cpu(), old.detach()):
                trained.add(name)
    with open_tensors(path) as file:
        owners = {name.rpartition(":")[0] for name in file.keys()} | trained  # noqa: SIM118 (not a dict)
        required = {name: shape for name, shape in shapes.items() if name.rpartition(":")[0] in owners}
        tensors = read_tensors(path, file, required, types=("F32",))
    moments: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        owner, _, key = name.rpartition(":")
        whole = key != "step" or (tensor == tensor.round() and 1 <= tensor <= max(1, state.step))
        if not tensor.isfinite().all() or not whole or (key == "exp_avg_sq" and (tensor < 0).any()):
            raise EffiLoRAError(f"{path}: {name} is out of range: take another checkpoint")
        moments.setdefault(owner, {})[key] = tensor
    return moments


def _fixed() -> list[str]:
    """Settings that a resumed run must have as they were; the adapter's are compared as its configuration."""
    names = [entry.name for entry in settings_of(TrainingConfig) if entry.metadata["fixed"]]
    return [name for name in names if name not in ADAPTER_SETTINGS]


def _identity(example: Example) -> list[str]:
    return [example.sha256[:16], example.caption, example.path.name]


def fingerprint(parts: RunParts, prior: list[list[Example]], processes: int) -> dict[str, Any]:
    """What must be the same for a checkpoint to be continued: model, data, and every setting that shapes a step."""
    config, family = parts.config, parts.family
    found: dict[str, Any] = {name: getattr(config, name) for name in _fixed()}
    # the denoiser's timestep range follows from the base, and was never part of it
    found["adapter"] = replace(parts.adapter.config, timestep_range=EffiLoRAConfig.timestep_range).to_dict()
    named = [config.pretrained_model_name_or_path, config.revision, config.variant]
    found["base"] = parts.base["base_hash"] or named  # a quantised model has no hash
    found["objective"] = parts.objective.name
    found["encoders"] = [model_hash(part) for part in family.parts() if part is not family.model]
    found["processes"] = processes
    found["images"] = [_identity(example) for example in parts.examples]
    found["class images"] = [_identity(example) for examples in prior for example in examples]
    if parts.concepts:  # with routing concept the adapter names them
        found["concepts"] = [asdict(concept) for concept in parts.concepts]
        found["weights"] = list(parts.weights)
        found["images of each"] = [sum(one.concept == each.name for one in parts.examples) for each in parts.concepts]
    if config.lr_scheduler not in ("constant", "constant_with_warmup"):
        found["max_train_steps"] = parts.steps  # the schedule depends on it; a constant rate may be trained longer
    return found

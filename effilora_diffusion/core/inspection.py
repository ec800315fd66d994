"""Statistics of an adapter (norms per block, heads used, origin), and the history of a run's Reducer."""

from __future__ import annotations

import contextlib
import copy
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .convert import describe_export_error, is_exact
from .errors import EffiLoRAError
from .files import AdapterFile, adapter_path, load_adapter_file

USED_SHARE = 0.01
"""Minimum norm of a head that counts as used, relative to the largest head's in the adapter."""


@torch.no_grad()
def inspect_adapter(adapter: str | Path | AdapterFile) -> dict[str, Any]:
    """Return JSON-serialisable statistics of a native file.

    ``layers`` maps each block to the Frobenius norm of its update with uniform gates (``norm``), to the norms of its
    ``heads``, both with the scale included, and to ``usage``, the mean gate of each head over the calibration inputs
    (``None`` if the file has no calibration).
    """
    content = adapter if isinstance(adapter, AdapterFile) else load_adapter_file(adapter_path(adapter))
    model = content.adapter
    blocks: dict[str, dict[str, Any]] = {
        block: {"norm": 0.0, "heads": [0.0] * model.config.heads} for block in model.blocks
    }
    for index, site in enumerate(model.sites):
        shared, heads = model.shared_a(site), model.B[index]
        for head in range(model.config.heads):
            size = float((heads[:, head] @ shared).square().sum()) * model.config.scale**2
            blocks[site.block]["heads"][head] += size
        blocks[site.block]["norm"] += float((heads.mean(1) @ shared).square().sum()) * model.config.scale**2
    for block, usage in head_usage(content).items():
        norms = blocks[block]
        blocks[block] = {
            "norm": norms["norm"] ** 0.5,
            "heads": [size**0.5 for size in norms["heads"]],
            "usage": usage,
        }
    head_norms = [size for block in blocks.values() for size in block["heads"]]
    largest = max(head_norms, default=0.0)
    used = sum(size > 0 and size >= USED_SHARE * largest for size in head_norms)
    return {
        **content.metadata,  # first, so that metadata can't overwrite what is computed
        "export_error": _number(content.metadata.get("export_error")),
        "config": model.config.to_dict(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "sites": len(model.sites),
        "maps": sum(len(site.linears) for site in model.sites),
        "heads_used": used,
        "heads_total": len(head_norms),
        "layers": blocks,
        "exact_export": is_exact(model),
        "sha256": content.sha256,
    }


def _number(value: Any) -> float:
    """Convert a metadata value to a number; 0 if it is none."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return 0.0


@torch.no_grad()
def head_usage(content: AdapterFile) -> dict[str, list[float] | None]:
    """Return each block's mean gates over the calibration inputs, weighted by the norm of the shared activations A x."""
    model = content.adapter
    gates: dict[str, list[list[float]]] = {block: [] for block in model.blocks}
    for index, site in enumerate(model.sites):
        if model.config.heads == 1:
            gates[site.block].append([1.0])
        elif model.config.routing == "static":
            gates[site.block].append(model.G[index].softmax(0).tolist())
        elif site.name in content.calibration:
            moments = content.calibration[site.name].diagonal(dim1=1, dim2=2).sum(1)
            if float(moments[0]) > 0:
                gates[site.block].append((moments[1:] / moments[0]).tolist())
    return {
        block: [sum(column) / len(rows) for column in zip(*rows, strict=True)] if rows else None
        for block, rows in gates.items()
    }


def single_head(content: AdapterFile, head: int) -> AdapterFile:
    """Copy the adapter and zero all heads but ``head`` (counted from 1); its gates stay as they are among all heads."""
    if not 1 <= head <= content.adapter.config.heads:
        raise EffiLoRAError(f"the adapter has heads 1 to {content.adapter.config.heads}, not {head}")
    adapter = copy.deepcopy(content.adapter)
    with torch.no_grad():
        for heads in adapter.B:
            kept = heads[:, head - 1].clone()
            heads.zero_()
            heads[:, head - 1] = kept
    return AdapterFile(adapter, content.metadata, content.calibration, content.sha256)


@dataclass
class ReducerHistory:
    """The log of a run's Reducer.

    Args:
        steps: steps at which importance was evaluated.
        importance: each block's importance at ``steps``: its sampling weight sigmoid(-s), 0.5 before the first evaluation.
        active: for each block the half-open intervals of steps that trained it.
    """

    steps: list[int] = field(default_factory=list)
    importance: dict[str, list[float]] = field(default_factory=dict)
    active: dict[str, list[tuple[int, int]]] = field(default_factory=dict)

    def share_active(self, block: str, first: int, last: int) -> float:
        """Return the share of the steps ``first <= step < last`` that trained ``block``."""
        intervals = self.active.get(block, [])
        return sum(max(0, min(end, last) - max(start, first)) for start, end in intervals) / max(1, last - first)


def reducer_history(log: Path, blocks: list[str], steps: int) -> ReducerHistory:
    """Read a run's ``reducer.jsonl``; damaged and incomplete lines are skipped.

    Args:
        log: the file; if it is missing, every block counts as trained in every step.
        blocks: the adapter's.
        steps: optimizer steps so far, where the last interval ends.
    """
    history = ReducerHistory(importance={block: [] for block in blocks}, active={block: [] for block in blocks})
    since, active = 0, list(blocks)
    for event in _events(log):
        step = int(event["step"])
        if event.get("event") == "importance":
            history.steps.append(step)
            for block in blocks:
                score = float(event["scores"].get(block, 0.0))
                history.importance[block].append(1 / (1 + math.exp(max(-30.0, min(30.0, score)))))
        elif event.get("event") == "active":
            _close(history, active, since, step)
            since, active = step, [block for block in event["layers"] if block in history.active]
    _close(history, active, since, steps)
    return history


def logged_blocks(log: Path) -> list[str]:
    """Return the blocks in a run's ``reducer.jsonl``, in model order once importance was evaluated."""
    blocks: dict[str, None] = {}
    for event in _events(log):
        if event.get("event") == "importance":
            return list(event["scores"])
        blocks.update(dict.fromkeys(event.get("layers", [])))
    return list(blocks)


def _close(history: ReducerHistory, blocks: list[str], first: int, last: int) -> None:
    if last > first:
        for block in blocks:
            history.active[block].append((first, last))


def _events(log: Path) -> list[dict[str, Any]]:
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    events = []
    for line in lines:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            event = json.loads(line)
            int(event["step"])
            events.append(event)
    return events


def describe(facts: dict[str, Any]) -> str:
    """Format the result of :func:`inspect_adapter` as text."""
    config = facts["config"]
    alpha = config["alpha"] if config["alpha"] is not None else config["rank"]
    export = describe_export_error(None if facts["exact_export"] else facts.get("export_error", 0.0))
    lines = [
        f"base            {facts.get('base_model', 'unknown')} (hash {facts.get('base_hash', 'unknown')})",
        f"template        {facts['prompt_template']}"
        if "prompt_template" in facts
        else f"trigger prompt  {facts.get('trigger_prompt', 'unknown')}",
        f"adapter         rank {config['rank']}, alpha {alpha}, {config['heads']} heads, {config['routing']} routing",
        f"parameters      {facts['parameters']:,} in {facts['maps']} linear layers",
        f"heads used      {facts['heads_used']} of {facts['heads_total']}",
        f"plain LoRA      {export}",
        f"sha256          {facts['sha256']}",
        "",
        "norm of the update and of each head, by block:",
    ]
    width = max(len(name) for name in facts["layers"])
    for name, block in facts["layers"].items():
        heads = "  ".join(f"{size:.3f}" for size in block["heads"])
        lines.append(f"  {name:{width}}  {block['norm']:.3f}   {heads}")
    return "\n".join(lines)

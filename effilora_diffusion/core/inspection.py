"""What an adapter is and where it acts: counts, norms per layer, heads used, origin; what a run's Reducer has measured."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .convert import is_exact
from .errors import EffiLoRAError
from .files import AdapterFile, adapter_path, load_adapter_file

USED_SHARE = 0.01
"""A head counts as used if its norm is at least this share of the largest head's norm in the adapter."""


@torch.no_grad()
def inspect_adapter(adapter: str | Path | AdapterFile) -> dict[str, Any]:
    """JSON-ready facts about a native file.

    ``layers`` maps each block to the Frobenius norm of its update with uniform gates, to the norms of its heads
    (both with the scale included), and to the ``usage`` of its heads: the share of the gates that each gets over typical
    inputs (``None`` where the file holds no calibration to tell).
    """
    content = adapter if isinstance(adapter, AdapterFile) else load_adapter_file(adapter_path(adapter))
    model = content.adapter
    layers: dict[str, dict[str, Any]] = {
        layer: {"norm": 0.0, "heads": [0.0] * model.config.heads} for layer in model.blocks
    }
    for index, site in enumerate(model.sites):
        shared, heads = model.shared_a(site), model.B[index]
        for head in range(model.config.heads):
            size = float((heads[:, head] @ shared).square().sum()) * model.config.scale**2
            layers[site.block]["heads"][head] += size
        layers[site.block]["norm"] += float((heads.mean(1) @ shared).square().sum()) * model.config.scale**2
    for facts in layers.values():
        facts["norm"] = facts["norm"] ** 0.5
        facts["heads"] = [size**0.5 for size in facts["heads"]]
    for layer, usage in head_usage(content).items():
        layers[layer]["usage"] = usage
    largest = max((size for facts in layers.values() for size in facts["heads"]), default=0.0)
    used = sum(size > 0 and size >= USED_SHARE * largest for facts in layers.values() for size in facts["heads"])
    return {
        **content.metadata,  # first: a file's words about itself never replace what is measured
        "export_error": _number(content.metadata.get("export_error")),
        "config": model.config.to_dict(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "sites": len(model.sites),
        "maps": sum(len(site.linears) for site in model.sites),
        "heads_used": used,
        "heads_total": len(layers) * model.config.heads,
        "layers": layers,
        "exact_export": is_exact(model),
        "sha256": content.sha256,
    }


def _number(value: Any) -> float:
    """A number of a file's metadata; 0 if it is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return 0.0


@torch.no_grad()
def head_usage(content: AdapterFile) -> dict[str, list[float] | None]:
    """Each block's mean gates over typical inputs, heads in order, weighted by the size of the codes (they sum to 1)."""
    model = content.adapter
    gates: dict[str, list[list[float]]] = {layer: [] for layer in model.blocks}
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
        layer: [sum(column) / len(rows) for column in zip(*rows, strict=True)] if rows else None
        for layer, rows in gates.items()
    }


def single_head(content: AdapterFile, head: int) -> AdapterFile:
    """A copy in which only ``head`` (counted from 1) acts, under the gates that it has beside the others."""
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
    """What the Reducer of a run has measured and chosen, from its log.

    ``importance`` maps each layer to its values at ``steps``, between 0 and 1: the weight with which it is drawn for
    training, 0.5 before anything was measured. ``active`` maps each layer to the spans of steps that trained it.
    """

    steps: list[int] = field(default_factory=list)
    importance: dict[str, list[float]] = field(default_factory=dict)
    active: dict[str, list[tuple[int, int]]] = field(default_factory=dict)

    def share_active(self, layer: str, first: int, last: int) -> float:
        """Share of the steps ``first <= step < last`` that trained ``layer``."""
        spans = self.active.get(layer, [])
        return sum(max(0, min(end, last) - max(start, first)) for start, end in spans) / max(1, last - first)


def reducer_history(log: Path, layers: list[str], steps: int) -> ReducerHistory:
    """Read a run's ``reducer.jsonl``; lines that are damaged, or being written, are left out.

    Args:
        log: the file; without it every layer counts as trained in every step.
        layers: the adapter's.
        steps: optimizer steps so far, where the last span ends.
    """
    history = ReducerHistory(importance={layer: [] for layer in layers}, active={layer: [] for layer in layers})
    since, active = 0, list(layers)
    for event in _events(log):
        step = int(event["step"])
        if event.get("event") == "importance":
            history.steps.append(step)
            for layer in layers:
                score = float(event["scores"].get(layer, 0.0))
                history.importance[layer].append(1 / (1 + math.exp(max(-30.0, min(30.0, score)))))
        elif event.get("event") == "active":
            _close(history, active, since, step)
            since, active = step, [layer for layer in event["layers"] if layer in history.active]
    _close(history, active, since, steps)
    return history


def logged_layers(log: Path) -> list[str]:
    """The layers that a run's ``reducer.jsonl`` names, in model order once an importance was measured."""
    found: dict[str, None] = {}
    for event in _events(log):
        if event.get("event") == "importance":
            return list(event["scores"])
        found.update(dict.fromkeys(event.get("layers", [])))
    return list(found)


def _close(history: ReducerHistory, layers: list[str], first: int, last: int) -> None:
    if last > first:
        for layer in layers:
            history.active[layer].append((first, last))


def _events(log: Path) -> list[dict[str, Any]]:
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            event = json.loads(line)
            int(event["step"])
            found.append(event)
        except (ValueError, KeyError, TypeError):
            continue
    return found


def describe(facts: dict[str, Any]) -> str:
    """The same as lines of text."""
    config = facts["config"]
    alpha = config["alpha"] if config["alpha"] is not None else config["rank"]
    export = "exact" if facts["exact_export"] else f"least squares, relative error {facts.get('export_error', 0):.2%}"
    lines = [
        f"base            {facts.get('base_model', 'unknown')} (hash {facts.get('base_hash', 'unknown')})",
        f"prompt form     {facts['prompt_template']}"
        if "prompt_template" in facts
        else f"trigger prompt  {facts.get('trigger_prompt', 'unknown')}",
        f"adapter         rank {config['rank']}, alpha {alpha}, {config['heads']} heads, {config['routing']} routing",
        f"parameters      {facts['parameters']:,} in {facts['maps']} linear maps",
        f"heads used      {facts['heads_used']} of {facts['heads_total']}",
        f"plain LoRA      {export}",
        f"sha256          {facts['sha256']}",
        "",
        "norm of the update, and of each head, by layer:",
    ]
    width = max(len(name) for name in facts["layers"])
    for name, layer in facts["layers"].items():
        heads = "  ".join(f"{size:.3f}" for size in layer["heads"])
        lines.append(f"  {name:{width}}  {layer['norm']:.3f}   {heads}")
    return "\n".join(lines)

"""Statistics of an adapter (norms per block, heads used, origin), and the history of a run's Reducer."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import heads_text, is_number
from .convert import describe_export_error, fixed_heads, is_exact
from .errors import EffiLoRAError
from .files import AdapterFile, load_adapter_file
from .reference import adapter_file
from .text_io import TextError, parse_json, read_user_text

USED_SHARE = 0.01
"""Minimum norm of a head that counts as used, relative to the largest head's in the adapter."""

LOG_LIMIT = 256 << 20
"""Bytes of a Reducer's log that are read."""


@torch.no_grad()
def inspect_adapter(adapter: str | Path | AdapterFile) -> dict[str, Any]:
    """Return JSON-serialisable statistics of a native file.

    ``layers`` maps each block to the Frobenius norm of its update with uniform gates (``norm``), to the norms of its
    ``heads``, both with the scale included, and to ``usage``, the mean gate of each head over the calibration inputs
    (``None`` if the file has no calibration).
    """
    content = adapter if isinstance(adapter, AdapterFile) else load_adapter_file(adapter_file(adapter))
    model = content.adapter
    blocks: dict[str, dict[str, Any]] = {
        block: {"norm": 0.0, "heads": [0.0] * model.config.heads} for block in model.blocks
    }
    for index, site in enumerate(model.sites):
        shared, heads = model.shared_a(site).double(), model.B[index].double()
        gram = shared @ shared.t()
        for head in range(model.config.heads):
            blocks[site.block]["heads"][head] += _squared_norm(heads[:, head], gram) * model.config.scale**2
        blocks[site.block]["norm"] += _squared_norm(heads.mean(1), gram) * model.config.scale**2
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
        "export_error": content.metadata.get("export_error", 0.0 if is_exact(model) else None),
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


def _squared_norm(up: Tensor, gram: Tensor) -> float:
    """The squared Frobenius norm of ``up @ down`` with ``gram = down @ down.T``: r x r, and in float64 it can't overflow."""
    return max(0.0, float(((up.t() @ up) * gram).sum()))


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
            moments = content.calibration[site.name].double().diagonal(dim1=1, dim2=2).sum(1)
            if float(moments[0]) > 0:
                gates[site.block].append((moments[1:] / moments[0]).clamp(0, 1).tolist())
    return {
        block: [sum(column) / len(rows) for column in zip(*rows, strict=True)] if rows else None
        for block, rows in gates.items()
    }


def single_head(content: AdapterFile, head: int) -> AdapterFile:
    """Copy the adapter and zero all heads but ``head`` (counted from 1); its gates stay as they are among all heads.

    The head of a concept acts on every prompt then, as its plain LoRA does.
    """
    if not 1 <= head <= content.adapter.config.heads:
        raise EffiLoRAError(f"the adapter has heads 1 to {content.adapter.config.heads}, not {head}")
    if content.adapter.concepts:
        return AdapterFile(fixed_heads(content.adapter, [head - 1]), content.metadata, sha256=content.sha256)
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
    """The whole lines of a log; a killed process may have left a part of one."""
    try:
        lines = read_user_text(log, LOG_LIMIT).split("\n")
    except TextError:
        return []
    events = []
    for line in lines:
        with contextlib.suppress(EffiLoRAError):
            event = parse_json(line)
            if _is_event(event):
                events.append(event)
    return events


def _is_event(event: Any) -> bool:
    if not isinstance(event, dict) or not is_number(event.get("step"), 0, 10**12):
        return False
    scores, layers = event.get("scores"), event.get("layers")
    if event.get("event") == "importance":
        return isinstance(scores, dict) and all(is_number(score, -1e6, 1e6) for score in scores.values())
    return isinstance(layers, list) and all(isinstance(layer, str) for layer in layers)


def concept_lines(concepts: Iterable[dict[str, Any]]) -> list[str]:
    """A line per concept, in the order of their heads: its name and its triggers."""
    return [f"concept         {one['name']}: {', '.join(map(repr, one['triggers']))}" for one in concepts]


def own_template(facts: dict[str, Any]) -> str:
    """What a language adapter brings along with its prompt template: a chat template of its own, and variables for it."""
    own = ", a chat template of its own" if facts.get("chat_template") else ""
    return own + (f", {facts['chat_template_kwargs']}" if facts.get("chat_template_kwargs") else "")


def plain_form(facts: dict[str, Any]) -> str:
    """How close the plain LoRA is, of the result of :func:`inspect_adapter`; the file of a checkpoint may not say it."""
    if facts["exact_export"]:
        return describe_export_error(None)
    error = facts.get("export_error")
    return (
        "a fit, not yet measured" if error is None else describe_export_error(error, facts.get("export_error_others"))
    )


def describe(facts: dict[str, Any]) -> str:
    """Format the result of :func:`inspect_adapter` as text."""
    config = facts["config"]
    alpha = config["alpha"] if config["alpha"] is not None else config["rank"]
    lines = [
        f"base            {facts.get('base_model', 'unknown')} (hash {facts.get('base_hash', 'unknown')})",
        f"template        {facts['prompt_template']}{own_template(facts)}"
        if "prompt_template" in facts
        else f"trigger prompt  {facts.get('trigger_prompt', 'unknown')}",
        f"adapter         rank {config['rank']}, alpha {alpha}, {heads_text(config['heads'], config['routing'])}",
        *concept_lines(config.get("concepts", ())),
        f"parameters      {facts['parameters']:,} in {facts['maps']} linear layers",
        f"heads used      {facts['heads_used']} of {facts['heads_total']}",
        f"plain LoRA      {plain_form(facts)}",
        f"sha256          {facts['sha256']}",
        "",
        "norm of the update and of each head, by block:",
    ]
    width = max(len(name) for name in facts["layers"])
    for name, block in facts["layers"].items():
        heads = "  ".join(f"{size:.3f}" for size in block["heads"])
        lines.append(f"  {name:{width}}  {block['norm']:.3f}   {heads}")
    return "\n".join(lines)

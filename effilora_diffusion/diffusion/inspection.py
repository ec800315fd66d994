"""What an adapter is and where it acts: counts, norms per layer, heads used, origin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..core import AdapterFile, is_exact, load_adapter_file
from .loading import adapter_path

USED_SHARE = 0.01
"""A head counts as used if its norm is at least this share of the largest head's norm in the adapter."""


@torch.no_grad()
def inspect_adapter(adapter: str | Path | AdapterFile) -> dict[str, Any]:
    """JSON-ready facts about a native file.

    ``layers`` maps each block to the Frobenius norm of its update with uniform gates, and to the norms of its heads
    (both with the scale included).
    """
    content = adapter if isinstance(adapter, AdapterFile) else load_adapter_file(adapter_path(adapter))
    model = content.adapter
    layers: dict[str, dict[str, Any]] = {
        layer: {"norm": 0.0, "heads": [0.0] * model.config.heads} for layer in model.layers
    }
    for index, site in enumerate(model.sites):
        shared, heads = model.shared_a(site), model.B[index]
        for head in range(model.config.heads):
            size = float((heads[:, head] @ shared).square().sum()) * model.config.scale**2
            layers[site.layer]["heads"][head] += size
        layers[site.layer]["norm"] += float((heads.mean(1) @ shared).square().sum()) * model.config.scale**2
    for facts in layers.values():
        facts["norm"] = facts["norm"] ** 0.5
        facts["heads"] = [size**0.5 for size in facts["heads"]]
    largest = max((size for facts in layers.values() for size in facts["heads"]), default=0.0)
    used = sum(size > 0 and size >= USED_SHARE * largest for facts in layers.values() for size in facts["heads"])
    return {
        "config": model.config.to_dict(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "sites": len(model.sites),
        "maps": sum(len(site.maps) for site in model.sites),
        "heads_used": used,
        "heads_total": len(layers) * model.config.heads,
        "layers": layers,
        "exact_export": is_exact(model),
        "sha256": content.sha256,
        **content.metadata,
    }


def describe(facts: dict[str, Any]) -> str:
    """The same as lines of text."""
    config = facts["config"]
    alpha = config["alpha"] if config["alpha"] is not None else config["rank"]
    export = "exact" if facts["exact_export"] else f"least squares, relative error {facts.get('export_error', 0):.2%}"
    lines = [
        f"base            {facts.get('base_model', 'unknown')} (hash {facts.get('base_hash', 'unknown')})",
        f"trigger prompt  {facts.get('trigger_prompt', 'unknown')}",
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

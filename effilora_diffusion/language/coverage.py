"""How much of a language model's blocks an adapter acts on, and what stays as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..core import EffiLoRA
from ..core.sites import base_layer, is_transposed, linears_of, widths
from ..core.weights import expert_modules, experts_of, paths_of
from .targets import EXPERTS, block_experts, is_in_block, language_part

SMALL = 0.005
"""Share of the blocks' weights below which what is not adapted is not named."""


@dataclass(frozen=True)
class Part:
    """Weights of one name in all blocks: how many numbers they are, and whether the adapter acts on them."""

    name: str
    numbers: int
    adapted: bool


def parts_of_blocks(model: nn.Module, paths: set[str]) -> list[Part]:
    """The weights of the blocks that generate text by name, most first; an adapter acts on those at ``paths``.

    Experts count as one, under their parameters' names where an adapter acts on some of them; norms, biases and routers are
    ``others``.
    """
    root, found = language_part(model), dict[tuple[str, bool], int]()

    def add(name: str, numbers: int, adapted: bool) -> None:
        found[name, adapted] = found.get((name, adapted), 0) + numbers

    seen: set[int] = set()
    for path, module in linears_of(model).items():
        size = widths(module)
        if size is not None and is_in_block(path, root):  # a quantised weight has fewer numbers than it stands for
            add(EXPERTS if f".{EXPERTS}." in path else path.rpartition(".")[2], size[0] * size[1], path in paths)
            seen.add(id(module._parameters.get("weight")))
    for path, weight in experts_of(model).items():
        if is_in_block(path, root):
            add(EXPERTS, weight.value.numel(), path in paths)
            seen.add(id(weight.value))
    quantised = {id(value) for module in expert_modules(model).values() for value in module.parameters(recurse=False)}
    for path, value in model.named_parameters():
        if is_in_block(path, root) and id(value) not in seen and not path.startswith("effilora."):
            add(EXPERTS if id(value) in quantised and value.ndim > 2 else "others", value.numel(), False)
    parts = [Part(name, numbers, adapted) for (name, adapted), numbers in found.items()]
    return sorted(parts, key=lambda part: -part.numbers)


def describe_coverage(model: nn.Module, adapter: EffiLoRA) -> str:
    """One line: the share of the blocks' weights that ``adapter`` acts on, what the rest is, and how to adapt its experts.

    Example:
        >>> print(describe_coverage(model, create_adapter(model, EffiLoRAConfig(target_modules=("paper",)))))
        adapts 3.1 % of the blocks' weights (k_proj, q_proj, v_proj); as they are: experts 94.2 % (add experts to ...)
    """
    parts = parts_of_blocks(model, set(paths_of(adapter.sites)))
    whole = sum(part.numbers for part in parts)
    adapted = sorted({part.name for part in parts if part.adapted})
    share = sum(part.numbers for part in parts if part.adapted) / whole
    left = [part for part in parts if not part.adapted and (part.numbers >= SMALL * whole or part.name == EXPERTS)]
    can = any(path not in paths_of(adapter.sites) for path in block_experts(model))
    routed = adapter.config.heads > 1 and adapter.config.routing != "static"
    how = (
        f" (add {EXPERTS} to --target_modules{', with --routing static or --heads 1' if routed else ''})"
        if can
        else ""
    )
    rest = [f"{part.name} {part.numbers / whole:.1%}{how if part.name == EXPERTS else ''}" for part in left]
    others = f"; as they are: {', '.join(rest)}" if rest else ""
    return f"adapts {share:.1%} of the blocks' weights ({', '.join(adapted)}){others}"


def model_facts(model: nn.Module) -> dict[str, Any]:
    """What an adapter's file says of the model's kind, which other forms of the adapter depend on."""
    plain = {base_layer(part) for part in model.modules()}
    return {
        "fan_in_fan_out": any(is_transposed(part) for part in plain),
        "experts": bool(expert_modules(model)),
        **config_facts(model.config),
    }


def config_facts(config: Any) -> dict[str, Any]:
    """The kind of the part of a model that generates text, and its numbers of heads, which order the rows of q and k in GGUF."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = getattr(text, "num_attention_heads", None) or 0
    return {
        "model_type": str(getattr(text, "model_type", "")),
        "attention_heads": int(heads),
        "key_value_heads": int(getattr(text, "num_key_value_heads", None) or heads),
    }

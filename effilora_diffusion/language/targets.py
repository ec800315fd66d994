"""Which linears and experts of a transformers model are adapted."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..core import EffiLoRA, EffiLoRAConfig, EffiLoRAError, Site
from ..core.sites import block_of, is_target, linears_of, widths
from ..core.weights import Weight, expert_modules, experts_of
from .models import ENCODER_DECODER

_QKV = (
    *("q_proj", "k_proj", "v_proj", "qkv_proj", "Wqkv", "query_key_value", "c_attn"),
    *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"),  # DeepSeek's latent attention: q, and k and v
)

GROUPS: dict[str, tuple[str, ...]] = {
    "attention": (
        *(*_QKV, "o_proj", "out_proj"),
        *("self_attention.dense", "attention.dense", "self_attn.dense", "attn.c_proj", "attn.out_proj", "attn.dense"),
    ),
    "feed_forward": (
        *("gate_proj", "up_proj", "down_proj", "gate_up_proj", "fc1", "fc2", "c_fc", "mlp.c_proj", "fc_in", "fc_out"),
        *("dense_h_to_4h", "dense_4h_to_h", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
    ),
    "paper": (
        *(*_QKV, "up_proj", "down_proj", "gate_up_proj", "fc1", "fc2", "c_fc", "mlp.c_proj", "fc_in", "fc_out"),
        *("dense_h_to_4h", "dense_4h_to_h", "feed_forward.w2", "feed_forward.w3"),
    ),
}
"""Names for usual sets of linear layers, as transformers calls them in its models.

``paper`` is what the paper adapts in LLaMA: q, k, v, up and down (section 4.1), and their like elsewhere. Layers that a model
has fused are in it whole.
"""

ALL_LINEAR = "all-linear"
"""Stands for every linear of the blocks, as in PEFT; the output embedding stays as it is."""

EXPERTS = "experts"
"""Stands for the experts of a mixture, which transformers keeps as parameters of several matrices, not as linears."""

_SAME_INPUT = (
    *(("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"), ("query", "key", "value")),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)
"""Linears of one module that read one input."""


def language_part(model: nn.Module) -> str:
    """Path of the part of ``model`` that generates text: of a vision-language model its language model, else ``""``."""
    config: Any = model.config
    vision = any(getattr(config, name, None) is not None for name in ("vision_config", "audio_config"))
    if not vision:
        return ""
    for path in ("model.language_model", "language_model", "model.text_model", "text_model"):
        try:
            model.get_submodule(path)
        except AttributeError:
            continue
        return path
    raise EffiLoRAError(f"the language model inside {type(model).__name__} was not found: name its layers in full")


def block_linears(model: nn.Module) -> dict[str, tuple[int, int]]:
    """The widths of the linears that can be adapted by path: those in blocks, not embeddings or projectors of images."""
    root, found = language_part(model), {}
    for path, module in linears_of(model).items():
        size = widths(module)
        if size is not None and is_in_block(path, root):
            found[path] = size
    return found


def is_in_block(path: str, root: str) -> bool:
    """Whether a path lies in a block of the part ``root`` of a model."""
    return block_of(path) != path and (not root or path.startswith(f"{root}."))


def block_experts(model: nn.Module) -> dict[str, Weight]:
    """The experts' parameters that can be adapted by path."""
    root = language_part(model)
    return {path: weight for path, weight in experts_of(model).items() if is_in_block(path, root)}


def is_chosen(path: str, targets: Iterable[str], stacked: bool = False) -> bool:
    """Whether ``targets`` mean ``path``: a linear's, or with ``stacked`` that of a parameter of experts.

    Groups mean linears only: experts are chosen by :data:`EXPERTS`, or by a name that contains it.
    """
    for target in targets:
        if target == EXPERTS:
            chosen = stacked or ".experts." in path
        elif stacked:
            chosen = "experts." in target and is_target(path, (target,))
        else:
            chosen = target == ALL_LINEAR or is_target(path, GROUPS.get(target, (target,)))
        if chosen:
            return True
    return False


def find_sites(model: nn.Module, targets: Iterable[str]) -> list[Site]:
    """Sites of what ``targets`` name: groups of :data:`GROUPS`, ``all-linear``, ``experts``, or name endings.

    Linears that read one input (q, k and v; gate and up) share a site. Raises :class:`EffiLoRAError` if nothing is found.
    """
    targets = tuple(targets)
    linears, experts = block_linears(model), block_experts(model)
    for target in targets:
        own = any(is_chosen(path, (target,)) for path in linears)
        if not own and not any(is_chosen(path, (target,), True) for path in experts):
            raise EffiLoRAError(_not_found(model, target, linears, experts))
    sites = _grouped({path: size for path, size in linears.items() if is_chosen(path, targets)})
    for path, weight in experts.items():
        if is_chosen(path, targets, True):
            size = (weight.in_features, ((path, weight.out_features),), weight.experts)
            sites.append(Site(path, block_of(path), *size))
    order = {path: number for number, (path, _) in enumerate(model.named_modules())}
    return sorted(sites, key=lambda site: order[site.block])  # a block's experts behind its linears


def _not_found(model: nn.Module, target: str, linears: dict[str, Any], experts: dict[str, Weight]) -> str:
    """Why ``target`` means nothing in ``model``, and what would mean something."""
    there = [path for path in expert_modules(model) if is_in_block(path, language_part(model))]
    if target == EXPERTS and there:
        return (
            f"the experts of {type(model).__name__} ({there[0]}) are quantised, or lie in a form that is not known here: "
            "load the model without quantisation, or leave experts out of --target_modules"
        )
    groups = [name for name in GROUPS if any(is_chosen(path, (name,)) for path in linears)]
    groups += [ALL_LINEAR] * bool(linears) + [EXPERTS] * bool(experts)
    endings = sorted({path.rpartition(".")[2] for path in linears})[:40]
    what = "experts are among its weights" if target == EXPERTS else f"linear of its blocks ends in {target}"
    return f"{type(model).__name__}: no {what}; --target_modules has {', '.join(groups)}, or of {endings}"


def _grouped(found: dict[str, tuple[int, int]]) -> list[Site]:
    """Sites of the linears in ``found``, in model order."""
    sites: list[Site] = []
    taken: set[str] = set()
    for path, (width, _) in found.items():
        if path in taken:
            continue
        parent, _, name = path.rpartition(".")
        group = next((names for names in _SAME_INPUT if name in names), (name,))
        maps = [f"{parent}.{one}" for one in group if found.get(f"{parent}.{one}", (0, 0))[0] == width]
        taken.update(maps)
        label = "_".join(one.rpartition(".")[2] for one in maps)
        sites.append(Site(f"{parent}.{label}", block_of(path), width, tuple((one, found[one][1]) for one in maps)))
    return sites


def create_adapter(model: nn.Module, config: EffiLoRAConfig, seed: int = 0, a_start: str = "kaiming") -> EffiLoRA:
    """A fresh adapter for ``model`` (identity until trained); raises :class:`EffiLoRAError` if nothing is targeted.

    A starts as that of PEFT's LoRA unless ``a_start`` says otherwise, so that a learning rate means what it means there.
    """
    if config.routing == "timestep":
        raise EffiLoRAError("--routing timestep is for diffusion models: language models have no timestep")
    if getattr(model.config, "is_encoder_decoder", False):
        raise EffiLoRAError(f"{type(model).__name__} is {ENCODER_DECODER}")
    return EffiLoRA(config, find_sites(model, config.target_modules), seed, a_start)

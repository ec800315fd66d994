"""Which linears of a transformers model are adapted."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..core import EffiLoRA, EffiLoRAConfig, EffiLoRAError, Site
from ..core.sites import block_of, is_target, linears_of, widths

GROUPS: dict[str, tuple[str, ...]] = {
    "attention": (
        *("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "qkv_proj", "Wqkv", "query_key_value", "c_attn"),
        *("self_attention.dense", "attention.dense", "self_attn.dense", "attn.c_proj", "attn.out_proj", "attn.dense"),
    ),
    "feed_forward": (
        *("gate_proj", "up_proj", "down_proj", "gate_up_proj", "fc1", "fc2", "c_fc", "mlp.c_proj", "fc_in", "fc_out"),
        *("dense_h_to_4h", "dense_4h_to_h", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
    ),
    "paper": (
        *("q_proj", "k_proj", "v_proj", "qkv_proj", "Wqkv", "query_key_value", "c_attn"),
        *("up_proj", "down_proj", "gate_up_proj", "fc1", "fc2", "c_fc", "mlp.c_proj", "fc_in", "fc_out"),
        *("dense_h_to_4h", "dense_4h_to_h", "feed_forward.w2", "feed_forward.w3"),
    ),
}
"""Names for usual sets of linear layers, as transformers calls them in its models.

``paper`` is what the paper adapts in LLaMA: q, k, v, up and down (section 4.1), and their like elsewhere. Layers that a model
has fused are in it whole.
"""

ALL_LINEAR = "all-linear"
"""Stands for every linear of the blocks, as in PEFT; the output embedding stays as it is."""

_SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"), ("query", "key", "value"))
"""Linears of one module that read one input."""


def language_part(model: nn.Module) -> str:
    """Path of the part of ``model`` that generates text: of a vision-language model its language model, else ``""``."""
    vision = any(getattr(model.config, name, None) is not None for name in ("vision_config", "audio_config"))
    if not vision:
        return ""
    for path in ("model.language_model", "language_model", "model.text_model", "text_model"):
        try:
            model.get_submodule(path)
        except AttributeError:
            continue
        return path
    raise EffiLoRAError(f"the language model inside {type(model).__name__} was not found: name its layers in full")


def find_sites(model: nn.Module, targets: Iterable[str]) -> list[Site]:
    """Sites of the linears named by ``targets``: groups of :data:`GROUPS`, ``all-linear``, or name endings.

    Linears that read one input (q, k and v; gate and up) share a site. Raises :class:`EffiLoRAError` if none is found.
    """
    targets = tuple(targets)
    names = tuple(name for target in targets for name in GROUPS.get(target, (target,)))
    root = language_part(model)
    found: dict[str, tuple[int, int]] = {}
    for path, module in linears_of(model).items():
        size = widths(module)
        inside = path.startswith(f"{root}.") if root else True
        in_block = block_of(path) != path  # else an embedding, or the projector of image features
        if size is None or not inside or not in_block:
            continue
        if ALL_LINEAR in names or is_target(path, names):
            found[path] = size
    for target in targets:
        if target != ALL_LINEAR and not any(is_target(path, GROUPS.get(target, (target,))) for path in found):
            raise EffiLoRAError(
                f"no linear of {type(model).__name__} ends in {target}: --target_modules has {', '.join(GROUPS)}, "
                f"{ALL_LINEAR}, or of {_endings(model)}"
            )
    return _grouped(found)


def _endings(model: nn.Module) -> list[str]:
    return sorted({path.rpartition(".")[2] for path in linears_of(model)})[:40]


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
    return EffiLoRA(config, find_sites(model, config.target_modules), seed, a_start)

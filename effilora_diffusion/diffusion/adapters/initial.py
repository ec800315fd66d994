"""The adapter that an image run starts from: a native one, or a plain LoRA taken over exactly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ...core import AdapterFile, EffiLoRA, EffiLoRAConfig, EffiLoRAError
from ...core.adapter import a_key
from ...core.convert import PlainLoRA
from ...core.files import is_native, load_adapter_file
from ...core.sites import Site, base_layer, is_target, linears_of, widths
from .lora_files import load_plain_lora, remove_plain_loras
from .processors import create_adapter, find_sites

NAME = "initial"
"""Name of the plain LoRA while it is read."""


def read_initial(path: Path, pipe: Any, component: str, wanted: EffiLoRAConfig) -> AdapterFile:
    """The adapter in ``path``, a native file or a plain LoRA of any format that diffusers reads.

    Args:
        path: the file.
        pipe: the pipeline that it was made for; it is left as it was.
        component: name of the trained part in ``pipe``.
        wanted: heads and routing of an adapter that is made of a plain LoRA.

    Raises:
        EffiLoRAError: an adapter that can't be taken over exactly: of another base, on other layers than linears, DoRA.
    """
    if is_native(path):
        return load_adapter_file(path)
    load_plain_lora(pipe, path, NAME)
    try:
        factors = _factors(pipe, component, path)
    finally:
        remove_plain_loras(pipe)
    return AdapterFile(from_plain(getattr(pipe, component), factors, wanted))


def _factors(pipe: Any, component: str, path: Path) -> dict[str, PlainLoRA]:
    """The two matrices of every linear on which the loaded plain LoRA acts, the scale in the second one."""
    found = {}
    for part, module in pipe.components.items():
        if not isinstance(module, nn.Module):
            continue
        layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, BaseTunerLayer)}
        for name, layer in layers.items():
            linear = isinstance(layer, LoraLayer) and NAME in layer.lora_A and widths(base_layer(layer)) is not None
            if part != component or not linear or NAME in getattr(layer, "lora_magnitude_vector", {}):
                raise EffiLoRAError(
                    f"--init_from {path} also acts on {part}.{name}, where a run here trains nothing, or is no plain LoRA there: "
                    f"only LoRAs of linears of the {component} can be trained on"
                )
            down, up = layer.lora_A[NAME].weight.detach().float(), layer.lora_B[NAME].weight.detach().float()
            found[name] = PlainLoRA(down.clone(), up * layer.scaling[NAME])
    return found


@torch.no_grad()
def from_plain(model: nn.Module, factors: dict[str, PlainLoRA], wanted: EffiLoRAConfig) -> EffiLoRA:
    """An adapter that computes what a plain LoRA does, up to rounding: gates sum to 1, so every head is the LoRA's own B.

    Linears of one site share its A. Where their LoRAs do not, the A's are stacked, so the rank is the sum of theirs.
    """
    config = replace(wanted, alpha=None, target_modules=_targets(model, factors, wanted.target_modules))
    largest = max(len(pair.down) for pair in factors.values())
    for sharing in ("width", "none"):
        config = replace(config, a_sharing=sharing)
        stacks = _stacks(config, find_sites(model, config), factors)
        rank = max(sum(len(down) for down in stack) for stack in stacks.values())
        if rank == largest:  # as of a LoRA that an adapter was exported to
            break
    adapter = create_adapter(model, replace(config, rank=rank))
    for key, stack in stacks.items():
        joined = torch.cat(stack)
        adapter.A[key][: len(joined)] = joined
    for index, site in enumerate(adapter.sites):
        for path, _ in site.linears:
            pair, start = factors[path], _offset(stacks[a_key(config, site)], factors[path].down)
            assert start is not None
            adapter.B[index][site.rows(path), :, start : start + len(pair.down)] = pair.up.unsqueeze(1)
    return adapter


def _targets(model: nn.Module, factors: dict[str, PlainLoRA], wanted: tuple[str, ...]) -> tuple[str, ...]:
    """Target modules that mean exactly the linears of a plain LoRA, as short as they can be."""
    endings = [tuple(sorted({".".join(path.split(".")[-count:]) for path in factors})) for count in (1, 2, 3)]
    paths = set(linears_of(model))
    for targets in (wanted, ("attention",), ("attention", "feed_forward"), *endings):
        if {path for path in paths if is_target(path, targets)} == set(factors):
            return targets
    return tuple(sorted(factors))


def _stacks(config: EffiLoRAConfig, sites: list[Site], factors: dict[str, PlainLoRA]) -> dict[str, list[torch.Tensor]]:
    """The different A's of the linears that share one, by the key of that one."""
    found: dict[str, list[torch.Tensor]] = {}
    for site in sites:
        stack = found.setdefault(a_key(config, site), [])
        for path, _ in site.linears:
            if _offset(stack, factors[path].down) is None:
                stack.append(factors[path].down)
    return found


def _offset(stack: list[torch.Tensor], down: torch.Tensor) -> int | None:
    """The row at which ``down`` stands in a stack."""
    start = 0
    for part in stack:
        if torch.equal(part, down):
            return start
        start += len(part)
    return None

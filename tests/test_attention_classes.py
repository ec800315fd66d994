"""Every attention of the installed diffusers that has a processor: a new release shows here what it has changed."""

import importlib
import inspect
import pkgutil

import diffusers.models
import pytest
import torch
from conftest import assert_same, footprint, randomise
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import nn

from effilora_diffusion import detach
from effilora_diffusion.core import EffiLoRAConfig, EffiLoRAError
from effilora_diffusion.diffusion.adapters.processors import attach, create_adapter, is_effilora_processor

WIDTH = 32

ARGUMENTS = {
    **dict.fromkeys(
        (
            "query_dim",
            "dim",
            "hidden_size",
            "width",
            "pair_width",
            "context_dim",
            "q_dim",
            "kv_dim",
            "d_model",
            "in_dim",
            "out_dim",
            "num_channels",
            "channels",
            "added_kv_proj_dim",
        ),
        WIDTH,
    ),
    **dict.fromkeys(("heads", "num_heads", "num_attention_heads", "num_key_value_heads"), 2),
    **dict.fromkeys(("dim_head", "head_dim", "attention_head_dim"), WIDTH // 2),
    **dict.fromkeys(("attention_bias", "use_pair", "single"), False),
    "kernel_size": (3, 3, 3),
    "norm_type": "rms_norm",
    "rms_norm_eps": 1e-6,
}
"""Values for parameters by name, small and the same everywhere."""

NOT_TARGETS = {
    "AnimaTextConditionerAttention": "works on the prompt, before the denoiser",
    "MiniMaxH3AudioCausalAttention": "in an autoencoder",
    "MMAudioAttnBlock1D": "convolutions, in an autoencoder",
    "RFD4ProteinaPairAttention": "proteins: to_g and to_bias read pairs, not tokens",
    "MultiHeadCrossAttention": "video: plain names (proj, q_linear) that can be given as target_modules",
}
"""Attentions with projections that ``attention`` does not stand for, and why."""


def attention_classes():
    """Every attention class of diffusers' models by its qualified name."""
    found = {}
    for entry in pkgutil.walk_packages(diffusers.models.__path__, "diffusers.models."):
        module = importlib.import_module(entry.name)
        for name, kind in vars(module).items():
            mine = inspect.isclass(kind) and issubclass(kind, nn.Module) and kind.__module__ == entry.name
            if mine and hasattr(kind, "set_processor"):
                found[f"{entry.name.rpartition('.')[2]}.{name}"] = kind
    return found


CLASSES = attention_classes()


class Block(nn.Module):
    """A host as models have them: blocks with an attention each."""

    def __init__(self, kind):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Module()])
        bases = [base for base in kind.__mro__ if "__init__" in vars(base) and base.__module__.startswith("diffusers")]
        names = {name for base in bases for name in inspect.signature(base.__init__).parameters}
        chosen = {name: value for name, value in ARGUMENTS.items() if name in names}
        added = chosen.pop("added_kv_proj_dim", None)
        try:
            attention = kind(**chosen, **({"added_kv_proj_dim": added} if added else {}))
        except (TypeError, ValueError, AssertionError):  # some cross-attentions refuse a second stream
            attention = kind(**chosen)
        if attention.processor is None:  # the model that uses it gives one
            attention.set_processor(getattr(kind, "_default_processor_cls", AttnProcessor2_0)())
        self.blocks[0].add_module("self_attention", attention)


def build(name):
    torch.manual_seed(0)
    return Block(CLASSES[name]).eval().requires_grad_(False)


def linears(model):
    return {path: part for path, part in model.named_modules() if isinstance(part, nn.Linear)}


def covered(name):
    return CLASSES[name].__name__ not in NOT_TARGETS


def test_there_are_attentions_to_walk():
    assert len(CLASSES) >= 50
    assert set(NOT_TARGETS) <= {kind.__name__ for kind in CLASSES.values()}


@pytest.mark.parametrize("name", [name for name in CLASSES if covered(name)])
def test_every_projection_is_adapted_and_nothing_else_changes(name):
    model = build(name)
    before = footprint(model)
    (attention,) = (part for part in model.modules() if isinstance(part, CLASSES[name]))
    processor, seen = attention.processor, inspect.signature(attention.processor.__call__)
    x = {path: torch.randn(3, part.in_features) for path, part in linears(model).items()}
    base = {path: part(x[path]) for path, part in linears(model).items()}

    adapter = attach(model, create_adapter(model, EffiLoRAConfig(alpha=8.0)))
    adapted = sorted(path for site in adapter.sites for path, _ in site.linears)
    assert adapted == sorted(x)
    assert is_effilora_processor(attention.processor)
    assert isinstance(attention.processor, type(processor))
    assert inspect.signature(attention.processor.__call__) == seen  # diffusers drops keywords that are not in it
    for path, part in linears(model).items():
        assert torch.equal(part(x[path]), base[path])
    randomise(adapter)
    for path, part in linears(model).items():
        assert (part(x[path]) - base[path]).abs().max() > 0.01

    detach(model)
    assert attention.processor is processor
    assert_same(model, before)


@pytest.mark.parametrize("name", [name for name in CLASSES if not covered(name)])
def test_what_is_left_out_has_projections_with_other_names(name):
    model = build(name)
    try:
        adapter = create_adapter(model, EffiLoRAConfig())
    except EffiLoRAError:
        return
    assert len([path for site in adapter.sites for path, _ in site.linears]) < len(linears(model))

"""Adapters on the denoisers of every family, in the families' own pipelines: exact until trained, exact when gone."""

import pytest
import torch
from tiny_families import FAMILIES, build, draw

from effilora_diffusion import EffiLoRAConfig
from effilora_diffusion.core.sites import is_target
from effilora_diffusion.diffusion.attention import attach, create_adapter, detach
from effilora_diffusion.diffusion.loading import component_of

PROMPT = "a red cat on a table"


@pytest.mark.parametrize("name", FAMILIES)
def test_pictures_are_the_base_s_until_trained_at_strength_zero_and_after_detaching(name):
    pipe = build(name)
    model = component_of(pipe)
    before = draw(pipe, name, PROMPT)
    adapter = attach(model, create_adapter(model, EffiLoRAConfig()))
    assert torch.equal(draw(pipe, name, PROMPT), before)
    generator = torch.Generator().manual_seed(0)
    for heads in adapter.B:
        heads.data.normal_(std=0.3, generator=generator)
    assert (draw(pipe, name, PROMPT) - before).abs().mean() > 1
    adapter.strength = 0.0
    assert torch.equal(draw(pipe, name, PROMPT), before)
    detach(model)
    assert torch.equal(draw(pipe, name, PROMPT), before)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_targeted_projection_belongs_to_one_site(name):
    model = component_of(build(name))
    config = EffiLoRAConfig()
    adapter = create_adapter(model, config)
    found = [path for site in adapter.sites for path, _ in site.maps]
    named = [path for path, part in model.named_modules() if isinstance(part, torch.nn.Linear)]
    assert sorted(found) == sorted(path for path in named if is_target(path, config.target_modules))
    named_maps = [[path.rpartition(".")[2] for path, _ in site.maps] for site in adapter.sites]
    shared = [names for names in named_maps if "to_v" in names or "add_v_proj" in names]
    assert shared
    for names in shared:  # one code for every projection of one input
        assert "add_k_proj" in names if "add_v_proj" in names else "to_k" in names

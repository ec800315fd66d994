"""Recognising the base of an adapter in other dtypes and next to other adapters."""

import copy
import logging

import pytest
import torch
from conftest import build_tiny_pipeline
from helpers import make_subject, trainer
from torch import nn

from effilora_diffusion import load_adapter
from effilora_diffusion.core import merge
from effilora_diffusion.core.fingerprint import base_fingerprint, same_base

TYPES = (torch.float32, torch.float16, torch.bfloat16)


def linear(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 40))


@pytest.mark.parametrize("one", TYPES)
@pytest.mark.parametrize("other", TYPES)
def test_a_base_is_recognised_in_another_dtype(one, other):
    first, second = (base_fingerprint(linear(0).to(dtype)) for dtype in (one, other))
    halves = {one, other} == {torch.float16, torch.bfloat16}
    assert same_base(first, second) is (None if halves else True)
    different = base_fingerprint(linear(1).to(other))
    assert same_base(first, different) is (None if halves else False)


def test_a_fine_tuned_base_is_different():
    tuned = copy.deepcopy(base := linear(0))
    with torch.no_grad():
        for value in tuned.parameters():
            value.mul_(1.01)
    assert same_base(base_fingerprint(tuned), base_fingerprint(base)) is False
    assert same_base(base_fingerprint(base), {}) is None


def test_a_base_with_a_merged_adapter_is_not_reported_as_different(tmp_path, caplog):
    pipe = build_tiny_pipeline()
    pipe.save_pretrained(tmp_path / "model")
    options = {"routing": "static", "max_train_steps": 2, "num_validation_images": 0, "learning_rate": 0.1}
    trainer(tmp_path / "model", make_subject(tmp_path / "s", 2), tmp_path / "cat", **options).run()
    load_adapter(pipe, tmp_path / "cat", name="one")
    merge(pipe.unet, "one")
    load_adapter(pipe, tmp_path / "cat", name="two")
    assert "another model" not in caplog.text


def test_an_adapter_trained_in_bfloat16_matches_the_float32_model(tmp_path, caplog):
    pipe = build_tiny_pipeline()
    pipe.save_pretrained(tmp_path / "model")
    options = {"mixed_precision": "bf16", "max_train_steps": 1, "num_validation_images": 0, "learning_rate": 0.1}
    trainer(tmp_path / "model", make_subject(tmp_path / "s", 2), tmp_path / "cat", **options).run()
    with caplog.at_level(logging.WARNING):
        for name in ("one", "two"):
            load_adapter(pipe, tmp_path / "cat", name=name)
    assert "another model" not in caplog.text
    with torch.no_grad():
        pipe.unet.conv_in.weight.mul_(2)
    load_adapter(pipe, tmp_path / "cat", name="three")
    assert "another model of the same shape" in caplog.text

"""Every optimizer trains, resumes bit for bit, and leaves the weights that are to be drawn with."""

import hashlib
import json
import shutil

import pytest
import torch
from helpers import edit_json, make_subject, settings
from safetensors.torch import load_file

from effilora_diffusion.cli.train import parse_arguments
from effilora_diffusion.core import EffiLoRAError, load_adapter_file
from effilora_diffusion.diffusion.training.trainer import Trainer

RATES = {"prodigy": 1.0, "lion": 1e-3, "came": 1e-3, "schedulefree": 5e-3, "adafactor": 5e-3, "adamw8bit": 5e-3}


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    return make_subject(tmp_path_factory.mktemp("subject") / "s", 3, size=(32, 32))


def run(tiny_pipeline, subject, output, **changes):
    """A short run with frozen heads, a checkpoint in its middle, and an own rate; nothing is to be fitted at its end."""
    short = {"max_train_steps": 6, "checkpointing_steps": 3, "num_validation_images": 0, "train_batch_size": 2,
             "routing": "static", "reducer": "random", "reducer_warmup": 2, "reducer_interval": 2}  # fmt: skip
    one = Trainer(settings(tiny_pipeline, subject, output, **{**short, **changes}))
    one.run()
    return one


def continued(tiny_pipeline, subject, source, output, **changes):
    """The same run, from its checkpoint in the middle on."""
    output.mkdir()
    shutil.copytree(source / "checkpoint-3", output / "checkpoint-3")
    return run(tiny_pipeline, subject, output, resume_from_checkpoint="latest", overwrite_output_dir=False, **changes)


def weights(output, name="effilora.safetensors"):
    return dict(load_adapter_file(output / name).adapter.named_parameters())


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("optimizer", "changes"),
    [
        *[(name, {"learning_rate": rate}) for name, rate in RATES.items()],
        ("torch.optim.RMSprop", {"learning_rate": 1e-3, "optimizer_args": ["momentum=0.5"]}),
        ("adamw", {"learning_rate": 5e-3, "use_ema": True}),
    ],
)
def test_an_optimizer_resumes_bit_for_bit(tiny_pipeline, subject, tmp_path, optimizer, changes):
    whole = run(tiny_pipeline, subject, tmp_path / "whole", optimizer=optimizer, **changes)
    continued(tiny_pipeline, subject, tmp_path / "whole", tmp_path / "again", optimizer=optimizer, **changes)
    adamw = run(tiny_pipeline, subject, tmp_path / "adamw", learning_rate=changes["learning_rate"])
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "again"))
    last = (tmp_path / f"{name}/checkpoint-6/optimizer.safetensors" for name in ("whole", "again"))
    assert equal(*map(load_file, last))
    assert not equal(weights(tmp_path / "whole"), weights(tmp_path / "adamw"))
    assert type(whole.optimizer) is not type(adamw.optimizer) or changes.get("use_ema")


def test_a_state_of_another_optimizer_is_refused(tiny_pipeline, subject, tmp_path):
    run(tiny_pipeline, subject, tmp_path / "a", optimizer="lion", learning_rate=1e-3)
    with pytest.raises(EffiLoRAError, match="optimizer was 'lion' and is 'adamw'"):
        continued(tiny_pipeline, subject, tmp_path / "a", tmp_path / "b", learning_rate=1e-3)


def test_a_checkpoint_of_before_there_was_a_choice_is_one_of_adamw(tiny_pipeline, subject, tmp_path):
    run(tiny_pipeline, subject, tmp_path / "whole", learning_rate=5e-3)
    state = tmp_path / "whole" / "checkpoint-3" / "state.json"
    fingerprint = json.loads(state.read_text())["fingerprint"]
    for name in ("optimizer", "optimizer_args", "use_ema", "ema_decay"):
        del fingerprint[name]
    edit_json(state, fingerprint=fingerprint)
    manifest = state.with_name("manifest.json")
    files = json.loads(manifest.read_text())["files"]
    edit_json(manifest, files={**files, "state.json": hashlib.sha256(state.read_bytes()).hexdigest()})
    continued(tiny_pipeline, subject, tmp_path / "whole", tmp_path / "again", learning_rate=5e-3)
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "again"))
    with pytest.raises(EffiLoRAError, match="optimizer was 'adamw' and is 'lion'"):
        continued(tiny_pipeline, subject, tmp_path / "whole", tmp_path / "lion", learning_rate=5e-3, optimizer="lion")


def test_a_missing_package_is_told_before_the_model_is_loaded(tmp_path, subject):
    with pytest.raises(EffiLoRAError, match=r"no_such_package.Best, which can't be imported"):
        run(tmp_path / "no model", subject, tmp_path / "out", optimizer="no_such_package.Best")


def test_the_moving_average_is_what_is_kept(tiny_pipeline, subject, tmp_path):
    changes = {"learning_rate": 5e-3, "use_ema": True, "checkpointing_steps": 1, "reducer": "off", "ema_decay": 0.5}
    run(tiny_pipeline, subject, tmp_path / "out", **changes)
    steps = [weights(tmp_path / f"out/checkpoint-{step}", "adapter.safetensors") for step in range(1, 7)]
    for name, kept in weights(tmp_path / "out").items():
        average = steps[0][name].detach().clone()
        for number, one in enumerate(steps, 1):
            past = min(0.5, (1 + number) / (10 + number))
            average = past * average + (1 - past) * one[name].detach()
        torch.testing.assert_close(kept.detach(), average)
        assert not torch.equal(kept, steps[-1][name])


def test_schedule_free_weights_are_the_average_and_training_goes_on_from_its_own(tiny_pipeline, subject, tmp_path):
    changes = {"learning_rate": 5e-3, "optimizer": "schedulefree", "num_validation_images": 1}
    one = run(tiny_pipeline, subject, tmp_path / "seen", **changes, validation_steps=1, validation_inference_steps=1)
    run(tiny_pipeline, subject, tmp_path / "unseen", **{**changes, "num_validation_images": 0})
    assert equal(weights(tmp_path / "seen"), weights(tmp_path / "unseen"))  # drawing on the way changes nothing
    trained = weights(tmp_path / "seen/checkpoint-6", "adapter.safetensors")
    assert not equal(weights(tmp_path / "seen"), trained)
    assert equal(dict(one.adapter.named_parameters()), trained)
    one.optimizer.eval()
    assert equal(dict(one.adapter.named_parameters()), weights(tmp_path / "seen"))


def test_arguments_reach_the_optimizer(tiny_pipeline, subject, tmp_path):
    changes = {"optimizer": "Lion", "learning_rate": 1e-3, "optimizer_args": ["betas=0.5,0.6", "weight_decay=0.25"]}
    group = run(tiny_pipeline, subject, tmp_path / "lion", **changes).optimizer.param_groups[0]
    assert (group["betas"], group["weight_decay"], group["lr"]) == ((0.5, 0.6), 0.25, 1e-3)


def test_flags_of_diffusers_for_prodigy():
    words = [
        "--optimizer",
        "Prodigy",
        "--learning_rate",
        "1.0",
        "--prodigy_beta3",
        "0.9",
        "--prodigy_safeguard_warmup",
        "False",
    ]
    config = parse_arguments(words)
    assert (config.optimizer, config.optimizer_args) == ("prodigy", ["beta3=0.9", "safeguard_warmup=False"])
    assert parse_arguments(["--optimizer", "AdamW", "--prodigy_beta3", "0.9"]).optimizer_args == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimizer": "sophia"}, "--optimizer must be one of adamw, adamw8bit, prodigy"),
        ({"optimizer": "no_such_package.Best"}, "no_such_package.Best, which can't be imported: install its package"),
        ({"optimizer": "torch.nn.Linear"}, "torch.nn.Linear is no torch.optim.Optimizer"),
        ({"optimizer_args": ["momentum=0.9"]}, "does not take its arguments: .*momentum"),
        ({"optimizer_args": ["fast"]}, "--optimizer_args 'fast' is not KEY=VALUE"),
    ],
)
def test_what_can_not_be_an_optimizer_is_told_in_a_sentence(tiny_pipeline, subject, tmp_path, changes, words):
    with pytest.raises(EffiLoRAError, match=words):
        run(tiny_pipeline, subject, tmp_path / "out", **changes)


RATIOS = {"loraplus_lr_ratio": 4.0, "router_lr_ratio": 0.5}


def test_heads_and_routers_have_rates_of_their_own(tiny_pipeline, subject, tmp_path):
    steps = {"optimizer": "torch.optim.SGD", "learning_rate": 0.5, "max_train_steps": 1}
    for name, ratios in (("one", {}), ("four", RATIOS)):
        run(tiny_pipeline, subject, tmp_path / name, **steps, **ratios)
    one, four = weights(tmp_path / "one"), weights(tmp_path / "four")
    heads = [name for name in one if name.startswith("B.")]
    assert any(one[name].any() for name in heads)  # they start at zero, so that the first step is all they are
    assert all(torch.equal(four[name], 4 * one[name]) for name in heads)
    longer = run(tiny_pipeline, subject, tmp_path / "longer", **{**steps, "max_train_steps": 2}, **RATIOS)
    rates = {id(value): group["lr"] for group in longer.optimizer.param_groups for value in group["params"]}
    for name, parameter in longer.adapter.named_parameters():
        assert rates[id(parameter)] == 0.5 * {"A": 1, "B": 4, "G": 0.5}[name.split(".")[0]]


def test_own_rates_resume_bit_for_bit(tiny_pipeline, subject, tmp_path):
    rates = {"learning_rate": 5e-3, **RATIOS}
    run(tiny_pipeline, subject, tmp_path / "whole", **rates)
    continued(tiny_pipeline, subject, tmp_path / "whole", tmp_path / "again", **rates)
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "again"))
    with pytest.raises(EffiLoRAError, match="--loraplus_lr_ratio is for optimizers with a rate of your own"):
        parse_arguments(["--loraplus_lr_ratio", "16", "--optimizer", "prodigy"])

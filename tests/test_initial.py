"""A new run that starts from an existing adapter: a native one, a plain LoRA of other programs, a language model's."""

import pytest
import torch
from conftest import build_tiny_pipeline, unet_input
from helpers import arguments, make_subject, metrics, settings, trainer
from language_runs import make_place, weights, words
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file
from tiny_families import build, draw

from effilora_diffusion import EffiLoRAError, attach, export_lora
from effilora_diffusion.cli.train import main
from effilora_diffusion.cli.train_llm import main as train_llm
from effilora_diffusion.core import EffiLoRAConfig, load_adapter_file
from effilora_diffusion.diffusion.adapters.initial import read_initial

OPTIONS = {"num_validation_images": 0, "learning_rate": 0.05}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A model and a run of it, rank 3 and two heads, that others start from."""
    folder = tmp_path_factory.mktemp("initial")
    build_tiny_pipeline().save_pretrained(folder / "model")
    shape = {"rank": 3, "heads": 2, "adapt_feed_forward": True}
    trainer(folder / "model", make_subject(folder / "s", 2), folder / "first", **OPTIONS, **shape).run()
    for name in ("diffusers", "kohya"):
        export_lora(folder / "first", folder / f"{name}.safetensors", name)
    return folder


def test_a_run_starts_from_another_with_any_rate_data_and_length(runs, tmp_path, capsys):
    data = make_subject(tmp_path / "other", 3, first=7)
    changes = {
        "init_from": str(runs / "first"),
        "learning_rate": 1e-6,
        "max_train_steps": 1,
        "num_validation_images": 0,
    }
    config = settings(runs / "model", data, tmp_path / "out", **changes)
    assert main(arguments(config)) == 0
    assert "adapter     rank 3, 2 heads, token routing on 40 linears in 4 blocks" in capsys.readouterr().out
    first, second = (
        load_adapter_file(path / "effilora.safetensors").adapter for path in (runs / "first", tmp_path / "out")
    )
    assert second.config.target_modules == ("attention", "feed_forward")
    for old, new in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=1e-5)
    again = [*arguments(config), f"--config={tmp_path / 'out' / 'config.yaml'}", f"--output_dir={tmp_path / 'again'}"]
    assert main(again) == 0
    assert metrics(tmp_path / "again") == metrics(tmp_path / "out")


def test_a_run_that_started_from_another_is_resumed_exactly(runs, tmp_path):
    data, changes = (
        make_subject(tmp_path / "s", 2),
        {"init_from": str(runs / "first"), "checkpointing_steps": 2, **OPTIONS},
    )
    trainer(runs / "model", data, tmp_path / "whole", max_train_steps=4, **changes).run()
    trainer(runs / "model", data, tmp_path / "parts", max_train_steps=2, **changes).run()
    resumed = {"resume_from_checkpoint": "latest", "max_train_steps": 4, **changes}
    trainer(runs / "model", data, tmp_path / "parts", **resumed).run()
    whole, parts = (load_file(tmp_path / name / "effilora.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 5}, "--rank 5, but --init_from .* has 3: leave --rank out"),
        ({"heads": 5}, "--heads 5, but"),
        ({"routing": "static"}, "--routing static, but"),
        ({"target_modules": ["to_q"]}, "--target_modules to_q, but"),
        ({"lora_alpha": 7.0}, r"--lora_alpha 7.0, but"),
        ({"init_from": "/nowhere.safetensors"}, "--init_from /nowhere.safetensors: no such file"),
    ],
)
def test_a_run_that_names_another_shape_is_refused(runs, tmp_path, changes, message):
    changes = {"init_from": str(runs / "first"), **changes}
    with pytest.raises(EffiLoRAError, match=message):
        trainer(runs / "model", make_subject(tmp_path / "s", 1), tmp_path / "out", **changes)
    assert not list((tmp_path / "out").iterdir())


def test_a_run_that_changes_nothing_is_no_success(runs, tmp_path):
    changes = {"init_from": str(runs / "first"), "learning_rate": 1e-30, "adam_weight_decay": 0.0}
    run = trainer(runs / "model", make_subject(tmp_path / "s", 1), tmp_path / "out", **changes)
    with pytest.raises(EffiLoRAError, match="without changing a single head"):
        run.run()


@pytest.mark.parametrize("name", ["diffusers", "kohya"])
def test_a_plain_lora_that_shares_its_a_is_taken_over_at_its_rank(runs, name):
    pipe, sample = build_tiny_pipeline(), unet_input()
    found = read_initial(runs / f"{name}.safetensors", pipe, "unet", EffiLoRAConfig(heads=3)).adapter
    assert (found.config.rank, found.config.heads, found.config.a_sharing) == (3, 3, "width")
    assert found.config.target_modules == ("attention", "feed_forward")
    with torch.no_grad():
        base = pipe.unet(**sample).sample
        attach(pipe, found)
        ours = pipe.unet(**sample).sample
        pipe.load_lora_weights(str(runs), weight_name=f"{name}.safetensors")
        found.enabled = False
        theirs = pipe.unet(**sample).sample
    assert (theirs - base).abs().max() > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def peft_lora(pipe, part, folder, **options):
    """A LoRA made by PEFT, saved by diffusers, with random matrices of every linear's own."""
    model = getattr(pipe, part)
    config = LoraConfig(r=2, lora_alpha=3, init_lora_weights=False, **options)
    model.add_adapter(config)
    state = {f"{part}_lora_layers": get_peft_model_state_dict(model)}
    pipe.save_lora_weights(str(folder), **state, **{f"{part}_lora_adapter_metadata": config.to_dict()})


@pytest.mark.parametrize(("name", "part"), [("sd15", "unet"), ("flux", "transformer"), ("sd3", "transformer")])
def test_a_lora_of_peft_is_taken_over_exactly_with_its_a_matrices_stacked(name, part, tmp_path):
    targets = ["to_q", "to_v", "to_out.0"]
    theirs = build(name)
    peft_lora(theirs, part, tmp_path, target_modules=targets)
    pipe = build(name)
    before = {key: value.clone() for key, value in getattr(pipe, part).state_dict().items()}
    found = read_initial(tmp_path / "pytorch_lora_weights.safetensors", pipe, part, EffiLoRAConfig()).adapter
    assert all(torch.equal(value, before[key]) for key, value in getattr(pipe, part).state_dict().items())
    assert (found.config.a_sharing, found.config.rank) == ("none", 4)
    assert {path for site in found.sites for path, _ in site.linears} == {
        path
        for path, _ in getattr(pipe, part).named_modules()
        if path.endswith(tuple(f".{target}" for target in targets))
    }
    base = draw(pipe, name, "a cat")
    attach(pipe, found)
    ours, plain = draw(pipe, name, "a cat"), draw(theirs, name, "a cat")
    assert (plain - base).abs().max() > 10
    torch.testing.assert_close(ours, plain, rtol=0, atol=1.0)  # levels of 255


def test_a_lora_of_other_layers_is_refused(tmp_path):
    pipe = build("sd15")
    peft_lora(pipe, "unet", tmp_path, target_modules=["to_q", "conv1"])
    with pytest.raises(EffiLoRAError, match=r"also acts on unet.*conv1"):
        read_initial(tmp_path / "pytorch_lora_weights.safetensors", build("sd15"), "unet", EffiLoRAConfig())


def test_another_base_is_told(runs, tmp_path, capsys):
    pipe = build_tiny_pipeline(seed=5)
    pipe.save_pretrained(tmp_path / "other")
    changes = {"init_from": str(runs / "first"), "dry_run": True}
    assert (
        main(arguments(settings(tmp_path / "other", make_subject(tmp_path / "s", 1), tmp_path / "out", **changes)))
        == 0
    )
    said = capsys.readouterr().out
    assert f"note: --init_from {runs / 'first'} was trained on {runs / 'model'}, this is another model" in said


def test_a_language_run_starts_from_another(tmp_path):
    place = make_place(tmp_path / "place")
    assert train_llm(words(place, tmp_path / "first", rank=2, heads=2)) == 0
    options = {"init_from": tmp_path / "first", "learning_rate": 1e-6, "max_steps": 1}
    assert train_llm(words(place, tmp_path / "second", **options)) == 0
    for old, new in zip(weights(tmp_path / "first"), weights(tmp_path / "second"), strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=1e-5)
    assert train_llm(words(place, tmp_path / "third", init_from=tmp_path / "first", heads=3)) == 0
    assert train_llm(words(place, tmp_path / "fourth", init_from=tmp_path / "first", heads=5)) == 2

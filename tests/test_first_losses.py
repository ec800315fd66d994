"""A given learning rate does here what it does in diffusers' scripts, and in language models what it does with PEFT's LoRA."""

import pytest
import tiny_families
import tiny_language
import torch
from peft import LoraConfig, get_peft_model
from tiny_families import FAMILIES

from benchmarks.first_losses import UNTRAINED, lora_losses, off, our_losses
from benchmarks.subject import settings
from effilora_diffusion import EffiLoRAConfig, EffiLoRAError, create_adapter
from effilora_diffusion.cli.train import parse_arguments
from effilora_diffusion.diffusion.models import make_family
from effilora_diffusion.diffusion.presets import EMBEDDED_RATE

RATE = 5e-4
STEPS = 10


def test_the_first_losses_are_those_of_the_lora_of_diffusers_scripts(tmp_path):
    shape = {"rank": 64, "max_train_steps": STEPS, "train_batch_size": 1, "lr_scheduler": "constant"}
    shape |= {"with_prior_preservation": False, "a_start": "gaussian", "export_distillation_steps": 0}

    def run(rate=RATE, **changes):
        return settings("EffiLoRA", 0, rate, str(tmp_path / "run"), {**shape, **changes})

    lora, untrained = lora_losses(run()), lora_losses(run(UNTRAINED))
    ours, shorter = (off(our_losses(run(a_start=start)), lora, untrained) for start in ("gaussian", "kaiming"))
    assert ours < 0.15
    assert shorter > 2 * ours


def peft_deviations(model, init, rank=8):
    """Deviation of the entries of every A of a PEFT LoRA, by the linear's name."""
    config = LoraConfig(r=rank, init_lora_weights=init, target_modules="all-linear")
    named = get_peft_model(model, config).base_model.model.named_modules()
    return {name: float(one.lora_A["default"].weight.detach().std()) for name, one in named if hasattr(one, "lora_A")}


def assert_starts_as_peft(model, init, **options):
    adapter = create_adapter(model, EffiLoRAConfig(rank=8, **options))
    ours = {path: float(adapter.shared_a(site).detach().std()) for site in adapter.sites for path, _ in site.linears}
    theirs = peft_deviations(model, init)
    for path, deviation in ours.items():
        assert theirs[path] == pytest.approx(deviation, rel=0.3), path


@pytest.mark.parametrize("name", FAMILIES)
def test_a_of_every_image_model_is_as_long_as_in_diffusers_scripts(name):
    family = make_family(tiny_families.build(name), torch.device("cpu"))
    assert_starts_as_peft(family.model, "gaussian")


def test_a_of_a_language_model_is_as_long_as_peft_makes_it():
    assert_starts_as_peft(tiny_language.build("llama"), True, target_modules=("all-linear",))


def test_a_start_can_be_chosen_and_has_a_known_name():
    model = tiny_families.build("sd15" if "sd15" in FAMILIES else FAMILIES[0])
    for start in ("gaussian", "kaiming"):
        adapter = create_adapter(model, EffiLoRAConfig(rank=8), a_start=start)
        for key, value in adapter.A.items():
            assert float(value.detach().std()) == pytest.approx(
                1 / 8 if start == "gaussian" else (3 * int(key)) ** -0.5, rel=0.2
            )
    with pytest.raises(EffiLoRAError, match="a_start must be one of"):
        create_adapter(model, a_start="orthogonal")


@pytest.mark.parametrize("images", [(), ("--instance_data_dir", "mine")])
def test_a_given_rate_is_diffusers_and_without_one_the_embedded_base_has_its_own(images):
    own = parse_arguments([*images])
    assert {"a_start": own.a_start, "learning_rate": own.learning_rate} == EMBEDDED_RATE
    given = parse_arguments([*images, "--learning_rate", "1e-3"])
    assert (given.a_start, given.learning_rate) == ("gaussian", 1e-3)
    both = parse_arguments([*images, "--learning_rate", "1e-3", "--a_start", "kaiming"])
    assert (both.a_start, both.learning_rate) == ("kaiming", 1e-3)


def test_another_model_has_the_rate_and_the_start_of_diffusers_scripts():
    found = parse_arguments(["--pretrained_model_name_or_path", "model", "--instance_data_dir", "mine"])
    assert (found.a_start, found.learning_rate) == ("gaussian", 5e-4)

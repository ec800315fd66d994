"""The Train tab's presets: the form shows their values, and what a training would take."""

import json

import pytest
from app_forms import built, by_hand

from effilora_diffusion.diffusion.config import TrainingConfig
from effilora_diffusion.diffusion.presets import DEFAULT, NAMES, preset_settings
from effilora_diffusion.studio.session import Session
from effilora_diffusion.studio.tabs.train import TrainTab
from effilora_diffusion.studio.train_form import run_settings, shown_fields


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    return built(TrainTab, Session(None, tmp_path_factory.mktemp("o") / "outputs"))


def chosen(tab, preset, **hand):
    """The form after a preset was chosen: what is said of it, and every field."""
    before = by_hand(tab.session, **hand)
    text, *changes = tab.choose(preset, "a photo of sks dog", *before)
    fields = [change.get("value", value) for value, change in zip(before, changes, strict=True)]
    return text, dict(zip([entry.name for entry in shown_fields()], fields, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_s_values_are_in_the_form_and_in_the_run(tab, name, tmp_path):
    text, fields = chosen(tab, name, seed=None, class_prompt="a dog", validation_guidance_scale="3")
    assert text.startswith(f"**{name}**: ")
    found = run_settings(tab.session, "a photo of sks dog", name, tmp_path, list(fields.values()))
    expected = preset_settings(name, embedded=True)
    assert {setting: found[setting] for setting in expected} == expected
    assert (found["preset"], found["with_prior_preservation"]) == (name, name != "paper")
    assert (found["class_prompt"], found["validation_guidance_scale"]) == (["a dog"], 3.0)  # what nobody chose stays
    TrainingConfig(**found)


def test_figures_are_those_of_the_settings_in_the_form(tab):
    text, fields = chosen(tab, DEFAULT)
    assert "77,568 parameters, file 0.3 MB, plain LoRA 0.6 MB, about 86.4 MB of memory, 250 steps" in text
    fields["rank"] = 16
    assert "155,136 parameters" in tab.predict(DEFAULT, "", *fields.values())
    fields["resolution"] = 33
    assert "--resolution must be" in tab.predict(DEFAULT, "", *fields.values())
    assert tab.predict("quickest", "", *fields.values()) == ""


def test_the_time_is_told_from_a_run_with_the_same_steps(tab, tmp_path):
    _, fields = chosen(tab, "fast")
    settings = run_settings(tab.session, "a cat", "fast", tmp_path, list(fields.values()))
    folder = tab.session.outputs / "earlier"
    folder.mkdir()
    (folder / "config.yaml").write_text(TrainingConfig(**settings).to_yaml())
    lines = [{"step": step, "loss": 1.0, "seconds": 2.0, "active_layers": 7} for step in range(1, 11)]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert "125 steps, about 4 min at the pace of earlier" in tab.predict("fast", "a cat", *fields.values())
    fields["resolution"] = 128
    assert "at the pace of" not in tab.predict("fast", "a cat", *fields.values())

"""The Train tab's settings: five groups in words, all others to be searched, sizes that fit a card, the report as a table."""

import pytest
from app_forms import built, by_hand

from effilora_diffusion.diffusion.config import TrainingConfig
from effilora_diffusion.studio.prediction import MEMORY
from effilora_diffusion.studio.report_table import report_rows, report_table
from effilora_diffusion.studio.session import Session
from effilora_diffusion.studio.settings_panel import GROUPS
from effilora_diffusion.studio.tabs.train import TrainTab
from effilora_diffusion.studio.train_form import run_settings, shown_fields


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    return built(TrainTab, Session(None, tmp_path_factory.mktemp("o") / "outputs"))


def test_every_setting_is_in_the_form_once_and_named_in_words(tab):
    names = [entry.name for entry in shown_fields()]
    assert sorted(tab.settings.parts) == sorted(names)
    assert tab.advanced == [tab.settings.parts[name] for name in names]
    listed = [name for group in GROUPS.values() for name in group]
    assert len(set(listed)) == len(listed) <= 20
    labels = [part.label for part in tab.advanced]
    assert len(set(labels)) == len(labels)
    for name, part in tab.settings.parts.items():
        assert part.label[0].isupper()
        assert "_" not in part.label
        assert part.info.endswith(f"(--{name})")


def test_settings_are_fitted_to_a_card_s_memory(tab, tmp_path):
    names = [entry.name for entry in shown_fields()]
    hand = by_hand(tab.session, train_batch_size=64, resolution=256)
    before = tab.predict("plain", "a sks cat", *hand)
    text, *changes = tab.fit("6 GB", "plain", "a sks cat", *hand)
    assert "GB of memory" in before
    assert text.startswith("**6 GB**, of which 1 GB is left for libraries: micro-batches of ")
    changed = {name: change["value"] for name, change in zip(names, changes, strict=True) if "value" in change}
    assert changed.keys() >= {"train_batch_size", "gradient_accumulation_steps"}
    assert changed["train_batch_size"] * changed["gradient_accumulation_steps"] == 64
    fields = [changed.get(name, value) for name, value in zip(names, hand, strict=True)]
    TrainingConfig(**run_settings(tab.session, "a sks cat", "plain", tmp_path, fields))
    text, *changes = tab.fit("80 GB", "plain", "a sks cat", *by_hand(tab.session))
    assert "nothing had to be changed" in text
    assert not any("value" in change for change in changes)
    text, *changes = tab.fit("6 GB", "plain", "a sks cat", *by_hand(tab.session, resolution=33))
    assert text.startswith("**Not fitted to 6 GB:** --resolution must be")
    assert not any("value" in change for change in changes)
    assert next(iter(MEMORY.values())) is None


def test_a_report_is_a_table_whose_words_are_text():
    text = "model       <b>x</b>: SD\nconcepts    sks\n            zwx\nnote  a.png: it is all black\nnote: slow\n"
    assert report_rows(text) == [
        ("model", "<b>x</b>: SD"), ("concepts", "sks\nzwx"), ("note", "a.png: it is all black"), ("note", "slow"),
    ]  # fmt: skip
    table = report_table(text)
    assert "<b>" not in table
    assert table.count('<th scope="row">') == 4
    assert "<td>sks<br>zwx</td>" in table

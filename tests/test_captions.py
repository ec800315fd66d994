"""Captions drawn for every row: shuffled, dropped, one of several, and the same again after a resume."""

import pytest
import torch
from helpers import PROMPT, files_in, make_subject, metrics, settings, trainer
from safetensors.torch import load_file

from effilora_diffusion.cli.train import parse_arguments
from effilora_diffusion.core import EffiLoRAError
from effilora_diffusion.diffusion.caption_options import PLAIN, CaptionStyle
from effilora_diffusion.diffusion.data.captions import draw_caption
from effilora_diffusion.diffusion.data.folder import scan_images
from effilora_diffusion.diffusion.data.images import Preparation
from effilora_diffusion.diffusion.data.latents import ExampleSource
from effilora_diffusion.diffusion.data.text_states import BESIDE, TextStates
from effilora_diffusion.diffusion.models import make_family
from effilora_diffusion.diffusion.models.pipelines import load_pipeline
from effilora_diffusion.diffusion.training.main import report_only

TAGS = "sks cat, red, round, small, old"
ROWS = range(200)


def drawn(caption, triggers=(), **style):
    captions = caption if isinstance(caption, tuple) else (caption,)
    return [draw_caption(captions, CaptionStyle(**style), triggers, 0, "instance", row) for row in ROWS]


def test_a_plain_caption_stays_as_it_is():
    assert set(drawn("a  cat,red ,")) == {"a  cat,red ,"}
    assert set(drawn(TAGS, keep_tokens=2, caption_separator=";")) == {TAGS}


def test_tags_are_shuffled_behind_those_that_are_kept():
    found = drawn(TAGS, shuffle_caption=True, keep_tokens=2)
    assert {text[:13] for text in found} == {"sks cat, red,"}
    assert {frozenset(text.split(", ")) for text in found} == {frozenset(TAGS.split(", "))}
    assert len(set(found)) == 6
    assert {text.split(", ")[0] for text in drawn(TAGS, shuffle_caption=True)} == set(TAGS.split(", "))
    assert found != [draw_caption((TAGS,), CaptionStyle(True, 2), (), 1, "instance", row) for row in ROWS]


def test_tags_are_dropped_at_their_rate_but_those_that_are_kept():
    found = drawn(TAGS, caption_tag_dropout_rate=0.25, keep_tokens=1)
    assert all(text.startswith("sks cat") for text in found)
    assert 0.2 < sum(5 - len(text.split(", ")) for text in found) / (4 * len(ROWS)) < 0.3
    assert set(drawn(TAGS, caption_tag_dropout_rate=1.0)) == {""}
    order = TAGS.split(", ")
    assert all(sorted(text.split(", "), key=order.index) == text.split(", ") for text in found)


def test_whole_captions_are_dropped_at_their_rate():
    found = drawn(TAGS, caption_dropout_rate=0.2)
    assert set(found) == {"", TAGS}
    assert 0.14 < found.count("") / len(ROWS) < 0.26


def test_one_of_several_captions_and_of_alternatives_is_drawn():
    assert {
        text: drawn(("one", "two", "three")).count(text) > 40 for text in ("one", "two", "three")
    } == dict.fromkeys(("one", "two", "three"), True)
    found = drawn("a {red|green | blue} cat {up|}", enable_wildcard=True)
    assert set(found) == {f"a {colour} cat {place}" for colour in ("red", "green", "blue") for place in ("up", "")}
    assert set(drawn("a {red|green} cat")) == {"a {red|green} cat"}


def test_separators_are_those_of_the_settings():
    assert set(drawn("b. a", shuffle_caption=True, caption_separator=".")) == {"b. a", "a. b"}
    found = drawn(
        "x, y ||| a, b ||| z", shuffle_caption=True, keep_tokens_separator="|||", caption_tag_dropout_rate=0.5
    )
    assert all(text.startswith("x, y") and text.endswith("z") for text in found)
    assert {len(text.split(", ")) for text in found} == {3, 4, 5}


@pytest.mark.parametrize("style", [{"caption_tag_dropout_rate": 0.9}, {"caption_dropout_rate": 0.5}])
def test_a_trigger_survives_whatever_is_dropped(style):
    found = drawn(TAGS, ("zwx", "sks"), shuffle_caption=True, **style)
    assert all("sks" in text for text in found)
    assert len(set(found)) > 2
    over_two_tags = drawn(TAGS, ("cat, red",), shuffle_caption=True, caption_tag_dropout_rate=0.5)
    assert all("cat, red" in text for text in over_two_tags)
    assert TAGS in over_two_tags


# --------------------------------------------------------------------------------------------------------------- text states


@pytest.fixture(scope="module")
def family(tiny_pipeline):
    return make_family(load_pipeline(str(tiny_pipeline)), torch.device("cpu"))


def counted(family, monkeypatch):
    calls, encode = [], type(family).encode_prompt
    monkeypatch.setattr(family, "encode_prompt", lambda prompt: calls.append(prompt) or encode(family, prompt))
    return calls


def test_text_states_are_encoded_ahead_while_there_is_memory_and_once_while_they_are_kept(family, monkeypatch):
    calls = counted(family, monkeypatch)
    one = sum(value.numel() * value.element_size() for value in family.encode_prompt("x").values())
    calls.clear()
    states = TextStates(family, lambda row: f"caption {row // 2}", memory=4 * one)
    states._ahead = None  # as on a GPU
    at = lambda row: states.at(row, states.caption(row))
    states.prepare(range(20))
    assert calls == [f"caption {number}" for number in range(4)]
    for row in range(20):
        wanted = type(family).encode_prompt(family, f"caption {row // 2}")
        assert all(torch.equal(at(row)[name], wanted[name]) for name in wanted)
        assert len(states) <= 4
    assert calls == [f"caption {number}" for number in range(10)]
    calls.clear()
    for _ in range(3):  # the rows that the Reducer measures with come again and again
        for row in range(4):
            at(row)
    assert calls == ["caption 0", "caption 1"]
    for row in range(20 + 3 * BESIDE):
        at(row)
    assert len(states) <= 4 + BESIDE


def test_trained_encoders_encode_what_is_asked_for_and_not_the_whole_run_again(family, monkeypatch):
    calls = counted(family, monkeypatch)
    states = TextStates(family, str)
    states._ahead = None  # as on a GPU
    states.prepare(range(300))
    calls.clear()
    states.encode_again()
    states.at(5, "5")
    assert calls == [str(row) for row in range(5, 5 + BESIDE)]


def test_a_cpu_encodes_many_captions_when_their_turn_comes(family, monkeypatch):
    monkeypatch.setattr("effilora_diffusion.diffusion.data.text_states.AHEAD_ON_CPU", 3)
    calls = counted(family, monkeypatch)
    states = TextStates(family, str)
    at = lambda row: states.at(row, str(row))
    states.prepare(range(10, 100))
    assert calls == ["10", "11", "12"]
    for row in (10, 13, 14, 12):
        at(row)
    assert calls == ["10", "11", "12", "13", "14"]


def test_a_small_memory_changes_no_row(family, tmp_path):
    make_subject(tmp_path, 4, captions=[f"{number}, red, round\nsecond {number}" for number in range(4)])
    examples, _ = scan_images(tmp_path, None)

    def rows(memory):
        source = ExampleSource(family, examples, Preparation(32, center_crop=True), "instance", memory=memory)
        source.texts._ahead = None
        source.fill(rows=range(12))
        return [source.draw(row) for row in (*range(12), 3, 15)]

    for (latents, conditions, name), (others, other_conditions, other) in zip(rows(1), rows(10**9), strict=True):
        assert (name, latents.tolist()) == (other, others.tolist())
        assert all(torch.equal(conditions[key], other_conditions[key]) for key in conditions)


# ----------------------------------------------------------------------------------------------------------------------- runs

STYLE = {
    "shuffle_caption": True,
    "keep_tokens": 1,
    "caption_tag_dropout_rate": 0.3,
    "caption_dropout_rate": 0.2,
    "enable_wildcard": True,
}


@pytest.fixture(scope="module")
def tagged(tmp_path_factory):
    captions = [
        "sks cat, red, {big|small}, old\na sks cat, alone",
        "sks cat, blue, new, far",
        "sks cat, up, down, left",
    ]
    return make_subject(tmp_path_factory.mktemp("tagged") / "s", 3, captions=captions)


def test_a_run_that_stops_in_the_middle_draws_the_same_captions(tiny_pipeline, tagged, tmp_path, monkeypatch):
    monkeypatch.setattr("effilora_diffusion.diffusion.data.text_states.TEXT_MEMORY", 1)  # a text state at a time
    options = {
        **STYLE,
        "max_train_steps": 6,
        "train_batch_size": 2,
        "checkpointing_steps": 3,
        "num_validation_images": 0,
    }
    whole = trainer(tiny_pipeline, tagged, tmp_path / "out", **options)
    texts = [whole.batches.instance.caption(row) for row in range(12)]
    assert len(set(texts)) > 8
    whole.run()
    first, logged = files_in(tmp_path / "out"), metrics(tmp_path / "out")
    monkeypatch.undo()
    trainer(tiny_pipeline, tagged, tmp_path / "out", **options, resume_from_checkpoint="checkpoint-3").run()
    assert len(metrics(tmp_path / "out")) == 6
    (tmp_path / "first.safetensors").write_bytes(first["effilora.safetensors"])
    one, other = (load_file(tmp_path / name) for name in ("first.safetensors", "out/effilora.safetensors"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert metrics(tmp_path / "out") == logged


def test_a_changed_style_is_another_run(tiny_pipeline, tagged, tmp_path):
    options = {"checkpointing_steps": 1, "num_validation_images": 0}
    run = trainer(tiny_pipeline, tagged, tmp_path / "out", shuffle_caption=True, **options)
    run.run()
    options["resume_from_checkpoint"] = "checkpoint-1"
    for changes, words in (
        ({}, "shuffle_caption was True and is False"),
        ({"shuffle_caption": True, "caption_prefix": "photo of"}, "the caption of 0.png was 'sks cat, red"),
    ):
        other = trainer(tiny_pipeline, tagged, tmp_path / "out", **options, **changes)
        with pytest.raises(EffiLoRAError, match=words):
            other.run()


def test_concepts_keep_their_triggers_in_every_row(tiny_pipeline, tagged, tmp_path):
    options = {
        "routing": "concept",
        "trigger": ["sks"],
        "rank": 2,
        **STYLE,
        "keep_tokens": 0,
        "caption_dropout_rate": 0.5,
    }
    run = trainer(tiny_pipeline, tagged, tmp_path / "out", **options)
    captions = run.batches.draw(0, 40).captions
    assert "sks" in captions
    assert len(set(captions)) > 10
    assert all("sks" in caption for caption in captions)
    run.folder.release()


def test_the_trigger_stands_for_its_mark_in_captions_and_prompts(tiny_pipeline, tmp_path, capsys):
    subject = make_subject(tmp_path / "s", 3, captions=["a [trigger] cat\n[trigger]"])
    options = {"instance_prompt": "a photo of [trigger]", "validation_prompt": ["[trigger] up"], "max_train_steps": 1}
    options |= {"caption_prefix": "photo,", "caption_suffix": ", 4k"}
    config = settings(tiny_pipeline, subject, tmp_path / "out", trigger=["zwx"], **options)
    assert config.validation_prompt == ["zwx up"]
    report_only(config)
    told = capsys.readouterr().out
    assert "0.png: 'photo, a zwx cat , 4k | photo, zwx , 4k' ('0.txt')" in told
    assert "1.png: 'photo, a photo of zwx , 4k' (--instance_prompt)" in told
    assert "note: 1 image has several captions: one is drawn for every row" in told
    plain = settings(tiny_pipeline, subject, tmp_path / "out", instance_prompt=PROMPT)
    with pytest.raises(EffiLoRAError, match=r"the caption of '.*0\.png' has \[trigger\]: say with --trigger"):
        report_only(plain)
    report_only(
        settings(tiny_pipeline, make_subject(tmp_path / "t", 1), tmp_path / "out", trigger=["zwx"], keep_tokens=1)
    )
    told = capsys.readouterr().out
    assert "note: no caption has --trigger 'zwx', nor [trigger] in its place" in told
    assert "note: --keep_tokens has no effect without --shuffle_caption" in told


def test_flags_have_the_names_of_sd_scripts_and_diffusers():
    words = ["--instance_data_dir", "x", "--instance_prompt", "y", "--pretrained_model_name_or_path", "z"]
    assert parse_arguments([*words, "--caption_dropout", "0.1"]).caption_dropout_rate == 0.1
    with pytest.raises(EffiLoRAError, match="--caption_dropout must be a number from 0 to 1, not 'often'"):
        parse_arguments([*words, "--caption_dropout", "often"])
    with pytest.raises(EffiLoRAError, match="--caption_dropout_rate must be at least 0 and at most 1, not 2"):
        parse_arguments([*words, "--caption_dropout", "2"])
    assert CaptionStyle() == PLAIN

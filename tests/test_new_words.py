"""Textual inversion beside an adapter: new words are trained, saved, loaded here and in stock diffusers, and taken off again."""

import copy
import shutil

import pytest
import torch
from helpers import make_subject, metrics, same_content, trainer
from safetensors.torch import load_file
from test_text_encoders import RUN, same, states
from tiny_families import build

from effilora_diffusion import detach, export_lora, load_adapter, remove_adapter
from effilora_diffusion.core import EffiLoRAError, load_adapter_file, save_adapter_file
from effilora_diffusion.core.words import BOOK, NewWords, add_words, remove_words
from effilora_diffusion.diffusion.sampling.generate import draw_images

TI = {
    **RUN,
    "train_text_encoder": False,
    "train_text_encoder_ti": True,
    "train_text_encoder_ti_frac": 1.0,
    "instance_prompt": "a photo of TOK cat",
}
NEW = "a photo of <s0><s1> cat"
EMBEDDINGS = {
    "sd15": {"text_encoder": "clip_l"},
    "sdxl": {"text_encoder": "clip_l", "text_encoder_2": "clip_g"},
    "flux": {"text_encoder": "clip_l", "text_encoder_2": "t5"},
}


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    return make_subject(tmp_path_factory.mktemp("subject") / "s", 2, size=(64, 64))


@pytest.fixture(scope="module", params=EMBEDDINGS)
def run(request, subject, tmp_path_factory):
    """A family's pipeline and the folder of a run of two steps, with an adapter on the encoders too in SDXL."""
    family, folder = request.param, tmp_path_factory.mktemp(request.param)
    build(family).save_pretrained(folder / "model")
    more = {"enable_t5_ti": family == "flux", "train_text_encoder": family == "sdxl"}
    trainer(folder / "model", subject, folder / "out", **{**TI, **more}).run()
    shutil.copytree(folder / "out", folder / "again")
    given = {**TI, **more, "resume_from_checkpoint": "checkpoint-1"}
    trainer(folder / "model", subject, folder / "again", **given).run()
    return family, folder


def test_a_run_trains_new_words_and_resumes_exactly(run):
    family, folder = run
    words = load_adapter_file(folder / "out" / "effilora.safetensors").adapter.words
    first = load_adapter_file(folder / "out" / "checkpoint-1" / "adapter.safetensors").adapter.words
    assert list(words.embeddings) == list(EMBEDDINGS[family])
    assert words.meanings == {"TOK": ("<s0>", "<s1>")}
    for part, rows in words.embeddings.items():
        assert not torch.equal(rows, first.embeddings[part])
    assert metrics(folder / "again") == metrics(folder / "out")
    for name in ("effilora.safetensors", "pytorch_lora_weights.safetensors"):
        assert same_content(folder / "again" / name, folder / "out" / name)


def test_the_words_load_here_and_in_stock_diffusers_alike(run):
    family, folder = run
    pipe, stock = build(family), build(family)
    tokenizer, before, plain = pipe.tokenizer, states(pipe, NEW), states(pipe, "a photo of a cat")
    adapter = load_adapter(pipe, folder / "out")
    own = states(pipe, NEW)
    found = load_file(folder / "out" / "out_emb.safetensors")
    assert sorted(found) == sorted(EMBEDDINGS[family].values())
    for part, key in EMBEDDINGS[family].items():
        encoder, reader = getattr(stock, part), getattr(stock, part.replace("text_encoder", "tokenizer"))
        if key == "t5":
            reader.add_tokens(["<s0>", "<s1>"])
            encoder.resize_token_embeddings(len(reader))
            numbers = reader.convert_tokens_to_ids(["<s0>", "<s1>"])
            encoder.get_input_embeddings().weight.data[numbers] = found[key]
        else:
            stock.load_textual_inversion(found[key], token=["<s0>", "<s1>"], text_encoder=encoder, tokenizer=reader)
    stock.load_lora_weights(str(folder / "out"))
    torch.testing.assert_close(states(stock, NEW), own, rtol=1e-5, atol=1e-5)
    assert not same(own, before)
    adapter.strength = 0  # of the words there is no more or less, and other prompts do not name them
    assert same(states(pipe, "a photo of a cat"), plain)
    remove_adapter(pipe, adapter)
    assert pipe.tokenizer is tokenizer
    assert BOOK not in vars(pipe)
    assert same(states(pipe, NEW), before)


def test_a_placeholder_in_a_prompt_stands_for_the_words(run):
    family, folder = run
    pipe = build(family)
    load_adapter(pipe, folder / "out")
    size = {"width": 64, "height": 64}
    one, two, other = draw_images(pipe, ["a photo of TOK cat", NEW, "a photo of cat"], [0, 0, 0], 1, **size)
    assert one.tobytes() == two.tobytes() != other.tobytes()
    content = load_adapter_file(folder / "out" / "effilora.safetensors")
    assert content.metadata["trigger_prompt"] == NEW


def test_exports_have_the_words_beside_them(run, tmp_path):
    family, folder = run
    export_lora(folder / "out", tmp_path / "x.safetensors")
    assert same_content(tmp_path / "x_emb.safetensors", folder / "out" / "out_emb.safetensors")
    export_lora(folder / "out", tmp_path / "merged", format="merged", model=str(folder / "model"))
    merged, pipe = type(build(family)).from_pretrained(tmp_path / "merged"), build(family)
    load_adapter(pipe, folder / "out")
    torch.testing.assert_close(states(merged, NEW), states(pipe, NEW), rtol=1e-4, atol=1e-4)


def test_two_adapters_with_words_take_turns(run, tmp_path):
    family, folder = run
    content = load_adapter_file(folder / "out" / "effilora.safetensors")
    pipe = build(family)
    before = states(pipe, NEW)
    load_adapter(pipe, folder / "out", name="one")
    own = states(pipe, NEW)
    with pytest.raises(EffiLoRAError, match="the word <s0> is another adapter's in this pipeline"):
        load_adapter(pipe, folder / "again", name="two")
    assert same(states(pipe, NEW), own)
    old = content.adapter.words
    new = NewWords({"HAT": ("<hat>",)}, {part: rows.shape[1] for part, rows in old.embeddings.items()})
    content.adapter.words = new
    save_adapter_file(tmp_path / "hat.safetensors", content)
    load_adapter(pipe, tmp_path / "hat.safetensors", name="hat", scale=0)
    assert same(states(pipe, NEW), own)
    detach(pipe, "one")
    assert not same(states(pipe, "a <hat>"), before)
    twin = copy.deepcopy(pipe)
    detach(pipe)
    assert same(states(pipe, NEW), before)
    assert BOOK in vars(twin)
    detach(twin)
    assert same(states(twin, NEW), before)


def test_words_are_frozen_after_their_share_of_the_steps_and_stay_about_as_long(tiny_pipeline, subject, tmp_path):
    given = {**TI, "resolution": 32, "max_train_steps": 4, "train_text_encoder_ti_frac": 0.5, "text_encoder_lr": 10.0}
    trainer(tiny_pipeline, subject, tmp_path / "out", **given).run()
    found = [load_adapter_file(tmp_path / "out" / f"checkpoint-{step}" / "adapter.safetensors") for step in (1, 2, 4)]
    rows = [content.adapter.words.embeddings["text_encoder"] for content in found]
    assert torch.equal(rows[1], rows[2])
    assert not torch.equal(rows[0], rows[1])
    assert not torch.equal(found[1].adapter.B[0], found[2].adapter.B[0])
    table = trainer(tiny_pipeline, subject, tmp_path / "b", **given).family.pipe.text_encoder.get_input_embeddings()
    length = float(table.weight.std())
    assert float(rows[0].std()) == pytest.approx(10 * (length / 10) ** 0.1, rel=0.1)  # a step of 10, then a tenth back
    again = shutil.copytree(tmp_path / "out", tmp_path / "again")
    trainer(tiny_pipeline, subject, again, **given, resume_from_checkpoint="checkpoint-3").run()
    assert same_content(again / "effilora.safetensors", tmp_path / "out" / "effilora.safetensors")


def test_words_start_as_a_concept_and_number_as_its_tokens(tiny_pipeline, subject, tmp_path):
    given = {**TI, "resolution": 32, "token_abstraction": ["TOK, HAT"], "initializer_concept": "a cat"}
    one = trainer(tiny_pipeline, subject, tmp_path / "out", **given)
    words, pipe = one.adapter.words, one.family.pipe
    ids = pipe.tokenizer("a cat", add_special_tokens=False).input_ids
    assert words.tokens == [f"<s{number}>" for number in range(2 * len(ids))]
    assert list(words.meanings) == ["TOK", "HAT"]
    table = pipe.text_encoder.get_input_embeddings().weight
    assert torch.equal(words.embeddings["text_encoder"], table[ids + ids])
    one.folder.release()
    three = trainer(tiny_pipeline, subject, tmp_path / "b", **{**TI, "num_new_tokens_per_abstraction": 3})
    assert three.adapter.words.tokens == ["<s0>", "<s1>", "<s2>"]
    spread = float(three.adapter.words.embeddings["text_encoder"].std() / table.std())
    assert 0.7 < spread < 1.4


def test_what_can_not_be_meant_is_refused(tiny_pipeline, subject, tmp_path):
    given = {**TI, "resolution": 32}
    for changes, message in (
        ({"instance_prompt": "a cat"}, "no caption names TOK"),
        ({"enable_t5_ti": True}, "has no T5"),
        ({"token_abstraction": ["TOK,TOK"]}, "placeholders that differ"),
        ({"routing": "concept"}, "single subject"),
    ):
        with pytest.raises(EffiLoRAError, match=message):
            trainer(tiny_pipeline, subject, tmp_path / "out", **{**given, **changes})
    several = make_subject(tmp_path / "several", 1, captions=["a cat\na TOK cat"])
    trainer(tiny_pipeline, several, tmp_path / "out", **given).folder.release()


def test_words_are_no_part_of_other_words_or_other_pipelines():
    words = NewWords({"TOK": ("<s0>", "<s1>")}, {"text_encoder": 16})
    assert words.in_prompt("TOKYO, a TOK's TOK") == "TOKYO, a <s0><s1>'s <s0><s1>"
    pipe = build("sd15")
    with pytest.raises(EffiLoRAError, match="16 numbers long, those of text_encoder 32"):
        add_words(pipe, words, "one")
    with pytest.raises(EffiLoRAError, match="which a UNet2DConditionModel does not have"):
        add_words(pipe.unet, words, "one")
    remove_words(pipe, None)
    assert BOOK not in vars(pipe)


@pytest.mark.parametrize(
    "found",
    [
        {"meanings": {"TOK": ["<s0>", "<s0>"]}, "widths": {"text_encoder": 8}},
        {"meanings": {"TOK": ["a b"]}, "widths": {"text_encoder": 8}},
        {"meanings": {"TOK": "<s0>"}, "widths": {"text_encoder": 8}},
        {"meanings": {"TOK": ["<s0>"]}, "widths": {"vae": 8}},
        {"meanings": {"TOK": ["<s0>"]}, "widths": {"text_encoder": 1 << 40}},
        {"meanings": {" \x00": ["<s0>"]}, "widths": {"text_encoder": 8}},
        {"meanings": {}, "widths": {}},
        [],
    ],
)
def test_a_header_that_claims_impossible_words_is_refused(found):
    with pytest.raises(EffiLoRAError, match="get the file again"):
        NewWords.from_description(found, ["text_encoder"])


def test_the_images_of_a_run_show_the_words(tiny_pipeline, subject, tmp_path):
    given = {**TI, "resolution": 32, "validation_prompt": ["a photo of TOK cat"], "num_validation_images": 1}
    trainer(tiny_pipeline, subject, tmp_path / "out", **given, max_train_steps=1).run()
    assert (tmp_path / "out" / "samples" / "step-000001.png").is_file()
    assert NEW in (tmp_path / "out" / "README.md").read_text()

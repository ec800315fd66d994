"""The syntax of prompts: weights as A1111 has them, choices and wildcards by the seed, LoRAs by name."""

import argparse

import numpy as np
import pytest
import torch
from tiny_families import build

from effilora_diffusion.core import EffiLoRAError
from effilora_diffusion.diffusion.models.long_prompts import chunk_count, encode_chunks
from effilora_diffusion.diffusion.models.weighted_prompts import BREAK
from effilora_diffusion.diffusion.sampling.a1111 import escaped
from effilora_diffusion.diffusion.sampling.generate import draw_images
from effilora_diffusion.diffusion.sampling.prompt_syntax import fragments, has_syntax, network_names, plain, resolve
from effilora_diffusion.diffusion.sampling.request import GenerationRequest
from effilora_diffusion.diffusion.sampling.resolving import by_label, drawing_of
from effilora_diffusion.diffusion.sampling.tokens import TokenCounter

SIZE = {"width": 64, "height": 64, "steps": 2, "guidance_scale": 3.0}
CALL = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}

WEIGHTS = {
    "a cat": [("a cat", 1.0)],
    "a (red) cat": [("a ", 1.0), ("red", 1.1), (" cat", 1.0)],
    "((red))": [("red", 1.1 * 1.1)],
    "[red]": [("red", 1 / 1.1)],
    "(red:1.4)": [("red", 1.4)],
    "(red:.5) (blue: -1 )": [("red", 0.5), (" ", 1.0), ("blue", -1.0)],
    "(a (b:2) c:0.5)": [("a ", 0.5), ("b", 1.0), (" c", 0.5)],
    "a (red": [("a ", 1.0), ("red", 1.1)],
    "a) red]": [("a) red]", 1.0)],
    "(a]": [("a]", 1.1)],
    "at 4:3) or so": [("at 4:3) or so", 1.0)],
    r"a \(red\) \[x\] \\": [(r"a (red) [x] \ ".strip(), 1.0)],
    "a BREAK b": [("a ", 1.0), (BREAK, 1.0), (" b", 1.0)],
    "a DAYBREAK": [("a DAYBREAK", 1.0)],
}


@pytest.mark.parametrize(("text", "expected"), WEIGHTS.items(), ids=WEIGHTS)
def test_weights_are_those_of_a1111(text, expected):
    found = fragments(text)
    assert [words for words, _ in found] == [words for words, _ in expected]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in expected])


def test_weights_beyond_reason_are_refused():
    assert plain(fragments("(a:1e9)")) == "a:1e9"  # no weight, as in A1111
    for text in ("(a:11)", "(" * 100 + "a"):
        with pytest.raises(EffiLoRAError, match="-10 to 10 are possible"):
            fragments(text)


def test_what_is_escaped_is_read_as_it_was():
    for text in (r"a (b:2) [c] {d|e} \ __f__ <lora:g:1>", "plain"):
        assert plain(fragments(resolve(escaped(text), 0).text)) == text
    assert has_syntax("a (b)")
    assert not has_syntax("a {b} of _c_, 2 < 3")


# ----------------------------------------------------------------------------------------------- choices and wildcards


@pytest.fixture
def wildcards(tmp_path):
    folder = tmp_path / "wildcards"
    (folder / "animals").mkdir(parents=True)
    (folder / "animals" / "cats.txt").write_text("# of the house\nsiamese\n\npersian\n", encoding="utf-8-sig")
    (folder / "any.txt").write_text("{a|b} __animals/cats__ <lora:soft:0.5>\n")
    (folder / "loop.txt").write_text("__loop__\n")
    (folder / "empty.txt").write_text("# nothing\n")
    (tmp_path / "secret.txt").write_text("secret\n")
    return folder


def test_the_same_seed_draws_the_same_and_all_are_drawn(wildcards):
    text = "{red|blue|{dark|light} green} __animals/cats__"
    found = [resolve(text, seed, wildcards).text for seed in range(64)]
    assert found == [resolve(text, seed, wildcards).text for seed in range(64)]
    colours, cats = ("red", "blue", "dark green", "light green"), ("siamese", "persian")
    assert set(found) == {f"{colour} {cat}" for colour in colours for cat in cats}


def test_shares_are_kept_and_what_is_no_choice_stays():
    assert {resolve("{0::a|b}", seed).text for seed in range(16)} == {"b"}
    often = sum(resolve("{9::a|b}", seed).text == "a" for seed in range(200))
    assert 160 < often < 200
    for text in ("{a}", "{a|b", "a|b}", r"\{a\|b\}", "_x_", "a__b", "____"):
        assert resolve(text, 1).text == text


def test_several_different_options_are_drawn_at_once():
    assert resolve("{2$$red|blue}", 1).text in ("red, blue", "blue, red")
    found = [resolve("{1-2$$ and $$a|b|{c|d}}", seed).text for seed in range(64)]
    assert {text.count(" and ") for text in found} == {0, 1}
    assert all(len(set(text.split(" and "))) == text.count(" and ") + 1 for text in found)
    assert {word for text in found for word in text.split(" and ")} == set("abcd")
    assert sorted(resolve("{9$$a|0::b|c}", 2).text.split(", ")) == ["a", "b", "c"]
    assert {resolve("{1$$0::b|a}", seed).text for seed in range(9)} == {"a"}


def test_files_of_wildcards_may_hold_all_of_the_syntax(wildcards):
    found = resolve("__any__ cat", 3, wildcards)
    assert found.text.split()[0] in "ab"
    assert found.text.split()[1] in ("siamese", "persian")
    assert found.adapters == [("soft", 0.5)]


@pytest.mark.parametrize(
    ("text", "said"),
    [("__dogs__", "no file dogs.txt"), ("__../secret__", None), ("__animals/../../secret__", "no file"),
     ("__loop__", "without an end"), ("__empty__", "without a line"), ("__/etc/passwd__", None)],
)  # fmt: skip
def test_wildcards_that_can_t_be_drawn_are_refused(wildcards, text, said):
    if said is None:
        assert resolve(text, 0, wildcards).text == text
        return
    with pytest.raises(EffiLoRAError, match=said):
        resolve(text, 0, wildcards)


def test_wildcards_do_not_grow_without_bound(tmp_path):
    (tmp_path / "big.txt").write_text("x" * 2_000_000)
    (tmp_path / "twice.txt").write_text("{__twice__ __twice__|__twice__ __twice__}")
    for name, said in (("big", "too long"), ("twice", "without an end|too long")):
        with pytest.raises(EffiLoRAError, match=said):
            resolve(f"__{name}__", 0, tmp_path)


# ------------------------------------------------------------------------------------------------------------- LoRAs


def test_loras_are_taken_out_of_the_words():
    found = resolve("a cat, <lora:soft light:0.8> <lora:sharp>, sits <hypernet:x:1>", 0)
    assert found.text == "a cat, sits"
    assert found.adapters == [("soft light", 0.8), ("sharp", 1.0)]
    assert found.notes == ["<hypernet:...> is not supported and was left out."]
    with pytest.raises(EffiLoRAError, match="no number"):
        resolve("<lora:a:strong>", 0)
    assert network_names("<lora:a:strong> and <lora:b>") == ["a", "b"]
    nameless = resolve("a cat <lora::0.5>", 0)
    assert (nameless.text, nameless.adapters) == ("a cat", [])
    assert nameless.notes == ["A <lora:...> without a name was left out: write <lora:name:0.8>."]
    assert "one strength" in resolve("<lora:a:0.5:1>", 0).notes[0]
    for text in ("a [cat:dog:0.5]", "a [cat|dog]", "a [(cat:1.2):dog:0.5]"):
        assert "not supported" in resolve(text, 0).notes[0]
    for text in ("a [(cat:1.2) in a hat]", "a [((cat:1.2) in a (hat:0.5):1.1)]"):
        assert not resolve(text, 0).notes


def drawn(pipe, prompt, seed=0, **options):
    return drawing_of(GenerationRequest(prompt, **options), seed, pipe, by_label(["Cat", "cat @ 3"]), None)


def test_a_drawing_has_its_own_words_adapters_and_notes():
    pipe = argparse.Namespace()
    found = drawn(pipe, "a {x|x} <lora:cat:0.5> <lora:gone:1>", 7, num_images=3)
    assert found.request == GenerationRequest(
        "a x", adapters=[("Cat", 0.5)], seed=7, template="a {x|x} <lora:cat:0.5> <lora:gone:1>"
    )
    assert found.notes == ["There is no adapter named gone: generated without it."]
    literal = drawn(pipe, "a {x|x} <lora:cat:0.5>", literal=True)
    assert literal.request.prompt == "a {x|x} <lora:cat:0.5>"
    with pytest.raises(EffiLoRAError, match="twice"):
        drawn(pipe, "a <lora:cat:0.5>", adapters=[("Cat", 1.0)])


# ------------------------------------------------------------------------------------------------- weights when drawing


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def pipe(request):
    found = build(request.param)
    found.set_progress_bar_config(disable=True)
    return found


def encoded(pipe, text, negative="blurry"):
    parts, against = fragments(text), fragments(negative)
    book = {plain(parts): parts, plain(against): against}
    count = chunk_count(pipe, [plain(parts), plain(against)], book)
    return encode_chunks(pipe, count, prompt=[plain(parts)], negative_prompt=[plain(against)], book=book, **CALL)


def test_states_of_tokens_are_multiplied_and_keep_their_mean(pipe):
    stock = pipe.encode_prompt(["a red cat"], negative_prompt=["blurry"], **CALL)
    found = encoded(pipe, "a (red:1.4) cat")
    red = slice(2, 5)  # the tiny tokenizers read letters: beginning, a, r, e, d, ...
    widths = [pipe.text_encoder.config.hidden_size]
    widths += [pipe.text_encoder_2.config.hidden_size] if hasattr(pipe, "text_encoder_2") else []
    start = 0
    for width in widths:
        before, after = (states[0][0, :, start : start + width] for states in (stock, found))
        plainly = before.clone()
        plainly[red] *= 1.4
        ratio = float(before.mean() / plainly.mean())
        assert torch.allclose(after, plainly * (ratio if 0.5 < ratio < 2 else 1), atol=1e-5)
        start += width
    assert not torch.equal(stock[0], found[0])
    for index in range(1, len(stock)):  # the negative prompt and pooled states
        assert torch.equal(stock[index], found[index])
    assert not torch.equal(encoded(pipe, "a red cat", "(blurry:1.3)")[1], stock[1])


def test_every_chunk_has_its_weights_and_breaks_begin_one(pipe):
    long = "b" * 80
    found = encoded(pipe, f"{long} (red:1.4)")[0]
    stock = encoded(pipe, f"{long} red")[0]
    assert torch.equal(found[:, :77], stock[:, :77])
    assert not torch.equal(found[:, 77:], stock[:, 77:])
    broken = encoded(pipe, "a red BREAK cat")[0]
    for index, text in enumerate(("a red", "cat")):
        alone = pipe.encode_prompt([text], negative_prompt=[""], **CALL)[0]
        assert torch.equal(broken[:, 77 * index : 77 * (index + 1)], alone)


def pixels(image):
    return np.asarray(image, int)


def test_weights_are_drawn_and_brackets_without_effect_change_nothing(pipe):
    prompts = ["a red cat", "a (red:1.0) cat", "a (red:1.5) cat", "a (red:0.2) cat"]
    one_by_one = [draw_images(pipe, [text], [3], literal=False, **SIZE)[0] for text in prompts]
    (stock,) = draw_images(pipe, ["a red cat"], [3], **SIZE)
    assert one_by_one[0].tobytes() == one_by_one[1].tobytes() == stock.tobytes()
    assert len({image.tobytes() for image in one_by_one}) == 3
    together = draw_images(pipe, prompts, [3] * 4, literal=False, **SIZE)  # the same words in one batch
    for alone, image in zip(one_by_one, together, strict=True):
        assert np.abs(pixels(alone) - pixels(image)).max() <= 2
    negative = [
        draw_images(pipe, ["a (red:1.5) cat"], [3], literal=False, negative_prompt=text, **SIZE)[0].tobytes()
        for text in ("a red cat", "(a red cat:1.4)")
    ]
    assert negative[0] != negative[1]
    assert "encode_prompt" not in vars(pipe)
    literally = draw_images(pipe, ["a (red:1.5) cat"], [3], **SIZE)[0]
    assert literally.tobytes() not in {image.tobytes() for image in one_by_one}


def test_other_families_draw_the_plain_words_and_say_so():
    pixart = build("pixart-alpha")
    pixart.set_progress_bar_config(disable=True)
    options = {**SIZE, "max_sequence_length": 32}
    (weighted,) = draw_images(pixart, ["a (red:1.5) cat"], [3], literal=False, **options)
    (words,) = draw_images(pixart, ["a red cat"], [3], **options)
    assert weighted.tobytes() == words.tobytes()
    assert "PixArt" in drawn(pixart, "a (red:1.5) cat").notes[0]
    assert drawn(pixart, "a red cat").notes == []


# ------------------------------------------------------------------------------------------------------------ tokens


def test_tokens_are_counted_as_they_are_read(pipe):
    count = TokenCounter(pipe).count
    assert str(count("a (red:1.4) cat <lora:x:1>")) == "7 of 75 tokens"
    assert str(count("b" * 80)) == "80 of 150 tokens, in 2 chunks"
    assert count("a (red:1.4) cat", literal=True).tokens > 7


def test_prompts_that_are_cut_are_told():
    pixart = build("pixart-alpha")
    count = TokenCounter(pixart)
    assert not count.count("a red cat").cut
    long = count.count("red " * 200)
    assert long.cut
    assert "are read" in str(long)
    assert TokenCounter(argparse.Namespace(components={})).count("a") is None

"""Prompts over 77 tokens in Stable Diffusion and XL: in chunks, in training and drawing alike."""

from itertools import combinations

import numpy as np
import pytest
import torch
from helpers import files_in, make_subject, metrics, same_content, trainer
from test_family_calls import image_condition
from tiny_families import build

from effilora_diffusion import EffiLoRAError, encode_prompt
from effilora_diffusion.diffusion.models import IMAGE, make_family
from effilora_diffusion.diffusion.models.long_prompts import _Chunk, chunk_count
from effilora_diffusion.diffusion.sampling.generate import draw_images
from effilora_diffusion.diffusion.training.notes import notes

SHORT = "a red cat on a table"
LONG = " ".join(f"word{letter}" for letter in "abcdefghijklmnopqrstuvwxyz")
"""Of 130 tokens, as the tiny tokenizers read letters, and two chunks, of which the first ends with a word."""
CALL = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
SIZE = {"width": 64, "height": 64, "steps": 2, "guidance_scale": 3.0}


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def pipe(request):
    found = build(request.param)
    found.set_progress_bar_config(disable=True)
    return found


def words_of(pipe, text):
    return pipe.tokenizer(text, add_special_tokens=False).input_ids


def spoken(pipe, ids):
    """The text whose tokens are ``ids``."""
    return pipe.tokenizer.decode(ids)


def test_a_chunk_of_a_short_prompt_is_what_the_tokenizer_gives(pipe):
    for name in ("tokenizer", "tokenizer_2"):
        if (tokenizer := getattr(pipe, name, None)) is None:
            continue
        options = {"padding": "max_length", "truncation": True, "max_length": 77, "return_tensors": "pt"}
        expected = tokenizer(["", SHORT], **options)
        found = _Chunk(tokenizer, 0)(["", SHORT], **options)
        assert torch.equal(found.input_ids, expected.input_ids)
        assert torch.equal(found.attention_mask, expected.attention_mask)


def test_every_chunk_is_read_as_a_prompt_of_its_own(pipe):
    tokens = words_of(pipe, LONG)
    assert chunk_count(pipe, [LONG]) == 2
    found = encode_prompt(pipe, LONG, "blurry")
    states, negative = found["prompt_embeds"], found["negative_prompt_embeds"]
    assert states.shape[1] == negative.shape[1] == 2 * 77
    for index in range(2):
        part = spoken(pipe, tokens[75 * index : 75 * (index + 1)])
        negative_part = ["blurry" if index == 0 else ""]
        alone = pipe.encode_prompt([part], negative_prompt=negative_part, **CALL)
        place = slice(77 * index, 77 * (index + 1))
        assert torch.equal(states[:, place], alone[0])
        assert torch.equal(negative[:, place], alone[1])
        if index == 0 and len(alone) == 4:
            assert torch.equal(found["pooled_prompt_embeds"], alone[2])
            assert torch.equal(found["negative_pooled_prompt_embeds"], alone[3])


def kind(pipe):
    return "sdxl" if hasattr(pipe, "tokenizer_2") else "sd15"


def test_short_prompts_are_the_pipeline_s_own_bit_for_bit(pipe):
    stock = pipe.encode_prompt([SHORT], **CALL)
    found = list(encode_prompt(pipe, SHORT).values())
    assert all(torch.equal(*pair) for pair in zip(stock, found, strict=True))
    (drawn,) = draw_images(pipe, [SHORT], [3], **SIZE)
    given = {"width": 64, "height": 64, "num_inference_steps": 2, "guidance_scale": 3.0}
    (own,) = pipe(SHORT, generator=torch.Generator().manual_seed(3), **given).images
    assert drawn.tobytes() == own.tobytes()


def test_drawing_reads_every_chunk_whatever_else_is_drawn(pipe):
    changed = LONG.replace("wordz", "word9")
    cut = spoken(pipe, words_of(pipe, LONG)[:75])
    prompts = [SHORT, LONG, changed, cut, LONG]
    drawn = draw_images(pipe, prompts, [3] * 5, batch_size=2, **SIZE)
    assert near(drawn[1], drawn[4])
    assert not any(near(*pair) for pair in combinations(drawn[:4], 2))
    assert near(draw_images(pipe, [SHORT], [3], **SIZE)[0], drawn[0])
    given = {"width": 64, "height": 64, "num_inference_steps": 2, "guidance_scale": 3.0}
    (stock,) = pipe(**encode_prompt(pipe, LONG), generator=torch.Generator().manual_seed(3), **given).images
    assert stock.tobytes() == drawn[4].tobytes()
    with_negative = draw_images(pipe, [SHORT], [3], negative_prompt=LONG, **SIZE)[0]
    assert not near(with_negative, draw_images(pipe, [SHORT], [3], negative_prompt=cut, **SIZE)[0])
    assert "encode_prompt" not in vars(pipe)


def near(one, other):
    """Whether two images differ by what another batch size rounds differently, at most."""
    return np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 2


def test_training_reads_up_to_max_token_length_and_a_row_does_not_depend_on_its_batch(pipe):
    family = make_family(pipe, torch.device("cpu"))
    lengths = []
    for most in (75, 150, 225):
        family.read_tokens(most)
        lengths.append(len(family.encode_prompt(LONG)["encoder_hidden_states"]) // 77)
    assert lengths == [1, 2, 2]
    assert torch.equal(
        family.encode_prompt(LONG)["encoder_hidden_states"], encode_prompt(pipe, LONG)["prompt_embeds"][0]
    )
    size = {IMAGE: image_condition(kind(pipe))}
    rows = [{**family.encode_prompt(text), **size} for text in (SHORT, LONG)]
    noisy, times = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([900, 300])
    with torch.no_grad():
        together = family.predict(noisy, times, family.collate(rows))
        for index, row in enumerate(rows):
            alone = family.predict(noisy[index : index + 1], times[index : index + 1], family.collate([row]))
            assert torch.allclose(together[index], alone[0], rtol=1e-4, atol=1e-5)


def test_a_run_learns_from_the_second_chunk_and_resumes(tiny_pipeline, tmp_path):
    subject = make_subject(tmp_path / "s", captions=[LONG[:59], SHORT, LONG[:59]])
    common = {"max_train_steps": 2, "train_batch_size": 2, "num_validation_images": 0, "checkpointing_steps": 1}
    for most in (75, 150):
        run = trainer(tiny_pipeline, subject, tmp_path / str(most), max_token_length=most, **common)
        told = [note for note in notes(run.parts) if "tokens" in note]
        more = (
            "the caption of 0.png, 2.png has 52 tokens, and only the first 32 are read: --max_token_length reads more"
        )
        assert told == ([more] if most == 75 else [])
        run.run()
    assert metrics(tmp_path / "75")[0]["loss"] != metrics(tmp_path / "150")[0]["loss"]
    whole = metrics(tmp_path / "150")
    resumed = {"resume_from_checkpoint": "checkpoint-1", **common}
    expected = files_in(tmp_path / "150")["effilora.safetensors"]
    with pytest.raises(EffiLoRAError, match="max_token_length was 150 and is 225"):
        trainer(tiny_pipeline, subject, tmp_path / "150", max_token_length=225, **resumed).run()
    (tmp_path / "whole.safetensors").write_bytes(expected)
    trainer(tiny_pipeline, subject, tmp_path / "150", max_token_length=150, **resumed).run()
    assert same_content(tmp_path / "whole.safetensors", tmp_path / "150" / "effilora.safetensors")
    assert metrics(tmp_path / "150") == whole


def test_other_families_are_refused_in_a_sentence():
    family = make_family(build("pixart-alpha"), torch.device("cpu"))
    with pytest.raises(EffiLoRAError, match="--max_token_length is for Stable Diffusion"):
        family.read_tokens(150)
    with pytest.raises(EffiLoRAError, match="PixArtAlphaPipeline is none: give it the prompt itself"):
        encode_prompt(family.pipe, SHORT)

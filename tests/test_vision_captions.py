"""Captions by a vision-language model in a folder, and what is said of folders without one."""

from pathlib import Path

import pytest
import torch
import transformers as t
from app_forms import built
from helpers import make_subject
from tiny_text import clip_tokenizer
from tiny_vision import save_vision

from effilora_diffusion import EffiLoRAError
from effilora_diffusion.diffusion.data.vision_captions import Captioner
from effilora_diffusion.studio.brought import key_of
from effilora_diffusion.studio.tabs.train import TrainTab


def save_blip(folder):
    """A BLIP without training, which has no chat template."""
    torch.manual_seed(0)
    words = clip_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": 0, "sep_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    config = t.BlipConfig(
        text_config={**sizes, **ends, "vocab_size": len(words), "encoder_hidden_size": 32, "projection_dim": 16},
        vision_config={**sizes, "image_size": 28, "patch_size": 14, "projection_dim": 16}, projection_dim=16,
    )  # fmt: skip
    t.BlipForConditionalGeneration(config).save_pretrained(folder)
    t.BlipProcessor(t.BlipImageProcessor(size={"height": 28, "width": 28}), words).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("save", [save_vision, save_blip])
def test_a_model_s_words_for_an_image_are_one_line(save, tmp_path):
    path = make_subject(tmp_path / "p", 1, size=(40, 30)) / "0.png"
    captioner = Captioner(save(tmp_path / "model"))
    caption = captioner.caption(path)
    assert isinstance(caption, str)
    assert "\n" not in caption
    assert caption == captioner.caption(path)


def test_folders_without_such_a_model_are_refused_in_a_sentence(tmp_path, place):
    (tmp_path / "empty").mkdir()
    for folder, words in (
        (None, "no caption model is named"),
        (tmp_path / "none", "is no folder on this machine"),
        (tmp_path / "empty", "can't be loaded"),
        (place / "model", "can't be loaded"),
    ):
        with pytest.raises(EffiLoRAError, match=words) as raised:
            Captioner(folder)
        assert "\n" not in str(raised.value)


def test_empty_captions_are_written_and_others_stay(session, tmp_path):
    tools = built(TrainTab, session).images.tools
    files = [str(path) for path in sorted(make_subject(tmp_path / "p", 3).iterdir())]
    cards = [{"key": key_of(Path(file)), "caption": text} for file, text in zip(files, ("mine", "", ""), strict=True)]
    model = str(save_vision(tmp_path / "model"))
    *_, (found, said) = tools.write(files, cards, model)
    assert said == "2 of 2 captions written."
    assert found[0]["caption"] == "mine"
    assert [list(tools.write(files, cards, ""))[-1][1]] == [
        "**No captions written:** no caption model is named: enter the folder of a vision-language model at Caption model in "
        "the expert settings"
    ]
    full = [{**one, "caption": "x"} for one in cards]
    assert list(tools.write(files, full, model))[-1][1] == "No image lacks a caption."

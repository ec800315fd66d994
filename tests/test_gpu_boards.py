"""The benchmarks that need real models, in small: tiny random pipelines and judges, the same commands."""

import argparse
import json
import shutil

import pytest
import torch
from helpers import image, make_subject
from PIL import Image
from tiny_families import build
from tiny_judges import clip, dino

from benchmarks import paper, peft_board, runs
from effilora_diffusion.core import EffiLoRAError, exit_code
from effilora_diffusion.diffusion.judges.vision import Clip, Dino, likeness, matched

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Folders of a tiny FLUX.2 klein, of a DINO judge and of nine captioned images."""
    root = tmp_path_factory.mktemp("board")
    build("flux2-klein").save_pretrained(root / "klein")
    dino(root / "dino")
    make_subject(root / "images", 9, captions=[f"sks cat {index}" for index in range(9)], size=(80, 64))
    return root


def command(places, work, *more):
    sizes = "--steps 3 --eval_steps 2 --resolution 64 --inference_steps 1 --max_sequence_length 64 --rates 1e-2"
    sizes = [*sizes.split(), "--text_encoder_out_layers", "9", "18", "27"]
    named = ["--model", places / "klein", "--images", places / "images", "--dino", places / "dino", "--work", work]
    return [*map(str, named), *sizes, *more]


FIELDS = {
    "accelerator_memory_reserved_avg", "accelerator_memory_max", "accelerator_memory_reserved_99th", "train_time", "file_size",
    "num_trainable_params", "num_total_params", "status", "metrics",
}  # fmt: skip
"""What PEFT's results tell of a training."""

EVALUATED = {
    "step", "valid dino_similarity", "train loss", "train samples", "train time", "eval time", "mem allocated avg",
    "mem reserved avg", "elapsed time",
}  # fmt: skip


@pytest.mark.parametrize("row", ["lora-r32", "oft", "effilora-1-head-r5", "effilora-token-r14-preserved"])
def test_a_row_of_the_board_has_peft_s_fields_and_is_run_once(places, tmp_path, row, capsys, monkeypatch):
    peft_board.main(command(places, tmp_path, "--rows", row))
    (file,) = (tmp_path / "results").iterdir()
    found = json.loads(file.read_text())
    info = found["train_info"]
    assert set(info) == FIELDS
    assert set(found) == {"run_info", "train_info", "meta_info"}
    first, last = info["metrics"]
    assert set(first) == EVALUATED
    assert set(last) == {"step", "test dino_similarity", "drift", "train loss", "train samples"}
    assert last["step"] == 3
    assert last["train samples"] == 6
    assert 0 < last["drift"] < 1, "the base without the adapter draws other images"
    assert -1 <= last["test dino_similarity"] < 1
    (adapter,) = (tmp_path / "adapters").iterdir()
    assert adapter.stat().st_size == info["file_size"] > 4 * info["num_trainable_params"]
    assert f"| {row} | 0.01 | 1 |" in capsys.readouterr().out
    monkeypatch.setattr(peft_board, "measure", None)  # whoever repeats the command measures nothing
    peft_board.main(command(places, tmp_path, "--rows", row))
    assert f"| {row} | 0.01 | 1 |" in capsys.readouterr().out


def test_the_rows_are_trained_on_the_same_losses(places, tmp_path):
    """Before anything is learned, a LoRA and an EffiLoRA adapter see the same batch and noise."""
    pictures = peft_board.split(peft_board.all_pictures(str(places / "images")), tmp_path)
    protocol = peft_board.Protocol(
        model_id=str(places / "klein"), dtype="float32", resolution=64, max_steps=1, max_sequence_length=64
    )
    losses = []
    change = lambda family: peft_board.FlowObjective(1.0)
    for row in ("lora-r32", "effilora-1-head-r32"):
        own = peft_board.ROWS[row]
        config = peft_board.settings(protocol, tmp_path, own if isinstance(own, dict) else {}, pictures)
        started = (
            peft_board.start_ours(config, change)
            if isinstance(own, dict)
            else peft_board.start_peft(config, own, change)
        )
        losses.append(started.loop.step(0)["loss"])
        started.release()
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_split_is_peft_s():
    """Fourteen, two and four of twenty, by numpy's seed 0; every image once."""
    import numpy as np

    np.random.seed(0)
    order = np.arange(20)
    np.random.shuffle(order)
    assert list(np.random.RandomState(0).permutation(20)) == list(order)


def test_the_training_images_are_neither_validated_nor_tested_on(places, tmp_path):
    pictures = peft_board.split(peft_board.all_pictures(str(places / "images")), tmp_path)
    trained = {path.read_text() for path in pictures.folder.glob("*.txt")}
    valid, test = ({caption for _, caption in group} for group in (pictures.valid, pictures.test))
    assert (len(trained), len(valid), len(test)) == (3, 2, 4)
    assert len(trained | valid | test) == 9


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--dino", "nowhere/none"], "the model 'nowhere/none'"),
        (["--dino", "{empty}"], "the DINO judge's image processor '{empty}' can't be loaded"),
        (["--model", "{empty}"], "{empty} is not a diffusers model folder"),
        (["--images", "{empty}"], "needs more than 6 images, each with a caption"),
        (["--images", "someone/data"], "a hub data set needs `pip install datasets`"),
    ],
)
def test_what_is_missing_is_said_in_a_sentence(places, tmp_path, words, reason, capsys, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    empty = tmp_path / "empty"
    empty.mkdir()
    words = [word.format(empty=empty) for word in words]
    full = command(places, tmp_path / "work", "--rows", "oft")
    assert exit_code(lambda: peft_board.main([*full, *words])) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    if "nowhere" not in reason:
        assert reason.format(empty=empty) in error
    assert error.startswith("error: ")


def test_a_judge_tells_the_same_image_from_another_and_reads_prompts(tmp_path):
    dino(tmp_path / "dino")
    clip(tmp_path / "clip")
    judges = Dino(str(tmp_path / "dino"), CPU), Clip(str(tmp_path / "clip"), CPU)
    pictures = [image(0), image(1), Image.new("RGB", (50, 30), "red")]
    for judge in judges:
        features = judge.images(pictures)
        assert matched(features, features) == pytest.approx(1)
        assert likeness(features[:1], features[1:]) < 1 - 1e-6
        assert torch.allclose(judge.images(pictures[1:2]), features[1:2], atol=1e-5), "a batch changes nothing"
    texts = judges[1].texts(["a cat", "a much longer prompt"])
    assert torch.allclose(judges[1].texts(["a cat"]), texts[:1], atol=1e-5)
    with pytest.raises(EffiLoRAError, match="can't be loaded"):
        Clip(str(tmp_path), CPU)


@pytest.fixture(scope="module")
def paper_places(tmp_path_factory):
    """Folders of a tiny Stable Diffusion 1.5, of both judges and of one subject."""
    root = tmp_path_factory.mktemp("paper")
    build("sd15").save_pretrained(root / "sd15")
    dino(root / "dino")
    clip(root / "clip")
    subject = make_subject(root / "subjects" / "rex", 2, size=(80, 64))
    (subject / "class.txt").write_text("dog\n")
    return root


def paper_command(places, work, *more):
    sizes = "--steps 12 --resolution 64 --inference_steps 1 --images 1 --rates 1e-2 --seeds 0"
    named = ["--model", places / "sd15", "--subjects", places / "subjects", "--work", work]
    return [*map(str, named), *sizes.split(), *more]


@pytest.mark.parametrize("row", ["lora", "effilora", "effilora-preserved"])
def test_a_row_of_the_paper_s_setting_is_judged_by_every_given_judge(paper_places, tmp_path, row, capsys, monkeypatch):
    judges = ["--dino", str(paper_places / "dino"), "--clip", str(paper_places / "clip")]
    full = paper_command(paper_places, tmp_path, "--rows", row, *judges)
    paper.main(full)
    (file,) = (tmp_path / "results").iterdir()
    found = json.loads(file.read_text())
    assert {"CLIP-I", "CLIP-T", "DINO", "drift"} <= set(found)
    assert found["drift"] > 0
    assert found["bytes"] > 4 * found["parameters"]
    assert "| row | lr | runs | CLIP-I | DINO | CLIP-T | drift | loss |" in capsys.readouterr().out
    monkeypatch.setattr(paper, "measure", None)
    paper.main(full)
    assert f"| {row} | 0.01 | 1 |" in capsys.readouterr().out


def test_without_a_judge_s_weights_its_columns_are_left_out(paper_places, tmp_path, capsys):
    """And rows with a Reducer follow one another."""
    paper.main(paper_command(paper_places, tmp_path, "--rows", "effilora", "effilora-random"))
    assert "| row | lr | runs | loss | parameters | seconds |" in capsys.readouterr().out
    assert len(list((tmp_path / "results").iterdir())) == 2


def test_the_reducer_of_the_paper_s_row_acts(paper_places, tmp_path):
    words = argparse.Namespace(model=str(paper_places / "sd15"), work=tmp_path, resolution=64, batch=1, steps=12)
    (subject,) = paper.subjects(paper_places / "subjects")
    started = runs.start_ours(paper.settings(words, subject, paper.ROWS["effilora"], 1e-2, 0), lambda family: None)
    begin = started.settings["reducer"]["warmup"]
    started.loop.run(begin, begin + 3)
    frozen = [value for value in started.loop.parameters if not value.requires_grad]
    started.release()
    assert started.settings["reducer"]["mode"] == "importance"
    assert frozen


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda root: (root / "rex" / "class.txt").unlink(), "has no class.txt"),
        (lambda root: [path.unlink() for path in (root / "rex").glob("*.png")], "has no images"),
        (lambda root: shutil.rmtree(root / "rex"), "needs a folder of images per subject"),
    ],
)
def test_subjects_that_can_t_be_used_are_one_sentence(tmp_path, change, reason):
    make_subject(tmp_path / "rex", 1)
    (tmp_path / "rex" / "class.txt").write_text("dog")
    change(tmp_path)
    with pytest.raises(EffiLoRAError, match=reason):
        paper.subjects(tmp_path)

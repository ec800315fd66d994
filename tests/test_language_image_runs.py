"""Runs on conversations about images: what they learn, asking them, damaged images, mistakes."""

import json

import pytest
from PIL import Image
from tiny_language import save
from tiny_vision import build_vision, make_place, processor, talk

from effilora_diffusion import load_adapter
from effilora_diffusion.cli import main as cli
from effilora_diffusion.cli.train_llm import main
from effilora_diffusion.core import load_adapter_file
from effilora_diffusion.language.generate import generate_answers
from effilora_diffusion.language.images import ImageEncoder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("images"))


def test_a_damaged_image_is_one_sentence_from_a_loader_s_process_too(place, tmp_path, capsys):
    whole = (place / "images" / "red0.png").read_bytes()
    (place / "images" / "half.png").write_bytes(whole[: len(whole) - 30])
    records = [talk("hi", "a"), talk("<image>", "a", image="half.png")]
    (tmp_path / "half.json").write_text(json.dumps(records))
    told = words(place, tmp_path / "out", train_file=tmp_path / "half.json", dataloader_num_workers=1)
    assert main(told, images=True) == 2
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert said.startswith(f"error: --train_file {tmp_path / 'half.json'}, record 2: the image")


def test_a_damaged_image_that_no_step_has_drawn_costs_no_result(place, tmp_path):
    records = json.loads((place / "train.json").read_text())
    whole = (place / "images" / "red0.png").read_bytes()
    Image.effect_noise((64, 64), 90).convert("RGB").save(place / "images" / "late.png")
    whole = (place / "images" / "late.png").read_bytes()
    (place / "images" / "late.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "late.json").write_text(json.dumps([*records, {**records[0], "image": "late.png"}]))
    steps = {"max_steps": 1, "per_device_train_batch_size": 1}
    for seed in range(20):  # the first seed whose only step draws another record
        output = tmp_path / f"out{seed}"
        told = words(place, output, train_file=tmp_path / "late.json", seed=seed, **steps)
        if main(told, images=True) == 0:
            break
    assert (output / "effilora.safetensors").exists()
    assert (output / "adapter_model.safetensors").exists()


def words(place, output, **options):
    base = {"model_name_or_path": place / "model", "train_file": place / "train.json", "validation_file": place / "held.json",
            "image_folder": place / "images", "output_dir": output, "max_steps": 40, "learning_rate": 2e-2, "rank": 4,
            "per_device_train_batch_size": 4, "use_cpu": True, "report_to": "none", "logging_steps": 1, "disable_tqdm": True,
            "save_strategy": "no"}  # fmt: skip
    return [f"--{name}={value}" for name, value in {**base, **options}.items()]


def test_a_run_learns_to_tell_images_apart(place, tmp_path, capsys):
    assert main(words(place, tmp_path / "out"), images=True) == 0
    content = load_adapter_file(tmp_path / "out" / "effilora.safetensors")
    assert content.metadata["images"] is True
    assert all("language_model" in site.name for site in content.adapter.sites)
    model, encoder = build_vision()[0], ImageEncoder(processor(), place / "images")
    records = json.loads((place / "held.json").read_text())
    wanted = [record["conversations"][-1]["value"] for record in records]
    assert generate_answers(model, encoder, records, 3) != wanted
    load_adapter(model, tmp_path / "out")
    assert generate_answers(model, encoder, records, 3, batch_size=3) == wanted
    capsys.readouterr()
    for name, answer in (("red30.png", "r"), ("white30.png", "w")):
        image = str(place / "images" / name)
        assert cli(["chat", "--adapter", str(tmp_path / "out"), "--image", image, "--prompt", "which?"]) == 0
        assert capsys.readouterr().out.strip() == answer
    question = {"instruction": "<image>which?", "image": "red30.png", "choices": ["r", "b", "g", "w"], "answer": "r"}
    other = {**question, "image": "blue30.png", "answer": "b"}
    (tmp_path / "choices.json").write_text(json.dumps([question, other]))
    data = ["--data", str(tmp_path / "choices.json"), "--image_folder", str(place / "images"), "--json"]
    assert cli(["evaluate", "--adapter", str(tmp_path / "out"), *data]) == 0
    assert json.loads(capsys.readouterr().out)["choices"] == {"questions": 2, "choice": 1.0}
    assert cli(["chat", "--adapter", str(tmp_path / "out"), "--prompt", "which?"]) == 0
    assert capsys.readouterr().out.strip()
    assert cli(["export", str(tmp_path / "out"), str(tmp_path / "merged"), "--format", "merged"]) == 0
    assert (tmp_path / "merged" / "preprocessor_config.json").exists() or (
        tmp_path / "merged" / "processor_config.json"
    ).exists()


def test_a_model_of_images_is_also_asked_without_one(place, tmp_path, monkeypatch):
    assert main(words(place, tmp_path / "out", max_steps=1), images=True) == 0
    asked = []
    monkeypatch.setattr(
        "effilora_diffusion.language.generate.stream_answer",
        lambda model, encoder, record, **options: asked.append(encoder.prompt(record)) or iter(["ok"]),
    )
    assert cli(["chat", "--adapter", str(tmp_path / "out"), "--prompt", "which?"]) == 0
    assert asked == ["<user>which?</s><assistant>"]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"image_folder": "/nowhere"}, "--image_folder /nowhere: no such folder"),
        ({"image_folder": "."}, "can't be used: there is no such file"),
        ({"train_file": "/nowhere.json"}, "--train_file /nowhere.json can't be read"),
        ({"max_length": 3}, "longer than --max_length 3"),
        ({"prompt_template": "chat", "model_name_or_path": "text"}, "is not a vision-language model"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(place, tmp_path, capsys, change, word):
    if "model_name_or_path" in change:
        change = {**change, "model_name_or_path": save(tmp_path / "text")}
    assert main(words(place, tmp_path / "out", **change), images=True) == 2
    said = capsys.readouterr().err.strip()
    assert word in said
    assert "Traceback" not in said
    assert not (tmp_path / "out" / "effilora.safetensors").exists()

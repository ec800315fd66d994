"""--dataset_name: what diffusers' commands name is trained on as a folder of the same images would be."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from accelerate import Accelerator
from helpers import PROMPT, image, make_subject, metrics, settings
from safetensors.torch import load_file

from effilora_diffusion import export_lora
from effilora_diffusion.cli.plan import command
from effilora_diffusion.cli.train import parse_arguments
from effilora_diffusion.core import EffiLoRAError
from effilora_diffusion.diffusion.data.dataset import dataset_folder
from effilora_diffusion.diffusion.data.folder import scan_images
from effilora_diffusion.diffusion.training.plan import Budget, Planner
from effilora_diffusion.diffusion.training.trainer import Trainer

CAPTIONS = ["a sks cat asleep", "a sks cat, tête-à-tête", "a sks cat"]


def png(seed):
    buffer = io.BytesIO()
    image(seed).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def parquet(tmp_path):
    """A data set of three images with a column of prompts, as the hub stores them."""
    folder = tmp_path / "parquet"
    folder.mkdir()
    rows = [{"bytes": png(seed), "path": f"{seed}.png"} for seed in range(3)]
    pq.write_table(pa.table({"image": rows, "prompt": CAPTIONS}), folder / "train-00000-of-00001.parquet")
    return folder


@pytest.fixture
def imagefolder(tmp_path):
    """The same images as a folder with a metadata file."""
    folder = make_subject(tmp_path / "imagefolder")
    lines = [{"file_name": f"{number}.png", "prompt": caption} for number, caption in enumerate(CAPTIONS)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture(params=["parquet", "imagefolder"])
def source(request):
    return request.getfixturevalue(request.param)


def scanned(folder, default=None):
    return [(one.caption, one.path.read_bytes()) for one in scan_images(folder, default)[0]]


def test_images_and_captions_are_those_of_the_data_set(source, tmp_path, capsys):
    folder = dataset_folder(str(source), None, "image", "prompt", print, tmp_path / "cache")
    assert [caption for caption, _ in scanned(folder)] == CAPTIONS
    assert [content for _, content in scanned(folder)] == [
        png(seed) if source.name == "parquet" else (source / f"{seed}.png").read_bytes() for seed in range(3)
    ]
    assert "3 images, with captions" in capsys.readouterr().out
    again = dataset_folder(str(source), None, "image", "prompt", print, tmp_path / "cache")
    assert again == folder
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [folder.name]


def test_without_a_column_of_captions_every_image_has_the_instance_prompt(source, tmp_path):
    folder = dataset_folder(str(source), None, "image", None, print, tmp_path / "cache")
    assert [caption for caption, _ in scanned(folder, PROMPT)] == [PROMPT] * 3


def test_a_command_with_a_data_set_trains_resumes_and_repeats(parquet, tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr("effilora_diffusion.diffusion.data.dataset.HF_HOME", str(tmp_path / "home"))
    kind = type(settings(tiny_pipeline, parquet, tmp_path))

    def run(output, **changes):
        config = vars(settings(tiny_pipeline, parquet, tmp_path / output, checkpointing_steps=1))
        named = {"instance_data_dir": None, "dataset_name": str(parquet), "caption_column": "prompt", **changes}
        Trainer(kind(**{**config, **named})).run()
        return tmp_path / output

    first = run("first")
    Trainer(settings(tiny_pipeline, next((tmp_path / "home/effilora/datasets").iterdir()), tmp_path / "folder")).run()
    assert metrics(first) == metrics(tmp_path / "folder")
    text = (first / "config.yaml").read_text()
    assert "instance_data_dir" not in text
    repeated = parse_arguments(["--config", str(first / "config.yaml"), "--output_dir", str(tmp_path / "again")])
    Trainer(repeated).run()
    assert metrics(tmp_path / "again") == metrics(first)
    assert 0 < export_lora(f"{first}@1", tmp_path / "plain.safetensors") < 1
    run("first", resume_from_checkpoint="checkpoint-1")
    assert metrics(first) == metrics(tmp_path / "again")
    one, other = (load_file(tmp_path / name / "effilora.safetensors") for name in ("first", "again"))
    assert all((one[name] == other[name]).all() for name in one)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_column": "picture"}, "--image_column 'picture' is not in .* it has image, prompt"),
        ({"caption_column": "text"}, "--caption_column 'text' is not in .* it has image, prompt"),
        ({"image_column": "prompt"}, "row 1 of .* has no image in its column 'prompt'"),
        ({"name": "no/such-data-set-here"}, "--dataset_name no/such-data-set-here can't be loaded"),
    ],
)
def test_a_data_set_that_can_not_be_used_is_told_in_a_sentence(parquet, tmp_path, changes, words):
    named = {"name": str(parquet), "image_column": "image", "caption_column": "prompt", **changes}
    with pytest.raises(EffiLoRAError, match=words):
        dataset_folder(config_name=None, say=print, cache=tmp_path / "cache", **named)
    assert not list((tmp_path / "cache").glob("[0-9a-f]*"))


def test_a_plan_names_the_data_set_and_not_its_folder(parquet, tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr("effilora_diffusion.diffusion.data.dataset.HF_HOME", str(tmp_path / "home"))
    config = settings(tiny_pipeline, parquet, tmp_path / "out", dataset_name=str(parquet), caption_column="prompt")
    config.instance_data_dir = None
    plan = Planner(Accelerator(cpu=True), {"resolution"}, Budget(), print).plan(config)
    assert len(plan.parts.examples) == 3
    assert f"--dataset_name {parquet}" in command(plan)
    assert "--instance_data_dir" not in command(plan)


def test_a_data_set_and_a_folder_are_one_too_many(parquet, tiny_pipeline, tmp_path):
    with pytest.raises(EffiLoRAError, match="both name the images"):
        Trainer(settings(tiny_pipeline, parquet, tmp_path / "out", dataset_name=str(parquet)))


def test_a_row_without_an_image_is_named(tmp_path):
    (tmp_path / "p").mkdir()
    rows = [{"bytes": png(0), "path": None}, {"bytes": b"no image", "path": None}]
    pq.write_table(pa.table({"image": rows}), tmp_path / "p" / "train.parquet")
    with pytest.raises(EffiLoRAError, match=r"row 2 of .* has no image in its column 'image'"):
        dataset_folder(str(tmp_path / "p"), None, "image", None, print, tmp_path / "cache")

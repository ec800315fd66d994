"""Where images and captions may lie: sub-folders, names of folders, caption files of every kind, sd-scripts' dataset config."""

import json

import pytest
from helpers import files_in, image, make_subject, metrics, settings, trainer

from effilora_diffusion.cli.train import parse_arguments
from effilora_diffusion.core import EffiLoRAError
from effilora_diffusion.core.image_io import glance_at_image
from effilora_diffusion.diffusion.caption_options import PLAIN, CaptionStyle
from effilora_diffusion.diffusion.data import folder as folders
from effilora_diffusion.diffusion.data.buckets import BucketOrder
from effilora_diffusion.diffusion.data.folder import report_problems, scan_images
from effilora_diffusion.diffusion.data.image_check import check_image
from effilora_diffusion.diffusion.dataset_config import read_dataset_config
from effilora_diffusion.diffusion.training.main import report_only
from effilora_diffusion.diffusion.training.trainer import Trainer


def scanned(folder, default=None, **options):
    """Captions and repeats of the images in a folder by their paths in it."""
    examples, problems = scan_images(folder, default, **options)
    found = {example.path.relative_to(folder).as_posix(): (example.captions, example.repeats) for example in examples}
    return found, [problem.reason for problem in problems if "very small" not in problem.reason]


# --------------------------------------------------------------------------------------------------- folders and captions


def test_sub_folders_are_read_and_their_names_give_repeats_and_captions(tmp_path):
    make_subject(tmp_path, 1)
    make_subject(tmp_path / "10_sks dog", 2, first=3, captions=["a sks dog asleep"])
    make_subject(tmp_path / "10_sks dog" / "more", 1, first=6)
    make_subject(tmp_path / "plain", 1, first=7)
    make_subject(tmp_path / ".hidden", 1, first=8)
    found, reasons = scanned(tmp_path, "a dog")
    assert found == {
        "0.png": (("a dog",), 1),
        "10_sks dog/0.png": (("a sks dog asleep",), 10),
        "10_sks dog/1.png": (("sks dog",), 10),
        "10_sks dog/more/0.png": (("sks dog",), 10),
        "plain/0.png": (("a dog",), 1),
    }
    assert reasons == []


@pytest.mark.parametrize("name", ["2024_holiday", "0_sks dog"])
def test_a_number_that_can_be_no_repeats_is_told(tmp_path, name):
    make_subject(tmp_path / name, 1)
    with pytest.raises(EffiLoRAError, match=rf"'.*{name}' asks for {name.split('_')[0]} repeats"):
        scan_images(tmp_path, "a dog")


def test_a_link_to_a_folder_above_is_followed_once(tmp_path):
    make_subject(tmp_path / "a", 1)
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    assert set(scanned(tmp_path, "x")[0]) == {"a/0.png"}


def test_text_files_win_over_caption_files_unless_a_suffix_is_named(tmp_path):
    make_subject(tmp_path, 2, captions=["by text"])
    for number in range(2):
        (tmp_path / f"{number}.caption").write_text(f"by caption {number}")
    assert scanned(tmp_path)[0] == {"0.png": (("by text",), 1), "1.png": (("by caption 1",), 1)}
    assert scanned(tmp_path, caption_extension=".caption")[0]["0.png"] == (("by caption 0",), 1)


def test_every_line_of_a_text_file_and_every_entry_of_a_list_is_a_caption(tmp_path):
    make_subject(tmp_path, 2, captions=["one\n\n two \r\nthree\n"])
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "1.png", "text": ["four", " five "]}))
    assert scanned(tmp_path)[0] == {"0.png": (("one", "two", "three"), 1), "1.png": (("four", "five"), 1)}


def test_lists_of_captions_reach_into_sub_folders_and_the_nearest_wins(tmp_path):
    for number, name in enumerate(("", "a", "a/b")):
        make_subject(tmp_path / name, 1, first=number)
    rows = ["file_name,mood,caption", '0.png,-,"root, with a comma"', "a/0.png,-,by the root", "a\\b\\0.png,-,far"]
    (tmp_path / "metadata.csv").write_text("\n".join(rows))
    (tmp_path / "a" / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "text": "near"}))
    assert scanned(tmp_path)[0] == {
        "0.png": (("root, with a comma",), 1),
        "a/0.png": (("near",), 1),
        "a/b/0.png": (("far",), 1),
    }


def test_a_plain_csv_gives_captions_and_another_one_is_named(tmp_path):
    make_subject(tmp_path, 2)
    (tmp_path / "list.csv").write_text("Image,Prompt\n0.png,first\n1.png,second\ngone.png,third\n")
    (tmp_path / "losses.csv").write_text("step,loss\n1,0.5\n")
    found, reasons = scanned(tmp_path)
    assert [captions for captions, _ in found.values()] == [("first",), ("second",)]
    assert reasons == [
        "line 4 of list.csv names 'gone.png', which is not here",
        "its first line must name a column of files (file_name) and one of captions (text)",
    ]
    (tmp_path / "list.csv").write_text("image,prompt\n0.png,first\n0.png,second\n")
    with pytest.raises(EffiLoRAError, match=r"lines 2 and 3 of .*list\.csv' give '0\.png' two captions"):
        scan_images(tmp_path, None)


def test_many_remarks_of_one_kind_are_told_as_a_number(tmp_path):
    make_subject(tmp_path, folders.LISTED + 5)
    lines = report_problems(scan_images(tmp_path, "x")[1], tmp_path).splitlines()
    assert len(lines) == folders.LISTED + 1
    assert lines[-1] == "note  5 more: very small (x pixels)"


def test_many_images_are_indexed_by_their_headers_with_the_same_result(tmp_path, monkeypatch):
    make_subject(tmp_path, 2, size=(80, 64))
    image(7, (90, 70)).save(
        tmp_path / "turned.jpg", exif=b"Exif\0\0MM\0*\0\0\0\b\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"
    )
    image(8, (90, 70)).save(tmp_path / "w.webp")
    whole = scan_images(tmp_path, "x")
    decoded = []
    monkeypatch.setattr(folders, "check_image", lambda path, edge: decoded.append(path) or check_image(path, edge))
    monkeypatch.setattr(folders, "MOST_DECODED", 3)
    assert scan_images(tmp_path, "x") == whole
    assert decoded == []
    assert glance_at_image(tmp_path / "turned.jpg")[0] == (70, 90)
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:-30])
    (tmp_path / "w.webp").write_bytes((tmp_path / "w.webp").read_bytes()[:-30])
    image(9, (70, 70)).save(tmp_path / "z.bmp")
    _, problems = scan_images(tmp_path, "x")
    assert [path.name for path in decoded] == ["1.png", "z.bmp"]  # a WebP without its end can't even be opened
    assert {problem.path.name for problem in problems} == {"1.png", "w.webp"}


def test_an_epoch_has_every_image_as_often_as_it_is_repeated():
    for sizes in ([(8, 8)] * 3, [(8, 8), (16, 8), (8, 8)]):
        order = BucketOrder(sizes, 1, 0, "instance", [1, 3, 2])
        drawn = [order.item(position)[0] for position in range(18)]
        assert [sorted(drawn[start : start + 6]) for start in (0, 6, 12)] == [[0, 1, 1, 1, 2, 2]] * 3
        assert drawn[:6] != drawn[6:12]
        assert BucketOrder(sizes, 1, 0, "instance", [1, 3, 2]).item(13)[0] == drawn[13]


# ------------------------------------------------------------------------------------------------- sd-scripts' dataset config

CONFIG = """
[general]
shuffle_caption = true
caption_extension = '.caption'
keep_tokens = 1
enable_bucket = false
min_bucket_reso = 256

[[datasets]]
resolution = 32
batch_size = 2
keep_tokens = 2

  [[datasets.subsets]]
  image_dir = '{root}/dog'
  class_tokens = 'sks dog'
  num_repeats = 3

  [[datasets.subsets]]
  image_dir = '{root}/mug'
  class_tokens = 'zwx mug'
  keep_tokens = 0
  caption_prefix = 'photo,'
"""
REG = """
  [[datasets.subsets]]
  is_reg = true
  image_dir = '{root}/reg'
  class_tokens = 'dog'
"""


@pytest.fixture
def listed(tmp_path):
    """sd-scripts' file of two folders, with four and one images."""
    make_subject(tmp_path / "dog", 4)
    (tmp_path / "dog" / "0.caption").write_text("sks dog, asleep, red")
    make_subject(tmp_path / "mug", 1, first=5)
    make_subject(tmp_path / "reg", 3, first=9)
    file = tmp_path / "dataset.toml"
    file.write_text(CONFIG.format(root=tmp_path.as_posix()))
    return file


def with_file(model, file, output, **options):
    named = {
        "instance_data_dir": None,
        "instance_prompt": None,
        "num_validation_images": 0,
        "dataset_config": str(file),
    }
    config = settings(model, "x", output, **{"instance_prompt": "x"})
    return type(config)(**{**vars(config), **named, **options})


def test_the_settings_of_a_folder_win_over_those_of_its_data_set_and_of_all(listed, tmp_path):
    found = read_dataset_config(listed, PLAIN, None)
    dog, mug = found.subsets
    assert (dog.image_dir, dog.prompt, dog.repeats, dog.caption_extension) == (
        f"{tmp_path.as_posix()}/dog", "sks dog", 3, ".caption",
    )  # fmt: skip
    assert dog.style == CaptionStyle(shuffle_caption=True, keep_tokens=2)
    assert mug.style == CaptionStyle(shuffle_caption=True, keep_tokens=0, caption_prefix="photo,")
    assert found.settings == {"resolution": 32, "train_batch_size": 2, "random_flip": False, "center_crop": True}
    assert found.unused == ["min_bucket_reso"]
    listed.write_text(listed.read_text().replace("enable_bucket = false", "enable_bucket = true"))
    found = read_dataset_config(listed, PLAIN, None)
    assert found.settings.items() >= {"use_aspect_ratio_buckets": True, "min_bucket_reso": 256}.items()
    assert found.unused == []


def test_a_run_has_the_folders_repeats_and_captions_of_the_file(listed, tiny_pipeline, tmp_path, capsys):
    run = Trainer(with_file(tiny_pipeline, listed, tmp_path / "out", resolution=64, train_batch_size=1))
    told = capsys.readouterr().out
    assert (run.config.resolution, run.config.train_batch_size, run.parts.epoch, run.parts.steps_per_epoch) == (
        32,
        2,
        13,
        7,
    )
    assert "images      5 (13 an epoch), 3 distinct captions" in told
    assert "folder      'dog': 4 images, 3 times an epoch" in told
    assert (
        "note: --dataset_config goes before other settings, as in sd-scripts: resolution 32, train_batch_size 2"
        in told
    )
    assert "note: keys of --dataset_config without an effect: min_bucket_reso" in told
    rows = [run.batches.instance.caption(position) for position in range(13)]
    assert (rows.count("sks dog"), rows.count("sks dog, asleep, red")) == (9, 3)
    assert set(rows) <= {"sks dog", "sks dog, asleep, red", "photo, zwx mug", "zwx mug, photo"}
    run.run()
    assert (tmp_path / "out" / "effilora.safetensors").exists()
    again = parse_arguments(
        ["--config", str(tmp_path / "out" / "config.yaml"), "--output_dir", str(tmp_path / "again")]
    )
    Trainer(again).run()
    assert metrics(tmp_path / "again") == metrics(tmp_path / "out")


def test_each_prompt_of_the_file_is_a_concept_with_its_share_of_rows(listed, tiny_pipeline, tmp_path):
    run = Trainer(with_file(tiny_pipeline, listed, tmp_path / "out", routing="concept", rank=2))
    assert [concept.prompt for concept in run.adapter.concepts] == ["sks dog", "zwx mug"]
    assert run.parts.weights == (12.0, 1.0)
    run.folder.release()


def test_class_images_of_the_file_are_used_as_they_are(listed, tiny_pipeline, tmp_path):
    listed.write_text(listed.read_text() + REG.format(root=tmp_path.as_posix()))
    before = files_in(tmp_path / "reg")
    run = Trainer(with_file(tiny_pipeline, listed, tmp_path / "out"))
    assert (run.parts.classes[0].count, run.parts.classes[0].caption) == (3, "dog")
    assert not run.parts.prior.from_base
    assert {example.path.parent.name for example in run.batches.classes.examples} == {"reg"}
    assert run.batches.draw(0, 2).instances == 2
    assert len(run.batches.draw(0, 2).names) == 4
    assert {name: content for name, content in files_in(tmp_path / "reg").items() if name in before} == before
    assert {name for name in files_in(tmp_path / "reg") if name.endswith(".png")} == set(before)
    run.folder.release()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("enable_bucket = false", "validation_split = 0.1", "data set 1 of .* has validation_split, which is not"),
        ("num_repeats = 3", "enable_bucket = 1", "enable_bucket must be of type bool, not 1"),
        ("keep_tokens = 2", "color_aug = true", "has color_aug, which is not supported"),
        ("keep_tokens = 2", "what_is_this = 1", "has the unknown key 'what_is_this'"),
        ("keep_tokens = 2", "keep_tokens = '2'", "keep_tokens must be of type int, not '2'"),
        ("num_repeats = 3", "num_repeats = 0", "folder 1 of data set 1 of .*: num_repeats must be at least 1"),
        ("num_repeats = 3", "flip_aug = true", "asks for random_flip False, another folder for True"),
        ("resolution = 32", "resolution = [32, 64]", "resolution must be one number"),
        ("resolution = 32", "resolution = -32", "resolution must be one number"),
        ("resolution = 32", "resolution = true", "resolution must be one number"),
        ("resolution = 32", "resolution = 0", "resolution must be one number"),
        ("  image_dir", "  folder", "has the unknown key 'folder'"),
        ("[general]", "[common]", "has the unknown key 'common'"),
        ("[[datasets]]", "[[datasets", "can't be read"),
    ],
)
def test_what_a_file_can_not_have_is_named(listed, old, new, words):
    listed.write_text(listed.read_text().replace(old, new, 1))
    with pytest.raises(EffiLoRAError, match=words):
        read_dataset_config(listed, PLAIN, None)


def test_repeats_of_folders_are_told_by_a_dry_run_and_lengthen_epochs(tiny_pipeline, tmp_path, capsys):
    make_subject(tmp_path / "s" / "4_sks cat", 2)
    make_subject(tmp_path / "s" / "1_cat", 1, first=5)
    report_only(settings(tiny_pipeline, tmp_path / "s", tmp_path / "out", max_train_steps=None, num_train_epochs=2))
    told = capsys.readouterr().out
    assert "folder      '4_sks cat': 2 images, 4 times an epoch, caption 'sks cat'" in told
    assert "steps       18, batch size 1, 2.0 epochs" in told


def test_other_repeats_are_another_run(tiny_pipeline, tmp_path):
    make_subject(tmp_path / "s" / "2_sks cat", 2)
    trainer(tiny_pipeline, tmp_path / "s", tmp_path / "out", checkpointing_steps=1, num_validation_images=0).run()
    (tmp_path / "s" / "2_sks cat").rename(tmp_path / "s" / "3_sks cat")
    run = trainer(tiny_pipeline, tmp_path / "s", tmp_path / "out", resume_from_checkpoint="checkpoint-1")
    with pytest.raises(EffiLoRAError, match="repeats and captions was"):
        run.run()

"""Latents and text states on disk: the same run, nothing encoded twice, nothing of another model, image or setting."""

import resource
import signal
import sys

import pytest
import torch
from helpers import image, make_subject, metrics, same_content, settings, sharp_pipeline, trainer
from PIL import Image

from effilora_diffusion import EffiLoRAError
from effilora_diffusion.diffusion.data.cache import DiskCache
from effilora_diffusion.diffusion.models.base import Family

FAST = {"num_validation_images": 0, "routing": "static", "heads": 1, "max_train_steps": 4, "center_crop": False}
DISK = {"cache_latents_to_disk": True, "cache_text_encoder_outputs_to_disk": True}
PLAIN = "pytorch_lora_weights.safetensors"


@pytest.fixture
def encoded(monkeypatch):
    """What the encoders were called for: an image's number of pixels, or a prompt."""
    seen = []
    pictures, prompts = Family.encode_image, Family.encode_prompt
    monkeypatch.setattr(Family, "encode_image", lambda self, one: seen.append(one.numel()) or pictures(self, one))
    monkeypatch.setattr(Family, "encode_prompt", lambda self, one: seen.append(one) or prompts(self, one))
    return seen


def subject_of(folder):
    make_subject(folder, 3, captions=["a sks cat", "a sks cat on a table"], size=(48, 32))
    mask = Image.new("L", (48, 32), 255)
    mask.paste(0, (0, 0, 24, 32))
    mask.save(folder / "0.mask.png")
    return folder


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}


def test_a_run_from_disk_is_the_run_from_memory_and_the_second_start_encodes_nothing(tiny_pipeline, tmp_path, encoded):
    subject = subject_of(tmp_path / "s")
    prior = {"with_prior_preservation": True, "class_prompt": "a cat", "masked_loss": True, "prior_interval": 1}
    shared = {**FAST, **prior, "random_flip": True, "use_aspect_ratio_buckets": True, "checkpointing_steps": 2}
    trainer(tiny_pipeline, subject, tmp_path / "memory", **shared).run()
    cache = {**DISK, "latents_cache_dir": str(tmp_path / "cache")}
    runs, counts = [], []
    for name in ("first", "second"):
        encoded.clear()
        runs.append(trainer(tiny_pipeline, subject, tmp_path / name, **shared, **cache))
        at_start = list(encoded)
        runs[-1].run()  # judging encodes some prompts for itself
        counts.append([*at_start, *(one for one in encoded[len(at_start) :] if isinstance(one, int))])
        kept = files(tmp_path / "cache")
        assert not runs[-1].batches.instance._moments
        assert not len(runs[-1].batches.instance.texts)
        assert not runs[-1].batches.instance._masks
    assert {"a sks cat", "a sks cat on a table", "a cat"} < set(counts[0])
    assert len([one for one in counts[0] if isinstance(one, int)]) >= 3
    assert counts[1] == []
    assert kept == files(tmp_path / "cache")
    for name in ("first", "second"):
        assert metrics(tmp_path / name) == metrics(tmp_path / "memory")
        assert same_content(tmp_path / name / PLAIN, tmp_path / "memory" / PLAIN)
    assert not (tmp_path / "first" / "cache").exists()


def test_a_run_goes_on_from_its_cache(tiny_pipeline, tmp_path, encoded):
    subject = subject_of(tmp_path / "s")
    trainer(tiny_pipeline, subject, tmp_path / "whole", **FAST).run()
    trainer(tiny_pipeline, subject, tmp_path / "part", **{**FAST, "max_train_steps": 2}, **DISK).run()
    assert files(tmp_path / "part" / "cache")
    again = {**FAST, **DISK, "resume_from_checkpoint": "latest", "train_batch_size": 1}
    trainer(tiny_pipeline, subject, tmp_path / "part", **again).run()
    assert metrics(tmp_path / "part") == metrics(tmp_path / "whole")
    assert same_content(tmp_path / "part" / PLAIN, tmp_path / "whole" / PLAIN)


def test_damaged_files_are_made_again_and_told(tiny_pipeline, tmp_path, encoded, capsys):
    subject = make_subject(tmp_path / "s", 2)
    options = {**FAST, **DISK, "center_crop": True}
    trainer(tiny_pipeline, subject, tmp_path / "out", **options).run()
    whole = metrics(tmp_path / "out")
    cache = tmp_path / "out" / "cache"
    kept = {path: path.read_bytes() for path in files(cache)}
    first, second, third = sorted(kept)
    first.write_bytes(kept[first][:-10])
    second.write_bytes(kept[second][:-1] + bytes([kept[second][-1] ^ 1]))  # a bit of the last number
    third.write_bytes(b"")
    encoded.clear()
    capsys.readouterr()
    trainer(tiny_pipeline, subject, tmp_path / "again", **options, latents_cache_dir=str(cache)).run()
    told = [line for line in capsys.readouterr().out.splitlines() if "is damaged and made again" in line]
    assert len(told) == 3
    assert len([one for one in encoded if one != ""]) >= 3
    assert {path: path.read_bytes() for path in files(cache)} == kept
    assert metrics(tmp_path / "again") == whole


def test_what_latents_depend_on_is_never_mixed(tiny_pipeline, tmp_path, encoded):
    subject = make_subject(tmp_path / "s", 1, size=(48, 48))
    options = {**FAST, **DISK, "latents_cache_dir": str(tmp_path / "cache"), "center_crop": True}

    def start(name, model=tiny_pipeline, **changed):
        """How many images a new run encodes."""
        encoded.clear()
        trainer(model, subject, tmp_path / name, **{**options, **changed})
        return len([one for one in encoded if isinstance(one, int)])

    assert start("first") == 1
    assert start("second") == 0
    assert start("resolution", resolution=24) == 1
    assert start("filter", image_interpolation_mode="bicubic") == 1
    assert start("autoencoder", sharp_pipeline(tiny_pipeline, tmp_path / "model")) == 1
    assert start("type", mixed_precision="bf16") == 1  # rounded to 16 bits before it encodes in 32
    image(7, (48, 48)).save(subject / "0.png")
    assert start("image") == 1


def test_tensors_of_every_kind_come_back_as_they_were(tmp_path):
    cache = DiskCache(tmp_path / "c", {"model": 1}, print)
    tensors = {
        "states": torch.randn(3, 4).to(torch.bfloat16),
        "tokens": torch.tensor(7),
        "mask": torch.tensor([True, False]),
        "turned": torch.randn(4, 3).T,
    }
    assert cache.load({"prompt": "x"}) is None
    cache.save({"prompt": "x"}, tensors)
    assert {"prompt": "x"} in cache
    assert {"prompt": "y"} not in cache
    assert {"prompt": "x"} not in DiskCache(tmp_path / "c", {"model": 2}, print)
    found = cache.load({"prompt": "x"})
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)


@pytest.mark.skipif(sys.platform != "linux", reason="sizes of files are limited through resource")
def test_a_full_disk_is_one_sentence_and_leaves_nothing_half(tmp_path):
    cache = DiskCache(tmp_path / "c", {}, print)
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(EffiLoRAError, match="make room, or name another place") as caught:
            cache.save({"image": 1}, {"moments": torch.zeros(5000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert "\n" not in str(caught.value)
    assert [path for path in (tmp_path / "c").rglob("*") if path.is_file()] == []
    (tmp_path / "file").write_text("")
    with pytest.raises(EffiLoRAError, match="could not be written"):
        DiskCache(tmp_path / "file", {}, print).save({}, {"moments": torch.zeros(1)})


def test_a_folder_for_the_cache_asks_for_it(tiny_pipeline, tmp_path):
    config = settings(tiny_pipeline, tmp_path / "s", tmp_path / "out", latents_cache_dir="cache")
    assert (config.cache_latents_to_disk, config.cache_text_encoder_outputs_to_disk) == (True, False)

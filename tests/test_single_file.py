"""Checkpoints in one file, as people have them from model sites: the same model as the folder, or a clear refusal."""

import pytest
import torch
from helpers import make_subject, trainer
from safetensors.torch import save_file
from single_files import write_single_file
from tiny_families import build, draw

from effilora_diffusion import EffiLoRAError, load_adapter
from effilora_diffusion.diffusion.models.pipelines import load_pipeline

PROMPT = "a red cat"


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def checkpoint(request, tmp_path_factory):
    """Name of the family, its folder, and the same weights in one file."""
    place = tmp_path_factory.mktemp(request.param)
    pipe = build(request.param)
    pipe.save_pretrained(place / "folder")
    return request.param, place / "folder", write_single_file(pipe, place / "model.safetensors")


def test_a_single_file_is_the_same_model_as_its_folder(checkpoint):
    name, folder, file = checkpoint
    ours, stock = load_pipeline(str(file), single_file_config=str(folder)), load_pipeline(str(folder))
    assert type(ours) is type(stock)
    for part in [name for name, value in stock.components.items() if hasattr(value, "state_dict")]:
        one, other = getattr(ours, part).state_dict(), getattr(stock, part).state_dict()
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert torch.equal(draw(ours, name, PROMPT), draw(stock, name, PROMPT))


def test_an_adapter_trained_on_a_single_file_fits_the_folder(checkpoint, tmp_path, caplog):
    name, folder, file = checkpoint
    options = {"single_file_config": str(folder), "resolution": 64, "num_validation_images": 0, "learning_rate": 1e-2}
    run = trainer(file, make_subject(tmp_path / "s", 2, size=(64, 64)), tmp_path / "out", **options)
    run.run()
    pipe = load_pipeline(str(folder))
    load_adapter(pipe, tmp_path / "out")
    assert not [record for record in caplog.records if record.name.startswith("effilora")]  # no word of another base
    assert torch.equal(draw(pipe, name, PROMPT), draw(run.family.pipe, name, PROMPT))


def test_without_configuration_and_hub_the_message_names_the_way_out(checkpoint):
    _, _, file = checkpoint
    with pytest.raises(EffiLoRAError, match="go online once, or give a folder"):
        load_pipeline(str(file))


def test_a_configuration_of_another_architecture_is_refused(checkpoint, tmp_path):
    name, _, file = checkpoint
    build("sdxl" if name == "sd15" else "sd15").save_pretrained(tmp_path / "other")
    with pytest.raises(EffiLoRAError, match=r"can't be loaded .*other"):
        load_pipeline(str(file), single_file_config=str(tmp_path / "other"))


def test_other_files_are_refused(tmp_path):
    lora = tmp_path / "lora.safetensors"
    save_file({"unet.to_q.lora_A.weight": torch.zeros(1)}, lora)
    with pytest.raises(EffiLoRAError, match="no whole Stable Diffusion"):
        load_pipeline(str(lora))
    pickle = tmp_path / "model.ckpt"
    torch.save({}, pickle)
    with pytest.raises(EffiLoRAError, match="may run code"):
        load_pipeline(str(pickle))
    lora.write_bytes(lora.read_bytes()[:40])
    with pytest.raises(EffiLoRAError, match="damaged"):
        load_pipeline(str(lora))

"""Runs of the training command on a tiny model and data of letters, and what they have written."""

import json

import torch
from tiny_language import save

from effilora_diffusion.core import load_adapter_file


def make_place(folder):
    """A model folder and data: which of two letters comes first in the alphabet."""
    save(folder / "model")
    pairs = [(a, b) for a in "abcdefgh" for b in "abcdefgh" if a != b]
    records = [{"instruction": f"{a}{b}", "output": min(a, b)} for a, b in pairs]
    for name, chosen in (("train", records[::2]), ("held", records[1::2])):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, chosen)))
    return folder


def words(place, output, **options):
    """The command's words."""
    base = {"model_name_or_path": place / "model", "train_file": place / "train.jsonl", "output_dir": output, "max_steps": 6,
            "learning_rate": 1e-2, "per_device_train_batch_size": 4, "use_cpu": True, "report_to": "none", "logging_steps": 1,
            "save_steps": 3, "disable_tqdm": True}  # fmt: skip
    words = [f"--{name}={value}" for name, value in {**base, **options}.items()]
    return [part for word in words for part in (word.replace("=", " ", 1).split() if " " in word else [word])]


def logs(output):
    """Steps and losses, as the last checkpoint has them."""
    folders = sorted(output.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    state = json.loads((folders[-1] / "trainer_state.json").read_text())
    return [(entry["step"], entry["loss"]) for entry in state["log_history"] if "loss" in entry]


def weights(output):
    """The adapter's tensors."""
    return [
        value.detach().clone() for value in load_adapter_file(output / "effilora.safetensors").adapter.parameters()
    ]


def same(one, other):
    """Whether tensors are equal, bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))

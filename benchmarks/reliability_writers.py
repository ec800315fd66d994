"""The commands that write, for the cases on full disks of :mod:`.reliability_cases`."""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from effilora_diffusion.cli import main as effilora
from effilora_diffusion.core.run_folder import checkpoints
from effilora_diffusion.diffusion.training.checkpoints import fault_of

from .reliability_cases import ROOM, SETTINGS, child, content, difference, tmpfs

ONLY_SHOWN = (".png", "README.md", "_kohya.safetensors", ".json")
"""Endings of what shows or repeats the result of a run whose adapter is saved: a note tells that it could not be written."""


@dataclass
class Writer:
    """A command with the words that make it write into a folder, and whether it can be gone on with."""

    words: Callable[[Path], list[str]]
    resumes: bool = False
    faults: Callable[[Path], bool] = field(default=lambda folder: False)

    def write(self, folder: Path, *more: str) -> tuple[int, list[str]]:
        """Run the command; its exit code and what it said in sentences."""
        ended = child([*self.words(folder), *more], command=effilora)
        if any("Traceback" in line or "uncaught" in line for line in ended.said):
            return 1, ended.said[-1:]
        return ended.code, [line for line in ended.said if line.startswith("error: ")]

    def fault(self, folder: Path, whole: dict[str, bytes]) -> str:
        """What is wrong after the command met a full disk, and after it was given room."""
        code, said = self.write(folder)
        if code == 0:
            found = content(folder)
            expected = {name: data for name, data in whole.items() if not name.endswith(ONLY_SHOWN)}
            return difference({name: found[name] for name in found if name in expected}, expected)
        if code != 2 or len(said) != 1:
            return f"exit code {code}, said {said}"
        if not any(words in said[0] for words in ("(No space left", "os error 28", "for lack of space")):
            return f"said {said[0]}"
        halves = [path.name for path in folder.rglob("*") if "tmp" in path.name or ".old" in path.name]
        if halves or self.faults(folder):
            return f"left over: {halves}"
        tmpfs(folder, ROOM, remount=True)
        more = [self._way(folder)] if self.resumes else []
        code, said = self.write(folder, *more)
        return f"going on: {said}" if code else difference(content(folder), whole)

    def _way(self, folder: Path) -> str:
        return "--resume_from_checkpoint=latest" if checkpoints(folder / "out") else "--overwrite_output_dir"


def _broken_checkpoint(folder: Path) -> bool:
    return any(fault_of(path) is not None for path in checkpoints(folder / "out"))


def _train(folder: Path) -> list[str]:
    settings = {**SETTINGS, "output_dir": str(folder / "out"), "class_data_dir": str(folder / "class")}
    return ["train", "--with_prior_preservation", *(f"--{name}={value}" for name, value in settings.items())]


def writers(folder: Path) -> dict[str, tuple[float, Writer]]:
    """Every command that writes, by name, with its share of the cases; ``folder`` is for what they need."""
    folder.mkdir()
    made = folder / "run"
    if child(_train(made), command=effilora).code != 0:
        raise RuntimeError("the run whose adapter is exported failed")
    adapter = str(made / "out" / "effilora.safetensors")
    model, records = _language(folder)

    def export(format: str, name: str) -> Writer:
        return Writer(lambda target: ["export", adapter, str(target / name), "--format", format])

    def language(target: Path) -> list[str]:
        return ["train-llm", "--model_name_or_path", str(model), "--train_file", str(records), "--max_steps", "4",
                "--save_steps", "2", "--per_device_train_batch_size", "2", "--learning_rate", "1e-2", "--use_cpu",
                "--report_to", "none", "--disable_tqdm", "True", "--output_dir", str(target / "out")]  # fmt: skip

    def generate(target: Path) -> list[str]:
        return ["generate", "--adapter", adapter, "--prompt", "a cat", "--num_inference_steps", "1", "--seed", "0",
                "--output", str(target / "cat.png")]  # fmt: skip

    return {
        "train": (0.45, Writer(_train, True, _broken_checkpoint)),
        "train-llm": (0.25, Writer(language, True)),
        "export diffusers": (0.06, export("diffusers", "a.safetensors")),
        "export kohya": (0.06, export("kohya", "b.safetensors")),
        "export peft": (0.06, export("peft", "c")),
        "export merged": (0.06, export("merged", "d")),
        "generate": (0.06, Writer(generate)),
    }


def _language(folder: Path) -> tuple[Path, Path]:
    """A tiny language model of letters, and records to train it on."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = ["<pad>", "<s>", "</s>", "<unk>", *string.printable[:95]]
    tokenizer = Tokenizer(models.WordLevel({letter: index for index, letter in enumerate(letters)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder / "model")
    shape = {"vocab_size": len(letters), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(**shape, num_attention_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    records = folder / "records.jsonl"
    pairs = [{"instruction": letter * 3, "output": letter} for letter in string.ascii_lowercase]
    records.write_text("\n".join(map(json.dumps, pairs)))
    return folder / "model", records

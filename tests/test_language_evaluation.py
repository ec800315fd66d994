"""The validation loss is the mean over tokens, and what a run says while it trains."""

import io
import json
import sys

import pytest
import torch
from language_runs import make_place, words
from tiny_language import build, tokenizer

from effilora_diffusion import EffiLoRAConfig, attach
from effilora_diffusion.cli.train_llm import main
from effilora_diffusion.core import Reducer
from effilora_diffusion.language.config import LanguageTrainingArguments
from effilora_diffusion.language.datasets import Collator
from effilora_diffusion.language.encoding import Encoder
from effilora_diffusion.language.examples import Examples
from effilora_diffusion.language.targets import create_adapter
from effilora_diffusion.language.trainer import LanguageTrainer

LENGTHS = (1, 30, 2, 2, 17, 1, 24)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("language"))


def make_trainer(folder, **options):
    model, encoder = build("llama"), Encoder(tokenizer())
    adapter = attach(model, create_adapter(model, EffiLoRAConfig(rank=2, target_modules=("paper",))))
    records = [{"instruction": "ab", "output": "abcd"[index % 4] * length} for index, length in enumerate(LENGTHS)]
    examples = Examples.of(records, encoder, "data")
    args = LanguageTrainingArguments(output_dir=str(folder), use_cpu=True, report_to=[], **options)
    more = {"model": model, "args": args, "eval_dataset": examples, "data_collator": Collator(encoder)}
    return LanguageTrainer(adapter, Reducer(adapter, 0), {}, **more)


@torch.no_grad()
def expected(trainer):
    """The mean loss per token, one example at a time and in double precision."""
    model, sums = trainer.model.double(), torch.zeros(2, dtype=torch.float64)
    for item in trainer.eval_dataset:
        loss = model(**trainer.data_collator([item])).loss
        sums += torch.tensor([float(loss) * item.num_label_tokens, item.num_label_tokens])
    return float(sums[0] / sums[1])


def test_the_validation_loss_is_the_mean_over_tokens_in_batches_of_any_size(tmp_path):
    found = {}
    for size in (1, 2, 3, 7, 64):
        trainer = make_trainer(tmp_path, per_device_eval_batch_size=size)
        found[size] = trainer.evaluate()["eval_loss"]
    whole = expected(trainer)
    assert list(found.values()) == pytest.approx([whole] * 5, rel=2e-6)
    of_batches = [float(trainer.model(**trainer.data_collator([item])).loss) for item in trainer.eval_dataset]
    assert abs(sum(of_batches) / len(of_batches) - whole) > 0.01 * whole  # the mean of means is another number


def test_label_smoothing_is_weighted_by_tokens_too(tmp_path):
    found = []
    for size in (1, 3, 7):
        trainer = make_trainer(tmp_path, per_device_eval_batch_size=size, label_smoothing_factor=0.1)
        found.append(trainer.evaluate()["eval_loss"])
    assert found == pytest.approx([found[0]] * 3, rel=2e-6)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_has_a_bar_and_a_file_a_line_now_and_then(place, tmp_path, monkeypatch, capsys):
    options = {
        "max_steps": 45,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": False,
        "learning_rate": 1e-3,
    }
    assert main(words(place, tmp_path / "file", **options)) == 0
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if line.startswith("step ")]
    assert len(lines) <= 21
    assert lines[0].startswith("step 1 of 45: loss ")
    assert lines[0].endswith(" left")
    assert lines[-1].startswith("step 45 of 45: loss ")
    assert "lr " in lines[-1]
    assert "of what the adapter changes, plain LoRA (PEFT) misses" in said.out
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert main(words(place, tmp_path / "bar", **{**options, "max_steps": 3})) == 0
    assert "3/3" in terminal.getvalue()
    assert "loss=" in terminal.getvalue()
    assert "step 1 of" not in terminal.getvalue()


def test_losses_are_logged_by_default(place, tmp_path):
    given = [word for word in words(place, tmp_path / "out", max_steps=12, save_steps=12) if "logging" not in word]
    assert main(given) == 0
    state = json.loads((tmp_path / "out" / "checkpoint-12" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 10]

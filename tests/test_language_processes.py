"""Two processes of a language run: what one would do, also where the examples don't come out even, and they end together."""

import gc
import json

import pytest
import torch
import torch.distributed as dist
from language_runs import logs, make_place, weights, words
from ranks import Ranks
from torch.nn.parallel import DistributedDataParallel

from effilora_diffusion.cli.train_llm import main

OPTIONS = {
    "max_steps": 9,  # an epoch has seven, the last one without a full batch
    "lr_scheduler_type": "constant",
    "learning_rate": 3e-3,
    "reducer": "importance",
    "reducer_warmup": 1,
    "reducer_interval": 2,
    "save_steps": 9,
    "per_device_eval_batch_size": 2,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "disable_tqdm": False,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, 27 records to learn and 5 of very different lengths to evaluate."""
    folder = make_place(tmp_path_factory.mktemp("language"))
    lines = (folder / "train.jsonl").read_text().splitlines()
    (folder / "train.jsonl").write_text("\n".join(lines[:27]))
    held = [{"instruction": "ab", "output": "a" * length} for length in (1, 2, 5, 17, 30)]
    (folder / "held.jsonl").write_text("\n".join(map(json.dumps, held)))
    return folder


def observed(arguments):
    """A run as one of its processes, and what it holds of the others at its end."""
    code = main(arguments)
    wrapped = sum(type(one) is DistributedDataParallel for one in gc.get_objects())
    print(f"in a group: {dist.is_initialized()}, wrapped models: {wrapped}")
    return code


@pytest.fixture(scope="module")
def outcome(place, tmp_path_factory):
    """A run in one process and the same in two: their folders, and what the two have said."""
    folder = tmp_path_factory.mktemp("outcome")
    told = {**OPTIONS, "validation_file": place / "held.jsonl"}
    ranks = Ranks(folder, observed, words(place, folder / "two", **told, per_device_train_batch_size=2))
    assert main(words(place, folder / "one", **told)) == 0
    assert ranks.codes() == [0, 0], ranks.said(0) + ranks.said(1)
    return folder, ranks.said(0), ranks.said(1)


def evaluated(output):
    state = json.loads((output / "checkpoint-9" / "trainer_state.json").read_text())
    return [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]


def test_a_finished_process_has_left_the_others(outcome):
    """Whoever is in a group when Python ends may be aborted by its threads, and the run counts as failed."""
    for said in outcome[1:]:
        assert "in a group: False, wrapped models: 0" in said


def test_two_processes_train_what_one_does(outcome):
    folder = outcome[0]
    losses = [[loss for _, loss in logs(folder / name)] for name in ("one", "two")]
    assert len(losses[0]) == len(losses[1]) == 9
    assert losses[1][:6] == pytest.approx(losses[0][:6], abs=1e-3)
    assert losses[1] == pytest.approx(losses[0], rel=0.2)  # the epoch's last batch is filled up for the second process
    for one, two in zip(evaluated(folder / "one")[:2], evaluated(folder / "two")[:2], strict=True):
        assert two == pytest.approx(one, rel=1e-3)  # of weights that are nearly the same
    events = [(folder / name / "reducer.jsonl").read_text().splitlines() for name in ("one", "two")]
    assert [json.loads(line)["event"] for line in events[0]] == [json.loads(line)["event"] for line in events[1]]
    assert all(torch.isfinite(value).all() for value in weights(folder / "two"))


def test_only_the_first_process_speaks(outcome):
    _, first, second = outcome
    assert first.count("export_error") == 1
    assert "step 9 of 9: loss" in first
    assert "\r" not in "".join(line for line in first.splitlines() if "step" in line)
    assert "step" not in second.replace("Loading", "")


def fail_in_one(folder, lines):
    """A process of a run; the second one's file has a record that can't be learned."""
    import os

    bad = folder / "bad.jsonl"
    words = [word for word in lines if "train_file" not in word]
    return main([*words, f"--train_file={bad}"] if os.environ["RANK"] == "1" else lines)


def test_a_bad_record_in_one_process_ends_both(place, tmp_path):
    lines = (place / "train.jsonl").read_text().splitlines()
    (tmp_path / "bad.jsonl").write_text("\n".join([*lines[:-1], '{"instruction": "ab"}']))
    ranks = Ranks(tmp_path, fail_in_one, tmp_path, words(place, tmp_path / "out", per_device_train_batch_size=2))
    assert ranks.codes() == [2, 2], ranks.said(0)
    assert "record 27" in ranks.said(1)
    assert "another process of this run has ended" in ranks.said(0)
    assert not any("Traceback" in ranks.said(rank) for rank in (0, 1))
    assert not list((tmp_path / "out").glob("*"))

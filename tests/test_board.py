"""The board of methods: what each trains, that measurements are resumed and shared out, and what the tables say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from benchmarks import board, board_table, judging, subject
from benchmarks.board import Bench, Plan
from benchmarks.board_methods import METHODS, STANDARD
from benchmarks.board_rows import Rows
from benchmarks.peft_baseline import batches, train
from effilora_diffusion.diffusion.judges.efficientnet import EfficientNetLite0, Judge
from effilora_diffusion.diffusion.models import make_family
from effilora_diffusion.diffusion.models.pipelines import load_pipeline
from effilora_diffusion.diffusion.training.trainer import Trainer

SHORT = 3


@pytest.fixture(scope="module")
def judge():
    torch.manual_seed(0)
    return Judge(EfficientNetLite0())  # the ImageNet weights are a package of their own, and no test's subject


@pytest.fixture
def bench(tmp_path, judge, monkeypatch):
    monkeypatch.setitem(subject.EMBEDDED_SAMPLING, "steps", 1)
    monkeypatch.setattr(board, "CLASS_IMAGES", 2)
    monkeypatch.setattr(judging, "OTHER_PROMPTS", subject.OTHER_PROMPTS[:2])
    return Bench(tmp_path, steps=2, images=1, judge=judge, levels=(2, 2))


def settings(bench, method, steps=SHORT):
    config = bench.settings(method, board.BY_NAME["robot"], METHODS[method].rates[-1], 0, steps)
    config.validation_inference_steps = 1
    return config


@pytest.fixture(scope="module")
def base():
    return make_family(load_pipeline(None), torch.device("cpu"))


@torch.no_grad()
def predicted(family, batch):
    return family.predict(batch.latents + batch.noise, batch.timesteps, batch.conditions)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_its_own_parameters_and_nothing_else(bench, base, method, tmp_path):
    config = settings(bench, method)
    before = {}

    def fit(family, config):
        fitted = METHODS[method].fit(family, config)
        before.update({name: value.detach().clone() for name, value in family.model.named_parameters()})
        return fitted

    done = train(config, fit)
    after = dict(done.family.model.named_parameters())
    own = {id(parameter) for parameter in done.fitted.parameters}
    changed = {name for name, value in after.items() if not value.equal(before[name])}
    trained = {name for name, value in after.items() if id(value) in own}
    assert changed <= trained
    assert all(".lora_E." in name for name in trained - changed)  # a layer may lose its last rank to AdaLoRA

    batch = batches(config, base).draw(0, 2)
    done.fitted.route(batch.captions)
    expected = predicted(base, batch)
    assert not predicted(done.family, batch).equal(expected)
    with done.fitted.base():
        assert predicted(done.family, batch).equal(expected)
    done.fitted.save(tmp_path / "saved.safetensors")
    kept = sum(value.numel() for value in load_file(tmp_path / "saved.safetensors").values())
    assert 0 < kept <= sum(parameter.numel() for parameter in done.fitted.parameters) + 56 * 256


def test_methods_are_of_about_the_same_size(bench):
    sizes = {}
    for method in set(METHODS) - {"full attention", "full UNet", "VeRA"}:
        fitted = METHODS[method].fit(
            make_family(load_pipeline(None), torch.device("cpu")), settings(bench, method, 10)
        )
        sizes[method] = sum(parameter.numel() for parameter in fitted.parameters)
    assert sizes["LoRA"] == 73_472
    assert all(0.9 < size / sizes["LoRA"] < 1.6 for size in sizes.values()), sizes


@pytest.mark.parametrize("method", ["EffiLoRA, token", "EffiLoRA, one head"])
def test_the_loop_of_the_board_is_the_trainer_s(bench, method):
    config = settings(bench, method)
    config.num_validation_images = 0
    done = train(config, METHODS[method].fit)
    trainer = Trainer(config)
    trainer.adapter.train()
    trainer.loop.run(0, SHORT)
    trainer.folder.release()
    theirs = list(trainer.adapter.parameters())
    assert all(mine.equal(other) for mine, other in zip(done.fitted.parameters, theirs, strict=True))


def test_adalora_drops_ranks(bench):
    done = train(settings(bench, "AdaLoRA", 10), METHODS["AdaLoRA"].fit)
    scales = [value for name, value in done.family.model.named_parameters() if ".lora_E." in name]
    assert sum(int((scale != 0).sum()) for scale in scales) == 4 * len(scales)


def test_the_board_measures_every_row_once(bench, monkeypatch):
    plan = Plan(["EffiLoRA, concept"], ["robot"], ["robot", "flat-cat"], seeds=1)
    monkeypatch.setattr(board_table, "DRIFT_BOUND", 9.0)
    board.run(bench, plan)
    rows = bench.rows.read()
    assert [row["rate"] for row in rows[:3]] == [4e-3, 8e-3, 2e-3]
    assert [(row["subject"], row["seed"]) for row in rows if row["subject"] == "flat-cat"] == [("flat-cat", 0)]
    assert rows[-1]["rate"] in METHODS["EffiLoRA, concept"].rates
    assert {row["untriggered"] for row in rows} == {0.0}
    assert all(row["drift"] > 0 and row["loss"] < row["base_loss"] for row in rows)
    assert rows[0]["loss"] > rows[1]["loss"]

    lines = bench.rows.path.read_text().splitlines()
    bench.rows.path.write_text("\n".join(lines[1:]) + "\n")
    board.run(bench, plan)
    again = bench.rows.read()
    timing = ("cpu_seconds",)
    assert {k: v for k, v in again[-1].items() if k not in timing} == {
        k: v for k, v in rows[0].items() if k not in timing
    }
    monkeypatch.setattr(bench, "measure", lambda key: pytest.fail(f"{key} is measured twice"))
    board.run(bench, plan)


def test_a_method_that_learns_differently_is_measured_again(bench, monkeypatch):
    plan = Plan(["LoRA"], ["robot"], [], all_rates=True)
    key = bench.key("LoRA", "robot", METHODS["LoRA"].rates[0], 0)
    bench.rows.append({**key, "trace": key["trace"] * 1.01, "drift": 0.0, "rise_of_gap": 0.0})
    measured = []
    monkeypatch.setattr(
        bench, "measure", lambda key: measured.append(key) or {**key, "drift": 0.0, "rise_of_gap": 0.0}
    )
    board.run(bench, plan)
    assert [key["rate"] for key in measured] == list(METHODS["LoRA"].rates)


def test_a_claim_is_exclusive_and_a_torn_line_costs_one_row(tmp_path):
    one, other = Rows(tmp_path / "rows.jsonl"), Rows(tmp_path / "rows.jsonl")
    key = {"method": "LoRA", "trace": 0.5}
    with one.claimed(key) as mine:
        assert mine
        with other.claimed(key) as theirs:
            assert not theirs
        with other.claimed({**key, "seed": 1}) as theirs:
            assert theirs
        one.append({**key, "loss": 1.0})
    with other.claimed({**key, "trace": 0.5000001}) as theirs:
        assert not theirs
    with one.path.open("a") as file:
        file.write('{"method": "Lo')
    other.append({**key, "seed": 1})
    assert one.read() == [{**key, "loss": 1.0}, {**key, "seed": 1}]


MEASURE_ALL = """
import sys
from pathlib import Path
from benchmarks.board_rows import Rows
rows = Rows(Path(sys.argv[1]))
for number in range(60):
    with rows.claimed({"number": number}) as mine:
        if mine:
            rows.append({"number": number, "text": "x" * 5000})
"""


def test_processes_share_the_rows_out(tmp_path):
    path = tmp_path / "rows.jsonl"
    root = Path(board.__file__).parents[1]
    workers = [subprocess.Popen([sys.executable, "-c", MEASURE_ALL, str(path)], cwd=root) for _ in range(3)]
    assert [worker.wait() for worker in workers] == [0, 0, 0]
    assert sorted(row["number"] for row in Rows(path).read()) == list(range(60))
    assert len(path.read_text().splitlines()) == 60


def row(method, rate, likeness, drift, subject="flat-cat", seed=0, **more):
    own = {"method": method, "rate": rate, "subject": subject, "seed": seed, "trace": 0.5, "steps": 200, "images": 8}
    figures = {"rise_of_gap": likeness, "drift": drift, "loss": 0.4, "base_loss": 0.6, "change": 0.01}
    return {**own, **figures, "cpu_seconds": 30.0, "parameters": 73472, "bytes": 300_000, **more}


FIGURES = (0.3, 0.004), (0.6, 0.008), (0.7, 0.012), (0.9, 0.04)
CURVE = [row("LoRA", rate, *figures) for rate, figures in zip(METHODS["LoRA"].rates, FIGURES, strict=True)]


def test_the_rate_of_the_highest_likeness_within_the_bound_is_chosen():
    rates = board_table.curve(CURVE, "LoRA", ["flat-cat"])
    assert board_table.chosen_rate(rates) == 8e-3
    assert board_table.at_drift(rates, 0.01) == pytest.approx(0.65)
    assert board_table.at_drift(rates, 0.05) is None
    all_beyond = {rate: [{**one, "drift": one["drift"] + 1} for one in found] for rate, found in rates.items()}
    assert board_table.chosen_rate(all_beyond) == 2e-3
    failed = {1.6e-2: [{"failed": "the loss became nan"}]}
    assert board_table.chosen_rate(failed) is None


def test_rates_are_tried_until_the_best_lies_between_two():
    tried = lambda rows, **more: board_table.rates_to_try(rows, "LoRA", ["flat-cat"], **more)
    assert tried([]) == (4e-3,)
    assert tried(CURVE[1:2]) == (4e-3, 8e-3, 2e-3)
    assert tried(CURVE[:3]) == tried(CURVE) == (4e-3, 8e-3, 2e-3, 1.6e-2)
    falling = [CURVE[0], CURVE[1], {**CURVE[2], "rise_of_gap": 0.5}]
    assert tried(falling) == (4e-3, 8e-3, 2e-3)
    beyond = [{**row, "drift": row["drift"] + 0.009} for row in CURVE]
    assert tried(beyond[1:2]) == (4e-3, 2e-3)
    assert tried(beyond[:2]) == (4e-3, 2e-3)
    assert tried([{**row, "drift": 1.0} for row in CURVE]) == (4e-3, 2e-3)
    assert tried([], everything=True) == METHODS["LoRA"].rates
    diverged = {name: value for name, value in CURVE[1].items() if name != "drift"}
    assert tried([diverged]) == (4e-3, 2e-3)
    best = lambda rows, subjects, **more: board_table.best_rate(rows, "LoRA", subjects, **more)
    assert best(falling, ["flat-cat"]) == 4e-3
    assert best(falling, ["flat-cat"], everything=True) is None
    assert best(falling[1:], ["flat-cat"]) is None
    assert best(CURVE, ["flat-cat", "robot"]) is None


def test_intervals_are_of_paired_differences_by_subject():
    assert board_table.interval([1.0, 2.0, 3.0]) == pytest.approx(4.303 / 3**0.5)
    assert board_table.interval([1.0, 2.0]) is None
    standard = [
        row(STANDARD, 1e-3, 0.5, 0.02),
        row(STANDARD, 1e-3, 0.7, 0.01, "robot"),
        row(STANDARD, 1e-3, 0, 0, "bird"),
    ]
    mine = [row("LoRA", 1e-3, 0.6, 0.01), row("LoRA", 1e-3, 0.9, 0.01, seed=1), row("LoRA", 1e-3, 0.75, 0.01, "robot")]
    assert board_table.paired(mine, standard, "rise_of_gap") == pytest.approx([0.1, 0.05])


def test_the_tables_and_the_plot_come_from_the_rows(tmp_path, monkeypatch, capsys):
    path = tmp_path / "board.jsonl"
    rates = METHODS[STANDARD].rates
    other = [row(STANDARD, rate, one, 2 * drift) for rate, (one, drift) in zip(rates, FIGURES, strict=True)]
    path.write_text("".join(json.dumps(one) + "\n" for one in (*CURVE, *other)))
    picture = tmp_path / "board.png"
    words = ["board", "--work", str(tmp_path), "--table", "--rate_subjects", "flat-cat", "--plot", str(picture)]
    monkeypatch.setattr(sys, "argv", words)
    board.main()
    said = capsys.readouterr().out
    assert "| LoRA | 73,472 | 300 | 30 | 0.002: 0.30 / 0.0040; 0.004: 0.60 / 0.0080" in said
    assert "| LoRA | 0.008 | 1 x 1 | 0.700 | 0.0120 | as drift | 0.667 | 0.0100 | +0.400 | +0.0040 |" in said
    with Image.open(picture) as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(10**6)}
    assert image.size == (760, 380)
    assert len(colours) > 10


def test_the_standard_is_compared_at_equal_drift_and_at_equal_likeness():
    standard = [
        {"subject": subject, "seed": seed, "rate": rate, "drift": drift, "rise_of_gap": likeness + seed / 10}
        for subject in ("a", "b")
        for seed in (0, 1)
        for rate, drift, likeness in ((1e-3, 0.01, 0.3), (2e-3, 0.02, 0.5))
    ]
    mine = [
        {"subject": "a", "seed": 0, "drift": 0.015, "rise_of_gap": 0.6},
        {"subject": "b", "seed": 1, "drift": 0.005, "rise_of_gap": 0.2},
        {"subject": "c", "seed": 0, "drift": 0.01, "rise_of_gap": 0.5},
    ]
    assert board_table.at_equal(mine, standard, "rise_of_gap", "drift") == [
        (0.6, pytest.approx(0.4)),
        (0.2, pytest.approx(0.2)),
    ]
    # b: 0.2 of 0.4 at drift 0.01; a: beyond the last rate the curve goes on
    assert board_table.at_equal(mine, standard, "drift", "rise_of_gap") == [
        (0.015, pytest.approx(0.025)),
        (0.005, pytest.approx(0.005)),
    ]

"""Plans: the figures of the dry run without weights, budgets that are kept to or refused, and settings that train."""

import re
import shlex
import shutil

import pytest
import torch
import yaml
from accelerate import Accelerator
from helpers import make_subject, settings, trainer
from tiny_families import FAMILIES, build

from effilora_diffusion import EffiLoRAError, cli
from effilora_diffusion.cli.plan import command, lines
from effilora_diffusion.cli.train import parse_arguments
from effilora_diffusion.diffusion.config import TrainingConfig
from effilora_diffusion.diffusion.models import make_family
from effilora_diffusion.diffusion.models.hollow import hollow_pipeline
from effilora_diffusion.diffusion.models.pipelines import load_pipeline
from effilora_diffusion.diffusion.training.build import build as build_run
from effilora_diffusion.diffusion.training.dry_run import dry_run_report
from effilora_diffusion.diffusion.training.plan import Budget, Planner, peak


def no_words(text):
    pass


def planner(named=(), **budget):
    return Planner(Accelerator(cpu=True), named, Budget(**budget), no_words)


@pytest.fixture(scope="module")
def without_weights(tiny_pipeline, tmp_path_factory):
    """The tiny pipeline's folder without a single weight."""
    folder = tmp_path_factory.mktemp("configs") / "model"
    shutil.copytree(tiny_pipeline, folder)
    files = [*folder.rglob("*.safetensors"), *folder.rglob("*.bin")]
    assert files
    for file in files:
        file.unlink()
    return folder


@pytest.fixture
def subject(tmp_path):
    return make_subject(tmp_path / "s", 3)


@pytest.fixture
def plan(tiny_pipeline, without_weights, subject, tmp_path):
    """Plan for the tiny pipeline: settings over those of a quick run, and a budget."""

    def make(named=(), budget=None, **options):
        config = settings(without_weights, subject, tmp_path / "out", **{"train_batch_size": 4, **options})
        return planner({"resolution", *named}, **(budget or {})).plan(config)

    return make


@pytest.mark.parametrize("name", FAMILIES)
def test_a_pipeline_without_weights_has_the_dry_run_s_figures(name, tmp_path):
    build(name).save_pretrained(tmp_path / "model")
    subject = make_subject(tmp_path / "s", 2, size=(64, 64))
    config = settings(tmp_path / "model", subject, tmp_path / "out", resolution=64, train_batch_size=2,
                      with_prior_preservation=True)  # fmt: skip
    accelerator = Accelerator(cpu=True)
    expected = dry_run_report(build_run(config, accelerator, no_words), 1)
    found = planner().predict(config)
    assert found.lines() == expected.lines()
    assert vars(found) == vars(expected)


def test_a_plan_holds_no_weights(tiny_pipeline):
    pipe, full = hollow_pipeline(str(tiny_pipeline)), load_pipeline(str(tiny_pipeline))
    assert pipe.unet.state_dict().keys() == full.unet.state_dict().keys()
    for name, value in full.unet.state_dict().items():
        mine = pipe.unet.state_dict()[name]
        assert (mine.shape, mine.dtype) == (value.shape, value.dtype)
        assert mine.ndim < 2 or mine.untyped_storage().nbytes() == mine.element_size()
    half = hollow_pipeline(str(tiny_pipeline), torch.bfloat16)
    assert make_family(half, torch.device("cpu")).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"heads": 1, "routing": "static"},
        {"save_precision": "fp16"},
        {"rank": 16, "export_distillation_steps": 0},
        {"routing": "timestep", "export_distillation_steps": 0},
    ],
)
def test_predicted_files_are_within_five_percent_of_the_written_ones(tiny_pipeline, subject, tmp_path, options):
    run = trainer(tiny_pipeline, subject, tmp_path / "out", learning_rate=0.1, num_validation_images=0, **options)
    report = dry_run_report(run.parts, 1)
    run.run()
    for name, predicted in (("effilora", report.file), ("pytorch_lora_weights", report.plain)):
        written = (tmp_path / "out" / f"{name}.safetensors").stat().st_size
        assert predicted == pytest.approx(written, rel=0.05), name


def test_images_have_the_size_of_the_model_unless_somebody_names_one(subject):
    for named, expected in (((), 64), (("resolution",), 512)):
        found = planner(named).plan(
            TrainingConfig(instance_data_dir=str(subject), instance_prompt="an emoji of sks cat")
        )
        assert found.config.resolution == expected


def test_without_a_budget_nothing_is_changed(plan):
    found = plan(heads=3)
    assert (found.config.rank, found.config.heads, found.reduced, found.time) == (4, 3, [], 1.0)
    assert found.report.counts["stored"] > 0


def test_the_largest_adapter_within_a_budget_of_parameters_is_taken(plan):
    whole = plan().report.counts["stored"]
    for share in (0.9, 0.5, 0.2):
        found = plan(budget={"parameters": int(whole * share)})
        assert found.report.counts["stored"] <= whole * share
        assert (found.config.heads, found.config.routing) == (1, "static")
        larger = plan(rank=found.config.rank + 1, heads=1, routing="static").report.counts["stored"]
        assert larger > whole * share or found.config.rank == 8  # twice the rank is enough
        assert f"rank {found.config.rank} with 1 head instead of rank 4 with 3 heads" in found.reduced[0]
    kept = plan(named=["heads"], budget={"parameters": int(whole * 0.6)})
    assert (kept.config.heads, kept.config.rank) == (3, 2)
    assert kept.report.counts["stored"] <= whole * 0.6
    assert plan(rank=3).report.counts["stored"] > whole * 0.6


def test_a_budget_of_the_file_takes_16_bits_first_and_counts_both_files(plan):
    whole = plan().report
    found = plan(budget={"file": 0.8 * max(whole.file, whole.plain)})
    assert (found.config.save_precision, found.config.rank, found.config.heads) == ("fp16", 4, 3)
    named = plan(named=["save_precision"], budget={"file": 0.8 * max(whole.file, whole.plain)})
    assert named.config.save_precision == "float"
    for each in (found, named):
        assert max(each.report.file, each.report.plain) <= 0.8 * max(whole.file, whole.plain)


def test_a_budget_of_memory_costs_time_before_it_costs_the_adapter(plan):
    whole = plan().report
    rows = plan(train_batch_size=1, gradient_accumulation_steps=4).report
    assert rows.known < whole.known
    found = plan(budget={"memory": rows.known})
    assert (found.config.train_batch_size, found.config.gradient_accumulation_steps) == (1, 4)
    assert (found.config.gradient_checkpointing, found.config.rank) == (False, 4)
    found = plan(budget={"memory": rows.known - 1})
    assert found.config.gradient_checkpointing
    assert peak(found.report) < rows.known
    assert "micro-batches of 1, gradient checkpointing for --max_memory_gb" in found.reduced[0]
    assert found.time == pytest.approx(1.33)
    kept = plan(named=["train_batch_size", "gradient_checkpointing"], budget={"memory": whole.known - 1})
    assert (kept.config.train_batch_size, kept.config.gradient_checkpointing, kept.config.heads) == (4, False, 1)


def test_a_budget_of_time_takes_fewer_full_steps(plan):
    found = plan(budget={"time": 0.7}, max_train_steps=100)
    assert (found.config.max_train_steps, found.config.reducer, found.usual) == (70, "off", 100)
    found = plan(budget={"time": 0.7}, max_train_steps=100, gradient_checkpointing=True)
    assert found.time <= 0.7 < found.time * 54 / 52


@pytest.mark.parametrize(
    ("budget", "named", "words"),
    [
        ({"parameters": 100}, (), r"--max_parameters 100 can't be met: the smallest adapter here \(rank 1 with 1 head\) has "),
        ({"parameters": 100}, ("rank",), r"rank 4 with 1 head; with --rank 4\) has .* name less of it"),
        ({"file": 1000}, (), r"--max_file_mb 0.001 can't be met: .* files of 0.0\d MB"),
        ({"memory": 1e5}, (), r"--max_memory_gb 0.0001 can't be met: with micro-batches of 1, activations recomputed and rank 1"),
    ],
)  # fmt: skip
def test_an_impossible_budget_names_the_least_that_is_possible(plan, budget, named, words):
    with pytest.raises(EffiLoRAError, match=words):
        plan(named=named, budget=budget)


def run(words):
    return cli.main(["plan", *map(str, words)])


@pytest.fixture
def words(without_weights, subject, tmp_path):
    paths = ["--pretrained_model_name_or_path", without_weights, "--instance_data_dir", subject]
    return [*paths, "--instance_prompt", "a sks cat", "--output_dir", tmp_path / "my run"]


def test_a_plan_is_five_lines_and_a_command_that_gives_its_settings(words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run([*words, "--time", "0.7", "--max_memory_gb", "1", "--output", "c.yaml"]) == 0
    said = capsys.readouterr().out
    told = [line.split()[0] for line in said.splitlines()[:5]]
    assert told == ["base", "adapter", "class", "steps", "memory"]
    assert re.search(r"adapter .*: [\d,]+ parameters, file [\d.]+ MB, plain LoRA [\d.]+ MB, exact", said)
    assert "560 of 4 images" in said
    assert "0.70 of the time of 800 full steps" in said
    assert "held to the base's own prediction" in said
    pasted = said[said.index("accelerate launch") : said.index("\n\nwritten")].replace("\\\n", " ")
    (class_prompt,) = from_prompt = set(re.findall(r"--class_prompt '(.*?)'", said))
    assert from_prompt < {"a sks", "sks cat", "a cat"}  # by what the tiny tokenizer knows least
    from_words = parse_arguments(shlex.split(pasted)[3:], None)
    assert from_words.resolution == 32  # the model's own
    assert (from_words.max_train_steps, from_words.class_prompt, from_words.heads) == (560, [class_prompt], 1)
    assert f"class       {class_prompt!r} held to" in said
    assert parse_arguments(["--config", "c.yaml"], None) == from_words
    assert yaml.safe_load((tmp_path / "c.yaml").read_text())["output_dir"] == str(tmp_path / "my run")
    assert run([*words, "--output", "c.yaml"]) == 2
    assert "is there already" in capsys.readouterr().err


def test_the_written_file_starts_the_trainer_with_the_planned_figures(tiny_pipeline, subject, tmp_path, capsys):
    paths = [
        "--pretrained_model_name_or_path",
        tiny_pipeline,
        "--instance_data_dir",
        subject,
        "--output_dir",
        tmp_path / "o",
    ]
    named = [
        "--instance_prompt",
        "a sks cat",
        "--max_train_steps",
        2,
        "--num_validation_images",
        0,
        "--preset",
        "small",
    ]
    assert run([*paths, *named, "--max_parameters", 5000, "--output", tmp_path / "c.yaml"]) == 0
    planned = capsys.readouterr().out
    assert cli.main(["train", "--config", str(tmp_path / "c.yaml")]) == 0
    said = capsys.readouterr().out
    parameters = re.search(r"([\d,]+) parameters", planned)[1]
    assert int(parameters.replace(",", "")) <= 5000
    assert f"{parameters} parameters" in said
    memory = re.search(r"memory +(about [\d.]+ MB while training: .*?);", planned)[1]
    assert memory in said


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (["--time", "1.5"], "--time must be above 0 and at most 1"),
        (["--max_parameters", "0"], "--max_parameters must be at least 1"),
        (["--time", "0.5", "--max_train_steps", "10"], "both say how long"),
        (["--quantization", "torchao-int8"], "quantised base is not predicted"),
        (["--max_parameters", "10"], "the smallest adapter here"),
        (["--pretrained_model_name_or_path", __file__], "give --single_file_config"),
        (["--preset", "quick"], "--preset"),
    ],
)
def test_mistakes_are_one_sentence(words, capsys, extra, says):
    try:
        code = run([*words, *extra])
    except SystemExit as stop:  # argparse's own
        code = stop.code
    assert code == 2
    assert says in capsys.readouterr().err


def test_a_plan_of_the_example_needs_no_arguments(capsys):
    assert run([]) == 0
    said = capsys.readouterr().out
    assert "77,568 parameters" in said
    assert "250 of 5 images" in said


def test_lines_and_command_of_several_presets(plan):
    found = plan(heads=1, routing="static", preset="plain")
    assert "exact" in lines(found)[1]
    assert "--heads 1" in command(found)

"""The plain LoRA of a routed adapter: fitted, distilled, stored in the native file, and no burden to the run."""

import pytest
import torch
from helpers import make_subject, metrics, same_content, trainer
from PIL import Image

from effilora_diffusion import export_lora
from effilora_diffusion.core import AdapterFile, adapters_of, load_adapter_file, save_adapter_file
from effilora_diffusion.diffusion.training.plain import STEP_ROWS, Gauge, PlainMaker

LEARNED = {"learning_rate": 3e-2, "max_train_steps": 12, "train_batch_size": 2, "num_validation_images": 0}
CLASS = {"with_prior_preservation": True, "class_prompt": ["a dog", "a table"]}


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    return make_subject(tmp_path_factory.mktemp("data") / "subject", 3)


@pytest.fixture(scope="module")
def runs(tiny_pipeline, subject, tmp_path_factory):
    """The same run with and without distillation, and their summaries."""
    found = {}
    for steps in (0, 12):
        output = tmp_path_factory.mktemp("runs") / str(steps)
        run = trainer(tiny_pipeline, subject, output, **LEARNED, **CLASS, export_distillation_steps=steps)
        found[steps] = run, run.run()
    return found


def maker(run, rows=STEP_ROWS, **options):
    return PlainMaker(run.family, run.objective, run.adapter, run.batches, torch.device("cpu"), rows, **options)


def test_distillation_brings_the_plain_lora_nearer_on_both_kinds_of_rows(runs):
    fit, distilled = (summary.plain for _, summary in runs.values())
    assert (fit.distilled, distilled.distilled) == (False, True)
    assert fit.gap == fit.fit == distilled.fit
    assert distilled.gap.subject < 0.9 * fit.gap.subject
    assert distilled.gap.others < fit.gap.others


def test_rows_of_the_class_count_in_the_fit(runs):
    run, summary = runs[0]
    alone = maker(run)
    alone.batches = type(run.batches)(run.family, run.objective, run.batches.instance)
    narrow = alone.make(0, print)
    with maker(run).beside(narrow.adapter):
        gap, _ = Gauge(maker(run), narrow.adapter).gap()
    assert gap.others > summary.plain.fit.others


def test_the_run_itself_is_not_changed(runs):
    (one, _), (other, _) = runs.values()
    assert metrics(one.output) == metrics(other.output)
    for found, expected in zip(one.adapter.parameters(), other.adapter.parameters(), strict=True):
        assert torch.equal(found, expected)
    assert list(adapters_of(other.family.model)) == ["default"]
    assert other.adapter.enabled


def test_the_native_file_alone_gives_the_same_plain_lora_later_and_is_little_larger(runs, tmp_path):
    sizes = []
    for run, _ in runs.values():
        file = run.output / "effilora.safetensors"
        export_lora(file, tmp_path / "later.safetensors")
        assert same_content(tmp_path / "later.safetensors", run.output / "pytorch_lora_weights.safetensors")
        sizes.append(sum(value.numel() for value in _parameters(load_adapter_file(file))))
    assert sizes[0] < sizes[1] < 1.5 * sizes[0]


def _parameters(content):
    return [*content.adapter.parameters(), *(content.plain.parameters() if content.plain else ())]


def test_micro_batches_of_any_size_give_the_same_plain_lora(runs):
    run, _ = runs[0]
    ups = [torch.cat([*maker(run, rows).make(3, print).adapter.B]) for rows in (1, 4, STEP_ROWS)]
    start = torch.cat([*maker(run).make(0, print).adapter.B])
    moved = float((ups[2] - start).detach().norm())
    assert moved > 0
    for up in ups[:2]:
        assert float((up - ups[2]).detach().norm()) < 0.01 * moved


@pytest.mark.parametrize("rate", [1e30, 1e3], ids=["not finite", "worse"])
def test_a_distillation_that_comes_to_nothing_leaves_the_fit(runs, rate):
    run, summary = runs[0]
    told = []
    form = maker(run, rate=rate).make(4, told.append)
    assert not form.distilled
    assert form.gap == summary.plain.gap
    for found, expected in zip(form.adapter.parameters(), summary.plain.adapter.parameters(), strict=True):
        assert torch.equal(found, expected)
    assert list(adapters_of(run.family.model)) == ["default"]
    assert any("it could not be distilled" in line or "distilled in 4 steps" in line for line in told)


def test_a_run_without_class_rows_minds_the_empty_prompt(tiny_pipeline, subject, tmp_path, runs):
    run = trainer(tiny_pipeline, subject, tmp_path / "out", **LEARNED)
    assert {example.caption for example in run.batches.others.examples} == {""}
    run.folder.release()
    with_class = runs[0][0].batches
    assert with_class.others is with_class.classes
    batch = with_class.mixed("any", 0, range(4), 4)
    subject_rows, others = batch.timesteps[::2], batch.timesteps[1::2]
    assert (subject_rows[1] - subject_rows[0]) == (others[1] - others[0]) == 500  # levels are spread over each kind


def test_pictures_show_the_adapter_beside_its_plain_lora_only_where_they_differ(tiny_pipeline, subject, tmp_path):
    for routing in ("timestep", "static"):
        options = {
            **LEARNED,
            "num_validation_images": 2,
            "routing": routing,
            "validation_prompt": ["a sks cat", "a dog"],
        }
        run = trainer(tiny_pipeline, subject, tmp_path / routing, **options)
        summary = run.run()
        card = (run.output / "README.md").read_text(encoding="utf-8")
        if routing == "static":
            assert not (run.output / "plain_lora.png").exists()
            assert "its plain LoRA, exact." in card
            continue
        with Image.open(run.output / "plain_lora.png") as image:
            assert image.height > 4 * 32
        assert "](plain_lora.png)" in card
        assert str(summary.plain.gap) in card
        assert adapters_of(run.family.model).keys() == {"default"}


def test_a_plain_lora_of_several_heads_is_no_plain_lora(runs, tmp_path):
    content = load_adapter_file(runs[12][0].output / "effilora.safetensors")
    save_adapter_file(tmp_path / "a.safetensors", AdapterFile(content.adapter, plain=content.adapter))
    with pytest.raises(Exception, match="claims a plain LoRA with several heads"):
        load_adapter_file(tmp_path / "a.safetensors")

"""Judging a run: likeness, drift and losses on fixed noise per checkpoint, and the best of them by name."""

import json
import math

import pytest
from helpers import files_in, make_subject, metrics, same_content, settings, trainer
from tiny_judges import clip, dino

from effilora_diffusion import EffiLoRAError
from effilora_diffusion.cli import main
from effilora_diffusion.core.reference import adapter_file
from effilora_diffusion.core.scores import BY_LIKENESS, BY_LOSS, best_of, choose_best, read_scores, write_score
from effilora_diffusion.diffusion.training.examiner import other_prompts

TIMES = ("seconds", "memory")
RUN = {"max_train_steps": 4, "num_validation_images": 2, "checkpointing_steps": 1, "learning_rate": 5e-2, "heads": 1}


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    return str(dino(tmp_path_factory.mktemp("judge") / "dino"))


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    return make_subject(tmp_path_factory.mktemp("subject"))


@pytest.fixture(scope="module")
def judged(tiny_pipeline, subject, judge, tmp_path_factory):
    output = tmp_path_factory.mktemp("judged") / "run"
    summary = trainer(tiny_pipeline, subject, output, judge=judge, checkpoints_total_limit=1, **RUN).run()
    return output, summary


def scores(output):
    return [{name: value for name, value in line.items() if name not in TIMES} for line in read_scores(output)]


def test_every_checkpoint_has_its_scores(judged):
    lines = scores(judged[0])
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert (lines[0]["drift"], lines[0]["change"]) == (0.0, 0.0)
    assert all(line["drift"] > 0 and line["change"] > 0 for line in lines[1:])
    assert lines[4]["drift"] > lines[1]["drift"]
    assert all(-1 <= line["likeness"] <= 1 and math.isfinite(line["loss"]) for line in lines)
    assert len({line["likeness"] for line in lines}) == 5
    assert all(line["likeness_error"] > 0 for line in lines)


def test_the_best_checkpoint_is_named_kept_and_loaded_by_name(judged):
    output, summary = judged
    best = json.loads((output / "best.json").read_text())
    lines = scores(output)[1:]
    assert best["step"] == best_of(lines, {1, 2, 3, 4})["step"] < 4, "the run must not end with its best"
    assert adapter_file(f"{output}@best") == output / f"checkpoint-{best['step']}" / "adapter.safetensors"
    kept = sorted(path.name for path in output.glob("checkpoint-*"))
    assert kept == sorted({best["checkpoint"], "checkpoint-4"}), "one of the newest, and the best"
    (line,) = (line for line in summary.lines(output) if line.startswith("best"))
    assert line.endswith(f"as {output}@best")
    assert f"best        {best['checkpoint']}, by likeness and drift" in line
    assert f"| best | {best['checkpoint']}, by likeness" in (output / "README.md").read_text()
    assert main(["inspect", f"{output}@best"]) == 0


def test_judging_changes_nothing_of_the_run(judged, tiny_pipeline, subject, tmp_path):
    trainer(tiny_pipeline, subject, tmp_path / "plain", **RUN).run()
    assert same_content(judged[0] / "effilora.safetensors", tmp_path / "plain" / "effilora.safetensors")
    assert metrics(judged[0]) == metrics(tmp_path / "plain")
    found = scores(tmp_path / "plain")
    assert [line["drift"] for line in found] == [line["drift"] for line in scores(judged[0])]
    assert all("likeness" not in line for line in found)
    assert not (tmp_path / "plain" / "best.json").exists()
    with pytest.raises(EffiLoRAError, match="has named no best checkpoint"):
        adapter_file(f"{tmp_path / 'plain'}@best")


@pytest.mark.parametrize("missing", [False, True], ids=["", "killed before it was judged"])
def test_a_resumed_run_has_the_scores_of_an_unbroken_one(judged, missing, tiny_pipeline, subject, judge, tmp_path):
    output = tmp_path / "run"
    options = {**RUN, "judge": judge, "checkpoints_total_limit": 1}
    run = trainer(tiny_pipeline, subject, output, **options)
    validate = run._validate

    def killed(step=2):
        if run.step == step and missing:
            raise KeyboardInterrupt
        validate()
        if run.step == step:
            raise KeyboardInterrupt

    run._validate = killed
    with pytest.raises(KeyboardInterrupt):
        run.run()
    assert [line["step"] for line in scores(output)] == [0, 1] + [2] * (not missing)
    trainer(tiny_pipeline, subject, output, **options, resume_from_checkpoint="latest").run()
    assert scores(output) == scores(judged[0])
    expected, found = (json.loads((folder / "best.json").read_text()) for folder in (judged[0], output))
    assert {**expected, **dict.fromkeys(TIMES)} == {**found, **dict.fromkeys(TIMES)}
    assert same_content(judged[0] / "effilora.safetensors", output / "effilora.safetensors")


def test_a_clip_judges_too_and_a_judge_that_is_none_is_told_at_once(tiny_pipeline, subject, tmp_path):
    trainer(tiny_pipeline, subject, tmp_path / "out", judge=str(clip(tmp_path / "clip")), max_train_steps=1).run()
    assert "likeness" in scores(tmp_path / "out")[1]
    for name in (str(tmp_path), "efficientnett"):
        with pytest.raises(EffiLoRAError, match="can't be loaded"):
            trainer(tiny_pipeline, subject, tmp_path / "other", judge=name)
        assert not (tmp_path / "other").exists()


def test_what_is_not_learned_is_drawn_from_the_class_or_the_prompt_without_its_subject(
    tiny_pipeline, subject, tmp_path
):
    def prompts(**options):
        run = trainer(tiny_pipeline, subject, tmp_path / "out", **options)
        run.folder.release()
        return other_prompts(run.parts)

    assert prompts(instance_prompt="a cat zqxkwv") == ["a cat"]
    assert prompts(instance_prompt="zqx") == [""]
    assert prompts(class_prompt=["a dog", "a tree"]) == ["a dog", "a tree"]


def test_the_best_is_by_likeness_and_drift_else_by_held_out_loss():
    lines = [
        {"step": 0, "validation_loss": 0.1},
        {"step": 1, "validation_loss": 0.3},
        {"step": 2, "validation_loss": 0.2},
    ]
    assert best_of(lines, {0, 1, 2}) == {"step": 2, "validation_loss": 0.2, "by": BY_LOSS}
    assert best_of(lines, {1})["step"] == 1
    alike = [
        {**line, "likeness": 0.5 + line["step"] / 100, "likeness_error": 0.0, "drift": line["step"]} for line in lines
    ]
    assert best_of(alike, {1, 2}) == {**alike[2], "by": BY_LIKENESS}
    unsure = [{**line, "likeness_error": 0.02} for line in alike]
    assert best_of(unsure, {1, 2})["step"] == 1, "no drift is paid for what may be chance"
    assert best_of([{"step": 1, "loss": 0.1}], {1}) is None
    assert best_of([{"step": 1, "likeness": math.nan, "drift": 1.0}], {1}) is None


def test_without_a_judge_the_held_out_loss_of_the_checkpoints_decides(tmp_path):
    for step, loss in ((0, 0.1), (2, 0.5), (4, 0.3), (5, 0.2)):
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "loss": 1 / (step + 1), "validation_loss": loss}) + "\n")
        write_score(tmp_path, {"step": step, "drift": step / 10, "loss": 1.0})
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert choose_best(tmp_path)["adapter"] == "checkpoint-4/adapter.safetensors"
    assert choose_best(tmp_path, last=5) == {
        "step": 5, "validation_loss": 0.2, "drift": 0.5, "loss": 1.0, "by": BY_LOSS,
        "checkpoint": "checkpoint-5", "adapter": "effilora.safetensors",
    }  # fmt: skip
    write_score(tmp_path, {"step": 4, "drift": 9.0})
    assert [line["step"] for line in read_scores(tmp_path)] == [0, 2, 4, 5], "in the place of what stood there"


def test_the_settings_of_quick_runs_have_no_judge(tiny_pipeline, subject, tmp_path):
    assert settings(tiny_pipeline, subject, tmp_path).judge == "none"
    assert files_in(tmp_path) == {}

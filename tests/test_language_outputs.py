"""The output folder of language runs: checkpoints, going on, and what is kept of earlier runs."""

import json

import pytest
import torch
from language_runs import logs, make_place, same, weights, words
from PIL import Image
from tiny_language import build, tokenizer
from tiny_vision import build_vision

from effilora_diffusion.cli.train_llm import main
from effilora_diffusion.language.generate import generate_answers
from effilora_diffusion.language.images import ImageEncoder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("language"))


@pytest.mark.parametrize("reducer", ["off", "importance"])
def test_a_resumed_run_ends_where_an_unbroken_one_does(place, tmp_path, reducer):
    options = {"max_steps": 8, "reducer": reducer, "reducer_warmup": 1, "reducer_interval": 2}
    assert main(words(place, tmp_path / "whole", save_steps=4, **options)) == 0
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    assert not list(checkpoint.glob("*model*"))  # the adapter, not the base
    assert main(words(place, tmp_path / "again", save_steps=4, resume_from_checkpoint=checkpoint, **options)) == 0
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "again"))
    assert logs(tmp_path / "whole")[4:] == logs(tmp_path / "again")[4:]
    states = [(tmp_path / name / "checkpoint-8" / "reducer.json").read_text() for name in ("whole", "again")]
    assert states[0] == states[1]


def test_an_earlier_run_is_continued_or_replaced_only_when_told_to(place, tmp_path, capsys):
    output = tmp_path / "out"
    options = {"reducer": "random", "reducer_warmup": 1, "lr_scheduler_type": "constant"}
    assert main(words(place, output, max_steps=3, **options)) == 0
    first = weights(output)
    (output / "notes.txt").write_text("mine")
    assert main(words(place, output, max_steps=6, **options)) == 2
    assert "holds an earlier run" in capsys.readouterr().err
    assert same(weights(output), first)
    assert main(words(place, output, max_steps=6, resume_from_checkpoint="latest", **options)) == 0
    steps = [json.loads(line)["step"] for line in (output / "reducer.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]
    log = (output / "reducer.jsonl").read_text()
    assert max(steps) > 3
    assert main(words(place, output, max_steps=6, resume_from_checkpoint=output / "checkpoint-3", **options)) == 0
    assert (output / "reducer.jsonl").read_text() == log  # steps that are done again are told once
    capsys.readouterr()
    assert main(words(place, output, max_steps=6, resume_from_checkpoint="latest", **options)) == 2
    assert "6 steps behind it, of 6" in capsys.readouterr().err
    assert main(words(place, output, max_steps=3, overwrite_output_dir=True, report_to="nothing_known")) == 2
    assert (output / "effilora.safetensors").exists()  # refused before anything is deleted
    told = {"overwrite_output_dir": True, "save_strategy": "no", "reducer": "off", "max_steps": 3}
    assert main(words(place, output, **told)) == 0
    assert sorted(path.name for path in output.iterdir()) == [
        ".run.json", "adapter_config.json", "adapter_model.safetensors", "effilora.safetensors", "language_config.yaml",
        "notes.txt",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"learning_rate": 0}, "learned nothing"),
        ({"learning_rate": 1e30, "max_grad_norm": 0}, "no longer finite"),
        (
            {"learning_rate": 1e30, "max_grad_norm": 0, "max_steps": 9, "logging_steps": 3},
            "no longer finite by step 3",
        ),
        ({"resume_from_checkpoint": "latest"}, "no whole checkpoint"),
        ({"resume_from_checkpoint": "/nowhere"}, "no such checkpoint"),
    ],
)
def test_a_run_without_a_result_is_no_success(place, tmp_path, capsys, change, word):
    assert main(words(place, tmp_path / "out", save_strategy="no", **change)) == 2
    assert word in capsys.readouterr().err
    assert not (tmp_path / "out" / "effilora.safetensors").exists()


def test_a_folder_with_other_files_of_the_same_names_is_left_alone(place, tmp_path, capsys):
    (tmp_path / "adapter_config.json").write_text("mine")
    assert main(words(place, tmp_path)) == 2
    assert (
        "holds files that no run wrote and that this one would replace: adapter_config.json" in capsys.readouterr().err
    )
    assert main(words(place, tmp_path, overwrite_output_dir=True)) == 2
    assert (tmp_path / "adapter_config.json").read_text() == "mine"


def test_resuming_from_elsewhere_overwrites_no_other_run(place, tmp_path, capsys):
    for name, steps in (("one", 3), ("two", 6)):
        assert main(words(place, tmp_path / name, max_steps=steps, lr_scheduler_type="constant")) == 0
    kept = weights(tmp_path / "one")
    again = {
        "max_steps": 9,
        "lr_scheduler_type": "constant",
        "resume_from_checkpoint": tmp_path / "two" / "checkpoint-6",
    }
    assert main(words(place, tmp_path / "one", **again)) == 2
    assert same(weights(tmp_path / "one"), kept)
    assert main(words(place, tmp_path / "three", **again)) == 0
    (tmp_path / "two" / "checkpoint-6" / "optimizer.pt").unlink()
    assert main(words(place, tmp_path / "four", **again)) == 2
    assert "optimizer.pt" in capsys.readouterr().err


def test_latest_is_the_newest_whole_checkpoint(place, tmp_path, capsys):
    assert main(words(place, tmp_path / "whole")) == 0
    assert main(words(place, tmp_path / "out")) == 0
    again = words(place, tmp_path / "out", resume_from_checkpoint="latest")
    (tmp_path / "out" / "checkpoint-6" / "trainer_state.json").unlink()  # killed while it was written
    assert main(again) == 0
    assert same(weights(tmp_path / "out"), weights(tmp_path / "whole"))
    (tmp_path / "out" / "checkpoint-6" / "optimizer.pt").unlink()
    capsys.readouterr()
    assert main(again) == 2
    assert "checkpoint-6 has no ['optimizer.pt']" in capsys.readouterr().err


def test_a_run_goes_on_with_its_own_base_only(place, tmp_path, capsys):
    assert main(words(place, tmp_path / "out", max_steps=3, lr_scheduler_type="constant")) == 0
    build("llama", seed=5).save_pretrained(tmp_path / "other")
    tokenizer().save_pretrained(tmp_path / "other")
    more = {"max_steps": 6, "lr_scheduler_type": "constant", "resume_from_checkpoint": "latest"}
    assert main(words(place, tmp_path / "out", model_name_or_path=tmp_path / "other", **more)) == 2
    assert "the base model is a different one" in capsys.readouterr().err
    assert main(words(place, tmp_path / "out", dtype="bfloat16", **more)) == 2
    assert "dtype was 'float32' and is 'bfloat16'" in capsys.readouterr().err
    assert main(words(place, tmp_path / "out", **more)) == 0


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"optim": "lomo"}, "lomo"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "num_decay_steps"),
        ({"train_sampling_strategy": "group_by_length"}, "not grouped by length"),
        ({"push_to_hub": True}, "nothing is uploaded"),
        ({"use_liger_kernel": True}, "needs liger-kernel"),
        ({"gradient_checkpointing_kwargs": '{"reentrant":true}'}, "['reentrant']: torch knows"),
        ({"metric_for_best_model": "accuracy"}, "only eval_loss"),
        ({"report_to": "wandb"}, "wandb"),
        ({"do_eval": True, "do_train": False}, "this command trains"),
    ],
)
def test_an_earlier_run_outlives_settings_that_can_t_be(place, tmp_path, capsys, change, word):
    output = tmp_path / "out"
    output.mkdir()
    (output / "effilora.safetensors").write_text("an earlier run")
    assert main(words(place, output, overwrite_output_dir=True, **change)) == 2
    said = capsys.readouterr().err
    assert word in said
    assert "Traceback" not in said
    assert (output / "effilora.safetensors").read_text() == "an earlier run"


def test_replacing_a_run_from_elsewhere_leaves_none_of_its_checkpoints(place, tmp_path):
    constant = {"lr_scheduler_type": "constant"}
    assert main(words(place, tmp_path / "one", max_steps=3, **constant)) == 0
    assert main(words(place, tmp_path / "two", max_steps=9, **constant)) == 0
    more = {"overwrite_output_dir": True, "resume_from_checkpoint": tmp_path / "one" / "checkpoint-3", **constant}
    assert main(words(place, tmp_path / "two", **more)) == 0
    assert sorted(path.name for path in (tmp_path / "two").glob("checkpoint-*")) == ["checkpoint-6"]


def test_another_adapter_s_checkpoint_is_refused(place, tmp_path, capsys):
    assert main(words(place, tmp_path / "out")) == 0
    capsys.readouterr()
    other = words(place, tmp_path / "other", rank=2, resume_from_checkpoint=tmp_path / "out" / "checkpoint-3")
    assert main(other) == 2
    assert "rank was 8 and is 2" in capsys.readouterr().err


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_an_answer_never_contains_the_mark_of_an_image(tmp_path, sign):
    Image.new("RGB", (24, 20), "red").save(tmp_path / "red.png")
    turns = [{"from": "human", "value": "which?\n<image>"}, {"from": "gpt", "value": "r"}]
    model, reader = build_vision("llava")
    with torch.no_grad():  # with one of the two signs it is the likeliest token of all
        model.lm_head.weight.zero_()
        model.lm_head.weight[model.config.image_token_id] = sign
    encoder = ImageEncoder(reader, tmp_path)
    record = {"image": "red.png", "conversations": turns}
    assert generate_answers(model, encoder, [record], 3) == generate_answers(
        model, encoder, [record], 3, use_cache=False
    )

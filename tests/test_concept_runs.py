"""Runs with several subjects: the list that names them, whose turn a row is, what is learned, written and resumed."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline
from helpers import QUICK, make_subject, metrics, same_content

from effilora_diffusion import EffiLoRAError, export_lora, load_adapter
from effilora_diffusion.cli import main
from effilora_diffusion.core import load_adapter_file
from effilora_diffusion.core.concepts import Concept, find_concepts
from effilora_diffusion.core.inspection import single_head
from effilora_diffusion.diffusion.concepts_list import ConceptData
from effilora_diffusion.diffusion.config import TrainingConfig
from effilora_diffusion.diffusion.data.concepts import ConceptSource, name_concepts, row_shares, scan_concepts
from effilora_diffusion.diffusion.data.folder import Example
from effilora_diffusion.diffusion.dataset_config import Subset
from effilora_diffusion.diffusion.sampling.generate import draw_images
from effilora_diffusion.diffusion.sampling.leakage import leakage_prompts
from effilora_diffusion.diffusion.training.trainer import Trainer

PROMPTS = {"sks": "a photo of sks cat", "zwx": "a photo of zwx dog"}


def write_list(folder, **changes):
    """Two subjects with folders of their own, and the list that names them."""
    entries = []
    for number, (trigger, prompt) in enumerate(PROMPTS.items()):
        images = make_subject(folder / trigger, 2 + number, first=10 * number)
        entries.append(
            {
                "instance_data_dir": str(images),
                "instance_prompt": prompt,
                "trigger": trigger,
                **changes.get(trigger, {}),
            }
        )
    path = folder / "concepts.json"
    path.write_text(json.dumps(entries))
    return path


def settings(model, concepts, output, **options):
    shared = {key: value for key, value in QUICK.items() if key != "instance_prompt"}
    named = {
        "pretrained_model_name_or_path": str(model),
        "concepts_list": concepts and str(concepts),
        "output_dir": str(output),
    }
    return TrainingConfig(**{**shared, "routing": "concept", "train_batch_size": 2, **named, **options})


def trainer(*arguments, **options):
    return Trainer(settings(*arguments, **options), Accelerator(cpu=True))


def fresh(model):
    pipe = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, prompt):
    (image,) = draw_images(pipe, [prompt], [0], 3, 3.0, width=32, height=32)
    return np.asarray(image).astype(int)


@pytest.fixture(scope="module")
def run(tiny_pipeline, tmp_path_factory):
    """The output of a short run on two subjects with class images."""
    folder = tmp_path_factory.mktemp("concepts")
    changes = {
        trigger: {"class_data_dir": str(folder / f"class-{trigger}"), "class_prompt": f"a {thing}"}
        for trigger, thing in (("sks", "cat"), ("zwx", "dog"))
    }
    prior = {"with_prior_preservation": True, "num_class_images": 2}
    options = {"learning_rate": 0.1, "max_train_steps": 4, "checkpointing_steps": 2, **prior}
    trainer(tiny_pipeline, write_list(folder, **changes), folder / "out", **options).run()
    return folder / "out"


def test_a_run_writes_one_adapter_and_a_plain_lora_for_each_concept(run):
    adapter = load_adapter_file(run / "effilora.safetensors").adapter
    assert [(one.name, one.triggers, one.prompt) for one in adapter.concepts] == [
        ("sks", ("sks",), PROMPTS["sks"]),
        ("zwx", ("zwx",), PROMPTS["zwx"]),
    ]
    assert all(heads[:, number].any() for heads in adapter.B for number in range(2))
    assert {path.name for path in run.glob("pytorch*")} == {
        f"pytorch_lora_weights_{name}{end}.safetensors" for name in ("sks", "zwx") for end in ("", "_kohya")
    }
    card = (run / "README.md").read_text()
    assert "two of them loaded together add up" in card
    assert "| zwx | `zwx` | a photo of zwx dog | `pytorch_lora_weights_zwx.safetensors` |" in card
    assert len(list((run.parent / "class-zwx").glob("*.png"))) == 2


def test_each_plain_lora_draws_what_the_adapter_draws_for_its_concept(run, tiny_pipeline):
    pipe = fresh(tiny_pipeline)
    base = draw(pipe, "a photo of a dog")
    load_adapter(pipe, run)
    assert np.array_equal(draw(pipe, "a photo of a dog"), base)
    for name, prompt in PROMPTS.items():
        plain = fresh(tiny_pipeline)
        before = draw(plain, prompt)
        plain.load_lora_weights(run, weight_name=f"pytorch_lora_weights_{name}.safetensors")
        assert np.abs(draw(pipe, prompt) - draw(plain, prompt)).max() <= 2
        assert np.abs(draw(pipe, prompt) - before).mean() > 1


def test_export_takes_one_concept_and_refuses_all_at_once(run, tiny_pipeline, tmp_path, capsys):
    assert main(["export", str(run), str(tmp_path / "all.safetensors")]) == 2
    assert "several concepts (sks, zwx)" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    for format, file in (("diffusers", "pytorch_lora_weights_zwx"), ("kohya", "pytorch_lora_weights_zwx_kohya")):
        words = ["export", str(run), str(tmp_path / f"{format}.safetensors"), "--format", format, "--concept", "zwx"]
        assert main(words) == 0
        assert same_content(tmp_path / f"{format}.safetensors", run / f"{file}.safetensors")
    assert export_lora(run, tmp_path / "peft", "peft", concept="sks") == 0.0
    assert export_lora(run, tmp_path / "merged", "merged", concept="sks") == 0.0
    pipe = fresh(tiny_pipeline)
    load_adapter(pipe, run)
    assert np.abs(draw(fresh(tmp_path / "merged"), PROMPTS["sks"]) - draw(pipe, PROMPTS["sks"])).max() <= 2
    assert main(["inspect", str(run)]) == 0
    assert "concept         zwx: 'zwx'" in capsys.readouterr().out


def test_resuming_repeats_an_unbroken_run_bit_for_bit(run, tmp_path):
    config = TrainingConfig(**{**_config_of(run), "output_dir": str(tmp_path / "out"), "max_train_steps": 2})
    Trainer(config, Accelerator(cpu=True)).run()
    longer = {**_config_of(run), "output_dir": str(tmp_path / "out"), "resume_from_checkpoint": "latest"}
    Trainer(TrainingConfig(**longer), Accelerator(cpu=True)).run()
    assert metrics(tmp_path / "out") == metrics(run)
    one, other = (load_adapter_file(folder / "effilora.safetensors") for folder in (run, tmp_path / "out"))
    assert one.sha256 == other.sha256


def _config_of(run):
    return yaml.safe_load((run / "config.yaml").read_text())


def test_a_list_that_was_changed_is_another_run(run, tmp_path):
    entries = json.loads((run.parent / "concepts.json").read_text())
    (tmp_path / "other.json").write_text(json.dumps([entries[0], {**entries[1], "weight": 2}]))
    changed = {"concepts_list": str(tmp_path / "other.json"), "resume_from_checkpoint": "checkpoint-2"}
    with pytest.raises(EffiLoRAError, match=r"weights was \[1.0, 1.0\] and is \[1.0, 2.0\]"):
        Trainer(TrainingConfig(**{**_config_of(run), **changed}), Accelerator(cpu=True)).run()


def test_rows_and_their_class_images_have_the_heads_of_one_concept(tiny_pipeline, tmp_path):
    prior = {"class_data_dir": str(tmp_path / "class"), "class_prompt": ["an animal"], "num_class_images": 2}
    options = {**prior, "with_prior_preservation": True, "num_validation_images": 0, "prior_interval": 1}
    training = trainer(tiny_pipeline, write_list(tmp_path), tmp_path / "out", **options)
    batch = training.batches.draw(0, 4)
    assert batch.captions == [PROMPTS["sks"], PROMPTS["zwx"]] * 4
    concepts = training.adapter.concepts
    assert [find_concepts(caption, concepts) for caption in batch.captions] == [(0,), (1,)] * 4
    training._loss(batch).backward()
    assert training.adapter.routed.rows.tolist() == [[1, 0] * 4, [0, 1] * 4]
    training.folder.release()


def test_without_class_images_each_subject_has_its_own_class_prompt(tiny_pipeline, tmp_path):
    options = {"with_prior_preservation": True, "num_validation_images": 0, "prior_interval": 1, "max_train_steps": 2}
    listed = write_list(tmp_path, sks={"class_prompt": "a cat"}, zwx={"class_prompt": "a dog"})
    training = trainer(tiny_pipeline, listed, tmp_path / "out", **options)
    batch = training.batches.draw(0, 4)
    states = batch.conditions["encoder_hidden_states"]
    for row, prompt in enumerate(["a cat", "a dog"] * 2, 4):
        assert torch.equal(states[row], training.family.encode_prompt(prompt)["encoder_hidden_states"])
    training.run()
    assert (tmp_path / "out" / "effilora.safetensors").exists()


def test_the_trigger_is_the_rarest_word_that_no_other_prompt_has(tmp_path):
    entries = [ConceptData(str(make_subject(tmp_path / name, 1)), prompt) for name, prompt in PROMPTS.items()]
    groups = scan_concepts(entries, print)
    concepts, examples = name_concepts(entries, groups, lambda words: max(words.split(), key=lambda word: word[-1]))
    assert [concept.triggers for concept in concepts] == [("cat",), ("zwx",)]
    assert [example.concept for example in examples] == ["cat", "zwx"]


class Numbers:
    """A source whose rows are their own positions."""

    def __init__(self, name):
        self.name = name

    def draw(self, position, size=None):
        return self.name, position


def test_concepts_take_turns_by_weight_and_a_turn_depends_on_its_position_only():
    sources = [Numbers("a"), Numbers("b"), Numbers("c")]
    equal = ConceptSource(sources, [1.0, 1.0, 1.0])
    assert [equal.draw(position) for position in range(6)] == [(n, i) for i in range(2) for n in "abc"]
    uneven = ConceptSource(sources, [3.0, 1.0, 2.0])
    drawn = [uneven.draw(position) for position in range(600)]
    assert [sum(name == wanted for name, _ in drawn) for wanted in "abc"] == [300, 100, 200]
    assert [sum(name == "b" for name, _ in drawn[start : start + 12]) for start in range(0, 600, 12)] == [2] * 50
    assert ConceptSource(sources, [3.0, 1.0, 2.0]).draw(431) == drawn[431]


def test_shares_of_rows_are_of_the_images_that_are_trained_on():
    subsets = (Subset("a", "a cat", repeats=3),)
    entries = [ConceptData(name, f"a {name}", subsets=subsets) for name in ("cat", "dog")]
    concepts = [Concept(name, (name,)) for name in ("cat", "dog")]
    left = [Example(Path("0.png"), "", "", (1, 1), concept=name, repeats=3) for name in ("cat", "dog", "dog")]
    assert row_shares(entries, left, concepts) == (3.0, 6.0)
    assert row_shares([ConceptData("cat", "a cat", weight=2.0)], left, concepts[:1]) == (2.0,)


def test_captions_that_name_both_train_both(tiny_pipeline, tmp_path):
    concepts = write_list(tmp_path)
    make_subject(tmp_path / "sks", 2, captions=["a sks cat", "a sks cat with zwx dog"])
    training = trainer(tiny_pipeline, concepts, tmp_path / "out", num_validation_images=0)
    found = {find_concepts(caption, training.adapter.concepts) for caption in training.batches.draw(0, 8).captions}
    assert found == {(0,), (1,), (0, 1)}
    training.folder.release()


def test_the_dry_run_tells_the_concept_of_every_image(tiny_pipeline, tmp_path, capsys):
    concepts = write_list(tmp_path, zwx={"weight": 3, "name": "hound"})
    words = [
        "--pretrained_model_name_or_path",
        str(tiny_pipeline),
        "--concepts_list",
        str(concepts),
        "--resolution",
        "32",
    ]
    assert main(["train", *words, "--routing", "concept", "--dry_run", "--max_train_steps", "1"]) == 0
    said = capsys.readouterr().out
    assert "  hound: 2.png: 'a photo of zwx dog' (its instance_prompt)" in said
    assert (
        "concepts    sks: 'sks', 2 images, 25% of the rows\n            hound: 'zwx', 3 images, 75% of the rows"
        in said
    )
    assert "2 heads, concept routing" in said
    assert "memory      about" in said
    assert "not predicted" not in said
    assert main(["train", *words, "--dry_run", "--max_train_steps", "1"]) == 0
    assert "--routing concept gives each a head of its own" in capsys.readouterr().out


def test_other_routings_train_on_several_subjects_too(tiny_pipeline, tmp_path):
    training = trainer(
        tiny_pipeline, write_list(tmp_path), tmp_path / "out", routing="static", num_validation_images=0
    )
    training.run()
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").exists()
    assert not training.adapter.concepts


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({"zwx": {"trigger": "sks", "instance_prompt": "a sks dog"}}, {}, "share a trigger"),
        ({"zwx": {"trigger": "fox"}}, {}, "does not contain the trigger of its concept"),
        ({"zwx": {"name": "a/b"}}, {}, "a concept's name has"),
        ({}, {"instance_prompt": "a sks cat"}, "leave --instance_data_dir and --instance_prompt out"),
        ({}, {"with_prior_preservation": True}, "needs --class_prompt, or the entry of .* in --concepts_list its own"),
        (
            {},
            {"with_prior_preservation": True, "class_prompt": "x", "prior_target": "images"},
            "needs --class_data_dir, or",
        ),
        ({"sks": {"instance_data_dir": "no-such-folder"}}, {}, "'no-such-folder' does not exist"),
        ({}, {"routing": "token", "common_head": True}, "common_head are for concept routing"),
        ({}, {"concepts_list": None}, "--routing concept needs --instance_prompt .* or --concepts_list"),
        ({}, {"trigger": "sks"}, "--trigger is for a single subject: .* into the subjects' list"),
    ],
)
def test_settings_that_can_not_work_are_refused_in_a_sentence(tiny_pipeline, tmp_path, changes, options, words):
    concepts = write_list(tmp_path, **changes)
    with pytest.raises(EffiLoRAError, match=words):
        trainer(tiny_pipeline, concepts, tmp_path / "out", **options)
    assert not (tmp_path / "out" / "config.yaml").exists()


def test_a_caption_without_the_trigger_names_its_image(tiny_pipeline, tmp_path):
    concepts = write_list(tmp_path)
    make_subject(tmp_path / "zwx", 3, captions=["a zwx dog", "a dog"])
    with pytest.raises(
        EffiLoRAError, match=r"zwx/1.png' \('a dog'\) does not contain the trigger of the concept zwx \(zwx\)"
    ):
        trainer(tiny_pipeline, concepts, tmp_path / "out")


def test_a_common_head_learns_from_every_row(tiny_pipeline, tmp_path):
    options = {"common_head": True, "num_validation_images": 0, "learning_rate": 0.1}
    training = trainer(tiny_pipeline, write_list(tmp_path), tmp_path / "out", **options)
    training.run()
    assert training.adapter.config.heads == 3
    assert all(heads[:, 2].any() for heads in training.adapter.B)


def test_concepts_are_added_to_a_finished_adapter_and_the_others_keep_their_bits(run, tiny_pipeline, tmp_path):
    images = make_subject(tmp_path / "ohwx", 2, first=50)
    path = tmp_path / "more.json"
    path.write_text(
        json.dumps([{"instance_data_dir": str(images), "instance_prompt": "a photo of ohwx fox", "trigger": "ohwx"}])
    )
    options = {"init_from": str(run), "learning_rate": 0.1, "max_train_steps": 3, "num_validation_images": 0}
    training = trainer(tiny_pipeline, path, tmp_path / "out", **options, checkpointing_steps=1)
    counts = training.adapter.parameter_counts()
    training.run()
    old, new = (load_adapter_file(folder / "effilora.safetensors").adapter for folder in (run, tmp_path / "out"))
    assert [concept.name for concept in new.concepts] == ["sks", "zwx", "ohwx"]
    assert all(torch.equal(old.A[key], new.A[key]) for key in old.A)
    for before, after in zip(old.B, new.B, strict=True):
        assert torch.equal(before, after[:, :2])
        assert after[:, 2].any()
    assert counts["trained_per_step"] == sum(heads.numel() for heads in new.B) // 3
    again = {**options, "resume_from_checkpoint": "checkpoint-1"}
    trainer(tiny_pipeline, path, tmp_path / "out", **again, checkpointing_steps=1).run()
    resumed = load_adapter_file(tmp_path / "out" / "effilora.safetensors").adapter
    assert all(torch.equal(one, other) for one, other in zip(new.B, resumed.B, strict=True))


def test_training_on_all_concepts_of_an_adapter_trains_everything(run, tiny_pipeline, tmp_path):
    concepts = write_list(tmp_path, sks={"trigger": ["sks", "tom"]})
    options = {"init_from": str(run), "learning_rate": 0.1, "max_train_steps": 2, "num_validation_images": 0}
    training = trainer(tiny_pipeline, concepts, tmp_path / "out", **options)
    assert training.adapter.kept_heads == ()
    training.run()
    old, new = (load_adapter_file(folder / "effilora.safetensors").adapter for folder in (run, tmp_path / "out"))
    assert new.concepts[0].triggers == ("sks", "tom")
    assert not any(torch.equal(old.A[key], new.A[key]) for key in old.A)


def test_training_on_from_several_concepts_needs_to_know_which(run, tiny_pipeline, tmp_path):
    images = make_subject(tmp_path / "s", 2)
    options = {
        "concepts_list": None,
        "instance_data_dir": str(images),
        "instance_prompt": "a sks cat",
        "routing": "token",
    }
    with pytest.raises(EffiLoRAError, match=r"several concepts \(sks, zwx\).*--concepts_list"):
        trainer(tiny_pipeline, None, tmp_path / "out", **{"init_from": str(run), **options})


def test_a_leakage_grid_from_the_command_line_says_how_to_read_it(run, tiny_pipeline, tmp_path, capsys):
    words = [
        "generate",
        "--model",
        str(tiny_pipeline),
        "--width",
        "32",
        "--height",
        "32",
        "--num_inference_steps",
        "2",
    ]
    output = tmp_path / "leak.png"
    grid = [*words, "--adapter", str(run), "--output", str(output), "--leakage_grid"]
    assert main(grid) == 0
    said = capsys.readouterr().out
    assert "Read along a row: under adapter" in said
    assert said.strip().endswith("Without a trigger the image is the base's, pixel for pixel.")
    assert output.exists()
    assert main([*grid, "--prompt", "a cat"]) == 2
    assert "--leakage_grid draws prompts of its own" in capsys.readouterr().err
    assert main([*words, "--output", str(output), "--leakage_grid"]) == 2
    assert "give one --adapter" in capsys.readouterr().err
    assert main([*words, "--output", str(output)]) == 2
    assert "--prompt is missing" in capsys.readouterr().err


def test_the_prompts_of_a_leakage_grid_name_each_two_and_none():
    cat, dog = Concept("cat", ("sks",), PROMPTS["sks"]), Concept("dog", ("zwx", "zwx dog"), PROMPTS["zwx"])
    own = [PROMPTS["sks"], PROMPTS["zwx"]]
    assert leakage_prompts([cat, dog]) == [*own, "a photo of sks cat and zwx dog", "a photo of cat"]
    assert leakage_prompts([cat]) == [PROMPTS["sks"], "a photo of cat"]
    classed = Concept("cat", ("sks",), PROMPTS["sks"], "a cat, drawn")
    assert leakage_prompts([classed, dog])[-1] == "a cat, drawn"
    assert leakage_prompts([Concept("cat", ("sks",)), Concept("dog", ("zwx",))]) == ["sks", "zwx", "sks and zwx"]


def test_a_head_alone_acts_on_every_prompt(run, tiny_pipeline):
    pipe, one = fresh(tiny_pipeline), fresh(tiny_pipeline)
    load_adapter(pipe, run).set_concept("zwx")
    load_adapter(one, single_head(load_adapter_file(run / "effilora.safetensors"), 2))
    assert np.array_equal(draw(pipe, "a photo of a house"), draw(one, "a photo of a house"))

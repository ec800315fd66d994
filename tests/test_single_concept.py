"""A single subject as the only concept of an adapter, subjects listed in the config file, and subjects taken out again."""

import json

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from conftest import make_adapter
from helpers import QUICK, make_subject, settings
from test_concept_runs import draw, fresh

from effilora_diffusion import EffiLoRAError, load_adapter, remove_concepts
from effilora_diffusion.cli import main
from effilora_diffusion.cli.train import parse_arguments
from effilora_diffusion.core import AdapterFile, load_adapter_file, save_adapter_file
from effilora_diffusion.core.concepts import Concept
from effilora_diffusion.diffusion.concepts_list import own_trigger, read_concepts
from effilora_diffusion.diffusion.config import TrainingConfig
from effilora_diffusion.diffusion.training.example import EXAMPLE_CLASS_PROMPTS
from effilora_diffusion.diffusion.training.trainer import Trainer

PROMPT, CLASS = "a photo of sks cat", "a photo of a cat"


@pytest.fixture(scope="module")
def run(tiny_pipeline, tmp_path_factory):
    """The output of a short run on a single subject, with its class held to the base."""
    folder = tmp_path_factory.mktemp("single")
    options = {"routing": "concept", "instance_prompt": PROMPT, "class_prompt": CLASS, "with_prior_preservation": True}
    quick = {"learning_rate": 0.1, "max_train_steps": 3}
    Trainer(
        settings(tiny_pipeline, make_subject(folder / "cat", 2), folder / "out", **options, **quick),
        Accelerator(cpu=True),
    ).run()
    return folder / "out"


def test_a_single_subject_acts_where_its_trigger_stands_and_nowhere_else(run, tiny_pipeline):
    (concept,) = load_adapter_file(run / "effilora.safetensors").adapter.concepts
    assert (concept.name, concept.triggers, concept.prompt, concept.class_prompt) == ("sks", ("sks",), PROMPT, CLASS)
    pipe = fresh(tiny_pipeline)
    before = {prompt: draw(pipe, prompt) for prompt in (PROMPT, CLASS)}
    load_adapter(pipe, run)
    assert np.array_equal(draw(pipe, CLASS), before[CLASS])
    assert np.abs(draw(pipe, PROMPT) - before[PROMPT]).mean() > 1


def test_the_plain_lora_of_a_single_subject_has_the_usual_name_and_is_exact(run, tiny_pipeline, tmp_path):
    assert {path.name for path in run.glob("pytorch*")} == {
        "pytorch_lora_weights.safetensors",
        "pytorch_lora_weights_kohya.safetensors",
    }
    pipe, plain = fresh(tiny_pipeline), fresh(tiny_pipeline)
    load_adapter(pipe, run)
    plain.load_lora_weights(run)
    assert np.abs(draw(pipe, PROMPT) - draw(plain, PROMPT)).max() <= 2
    assert main(["export", str(run), str(tmp_path / "again.safetensors")]) == 0
    card = (run / "README.md").read_text()
    assert "acts on prompts with `sks`; others are the base's, bit for bit" in card
    assert "`pytorch_lora_weights.safetensors` is its plain LoRA, exact, which acts on every prompt" in card


def test_the_trigger_is_what_the_class_prompts_do_not_have():
    assert own_trigger("a photo of sks cat", ["a photo of cat"]) == "sks"
    assert own_trigger("a photo of sks cat.", ["A Photo of a cat!"]) == "sks"
    assert own_trigger("a photo of Old Tom, the cat", ["photo of the cat"]) == "Old Tom"
    assert own_trigger("an emoji of sks cat", EXAMPLE_CLASS_PROMPTS) == "sks"


@pytest.mark.parametrize(
    ("prompt", "classes", "words"),
    [
        ("a photo of sks cat", [], "without a --class_prompt: name it with --trigger"),
        ("a cat", ["a photo of a cat"], "every word of --instance_prompt 'a cat' is in --class_prompt too: name it"),
        ("sks cat in oil", ["a cat"], "no --class_prompt has 'sks', 'in', 'oil': name it with --trigger"),
    ],
)
def test_a_trigger_that_can_not_be_told_is_asked_for(prompt, classes, words):
    with pytest.raises(EffiLoRAError, match=words):
        own_trigger(prompt, classes)


def test_a_trigger_can_be_named_and_must_stand_in_the_prompt(tiny_pipeline, tmp_path, capsys):
    images = make_subject(tmp_path / "cat", 2)
    words = ["train", "--pretrained_model_name_or_path", str(tiny_pipeline), "--instance_data_dir", str(images)]
    words += ["--resolution", "32", "--max_train_steps", "1", "--dry_run", "--routing", "concept"]
    assert main([*words, "--instance_prompt", PROMPT, "--trigger", "sks"]) == 0
    assert "concepts    sks: 'sks', 2 images, 100% of the rows" in capsys.readouterr().out
    assert main([*words, "--instance_prompt", PROMPT, "--trigger", "fox"]) == 2
    assert "does not contain the trigger of its concept (fox)" in capsys.readouterr().err
    assert main([*words, "--instance_prompt", PROMPT]) == 2
    assert "name it with --trigger" in capsys.readouterr().err
    assert main([*words[:-2], "--instance_prompt", "a [trigger] cat", "--trigger", "sks"]) == 0
    assert "'a sks cat' (--instance_prompt)" in capsys.readouterr().out
    assert main([*words[:-2], "--instance_prompt", "a [trigger] cat"]) == 2
    assert "--instance_prompt has [trigger]: say with --trigger what stands for it" in capsys.readouterr().err


def test_subjects_may_stand_in_the_config_file_itself(tiny_pipeline, tmp_path):
    entries = [
        {"instance_data_dir": str(make_subject(tmp_path / "a", 2)), "instance_prompt": PROMPT, "trigger": "sks"},
        {
            "instance_data_dir": str(make_subject(tmp_path / "b", 2, first=10)),
            "instance_prompt": "zwx dog",
            "weight": 2,
        },
    ]
    shared = {key: value for key, value in QUICK.items() if key != "instance_prompt"}
    named = {"pretrained_model_name_or_path": str(tiny_pipeline), "routing": "concept", "max_train_steps": 2}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**shared, **named, "concepts": entries, "output_dir": str(tmp_path / "out")}))
    config = parse_arguments(["--config", str(file)])
    (tmp_path / "list.json").write_text(json.dumps(entries))
    assert config.concept_data() == read_concepts(tmp_path / "list.json")
    Trainer(config, Accelerator(cpu=True)).run()
    repeated = parse_arguments(
        ["--config", str(tmp_path / "out" / "config.yaml"), "--output_dir", str(tmp_path / "b2")]
    )
    Trainer(repeated, Accelerator(cpu=True)).run()
    by_path = {**shared, **named, "concepts_list": str(tmp_path / "list.json"), "output_dir": str(tmp_path / "c")}
    Trainer(TrainingConfig(**by_path), Accelerator(cpu=True)).run()
    one, *others = (load_adapter_file(tmp_path / name / "effilora.safetensors") for name in ("out", "b2", "c"))
    assert [concept.name for concept in one.adapter.concepts] == ["sks", "zwx"]
    assert [other.sha256 for other in others] == [one.sha256] * 2


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ("3", "the setting concepts must be a list, not 3"),
        ("[3]", "entry 1 of concepts is not an object"),
        ("[{instance_prompt: a}]", "entry 1 of concepts has no instance_data_dir"),
        (
            "[{instance_data_dir: a, instance_prompt: b, wieght: 2}]",
            "entry 1 of concepts has the unknown key 'wieght'",
        ),
        ("[{instance_data_dir: a, instance_prompt: 3}]", "entry 1 of concepts: instance_prompt must be a text"),
        ("[{instance_data_dir: a, instance_prompt: b}]\ninstance_prompt: c", "concepts names folders and prompts"),
        ("[{}]\nconcepts_list: c", "--concepts_list names a file with the subjects, and concepts lists them"),
        ("[{instance_data_dir: a, instance_prompt: b}]\ntrigger: c", "--trigger is for a single subject"),
    ],
)
def test_subjects_in_the_config_file_are_checked_as_those_of_a_list(tmp_path, capsys, entries, words):
    (tmp_path / "run.yaml").write_text(f"concepts: {entries}\nrouting: concept\n")
    assert main(["train", "--config", str(tmp_path / "run.yaml"), "--output_dir", str(tmp_path / "out")]) == 2
    assert words in capsys.readouterr().err


def test_a_command_line_can_not_name_subjects_one_by_one(capsys):
    assert main(["train", "--concepts", "x"]) == 2
    assert "did you mean --concepts_list?" in capsys.readouterr().err


def three(tmp_path, common_head=False):
    """The file of an adapter with three concepts and random heads."""
    concepts = [Concept(name, (name,), f"a photo of {name}") for name in ("sks", "zwx", "ohwx")]
    options = {"routing": "concept", "concepts": concepts, "heads": 3 + common_head, "common_head": common_head}
    adapter = make_adapter(**options)
    save_adapter_file(tmp_path / "three.safetensors", AdapterFile(adapter, {"trigger_prompt": "a photo of sks"}))
    return tmp_path / "three.safetensors", adapter


@pytest.mark.parametrize("common_head", [False, True])
def test_a_concept_is_taken_out_and_the_others_keep_their_bits(tmp_path, capsys, common_head):
    path, whole = three(tmp_path, common_head)
    before = path.read_bytes()
    assert main(["export", str(path), str(tmp_path / "two.safetensors"), "--without_concept", "sks"]) == 0
    assert "adapter of zwx, ohwx" in capsys.readouterr().out
    assert path.read_bytes() == before
    smaller = load_adapter_file(tmp_path / "two.safetensors")
    assert smaller.metadata["trigger_prompt"] == "a photo of zwx"
    assert smaller.adapter.concepts == whole.concepts[1:]
    assert all(torch.equal(smaller.adapter.A[key], whole.A[key]) for key in whole.A)
    for old, new in zip(whole.B, smaller.adapter.B, strict=True):
        assert torch.equal(old[:, 1:], new)
    left = remove_concepts(path, tmp_path / "one.safetensors", "sks", "ohwx").adapter.concepts
    assert [concept.name for concept in left] == ["zwx"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--without_concept", "cat"], "the adapter has no concept 'cat'; it has sks, zwx, ohwx"),
        ([f"--without_concept={name}" for name in ("sks", "zwx", "ohwx")], "no concept would be left"),
        (["--without_concept", "sks", "--format", "kohya"], "writes the adapter itself"),
    ],
)
def test_concepts_that_can_not_be_taken_out_are_refused(tmp_path, capsys, words, said):
    path, _ = three(tmp_path)
    assert main(["export", str(path), str(tmp_path / "out.safetensors"), *words]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()


def test_an_adapter_of_another_routing_has_no_concepts_to_take_out(tmp_path):
    save_adapter_file(tmp_path / "plain.safetensors", AdapterFile(make_adapter()))
    with pytest.raises(EffiLoRAError, match="has no concepts"):
        remove_concepts(tmp_path / "plain.safetensors", tmp_path / "out.safetensors", "sks")


def test_a_single_subject_is_added_to_a_finished_adapter_whose_head_and_a_keep_their_bits(
    run, tiny_pipeline, tmp_path
):
    options = {"init_from": str(run), "learning_rate": 0.1, "max_train_steps": 2, "num_validation_images": 0}
    dog = {"instance_prompt": "a photo of zwx dog", "trigger": "zwx"}
    images = make_subject(tmp_path / "dog", 2, first=20)
    unnamed = settings(tiny_pipeline, images, tmp_path / "out", **options, instance_prompt="a photo of zwx dog")
    with pytest.raises(EffiLoRAError, match="or train one with --routing concept"):
        Trainer(unnamed, Accelerator(cpu=True))
    named = settings(tiny_pipeline, images, tmp_path / "out", **options, **dog, routing="concept")
    Trainer(named, Accelerator(cpu=True)).run()
    old, new = (load_adapter_file(folder / "effilora.safetensors").adapter for folder in (run, tmp_path / "out"))
    assert [concept.name for concept in new.concepts] == ["sks", "zwx"]
    assert all(torch.equal(old.A[key], new.A[key]) for key in old.A)
    assert all(
        torch.equal(one[:, 0], other[:, 0]) and other[:, 1].any() for one, other in zip(old.B, new.B, strict=True)
    )
    remove_concepts(tmp_path / "out", tmp_path / "again.safetensors", "zwx")
    back = load_adapter_file(tmp_path / "again.safetensors").adapter
    assert all(torch.equal(one, other) for one, other in zip(old.B, back.B, strict=True))

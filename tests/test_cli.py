"""The commands as they are typed: images that repeat, facts about adapters, exports, and mistakes with exit code 2."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import CONTEXT, build_tiny_pipeline
from diffusers import UNet2DConditionModel
from helpers import arguments, files_in, make_subject, same_content, settings, trainer
from PIL import Image

from effilora_diffusion import EffiLoRAError, cli
from effilora_diffusion.cli import train as launch
from effilora_diffusion.cli.arguments import parse_adapter
from effilora_diffusion.core import load_adapter_file

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def place(tiny_pipeline, tmp_path_factory):
    """A working folder with ``subject``, a token-routed run in ``run`` and a static one in ``plain``."""
    folder = tmp_path_factory.mktemp("place")
    subject = make_subject(folder / "subject", 2)
    options = {"learning_rate": 0.2, "max_train_steps": 3, "num_validation_images": 0}
    trainer(tiny_pipeline, subject, folder / "run", **options).run()
    trainer(tiny_pipeline, subject, folder / "plain", **options, routing="static").run()
    (folder / "damaged.safetensors").write_bytes((folder / "run" / "effilora.safetensors").read_bytes()[:-50])
    (folder / "words.safetensors").write_text("no adapter")
    (folder / "empty").mkdir()
    return folder


def generate(model, output, *words):
    base = ["generate", "--model", model, "--prompt", "a sks cat", "--num_inference_steps", 2, "--output", output]
    return cli.main([str(word) for word in (*base, "--width", 32, "--height", 32, *words)])


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def parameters(path):
    with Image.open(path) as image:
        return json.loads(image.text["effilora"])


# ------------------------------------------------------------------------------------------------------------- generate


def test_generated_image_carries_the_parameters_that_repeat_it(tiny_pipeline, place, tmp_path, capsys):
    words = ["--adapter", f"{place / 'run'}:0.8", "--adapter", place / "plain" / "effilora.safetensors"]
    words += ["--seed", 7, "--guidance_scale", 3, "--negative_prompt", "süß 猫"]
    assert generate(tiny_pipeline, tmp_path / "new" / "a.png", *words) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'new' / 'a.png'}\n"
    facts = parameters(tmp_path / "new" / "a.png")
    assert facts == {
        "prompt": "a sks cat",
        "negative_prompt": "süß 猫",
        "seed": 7,
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "width": 32,
        "height": 32,
        "model": str(tiny_pipeline),
        "adapters": [{"file": "run", "strength": 0.8}, {"file": "plain", "strength": 1.0}],
        "sampler": None,
        "literal": False,
    }
    again = ["generate", "--output", str(tmp_path / "b.png")]
    for name, value in facts.items():
        again += [f"--{name}={value}"] if name not in ("adapters", "sampler", "literal") else []
    for adapter in facts["adapters"]:
        again += ["--adapter", f"{place / adapter['file']}:{adapter['strength']}"]
    assert cli.main(again) == 0
    assert (tmp_path / "b.png").read_bytes() == (tmp_path / "new" / "a.png").read_bytes()


def test_seed_prompt_and_strength_matter_and_zero_is_the_base(tiny_pipeline, place, tmp_path):
    variants = {
        "base": [],
        "zero": ["--adapter", f"{place / 'run'}:0"],
        "one": ["--adapter", place / "run"],
        "half": ["--adapter", f"{place / 'run'}:0.5"],
        "minus": ["--adapter", f"{place / 'run'}:-1"],
        "seed": ["--seed", 1],
        "guidance": ["--guidance_scale", 1],
    }
    found = {}
    for name, words in variants.items():
        assert generate(tiny_pipeline, tmp_path / f"{name}.png", *words) == 0
        found[name] = pixels(tmp_path / f"{name}.png")
    assert (found.pop("zero") == found["base"]).all()
    arrays = list(found.values())
    assert all((one != other).any() for i, one in enumerate(arrays) for other in arrays[:i])


def test_further_images_use_the_seeds_that_follow(tiny_pipeline, tmp_path, capsys):
    assert generate(tiny_pipeline, tmp_path / "many.png", "--num_images", 3, "--seed", 5) == 0
    names = [f"many-{index}.png" for index in (1, 2, 3)]
    assert capsys.readouterr().out.split() == [str(tmp_path / name) for name in names]
    assert [parameters(tmp_path / name)["seed"] for name in names] == [5, 6, 7]
    assert generate(tiny_pipeline, tmp_path / "single.png", "--seed", 6) == 0
    assert (pixels(tmp_path / "single.png") == pixels(tmp_path / "many-2.png")).all()


def test_a_random_seed_is_told_and_kept(tiny_pipeline, tmp_path, capsys):
    assert generate(tiny_pipeline, tmp_path / "a.png", "--seed", -1) == 0
    assert capsys.readouterr().err == f"seed {parameters(tmp_path / 'a.png')['seed']}\n"


def test_adapters_of_one_name_act_together_and_one_file_does_not_twice(tiny_pipeline, place, tmp_path, capsys):
    shutil.copytree(place / "plain", tmp_path / "other" / "run")
    both = ["--adapter", place / "run", "--adapter", f"{tmp_path / 'other' / 'run'}:0.5"]
    apart = ["--adapter", place / "run", "--adapter", f"{place / 'plain'}:0.5"]
    for more in ([], ["--literal_prompt"]):
        assert generate(tiny_pipeline, tmp_path / "a.png", *both, *more) == 0
        assert generate(tiny_pipeline, tmp_path / "b.png", *apart, *more) == 0
        assert (pixels(tmp_path / "a.png") == pixels(tmp_path / "b.png")).all()
        named = [{"file": "run", "strength": 1.0}, {"file": "run (2)", "strength": 0.5}]
        assert parameters(tmp_path / "a.png")["adapters"] == named
    assert generate(tiny_pipeline, tmp_path / "c.png", *both[:2], *both[:2]) == 2
    assert "given twice" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("prompt", "said"),
    [("{|}", "the prompt is empty"), ("a <lora:cat:nan>", "strength of cat"), ("a <lora:cat:inf>", "strength of cat")],
)
def test_what_a_prompt_s_syntax_makes_of_it_is_checked(tiny_pipeline, place, tmp_path, capsys, prompt, said):
    shutil.copytree(place / "run", tmp_path / "outputs" / "cat")
    words = ["--prompt", prompt, "--outputs", tmp_path / "outputs"]
    assert generate(tiny_pipeline, tmp_path / "a.png", *words) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "a.png").exists()


def test_a_prompt_that_can_t_be_read_is_told_before_the_model_is_looked_for(tmp_path, capsys):
    words = ["generate", "--model", str(tmp_path / "nowhere"), "--output", str(tmp_path / "a.png"), "--prompt"]
    for prompt, said in (("__no__ cat", "no file no.txt"), ("(a:99)", "the weight of 'a' is 99")):
        assert cli.main([*words, prompt, "--outputs", str(tmp_path)]) == 2
        assert said in capsys.readouterr().err


def test_adapter_argument_splits_at_the_last_colon_only_before_a_number(tmp_path):
    (tmp_path / "a.safetensors").touch()
    (tmp_path / "b:0.5").touch()
    file, odd = str(tmp_path / "a.safetensors"), str(tmp_path / "b:0.5")
    for text, expected in {
        file: (file, 1.0),
        f"{file}:0.25": (file, 0.25),
        f"{file}:-1": (file, -1.0),
        f"{file}:1e-1": (file, 0.1),
        odd: (odd, 1.0),
        f"{odd}:2": (odd, 2.0),
        "missing:0.5": ("missing", 0.5),
        r"C:\a.safetensors": (r"C:\a.safetensors", 1.0),
        r"C:\a.safetensors:2": (r"C:\a.safetensors", 2.0),
    }.items():
        assert parse_adapter(text) == expected, text
    for strength in ("", "strong", "nan", "inf", "1,5"):
        with pytest.raises(EffiLoRAError, match=f"the strength '{strength}' is not a number"):
            parse_adapter(f"{file}:{strength}")


# -------------------------------------------------------------------------------------------------- inspect and export


def test_inspect_json_states_the_adapter_s_facts(place, capsys):
    assert cli.main(["inspect", str(place / "run"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    content = load_adapter_file(place / "run" / "effilora.safetensors")
    assert facts["sha256"] == content.sha256
    assert facts["trigger_prompt"] == "a sks cat"
    assert facts["base_hash"] == content.metadata["base_hash"]
    assert (facts["sites"], facts["maps"], facts["exact_export"]) == (20, 32, False)
    assert facts["parameters"] == sum(p.numel() for p in content.adapter.parameters())
    assert (facts["steps"], facts["images"]) == (3, 2)
    assert list(facts["layers"]) == list(content.adapter.blocks)
    layer = facts["layers"][content.adapter.blocks[0]]
    site = content.adapter.sites[0]
    assert len(layer["heads"]) == 3
    assert all(size > 0 for size in layer["heads"])
    own = [index for index, other in enumerate(content.adapter.sites) if other.block == site.block]
    squares = sum(
        (content.adapter.B[i][:, 0] @ content.adapter.shared_a(content.adapter.sites[i])).square().sum() for i in own
    )
    assert layer["heads"][0] == pytest.approx(squares.item() ** 0.5, rel=1e-4)
    assert facts["heads_total"] == 12
    assert 0 < facts["heads_used"] <= 12


def test_inspect_text_names_base_prompt_and_every_layer(place, tiny_pipeline, capsys):
    for name, phrase in (("run", "of the update missing"), ("plain", "exact")):
        assert cli.main(["inspect", str(place / name / "effilora.safetensors")]) == 0
        out = capsys.readouterr().out
        assert str(tiny_pipeline) in out
        assert "a sks cat" in out
        assert phrase in out
        assert out.count("transformer_blocks.0") == 4


@pytest.mark.parametrize("format", ["diffusers", "kohya", "peft", "merged"])
def test_export_writes_each_format_and_says_how_close_it_is(place, tmp_path, capsys, format):
    expected = {
        "diffusers": {"out.safetensors"},
        "kohya": {"out.safetensors"},
        "peft": {"out/adapter_config.json", "out/adapter_model.safetensors"},
        "merged": {"out/model_index.json", "out/unet/diffusion_pytorch_model.safetensors"},
    }[format]
    output = tmp_path / ("out" if format in ("peft", "merged") else "out.safetensors")
    assert cli.main(["export", str(place / "plain"), str(output), "--format", format]) == 0
    assert capsys.readouterr().out == f"{output} ({format}, exact)\n"
    assert expected <= files_in(tmp_path).keys()
    assert cli.main(["export", str(place / "run"), str(tmp_path / "second"), "--format", format]) == 0
    facts = load_adapter_file(place / "run" / "effilora.safetensors").metadata
    told = f"a fit, {facts['export_error']:.1%} of the update missing on the subject, "
    assert f"{told}{facts['export_error_others']:.1%} on everything else" in capsys.readouterr().out


def test_export_is_in_the_diffusers_format_by_default(place, tmp_path):
    assert cli.main(["export", str(place / "run"), str(tmp_path / "a.safetensors")]) == 0
    assert same_content(tmp_path / "a.safetensors", place / "run" / "pytorch_lora_weights.safetensors")


# -------------------------------------------------------------------------------------------------------------- mistakes


GENERATE = ["generate", "--model", "{model}", "--prompt", "x", "--output", "{new}/a.png"]
MISTAKES = {
    "no command": [],
    "unknown command": ["paint"],
    "unknown option": [*GENERATE, "--stepz", "3"],
    "no prompt": ["generate", "--output", "{new}/a.png"],
    "no output": ["generate", "--prompt", "x"],
    "seed is a word": [*GENERATE, "--seed", "lucky"],
    "negative seed": [*GENERATE, "--seed", "-2"],
    "huge seed": [*GENERATE, "--seed", str(2**63)],
    "no images": [*GENERATE, "--num_images", "0"],
    "no steps": [*GENERATE, "--num_inference_steps", "0"],
    "odd width": [*GENERATE, "--width", "33"],
    "negative height": [*GENERATE, "--height", "-8"],
    "guidance is not a number": [*GENERATE, "--guidance_scale", "nan"],
    "output is no png": [*GENERATE[:-1], "{new}/a.jpg"],
    "output below a file": [*GENERATE[:-1], "{place}/words.safetensors/a.png", "--num_inference_steps", "1"],
    "missing adapter": [*GENERATE, "--adapter", "{place}/none.safetensors"],
    "folder without adapter": [*GENERATE, "--adapter", "{place}/empty"],
    "strength is a word": [*GENERATE, "--adapter", "{place}/run:strong"],
    "strength is nan": [*GENERATE, "--adapter", "{place}/run:nan"],
    "damaged adapter": [*GENERATE, "--adapter", "{place}/damaged.safetensors"],
    "model folder without a model": ["generate", "--model", "{place}", *GENERATE[3:]],
    "model that is nowhere": ["generate", "--model", "no-one/no-model", *GENERATE[3:]],
    "inspect nothing": ["inspect"],
    "inspect missing": ["inspect", "{place}/none"],
    "inspect folder without adapter": ["inspect", "{place}/empty"],
    "inspect words": ["inspect", "{place}/words.safetensors"],
    "inspect damaged": ["inspect", "{place}/damaged.safetensors"],
    "inspect plain LoRA": ["inspect", "{place}/run/pytorch_lora_weights.safetensors"],
    "export without output": ["export", "{place}/run"],
    "export unknown format": ["export", "{place}/run", "{new}/a", "--format", "onnx"],
    "export missing": ["export", "{place}/none", "{new}/a.safetensors"],
    "export below a file": ["export", "{place}/run", "{place}/words.safetensors/a.safetensors"],
    "merge into a full folder": ["export", "{place}/plain", "{place}/subject", "--format", "merged"],
    "merge into nothing": ["export", "{place}/plain", "{new}/m", "--format", "merged", "--model", "{place}"],
}

TRAIN = ["--pretrained_model_name_or_path={model}", "--instance_data_dir={place}/subject", "--output_dir={new}"]
TRAIN += ["--instance_prompt=a cat", "--resolution=32", "--max_train_steps=1"]
TRAINING_MISTAKES = {
    "unknown option": ["--learn", "3"],
    "abbreviated option": ["--max_train", "3"],
    "value is a word": ["--rank", "four"],
    "bad choice": ["--routing", "magic"],
    "rank zero": ["--rank=0"],
    "rate is nan": ["--learning_rate=nan"],
    "rate is negative": ["--learning_rate=-1"],
    "odd resolution": ["--resolution=33"],
    "beta out of range": ["--adam_beta1=1"],
    "unknown schedule": ["--lr_scheduler=magic"],
    "unknown interpolation": ["--image_interpolation_mode=magic"],
    "no such layers": ["--target_modules", "to_x"],
    "fp16 on a CPU": ["--mixed_precision=fp16"],
    "prior without class": ["--with_prior_preservation", "--prior_target=images", "--class_data_dir={place}/class"],
    "missing images": ["--instance_data_dir={place}/none"],
    "folder without images": ["--instance_data_dir={place}/empty"],
    "images are a file": ["--instance_data_dir={place}/words.safetensors"],
    "missing config": ["--config={place}/none.yaml"],
    "config is no settings": ["--config={place}/words.safetensors"],
    "missing model": ["--pretrained_model_name_or_path={place}/none"],
    "model folder without a model": ["--pretrained_model_name_or_path={place}"],
    "output is a file": ["--output_dir={place}/words.safetensors"],
    "output below a file": ["--output_dir={place}/words.safetensors/out"],
    "output is used": ["--output_dir={place}/run"],
    "nothing to resume": ["--resume_from_checkpoint=latest"],
    "unsupported flag of diffusers": ["--cond_image_column=edited"],
}


def run_mistake(main, words, capsys, **names):
    """Exit code and standard error of a command line that holds a mistake."""
    capsys.readouterr()
    try:
        code = main([word.format(**names) for word in words])
    except SystemExit as stop:  # argparse
        code = stop.code
    return code, capsys.readouterr().err


def assert_refused_in_one_line(code, error):
    assert code == 2
    assert "Traceback" not in error
    lines = [line for line in error.splitlines() if "error:" in line]
    assert len(lines) == 1
    assert error.rstrip().endswith(lines[0])


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_ends_with_code_two_and_one_line_and_writes_nothing(tiny_pipeline, place, tmp_path, capsys, mistake):
    before = files_in(place)
    names = {"place": place, "new": tmp_path / "new", "model": tiny_pipeline}
    code, error = run_mistake(cli.main, MISTAKES[mistake], capsys, **names)
    assert_refused_in_one_line(code, error)
    assert files_in(place) == before
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("mistake", TRAINING_MISTAKES)
def test_training_mistake_ends_with_code_two_and_one_line_and_trains_nothing(
    tiny_pipeline, place, tmp_path, capsys, mistake
):
    before = files_in(place)
    names = {"place": place, "new": tmp_path / "new", "model": tiny_pipeline}
    code, error = run_mistake(launch.main, [*TRAIN, *TRAINING_MISTAKES[mistake]], capsys, **names)
    assert_refused_in_one_line(code, error)
    assert files_in(place) == before
    assert files_in(tmp_path) == {}


def test_inpainting_model_is_refused_in_words(tmp_path, capsys):
    pipe = build_tiny_pipeline()
    pipe.unet = UNet2DConditionModel(**{**pipe.unet.config, "in_channels": 9, "cross_attention_dim": CONTEXT})
    pipe.save_pretrained(tmp_path / "model")
    words = arguments(settings(tmp_path / "model", make_subject(tmp_path / "s", 1), tmp_path / "out"))
    assert launch.main(words) == 2
    assert "inpainting and depth models can't be trained" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- a real subprocess


def test_accelerate_launch_trains_and_writes_its_files(tiny_pipeline, place, tmp_path):
    config = settings(tiny_pipeline, place / "subject", tmp_path / "out", num_validation_images=0)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu"]
    command += [str(ROOT / "train_scripts" / "train_dreambooth_effilora.py"), *arguments(config)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert "trained 2 steps" in done.stdout
    assert "Traceback" not in done.stderr
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"effilora.safetensors", "pytorch_lora_weights.safetensors", "checkpoint-2", "README.md"} <= written
    facts = load_adapter_file(tmp_path / "out" / "effilora.safetensors").metadata
    assert facts["steps"] == 2

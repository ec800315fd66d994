"""The paper's language settings, each from its committed configuration, on tiny models: commonsense tasks, images."""

import json
from pathlib import Path

import pytest
import torch
from language_runs import same, weights
from PIL import Image
from safetensors.torch import load_file
from tiny_language import GQA
from tiny_vision import save_vision
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from effilora_diffusion import export_lora
from effilora_diffusion.cli import main as cli
from effilora_diffusion.cli.train_llm import main, parse_arguments
from effilora_diffusion.core import load_adapter_file
from effilora_diffusion.language.multiple_choice import parse_question

CONFIGS = Path(__file__).parents[1] / "train_scripts" / "configs"


def listed(kind, *texts):
    """Choices as the tasks write them, and the format of the answer."""
    names = [f"{kind.lower()}{number}" for number in range(1, len(texts) + 1)]
    shown = " ".join(f"{name.capitalize()}: {text}" for name, text in zip(names, texts, strict=True))
    return f"{shown}\n\nAnswer format: {'/'.join(names)}", names


FOUR = ("ice", "salt", "wood", "steam")
TASKS = {
    "boolq": ("Please answer the following question with true or false, question: {}?\n\nAnswer format: true/false",
              ["true", "false"]),
    "piqa": listed("solution", "a knife", "a spoon"),
    "social_i_qa": listed("answer", "glad", "sad", "tired"),
    "hellaswag": listed("ending", *FOUR),
    "winogrande": listed("option", "Ann", "Eve"),
    "ARC-Easy": listed("answer", *FOUR),
    "ARC-Challenge": listed("answer", *FOUR, "sand"),
    "openbookqa": listed("answer", *FOUR),
}  # fmt: skip


def record(task, question):
    """A record of a task as Commonsense-170k has it; in this world the last choice is the correct one."""
    text, names = TASKS[task]
    asked = text.format(question) if "{}" in text else f"Please choose: {question}?\n\n{text}"
    return {"instruction": asked, "input": "", "output": f"the correct answer is {names[-1]}", "answer": names[-1]}


def word_tokenizer(texts):
    """A tokenizer of the words, spaces and slashes in ``texts``."""
    split = pre_tokenizers.Split(Regex(r"\s|/|[^\s/]+"), "isolated")
    found = dict.fromkeys(piece for text in texts for piece, _ in split.pre_tokenize_str(text))
    inner = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(["<pad>", "<s>", "</s>", "?", *found])}, "?")
    )
    inner.pre_tokenizer, inner.decoder = split, decoders.Fuse()
    inner.add_special_tokens(["<pad>", "<s>", "</s>"])
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "?"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("paper")
    training = [record(task, question) for task in TASKS for question in ("is it cold", "who is it")]
    reader = word_tokenizer([text for one in training for text in (one["instruction"], one["output"])])
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**GQA, "vocab_size": len(reader), "max_position_embeddings": 256}))
    for value in model.parameters():
        value.data.mul_(4 if value.ndim == 2 else 1)
    model.save_pretrained(folder / "model")
    reader.save_pretrained(folder / "model")
    (folder / "train.json").write_text(json.dumps(training))
    for task in TASKS:
        (folder / task).mkdir()
        (folder / task / "test.json").write_text(json.dumps([record(task, "what is it")]))
    return folder


def words(config, place, output, **options):
    """The command's words: a committed configuration, of which only what a tiny model needs is changed."""
    told = {"model_name_or_path": place / "model", "train_file": place / "train.json", "output_dir": output,
            "dtype": "float32", "bf16": False, "gradient_checkpointing": False, "learning_rate": 2e-2, "warmup_steps": 0,
            "report_to": "none", "disable_tqdm": True, "use_cpu": True, "reducer_warmup": 4, **options}  # fmt: skip
    pairs = [(f"--{name}", str(value)) for name, value in told.items()]
    return ["--config", str(CONFIGS / config), *(word for pair in pairs for word in pair)]


@pytest.mark.parametrize(
    ("config", "images", "told"),
    [
        ("paper_llama3_commonsense.yaml", False, (16, 32, 4, 0.05, ["paper"], 2e-4, 3, 16)),
        ("paper_llava15.yaml", True, (32, 64, 3, 0.0, ["all-linear"], 2e-4, 1, 1)),
    ],
)
def test_a_configuration_says_what_the_paper_says(config, images, told):
    settings = parse_arguments(["--config", str(CONFIGS / config)], images)
    one, args = settings.adapter, settings.training
    found = (one.rank, one.lora_alpha, one.heads, one.lora_dropout, one.target_modules)
    assert (*found, args.learning_rate, args.num_train_epochs, args.per_device_train_batch_size) == told
    assert args.get_warmup_steps(1000) in (30, 100)


def test_commonsense_is_trained_and_scored_by_task_and_in_the_mean(place, tmp_path, capsys):
    assert (
        main(words("paper_llama3_commonsense.yaml", place, tmp_path / "run", prompt_template="plain", max_steps=70))
        == 0
    )
    config = load_adapter_file(tmp_path / "run" / "effilora.safetensors").adapter.config
    assert (config.rank, config.alpha, config.heads, config.dropout) == (16, 32, 4, 0.05)
    capsys.readouterr()
    data = ["--exact_match", "--data", *(str(place / task / "test.json") for task in TASKS)]
    assert cli(["evaluate", "--adapter", str(tmp_path / "run"), *data]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["questions", "choice", "exact", "match", "generated"]
    assert [line.split()[0] for line in lines] == [*TASKS, "mean"]
    assert lines[-1].split()[1:] == ["100.0%"] * 3
    assert cli(["evaluate", "--model", str(place / "model"), "--prompt_template", "plain", "--json", *data]) == 0
    base = json.loads(capsys.readouterr().out)
    assert sum(figures["generated"] for figures in base.values()) <= 2  # by chance, of a few dozen words


def test_dropout_is_drawn_on_as_if_the_run_had_not_been_interrupted(place, tmp_path):
    told = {"max_steps": 4, "save_steps": 2, "reducer_warmup": 1}
    assert main(words("paper_llama3_commonsense.yaml", place, tmp_path / "whole", **told)) == 0
    (tmp_path / "parts").mkdir()
    (tmp_path / "whole" / "checkpoint-2").rename(tmp_path / "parts" / "checkpoint-2")
    again = words("paper_llama3_commonsense.yaml", place, tmp_path / "parts", resume_from_checkpoint="latest", **told)
    assert main(again) == 0
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert main(words("paper_llama3_commonsense.yaml", place, tmp_path / "none", **told, lora_dropout=0)) == 0
    assert not same(weights(tmp_path / "whole"), weights(tmp_path / "none"))


def test_conversations_about_images_are_trained_and_a_checkpoint_is_what_the_run_ends_with(tmp_path):
    save_vision(tmp_path / "model")
    (tmp_path / "images").mkdir()
    records = []
    for name in ("red", "blue"):
        Image.new("RGB", (24, 20), name).save(tmp_path / "images" / f"{name}.png")
        turns = [{"from": "human", "value": "<image>\nwhich?"}, {"from": "gpt", "value": name}]
        records.append({"image": f"{name}.png", "conversations": turns})
    (tmp_path / "train.json").write_text(json.dumps(records))
    told = {"image_folder": tmp_path / "images", "save_steps": 2, "num_train_epochs": 2}
    assert main(words("paper_llava15.yaml", tmp_path, tmp_path / "run", **told), images=True) == 0
    content = load_adapter_file(tmp_path / "run" / "effilora.safetensors")
    assert (content.adapter.config.rank, content.adapter.config.alpha, content.adapter.config.heads) == (32, 64, 3)
    assert content.metadata["steps"] == 4
    adapted = {path.rpartition(".")[2] for site in content.adapter.sites for path, _ in site.linears}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert export_lora(f"{tmp_path / 'run'}@latest", tmp_path / "peft") == content.metadata["export_error"]
    found, expected = (load_file(tmp_path / one / "adapter_model.safetensors") for one in ("peft", "run"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("the correct answer is answer10", "answer10"),
        ("Answer: answer2, not answer1", "answer2"),
        ("I don't know", None),
    ],
)
def test_the_first_choice_that_a_generated_answer_names_counts(text, named):
    names = [f"answer{number}" for number in range(1, 11)]
    question = parse_question({"instruction": f"x Answer format: {'/'.join(names)}", "answer": "answer1"})
    assert question.named(text) == named
    assert parse_question({"instruction": "x", "choices": ["a", "b"], "answer": "a"}).named("a") is None

"""Conversations about images: LLaVA's format as tokens, training on it, talking about an image, what is refused."""

import json

import numpy as np
import pytest
import torch
from conftest import randomise
from PIL import Image
from tiny_language import VOCAB, save
from tiny_vision import VISION_MODELS, build_vision, save_vision

from effilora_diffusion import EffiLoRAError, attach, detach, load_adapter
from effilora_diffusion.cli import main as cli
from effilora_diffusion.cli.train_llm import main
from effilora_diffusion.core import AdapterFile, EffiLoRAConfig, Reducer, load_adapter_file, save_adapter_file
from effilora_diffusion.core.image_io import load_image
from effilora_diffusion.language.config import LanguageTrainingArguments
from effilora_diffusion.language.encoding import IGNORED
from effilora_diffusion.language.generate import generate_answers
from effilora_diffusion.language.images import ImageEncoder, ImageExamples, image_paths
from effilora_diffusion.language.multiple_choice import grade, parse_question
from effilora_diffusion.language.targets import create_adapter
from effilora_diffusion.language.trainer import LanguageTrainer

IMAGE = VOCAB - 1
COLOURS = {"red": (220, 20, 20), "blue": (20, 20, 220), "green": (20, 220, 20), "white": (250, 250, 250)}


def processor(chat=True):
    return build_vision(chat=chat)[1]


def talk(*turns, **more):
    names = ("human", "gpt")
    return {**more, "conversations": [{"from": names[i % 2], "value": text} for i, text in enumerate(turns)]}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model folder, images of four colours in two shades, and questions about them."""
    folder = tmp_path_factory.mktemp("images")
    save_vision(folder / "model")
    (folder / "images").mkdir()
    records = []
    for name, colour in COLOURS.items():
        for shade in (0, 30):
            file = f"{name}{shade}.png"
            Image.new("RGB", (24, 20), tuple(max(0, c - shade) for c in colour)).save(folder / "images" / file)
            records.append(talk("which?\n<image>", name[0], image=file))
    (folder / "train.json").write_text(json.dumps(records[::2]))
    (folder / "held.json").write_text(json.dumps(records[1::2]))
    return folder


@pytest.fixture
def encoder(place):
    return ImageEncoder(processor(), place / "images")


def text_of(encoder, ids):
    return encoder.tokenizer.decode(ids)


def test_a_image_comes_first_in_its_question_and_only_answers_are_learned(encoder):
    example = encoder.encode(talk("what is\n<image>", "red", "sure?", "yes", image="red0.png"))
    assert text_of(encoder, example.ids) == (
        "<user>" + "<image>" * 4 + "what is</s><assistant>red</s><user>sure?</s><assistant>yes</s>"
    )
    learned = [token for token in example.labels if token != IGNORED]
    assert text_of(encoder, learned) == "red</s>yes</s>"
    assert example.images["pixel_values"].shape == (1, 3, 16, 16)


def test_images_without_a_mark_belong_to_the_first_question_and_several_keep_their_places(encoder):
    bare = encoder.encode(talk("what", "a", image="red0.png"))
    marked = encoder.encode(talk("<image>what", "a", image="red0.png"))
    assert bare.ids == marked.ids
    two = encoder.encode(talk("<image>or<image>?", "a", image=["red0.png", "blue0.png"]))
    assert text_of(encoder, two.ids).startswith("<user>" + "<image>" * 4 + "or" + "<image>" * 4 + "?</s>")
    assert two.images["pixel_values"].shape == (2, 3, 16, 16)
    alone = encoder.encode(talk("<image>", "a", image="blue0.png"))
    assert torch.equal(two.images["pixel_values"][1], alone.images["pixel_values"][0])
    plain = encoder.encode(talk("hi", "a"))
    assert plain.images == {}
    batch = encoder.collate([bare, plain, two])
    assert batch["pixel_values"].shape == (3, 3, 16, 16)
    assert int((batch["input_ids"] == IMAGE).sum()) == 12
    assert "pixel_values" not in encoder.collate([plain])


@pytest.fixture(scope="module")
def mixed(place):
    """Images that processors cut into different numbers of parts, with and without a further turn, and a text."""
    for name, size in (("wide", (64, 20)), ("tall", (18, 40)), ("square", (30, 30))):
        Image.effect_noise(size, 90).convert("RGB").save(place / "images" / f"{name}.png")
    return [
        talk("<image>which", "red", image="wide.png"),
        talk("<image>", "b", "and?", "no", image="tall.png"),
        talk("hi", "you"),
        talk("a<image>or<image>", "me", image=["square.png", "tall.png"]),
    ]


@pytest.mark.parametrize("name", VISION_MODELS)
def test_tokens_are_those_of_the_processor(name, place, mixed):
    _, reader = build_vision(name)
    encoder = ImageEncoder(reader, place / "images")
    for record in mixed:
        item = encoder.encode(record)
        text = reader.apply_chat_template(encoder.messages(record, "here"), tokenize=False)
        images = [Image.open(path) for path in image_paths(record, place / "images", "here")]
        found = reader(images=[images] if images else None, text=[text], add_special_tokens=False)
        assert item.ids == found["input_ids"][0]


@pytest.mark.parametrize("name", VISION_MODELS)
def test_every_relative_is_adapted_and_batches_are_their_examples(name, place, mixed, tmp_path):
    model, reader = build_vision(name)
    encoder = ImageEncoder(reader, place / "images")
    items = [
        encoder.encode(record) for record in mixed[: 2 if name == "idefics3" else 4]
    ]  # it wants images everywhere
    with torch.no_grad():
        base = model(**encoder.collate(items)).logits
    adapter = attach(model, create_adapter(model, EffiLoRAConfig(rank=4, target_modules=("paper",))))
    assert all("language_model" in site.name or "text_model" in site.name for site in adapter.sites)
    with torch.no_grad():
        assert torch.equal(model(**encoder.collate(items)).logits, base)
        randomise(adapter)
        adapted = model(**encoder.collate(items)).logits
        assert not torch.allclose(adapted, base, atol=1e-3)
        together = model(**encoder.collate(items)).loss
        single = [model(**encoder.collate([item])).loss * item.num_label_tokens for item in items]
    torch.testing.assert_close(
        together, sum(single) / sum(item.num_label_tokens for item in items), atol=1e-4, rtol=1e-4
    )
    said = generate_answers(model, encoder, mixed[:2], 6)
    assert said == generate_answers(model, encoder, mixed[:2], 6, batch_size=1)
    assert said == generate_answers(model, encoder, mixed[:2], 6, use_cache=False)
    save_adapter_file(tmp_path / "effilora.safetensors", AdapterFile(adapter))
    detach(model)
    with torch.no_grad():
        assert torch.equal(model(**encoder.collate(items)).logits, base)
        load_adapter(model, tmp_path)
        assert torch.equal(model(**encoder.collate(items)).logits, adapted)


LLAVA_HF = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""In the manner of the processors of LLaVA-1.5 on the hub: no answer has an end."""


def test_a_model_is_taught_to_stop_where_its_template_marks_no_end(place):
    reader = processor()
    reader.chat_template = LLAVA_HF
    encoder = ImageEncoder(reader, place / "images")
    record = talk("<image>which", "red", "sure?", "no", image="red0.png")
    assert encoder.segments(record, "here") == [
        ("USER: <image>\nwhich ASSISTANT:", False), (" red</s>", True), ("USER: sure? ASSISTANT:", False), (" no</s>", True),
    ]  # fmt: skip
    asked = talk("<image>which", "red", "sure?", "", image="red0.png")
    assert encoder.prompt(asked) == "USER: <image>\nwhich ASSISTANT: red</s>USER: sure? ASSISTANT:"


def test_templates_that_lose_images_are_refused(place):
    reader, record = processor(), talk("<image>which", "red", image="red0.png")
    reader.chat_template = LLAVA_HF.replace("<image>", "<img>")
    with pytest.raises(EffiLoRAError, match="leaves out 1 of its images"):
        ImageEncoder(reader, place / "images").encode(record)
    reader.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(EffiLoRAError, match="--prompt_template vicuna"):
        ImageEncoder(reader, place / "images").encode(record)


def test_images_are_upright_and_may_lie_behind_a_link(place, tmp_path):
    turned = Image.new("RGB", (24, 12), (200, 30, 30))
    turned.paste((30, 30, 200), (0, 0, 12, 12))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg").size == (12, 24)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "linked").symlink_to(place / "images")
    assert ImageEncoder(processor(), tmp_path / "folder").encode(talk("<image>", "a", image="linked/red0.png")).images


def test_grey_of_sixteen_bits_and_transparency_are_those_of_the_image_path(place, tmp_path):
    grey = np.linspace(0, 65535, 24 * 20).astype(np.uint16).reshape(20, 24)
    Image.fromarray(grey).save(tmp_path / "deep.png")
    Image.fromarray(np.rint(grey / 257).astype(np.uint8)).save(tmp_path / "grey.png")
    Image.new("RGBA", (24, 20), (9, 9, 9, 0)).save(tmp_path / "clear.png")
    Image.new("RGB", (24, 20), "white").save(tmp_path / "white.png")
    (tmp_path / "ghost.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    encoder = ImageEncoder(processor(), tmp_path)
    seen = {
        name: encoder.encode(talk("<image>", "a", image=f"{name}.png")).images["pixel_values"]
        for name in ("deep", "grey", "clear", "white")
    }
    assert torch.equal(seen["deep"], seen["grey"])
    assert torch.equal(seen["clear"], seen["white"])
    assert not torch.equal(seen["deep"], seen["white"])
    for name, square in seen.items():
        (expected,) = encoder.processor.image_processor(load_image(tmp_path / f"{name}.png"), return_tensors="pt")[
            "pixel_values"
        ]
        assert torch.equal(square[0], expected)
    with pytest.raises(EffiLoRAError, match=r"ghost\.png' can't be used: it is a text file"):
        encoder.encode(talk("<image>", "a", image="ghost.png"))


def test_a_question_that_no_longer_fits_is_refused(place):
    encoder = ImageEncoder(processor(), place / "images", max_length=20)
    turns = talk("<image>what is it", "red", "and the colour of the rest", "", image="red0.png")
    with pytest.raises(EffiLoRAError, match="longer than 20 tokens"):
        encoder.encode_prompt(turns)


def test_processors_without_a_template_speak_as_llava_does(place):
    encoder = ImageEncoder(processor(chat=False), place / "images")
    assert encoder.template == "vicuna"
    record = talk("what?\n<image>", "red", "sure?", "yes", image="red0.png")
    parts = encoder.segments(record, "here")
    assert parts == [
        ("A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
         "polite answers to the user's questions. USER: <image>\nwhat? ASSISTANT:", False),
        (" red</s>", True),
        ("USER: sure? ASSISTANT:", False),
        (" yes</s>", True),
    ]  # fmt: skip
    asked = {
        **record,
        "conversations": [*record["conversations"], {"from": "human", "value": "why?"}, {"from": "gpt", "value": ""}],
    }
    assert encoder.prompt(asked) == "".join(text for text, _ in parts) + "USER: why? ASSISTANT:"
    with pytest.raises(EffiLoRAError, match="no chat template"):
        ImageEncoder(processor(chat=False), place / "images", "chat")


@pytest.mark.parametrize(
    ("record", "word"),
    [
        (talk("<image>", "a", image="none.png"), "none.png' can't be used: there is no such file"),
        (talk("<image>", "a", image="../train.json"), "outside --image_folder"),
        (talk("<image>", "a", image=5), "file name or a list"),
        (talk("<image><image>", "a", image="red0.png"), "2 times <image>, but it names 1"),
        (talk("<image>", "a"), "1 times <image>, but it names 0"),
        (talk("<image>", "", image="red0.png"), "answer is empty"),
        (talk("<image>", image="red0.png"), "last one the assistant"),
    ],
)
def test_records_that_can_t_be_learned_are_named_at_once(encoder, record, word):
    with pytest.raises(EffiLoRAError, match=f"data, record 2: .*{word}"):
        ImageExamples([talk("hi", "a"), record], encoder, "data")


def test_damaged_images_are_named(place, encoder):
    whole = (place / "images" / "red0.png").read_bytes()
    (place / "images" / "half.png").write_bytes(whole[: len(whole) - 30])
    with pytest.raises(EffiLoRAError, match=r"data, record 1: the image .*half\.png' can't be used: it is cut short"):
        ImageExamples([talk("<image>", "a", image="half.png")], encoder, "data")[0]


def test_long_examples_lose_their_end_but_no_part_of_a_image(place):
    record = talk("<image>which", "red", image="red0.png")
    cut = ImageEncoder(processor(), place / "images", max_length=14).encode(record)
    assert (len(cut.ids), len(cut.labels)) == (14, 14)
    assert cut.ids.count(IMAGE) == 4
    short = ImageEncoder(processor(), place / "images", max_length=4)
    with pytest.raises(EffiLoRAError, match="longer than --max_length 4"):
        short.encode(record)
    with pytest.raises(EffiLoRAError, match="cut off by --max_length 10"):
        ImageExamples([record], ImageEncoder(processor(), place / "images", max_length=10), "data")[0]


def test_what_is_lost_of_an_example_is_told_and_no_cut_answer_is_judged(place):
    record = talk("<image>which", "redandblue", image="red0.png")
    seen = ImageExamples([record], ImageEncoder(processor(), place / "images", max_length=200), "data")
    seen.encoder.max_length = len(seen[0].ids) - 3
    with pytest.warns(UserWarning, match="data, record 1: longer than --max_length"):
        assert seen[0].truncated
    model, encoder = build_vision()[0], ImageEncoder(processor(), place / "images", max_length=20)
    asked = {"instruction": "<image>" + "x" * 40, "image": "red0.png", "choices": ["r", "b"], "answer": "r"}
    with pytest.raises(EffiLoRAError, match="data, record 4: longer than the model's 20 tokens"):
        grade(model, encoder, [parse_question(asked, "data, record 4")])


def test_smoothed_labels_are_those_of_the_next_token(encoder, tmp_path):
    model, _ = build_vision()
    adapter = attach(model, create_adapter(model, EffiLoRAConfig(rank=2, target_modules=("paper",))))
    args = LanguageTrainingArguments(str(tmp_path), label_smoothing_factor=0.1, use_cpu=True, report_to=[])
    trainer = LanguageTrainer(adapter, Reducer(adapter, 0), {}, model=model, args=args)
    batch = encoder.collate([encoder.encode(talk("<image>which?", "red", image="red0.png"))])
    with torch.no_grad():
        logs = model(**batch).logits[:, :-1].log_softmax(2)
        wanted = batch["labels"][:, 1:]
        learned = [(row, label) for row, label in zip(logs[0], wanted[0], strict=True) if label != IGNORED]
        expected = sum(-0.9 * row[label] - 0.1 * row.mean() for row, label in learned) / len(learned)
        found = trainer.compute_loss(model, dict(batch))
    torch.testing.assert_close(found, expected)


def test_a_damaged_image_is_one_sentence_from_a_loader_s_process_too(place, tmp_path, capsys):
    whole = (place / "images" / "red0.png").read_bytes()
    (place / "images" / "half.png").write_bytes(whole[: len(whole) - 30])
    records = [talk("hi", "a"), talk("<image>", "a", image="half.png")]
    (tmp_path / "half.json").write_text(json.dumps(records))
    told = words(place, tmp_path / "out", train_file=tmp_path / "half.json", dataloader_num_workers=1)
    assert main(told, images=True) == 2
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert said.startswith(f"error: --train_file {tmp_path / 'half.json'}, record 2: the image")


def test_a_damaged_image_that_no_step_has_drawn_costs_no_result(place, tmp_path):
    records = json.loads((place / "train.json").read_text())
    whole = (place / "images" / "red0.png").read_bytes()
    Image.effect_noise((64, 64), 90).convert("RGB").save(place / "images" / "late.png")
    whole = (place / "images" / "late.png").read_bytes()
    (place / "images" / "late.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "late.json").write_text(json.dumps([*records, {**records[0], "image": "late.png"}]))
    steps = {"max_steps": 1, "per_device_train_batch_size": 1}
    for seed in range(20):  # the first seed whose only step draws another record
        output = tmp_path / f"out{seed}"
        told = words(place, output, train_file=tmp_path / "late.json", seed=seed, **steps)
        if main(told, images=True) == 0:
            break
    assert (output / "effilora.safetensors").exists()
    assert (output / "adapter_model.safetensors").exists()


def words(place, output, **options):
    base = {"model_name_or_path": place / "model", "train_file": place / "train.json", "validation_file": place / "held.json",
            "image_folder": place / "images", "output_dir": output, "max_steps": 40, "learning_rate": 2e-2, "rank": 4,
            "per_device_train_batch_size": 4, "use_cpu": True, "report_to": "none", "logging_steps": 1, "disable_tqdm": True,
            "save_strategy": "no"}  # fmt: skip
    return [f"--{name}={value}" for name, value in {**base, **options}.items()]


def test_a_run_learns_to_tell_images_apart(place, tmp_path, capsys):
    assert main(words(place, tmp_path / "out"), images=True) == 0
    content = load_adapter_file(tmp_path / "out" / "effilora.safetensors")
    assert content.metadata["images"] is True
    assert all("language_model" in site.name for site in content.adapter.sites)
    model, encoder = build_vision()[0], ImageEncoder(processor(), place / "images")
    records = json.loads((place / "held.json").read_text())
    wanted = [record["conversations"][-1]["value"] for record in records]
    assert generate_answers(model, encoder, records, 3) != wanted
    load_adapter(model, tmp_path / "out")
    assert generate_answers(model, encoder, records, 3, batch_size=3) == wanted
    capsys.readouterr()
    for name, answer in (("red30.png", "r"), ("white30.png", "w")):
        image = str(place / "images" / name)
        assert cli(["chat", "--adapter", str(tmp_path / "out"), "--image", image, "--prompt", "which?"]) == 0
        assert capsys.readouterr().out.strip() == answer
    question = {"instruction": "<image>which?", "image": "red30.png", "choices": ["r", "b", "g", "w"], "answer": "r"}
    other = {**question, "image": "blue30.png", "answer": "b"}
    (tmp_path / "choices.json").write_text(json.dumps([question, other]))
    data = ["--data", str(tmp_path / "choices.json"), "--image_folder", str(place / "images"), "--json"]
    assert cli(["evaluate", "--adapter", str(tmp_path / "out"), *data]) == 0
    assert json.loads(capsys.readouterr().out)["choices"] == {"questions": 2, "choice": 1.0}
    assert cli(["chat", "--adapter", str(tmp_path / "out"), "--prompt", "which?"]) == 0
    assert capsys.readouterr().out.strip()
    assert cli(["export", str(tmp_path / "out"), str(tmp_path / "merged"), "--format", "merged"]) == 0
    assert (tmp_path / "merged" / "preprocessor_config.json").exists() or (
        tmp_path / "merged" / "processor_config.json"
    ).exists()


def test_a_model_of_images_is_also_asked_without_one(place, tmp_path, monkeypatch):
    assert main(words(place, tmp_path / "out", max_steps=1), images=True) == 0
    asked = []
    monkeypatch.setattr(
        "effilora_diffusion.language.generate.stream_answer",
        lambda model, encoder, record, **options: asked.append(encoder.prompt(record)) or iter(["ok"]),
    )
    assert cli(["chat", "--adapter", str(tmp_path / "out"), "--prompt", "which?"]) == 0
    assert asked == ["<user>which?</s><assistant>"]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"image_folder": "/nowhere"}, "--image_folder /nowhere: no such folder"),
        ({"image_folder": "."}, "can't be used: there is no such file"),
        ({"train_file": "/nowhere.json"}, "--train_file /nowhere.json can't be read"),
        ({"max_length": 3}, "longer than --max_length 3"),
        ({"prompt_template": "chat", "model_name_or_path": "text"}, "is not a vision-language model"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(place, tmp_path, capsys, change, word):
    if "model_name_or_path" in change:
        change = {**change, "model_name_or_path": save(tmp_path / "text")}
    assert main(words(place, tmp_path / "out", **change), images=True) == 2
    said = capsys.readouterr().err.strip()
    assert word in said
    assert "Traceback" not in said
    assert not (tmp_path / "out" / "effilora.safetensors").exists()

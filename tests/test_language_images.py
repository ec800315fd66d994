"""Conversations about images: LLaVA's format as tokens, training on it, talking about an image, what is refused."""

import numpy as np
import pytest
import torch
from conftest import randomise
from PIL import Image
from tiny_language import VOCAB
from tiny_vision import CHAT, VISION_MODELS, build_vision, make_place, processor, talk

from effilora_diffusion import EffiLoRAError, attach, detach, load_adapter
from effilora_diffusion.core import AdapterFile, EffiLoRAConfig, Reducer, save_adapter_file
from effilora_diffusion.core.image_io import load_image
from effilora_diffusion.language.batches import IGNORED
from effilora_diffusion.language.config import LanguageTrainingArguments
from effilora_diffusion.language.generate import generate_answers
from effilora_diffusion.language.images import ImageEncoder, ImageExamples, image_paths
from effilora_diffusion.language.multiple_choice import grade, parse_question
from effilora_diffusion.language.targets import create_adapter
from effilora_diffusion.language.trainer import LanguageTrainer

IMAGE = VOCAB - 1


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("images"))


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
    parts = [{"type": "image"}, {"type": "text", "text": "what"}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"type": "text", "text": "a"}]}]
    assert encoder.encode({"messages": turns, "image": "red0.png"}).ids == marked.ids
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
    with pytest.raises(EffiLoRAError, match="exclude each other"):
        ImageEncoder(processor(), place / "images", "vicuna", chat_template="{{ messages }}")
    own = ImageEncoder(processor(chat=False), place / "images", chat_template=CHAT.replace("MARK", "<image>"))
    assert own.segments(record, "here") == ImageEncoder(processor(), place / "images").segments(record, "here")


def test_every_answer_is_learned_where_the_template_rewrites_earlier_ones(place):
    reader = processor()
    reader.chat_template = reader.chat_template.replace(
        "{{ part['text'] }}",
        "{{ part['text'].split('=')[-1] if m.role == 'assistant' and not loop.last else part['text'] }}",
    ).replace("and not loop.last", "and m != messages[-1]")
    records = [talk("<image>a", "1=2", "b<image>", "3=4", image=["red0.png", "blue0.png"]), talk("hi", "5=6")]
    encoder = ImageEncoder(reader, place / "images")
    data = ImageExamples(records, encoder, "data")
    said = [text_of(encoder, [token for token in item.labels if token != IGNORED]) for item in data]
    assert (said, data.notes) == (["1=2</s>", "3=4</s>", "5=6</s>"], {"split": 1})
    assert [len(item.images.get("pixel_values", ())) for item in data] == [1, 2, 0]
    silent = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]}
    assert len(ImageExamples([silent, records[1]], encoder, "data")) == 1
    with pytest.raises(EffiLoRAError, match="none of its 1 records has an answer to learn"):
        ImageExamples([silent], encoder, "data")


def test_every_conversation_is_looked_at_where_a_template_goes_by_what_is_said(place):
    reader = processor()
    whole, shown = reader.chat_template, "{{ part['text'] }}"
    past = "{{ part['text'].split('</think>')[-1] if m.role == 'assistant' and m != messages[-1] else part['text'] }}"
    reader.chat_template = whole.replace(shown, past)
    plain = [talk("a", "1", "b", "2"), talk("a", "<think>x</think>3", "b", "<think>y</think>4")]
    encoder = ImageEncoder(reader, place / "images")
    said = [
        text_of(encoder, [token for token in item.labels if token != IGNORED])
        for item in ImageExamples(plain, encoder, "d")
    ]
    assert said == ["1</s>2</s>", "<think>x</think>3</s>", "<think>y</think>4</s>"]
    reader.chat_template = whole.replace(shown, "{% if m.role == 'x' %}{% generation %}{{ part['text'] }}{% endgeneration %}"
                                                "{% else %}{{ part['text'] }}{% endif %}")  # fmt: skip
    with pytest.raises(EffiLoRAError, match="none of its 2 records has an answer to learn"):
        ImageExamples([talk("hi", "a"), *plain[:1]], ImageEncoder(reader, place / "images"), "d")


@pytest.mark.parametrize(
    ("record", "word"),
    [
        (talk("<image>", "a", image="none.png"), "none.png' can't be used: there is no such file"),
        (talk("<image>", "a", image="../train.json"), "outside --image_folder"),
        (talk("<image>", "a", image=5), "file name or a list"),
        (talk("<image><image>", "a", image="red0.png"), "2 times <image>, but it names 1"),
        (talk("<image>", "a"), "1 times <image>, but it names 0"),
        (talk("<image>", "", image="red0.png"), "answer is empty"),
        (talk("<image>", image="red0.png"), "it needs an answer"),
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

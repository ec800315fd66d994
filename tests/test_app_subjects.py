"""Several subjects in the web UI: in an adapter that is drawn with, and in the Train tab."""

import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from app_forms import built, by_hand, image_size
from conftest import randomise
from helpers import make_subject

from effilora_diffusion.core import AdapterFile, EffiLoRA, load_adapter_file, save_adapter_file
from effilora_diffusion.core.concepts import Concept
from effilora_diffusion.core.run_folder import plain_names
from effilora_diffusion.diffusion.sampling.leakage import READING, leakage_columns, leakage_prompts
from effilora_diffusion.diffusion.sampling.metadata import read_parameters
from effilora_diffusion.studio.adapter_row import AdapterRow
from effilora_diffusion.studio.runs import Run
from effilora_diffusion.studio.subjects import MOST_SUBJECTS, SubjectsForm, images_note
from effilora_diffusion.studio.tabs.adapters import AdaptersTab
from effilora_diffusion.studio.tabs.compare import CompareTab
from effilora_diffusion.studio.tabs.train import TrainTab


def two_concepts(session, folder):
    """A run's folder with an adapter of two concepts and its plain LoRAs; returns its name."""
    content = load_adapter_file(session.outputs / "cat" / "effilora.safetensors")
    concepts = (Concept("cat", ("sks", "tom"), "a photo of sks cat"), Concept("dog", ("zwx",)))
    config = replace(content.adapter.config, routing="concept", heads=2, concepts=concepts)
    facts = {**content.metadata, "trigger_prompt": "a sks cat"}
    folder.mkdir()
    save_adapter_file(
        folder / "effilora.safetensors", AdapterFile(randomise(EffiLoRA(config, content.adapter.sites)), facts)
    )
    for concept in concepts:
        for name in plain_names(concept.name):
            (folder / name).write_bytes(b"")
    (folder / "pytorch_lora_weights_mine.safetensors").write_bytes(b"")
    return folder.name


def test_an_adapter_of_several_concepts_shows_what_a_prompt_may_name(session):
    name = two_concepts(session, session.outputs / "two")
    slot, tab = AdapterRow(session, 1), built(AdaptersTab, session)
    _, words, insert, triggers = slot.chosen(name)
    assert words == "Several subjects: each appears where the prompt has its trigger."
    assert not insert["visible"]
    assert triggers.raw_samples == [["sks"], ["tom"], ["zwx"]]
    assert slot.put_trigger("a hat", name, ["zwx"]) == "a hat, zwx"
    assert slot.put_trigger("", name, ["zwx"]) == "zwx"
    assert slot.put_trigger("", name, ["tom"]) == "a photo of sks cat"
    assert "__type__" in slot.put_trigger("a zwx hat", name, ["zwx"])
    assert "__type__" in slot.put_trigger("a hat", name, ["fox"])
    assert not slot.chosen("cat")[3].visible
    assert slot.fill("", name) == "a sks cat"
    assert "cat: sks, tom; dog: zwx" in tab.show(name)[0]
    assert "several concepts (cat, dog)" in tab.write(name, "diffusers")[1]
    assert tab.remove(name)[1] == "two is deleted."
    assert [path.name for path in (session.outputs / "two").iterdir()] == ["pytorch_lora_weights_mine.safetensors"]


def test_the_leakage_grid_has_a_row_per_prompt_and_a_column_per_head(session):
    name = two_concepts(session, session.outputs / "two")
    tab, visit = built(CompareTab, session), SimpleNamespace(session_hash="visitor")
    *_, (*_, grid, text, _, _) = tab.draw_leakage(visit, "", name, 1.0, 0, 1, 2.0, 32, 32)
    assert text == READING + " Without a trigger the image is the base's, pixel for pixel."
    rows = ["a photo of sks cat", "zwx", "a photo of sks cat and zwx", "a photo of cat"]
    columns = ["base", "adapter", "sks always", "zwx always"]
    concepts = session.concepts_of(name)
    assert leakage_prompts(concepts) == rows
    assert [column.label for column in leakage_columns(concepts)] == columns
    assert image_size(grid["value"])[1] > 4 * 128
    assert read_parameters(grid["value"])["grid"] == {"kind": "leakage"}
    *_, (*_, refused, _, _) = tab.draw_leakage(visit, "", "cat", 1.0, 0, 1, 2.0, 32, 32)
    assert "no subjects to tell apart" in refused


def subject_fields(*subjects):
    """The fields of the list of subjects, as the page sends them."""
    empty = [None, "", "", "", 1]
    return [value for one in (*subjects, *[empty] * (MOST_SUBJECTS - len(subjects))) for value in one]


def two_subjects(tmp_path):
    found = []
    for number, (trigger, thing) in enumerate((("sks", "cat"), ("zwx", "dog"))):
        files = sorted(map(str, make_subject(tmp_path / thing, 2, first=10 * number).glob("*.png")))
        found.append([files, trigger, f"a photo of {trigger} {thing}", f"a photo of {thing}", 1 + number])
    return found


def test_several_subjects_are_trained_each_with_a_head_of_its_own(session, tmp_path):
    tab = built(TrainTab, session)
    hand = {"max_train_steps": "2", "num_validation_images": 1, "resolution": 32, "validation_inference_steps": "2"}
    fields, advanced = subject_fields(*two_subjects(tmp_path)), by_hand(session, **hand)
    *_, (report, text) = tab.check_several(False, "both", "fast", 2, *fields, *advanced)
    assert text == "Nothing is in the way."
    told = "sks: &#x27;sks&#x27;, 2 images, 33% of the rows<br>zwx: &#x27;zwx&#x27;, 2 images, 67%"
    assert f'<th scope="row">Concepts</th><td>{told}' in report["value"]
    assert '<th scope="row">Class</th><td>no images, the class prompts go with' in report["value"]
    *_, text = tab.begin_several(False, "both", "fast", 2, *fields, *advanced)
    assert text == "both is being trained."
    run = Run(session.outputs, "both")
    while run.running:
        time.sleep(0.2)
    assert run.status().state == "done", run.status().message
    concepts = session.concepts_of("both")
    assert [(one.name, one.class_prompt) for one in concepts] == [("sks", "a photo of cat"), ("zwx", "a photo of dog")]
    assert "zwx: 'zwx'" in run.report()
    assert (session.outputs / "both" / "pytorch_lora_weights_zwx.safetensors").exists()


@pytest.mark.parametrize(
    ("number", "field", "value", "words"),
    [
        (2, 0, None, "subject 2 has no images"),
        (1, 1, "", "subject 1 has no trigger"),
        (2, 2, " ", "subject 2 has no trigger prompt"),
        (2, 2, "a photo of dog", "the trigger prompt of subject 2 does not contain its trigger"),
        (2, 3, "", "subject 2 has no class prompt, others have"),
        (1, 4, 0, "the weight of subject 1 must be a number"),
        (1, 2, "a sks cat with zwx dog", "contains the trigger 'zwx' of subject 2"),
        (2, 1, "SKS", "does not contain its trigger"),
    ],
)
def test_subjects_that_can_not_be_trained_are_refused_in_a_sentence(session, tmp_path, number, field, value, words):
    tab, subjects = built(TrainTab, session), two_subjects(tmp_path)
    subjects[number - 1][field] = value
    *_, text = tab.begin_several(False, "both", "fast", 2, *subject_fields(*subjects), *by_hand(session))
    assert text.startswith("**Not started:**")
    assert words in text
    assert not (session.outputs / "both").exists()
    assert not (session.outputs / "datasets").exists()


def test_images_of_a_subject_that_can_not_be_used_are_named(session, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    good = str(next(make_subject(tmp_path / "cat", 1).glob("*.png")))
    words, anyway = images_note([good, str(tmp_path / "broken.png")])
    assert words.startswith("1 image can be used. **Can't be trained on:** broken.png (")
    assert anyway["visible"]
    assert images_note([good])[0] == "1 image can be used."
    tab, subjects = built(TrainTab, session), two_subjects(tmp_path)
    subjects[1][0] = [str(tmp_path / "broken.png")]
    *_, text = tab.begin_several(False, "both", "fast", 2, *subject_fields(*subjects), *by_hand(session))
    assert "subject 2: an image can't be trained on (broken.png: " in text
    *_, text = tab.begin_several(True, "both", "fast", 2, *subject_fields(*subjects), *by_hand(session))
    assert "subject 2: none of the 1 files" in text
    assert not (session.outputs / "both").exists()


def test_subjects_are_added_and_removed_between_two_and_six():
    assert SubjectsForm.resized(2, 1)[0] == 3
    assert [update["visible"] for update in SubjectsForm.resized(2, 1)[1:]] == [True] * 3 + [False] * 3
    assert SubjectsForm.resized(6, 1)[0] == 6
    assert SubjectsForm.resized(2, -1)[0] == 2

"""The images of the Train tab without a browser: their cards, what blocks a start, captions, masks."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from app_forms import built, by_hand
from helpers import image, make_subject
from PIL import Image

from effilora_diffusion.diffusion.data.images import Preparation
from effilora_diffusion.studio.brought import captions_in, keep, key_of, painted_mask, read_captions, sort_out
from effilora_diffusion.studio.caption_tools import with_word
from effilora_diffusion.studio.tabs.train import TrainTab
from effilora_diffusion.studio.train_form import shown_fields
from effilora_diffusion.studio.training_data import painted_masks

SQUARE = Preparation(32, center_crop=True)


@pytest.fixture
def tab(session):
    return built(TrainTab, session)


def cards_of(tab, files, cards=(), taken=(), how=SQUARE):
    """The cards and the note after files have come."""
    found, note, anyway, taken = tab.images.refresh([str(file) for file in files], list(cards), list(taken), how)
    return {card["name"]: card for card in found}, note, anyway["visible"], taken


def test_every_image_is_a_card_with_its_verdict(tab, tmp_path):
    folder = make_subject(tmp_path / "p", 2, size=(300, 200))
    (folder / "bad.png").write_bytes(b"no image")
    Image.new("RGB", (80, 80)).save(folder / "black.png")
    (folder / "twice.png").write_bytes((folder / "0.png").read_bytes())
    image(4, (20, 20)).save(folder / "tiny.png")
    cards, note, anyway, _ = cards_of(tab, sorted(folder.iterdir()))
    assert {name: card["level"] for name, card in cards.items()} == {
        **dict.fromkeys(("0.png", "1.png"), "good"),
        **dict.fromkeys(("bad.png", "black.png", "tiny.png", "twice.png"), "stop"),
    }
    assert cards["0.png"]["size"] == "300 x 200 px, cut to 32 x 32"
    assert cards["black.png"]["says"] == "Can't be trained on: it is all black"
    assert "the same file as '0.png'" in cards["twice.png"]["says"]
    assert "training at 32 px needs 32 at least" in cards["tiny.png"]["says"]
    kind, content = cards["0.png"]["thumb"].split(",")
    assert kind == "data:image/webp;base64"
    assert Image.open(io.BytesIO(base64.b64decode(content))).size == (224, 149)
    assert note == "6 images, 4 of them can't be trained on."
    assert anyway
    assert str(tmp_path) not in str(cards)


def test_cards_follow_the_settings_that_cut(tab, tmp_path):
    files = [str(path) for path in make_subject(tmp_path / "p", 1, size=(300, 200)).iterdir()]

    def size(**hand):
        return tab.check(files, [], [], "fast", "", *by_hand(tab.session, **hand))[0][0]["size"]

    assert size() == "300 x 200 px, cut to 32 x 32"
    assert size(resolution=64) == "300 x 200 px, cut to 64 x 64"
    assert size(resolution=64, use_aspect_ratio_buckets=True) == "300 x 200 px, cut to 80 x 48"
    assert size(resolution=33) == "300 x 200 px, cut to 32 x 32"  # which the form refuses elsewhere


def test_what_can_not_be_trained_on_blocks_start_and_check_unless_overruled(tab, tmp_path):
    folder = make_subject(tmp_path / "p", 2)
    Image.new("RGB", (80, 80)).save(folder / "black.png")
    files = [str(path) for path in sorted(folder.iterdir())]
    words = (
        "an image can't be trained on (black.png: it is all black): remove or replace it, or tick 'Train with these"
    )
    *_, text = tab.begin(files, [], False, "a sks cat", "dog", "fast", *by_hand(tab.session))
    assert text.startswith(f"**Not started:** {words}")
    *_, (_, text) = tab.check_first(files, [], False, "a sks cat", "dog", "fast", *by_hand(tab.session))
    assert text.startswith(f"**It would not start:** {words}")
    assert not (tab.session.outputs / "datasets").exists()
    *_, (report, text) = tab.check_first(files, [], True, "a sks cat", "dog", "fast", *by_hand(tab.session))
    assert text == "Nothing is in the way."
    assert "black.png" in report["value"]  # told, although it is overruled


def test_files_are_brought_in_several_drops_and_taken_out_again(tab, tmp_path):
    files = [str(path) for path in sorted(make_subject(tmp_path / "p", 3).iterdir())]
    emptied, held = tab.images.added(files[:2], [])
    assert emptied is None
    _, held = tab.images.added(files[1:], held)
    assert held == files
    assert tab.images.without(held, key_of(Path(files[1]))) == [files[0], files[2]]
    assert tab.images.without(held, "../../x") == files


def test_captions_are_read_from_files_of_every_kind(tab, tmp_path):
    folder = make_subject(tmp_path / "p", 4, captions=["a red one\nin two ways", ""])
    (folder / "2.caption").write_text("a blue one")
    (folder / "metadata.csv").write_text("file_name,text\nimages/3.png,a green one\nsome (1).png,lost\n")
    (folder / "nobody.txt").write_text("lost")
    cards, note, _, taken = cards_of(tab, sorted(folder.iterdir()))
    assert [card["caption"] for card in cards.values()] == ["a red one\nin two ways", "", "a blue one", "a green one"]
    assert "3 captions read from files" in note
    assert "Captions without an image of that name: nobody.txt, some (1).png." in note
    again, note, *_ = cards_of(tab, sorted(folder.glob("*.png")), cards.values(), taken)
    assert [card["caption"] for card in again.values()] == [card["caption"] for card in cards.values()]


def test_a_caption_that_was_written_stays(tab, tmp_path):
    folder = make_subject(tmp_path / "p", 2, captions=["a red one", "a blue one"])
    images, files = sorted(folder.glob("*.png")), sorted(folder.iterdir())
    cards, *_ = cards_of(tab, images)
    cards["0.png"]["caption"] = "mine"
    found, note, _, taken = cards_of(tab, files, cards.values())
    assert [card["caption"] for card in found.values()] == ["mine", "a blue one"]
    assert "The caption of 0.png stays as it was written here." in note
    found["1.png"]["caption"] = ""  # taken away by hand: it stays away
    found, *_ = cards_of(tab, files, found.values(), taken)
    assert found["1.png"]["caption"] == ""


def test_a_caption_file_that_can_not_be_read_is_told(tmp_path):
    (tmp_path / "metadata.jsonl").write_text("{")
    (tmp_path / "list.csv").write_text("nothing")
    found, said = read_captions([], [tmp_path / "metadata.jsonl"])
    assert found == {}
    assert said[0].startswith("No captions were read: line 1 of 'metadata.jsonl' is not valid JSON")
    assert (
        "list.csv was not read: its first line must name a column" in read_captions([], [tmp_path / "list.csv"])[1][0]
    )


def test_what_the_page_sends_as_cards_counts_by_its_captions_alone(tmp_path):
    assert captions_in(None) == captions_in("x") == captions_in([1, None]) == {}
    files = sort_out([str(path) for path in make_subject(tmp_path / "p", 2).iterdir()])
    sent = [{"key": "../../etc/passwd", "caption": "x"}, {"key": key_of(files.images[0]), "caption": " a cat "}]
    keep(files, sent, tmp_path / "data")
    texts = [path.read_text() for path in (tmp_path / "data").glob("*.txt")]
    assert texts == ["a cat"]
    assert len(list((tmp_path / "data").iterdir())) == 3


def test_all_captions_are_changed_at_once(tab):
    cards = [{"key": "a", "caption": "on a sofa"}, {"key": "b", "caption": "sks dog, outside\nat home"}, {"key": "c"}]
    found, said = tab.images.tools.put_in_front(cards, " sks  dog ")
    assert [one["caption"] for one in found] == ["sks dog, on a sofa", "sks dog, outside\nsks dog, at home", ""]
    assert said == "2 captions changed."
    found, said = tab.images.tools.replace(found, "sks", "zwx")
    assert found[0]["caption"] == "zwx dog, on a sofa"
    assert tab.images.tools.replace(found, "sks", "x")[1] == "0 captions changed."
    assert tab.images.tools.replace(found, "", "x")[1] == "Enter the text that is to be replaced."
    assert tab.images.tools.put_in_front([{"key": "c", "caption": ""}], "sks")[1].startswith("There are no captions")
    assert with_word("sks dog", "sks dog") == "sks dog"


def test_a_closer_look_shows_what_the_trainer_cuts(tab, tmp_path):
    files = [str(path) for path in make_subject(tmp_path / "p", 1, size=(80, 40)).iterdir()]
    _, words, cut, key = tab.images.closer.look(files, key_of(Path(files[0])), SQUARE)
    assert words == "**0.png**: 32 x 32 px are trained on: the middle; 50% of the image is cut off."
    assert cut.size == (256, 256)
    assert tab.images.closer.edit(files, key)["background"].size == (80, 40)
    assert tab.images.closer.edit(files, "") is None
    random = tab.images.closer.look(files, key, Preparation(32))[1]
    assert "a place that changes at random" in random
    _, words, cut, *_ = tab.images.closer.look(files, "0.png", SQUARE)
    assert (words, cut) == (
        "**Not shown:** this image is no longer among those of the form: choose another one",
        None,
    )


def test_a_painted_mask_goes_with_its_image(tab, tmp_path):
    files = [str(path) for path in sorted(make_subject(tmp_path / "p", 2, size=(80, 40)).iterdir())]
    key, closer = key_of(Path(files[0])), tab.images.closer
    layer = Image.new("RGBA", (80, 40), (0, 0, 0, 0))
    assert "nothing is painted" in closer.keep_mask(files, key, {"layers": [layer]})[0]
    assert "nothing is painted" in closer.keep_mask(files, key, None)[0]
    layer.paste((255, 0, 0, 255), (10, 10, 30, 30))
    assert closer.keep_mask(files, key, {"layers": [layer]}) == (
        "Mask of 0.png saved: only what is painted is learned.",
        True,
    )
    cards, *_ = cards_of(tab, files)
    assert [card["size"].endswith("with a mask") for card in cards.values()] == [True, False]
    (shown,) = closer.edit(files, key)["layers"]
    assert np.asarray(shown)[..., 3].mean() == 255 / 8
    keep(sort_out(files), [], tmp_path / "data", painted_masks(tab.session))
    mask = np.asarray(Image.open(tmp_path / "data" / "000-0.mask.png"))
    assert (mask.shape, mask[20, 20], mask[5, 5], mask.mean()) == ((40, 80), 255, 0, 255 / 8)
    hand = by_hand(tab.session, masked_loss=True)
    *_, (report, text) = tab.check_first(files, [], False, "a sks cat", "dog", "fast", *hand)
    assert (text, "1 of the images, weight 0 outside" in report["value"]) == ("Nothing is in the way.", True)
    assert closer.erase_mask(files, key).startswith("Mask removed")
    assert not painted_mask(Path(files[0]), painted_masks(tab.session)).exists()
    assert closer.erase_mask(files, key) == "This image has no mask."


def test_a_mask_that_was_brought_goes_with_its_image(tmp_path):
    folder = make_subject(tmp_path / "p", 2)
    Image.new("L", (32, 32), 255).save(folder / "1.mask.png")
    brought = sort_out([str(path) for path in sorted(folder.iterdir())])
    assert [path.name for path in brought.images] == ["0.png", "1.png"]
    keep(brought, [], tmp_path / "data")
    assert (tmp_path / "data" / "001-1.mask.png").is_file()


def test_numbers_that_are_missing_are_named(tab, tmp_path):
    files = [str(path) for path in make_subject(tmp_path / "p", 2).iterdir()]
    names = [entry.name for entry in shown_fields()]
    advanced = by_hand(tab.session)
    advanced[names.index("rank")] = None
    *_, text = tab.begin(files, [], False, "a sks cat", "dog", "fast", *advanced)
    assert text == "**Not started:** fill in every number: Rank: size of the adapter is empty (--rank)"

"""Words of others on the page of the web UI: shown as they are, never as markup, and never the end of a request."""

import argparse
import json
import shutil

import gradio as gr
import pytest
from gradio_client import Client
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from effilora_diffusion import EffiLoRAError
from effilora_diffusion.core import AdapterFile, load_adapter_file, save_adapter_file
from effilora_diffusion.studio.adapter_row import AdapterRow
from effilora_diffusion.studio.runs import Run
from effilora_diffusion.studio.server import make_page, serve
from effilora_diffusion.studio.tabs.adapters import AdaptersTab
from effilora_diffusion.studio.tabs.generate import GenerateTab
from effilora_diffusion.studio.tabs.inspect import InspectTab
from effilora_diffusion.studio.tabs.runs import RunsTab
from effilora_diffusion.studio.words import clean, one_line, plain_words

ODD = {
    "half a letter": "a\ud800b\udfff", "control": "a\x1b[31mred\x00\x07\x9b2J",
    "direction": "a\u202ecba\u2066", "lines": "a\n# b\r\n\u2028c",
    "400 digits": int("9" * 400), "minus 400 digits": -int("9" * 400),
    "list": ["a", {"b": [None]}], "dictionary": {"a": {"b": 1}},
    "true": True, "none": None, "number": 1e308, "long": "x" * 100_000, "500 letters": "x" * 500,
    "markup": "<img src=x onerror=alert(1)> **a** ![b](http://c.example/d)",
    "formula": "$$\\frac{1}{2}$$ $a$", "address": "www.evil.example a@evil.example https://evil.example/x", "empty": "",
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a [b](http://c.example)", "a [b] (http: //c.example)"),
        ("see www.a.example and WWW.b.example", "see www&#46;a.example and WWW&#46;b.example"),
        ("write to a@b.example; cat @ 500", "write to a&#64;b.example; cat @ 500"),
        ("_a_ snake_case --max_train_steps ~~b~~", "&#95;a&#95; snake_case --max_train_steps &#126;&#126;b&#126;&#126;"),
        ("# a", "&#35; a"), ("- a", "&#45; a"), ("12. a", "&#49;2. a"), ("---", "&#45;--"), ("[a]: b", "&#91;a]: b"),
        ("&lt;b&gt; <i>", "&amp;lt;b&amp;gt; ‹i›"),
        ("`a` *b* | c \\d", "\\`a\\` \\*b\\* / c \\\\d"), ("--seed must be", "--seed must be"),
        ("a\x1b[31m\ud800\u202eb\tc\nd", "a[31mb c d"), ("👩\u200d🚀 שלום naïve 日本", "👩\u200d🚀 שלום naïve 日本"),
    ],
)  # fmt: skip
def test_words_are_shown_as_they_are(text, shown):
    assert plain_words(text) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/srv/effilora/outputs/cat/x.safetensors: damaged", "x.safetensors: damaged"),
        ("[Errno 2] No such file: '/home/ann/a.png'", "[Errno 2] No such file: 'a.png'"),
        ("C:\\Users\\ann\\cat.png can't be read", "cat.png can't be read"), ("\\\\host\\share\\cat.png", "\\cat.png"),
        ("1/2 of a/b and 3 / 4, https://a.example/b/c", "1/2 of a/b and 3 / 4, https://a.example/b/c"),
    ],
)  # fmt: skip
def test_errors_name_files_without_folders(text, shown):
    assert one_line(EffiLoRAError(text)) == shown


def built(kind, session):
    with gr.Blocks():
        tab = kind(session)
        tab.build()
    return tab


def odd_adapter(session, name, value):
    """An adapter whose metadata are all ``value``."""
    content = load_adapter_file(session.outputs / "cat" / "effilora.safetensors")
    keys = ("trigger_prompt", "base_model", "steps", "images", "export_error", "component", "base_hash", "base_dtype")
    path = session.uploads / f"{name}.safetensors"
    save_adapter_file(path, AdapterFile(content.adapter, dict.fromkeys(keys, value), content.calibration))
    return path


def check_text(*texts):
    for text in texts:
        assert all(letter.isprintable() or letter in "\n\u200d" for letter in text)
        json.dumps(text).encode()
        text.encode()  # no half of a letter
        for mark in ("<img", "](", "://", "www.", "a@"):
            assert mark not in text


def test_odd_metadata_end_no_request_and_reach_no_terminal(session, capfd):
    for name, value in ODD.items():
        odd_adapter(session, name, value)
    adapters, inspect, row = built(AdaptersTab, session), built(InspectTab, session), AdapterRow(session, 1)
    for name in ODD:
        card, _ = adapters.show(name)
        assert "rank 4, 3 heads" in card, name
        assert len(card) < 4000, name
        check_text(
            card, row.chosen(name)[1], str(row.fill("", name)) if name != "address" and name != "markup" else ""
        )
        assert "How much each layer changes" in inspect.show(name)[0]
        said = adapters.bring(str(session.uploads / f"{name}.safetensors"))[1]
        assert said == f"This file is here already, as {name}: nothing was added."
    assert adapters.found("", None).count("<img") == 1  # the sample of the run
    make_page(session)
    assert "\x1b[31m" not in "".join(capfd.readouterr())


def test_odd_metadata_end_no_call(place, tmp_path):
    shutil.copytree(place / "outputs", tmp_path / "outputs")
    args = argparse.Namespace(
        mixed_precision="no", model=str(place / "model"), outputs=tmp_path / "outputs", port=None,
        listen=False, allowed_host=[], models=None
    )  # fmt: skip
    page = serve(args, block=False)
    try:
        session = argparse.Namespace(outputs=tmp_path / "outputs", uploads=tmp_path / "outputs" / "adapters")
        for name, value in ODD.items():
            odd_adapter(session, name, value)
        found = {
            entry["name"]: entry for entry in Client(page.local_url, verbose=False).predict(api_name="/list_adapters")
        }
        assert set(found) == {*ODD, "cat"}
        assert found["control"]["trigger_prompt"] == clean(ODD["control"]) == "a[31mred2J"
        assert found["none"]["trigger_prompt"] is None
        assert found["400 digits"]["trigger_prompt"] is None  # no text
        assert len(found["500 letters"]["trigger_prompt"]) == 300
    finally:
        page.close()


def test_odd_parameters_of_images_end_no_request(session, tmp_path):
    tab = built(GenerateTab, session)
    (file,) = (
        event for event in session.draw(session.usual("a cat", [], 0), preview_every=0) if not hasattr(event, "step")
    )
    usual = json.loads(Image.open(file).text["effilora"])
    for key in (
        "prompt",
        "negative_prompt",
        "seed",
        "num_inference_steps",
        "guidance_scale",
        "width",
        "height",
        "adapters",
    ):
        for name, value in ODD.items():
            text = json.dumps({**usual, key: [{"file": value, "strength": 1}] if key == "adapters" else value})
            for chunk in ("effilora", "parameters"):  # where it is, and where earlier versions had it
                info = PngInfo()
                info.add_itxt(chunk, text)
                Image.new("RGB", (8, 8)).save(tmp_path / "x.png", pnginfo=info)
                *values, status = tab.read_upload(str(tmp_path / "x.png"))
                check_text(status)
                if "Not read" not in status:
                    for one in values:
                        component = str(one)
                        component.encode()
                        assert not isinstance(one, int) or abs(one) < 2**63, (key, name)


def test_no_component_makes_formulas(session):
    page = make_page(session)
    texts = [block for block in page.blocks.values() if isinstance(block, gr.Markdown)]
    assert len(texts) > 5
    assert all(block.latex_delimiters == [] for block in texts)


def test_errors_on_the_page_name_no_folder_of_the_server(session, tmp_path):
    adapters, runs = built(AdaptersTab, session), built(RunsTab, session)
    (tmp_path / "cut.safetensors").write_bytes((session.outputs / "cat" / "effilora.safetensors").read_bytes()[:-100])
    text = adapters.bring(str(tmp_path / "cut.safetensors"))[1]
    assert text.startswith("**Not taken:** cut.safetensors")
    folder = session.outputs / "failed"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"pid": 1, "born": 0}))
    (folder / "exit_code").write_text("2")
    (folder / "training.log").write_text(f"error: {tmp_path}/images/a.png is damaged \x1b[31m\n")
    assert Run(session.outputs, "failed").status().message == "Training failed: a.png is damaged [31m"
    (session.outputs / "cat" / "effilora.safetensors").write_bytes(b"damaged")
    for said in (text, runs.look("failed")[0], runs.look("cat")[0], adapters.show("cat")[0]):
        assert str(tmp_path) not in said
        assert "damaged" in said or "readable" in said
    (session.outputs / "\udcff").mkdir()
    (session.outputs / "\udcff" / "metrics.jsonl").touch()
    shutil.copyfile(session.uploads.parent / "cat" / "config.yaml", session.uploads / "a\x1bb.safetensors")
    assert "\udcff" not in [name for _, name in runs.names()]
    assert "a\x1bb" not in session.adapters()

"""Styles: A1111's table of words around prompts, in the form and on the command line."""

import csv

import gradio as gr
import pytest
from test_app_generate import VISIT, built, form
from test_app_generate import drawn as generated

from effilora_diffusion import EffiLoRAError, cli
from effilora_diffusion.diffusion.sampling.metadata import read_parameters
from effilora_diffusion.diffusion.sampling.styles import STYLES, Style, read_styles, save_style, with_styles
from effilora_diffusion.studio.styles_form import StylesForm

OF_A1111 = """\ufeffname,prompt,negative_prompt
None,,
------- art -------,,
poster,"poster of {prompt}, flat, bold","photo, blurry"
soft,soft light,
no photo,,photo
"two
lines","first,
second",""
"""


@pytest.fixture
def table(tmp_path):
    path = tmp_path / STYLES
    path.write_text(OF_A1111, encoding="utf-8")
    return path


def test_the_table_of_a1111_is_read(table, tmp_path):
    found = read_styles(table)
    assert list(found) == ["poster", "soft", "no photo", "two\nlines"]
    assert with_styles("a fox", "", [found["poster"], found["soft"]]) == (
        "poster of a fox, flat, bold, soft light",
        "photo, blurry",
    )
    assert with_styles("a fox", "dark", [found["no photo"]]) == ("a fox", "dark, photo")
    assert with_styles("", "", [found["soft"]]) == ("soft light", "")
    assert read_styles(tmp_path / "none.csv") == {}
    (tmp_path / "old.csv").write_text("name,text\nsoft,soft light\n")
    assert read_styles(tmp_path / "old.csv") == {"soft": Style("soft", "soft light")}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff\xfe\x00", "can't be read"),
        (b"a,b\n1,2\n", "must have the columns name, prompt, negative_prompt"),
        (b"name,prompt,negative_prompt\ncat,a cat, fluffy, sweet, grey\n", "row 2 .* put words with commas in quotes"),
        (b'name,prompt\nlong,"' + b"x" * 200_000 + b'"\n', "no CSV table: field larger"),
        (b"name,prompt\n" + b"x" * (4 << 20), "larger than 4 MB"),
    ],
)
def test_what_is_no_table_is_told(tmp_path, content, said):
    (tmp_path / STYLES).write_bytes(content)
    with pytest.raises(EffiLoRAError, match=said):
        read_styles(tmp_path / STYLES)
    with pytest.raises(EffiLoRAError, match=said):
        save_style(tmp_path / STYLES, Style("new", "words"))
    assert (tmp_path / STYLES).read_bytes() == content


def test_saving_leaves_all_else_as_it_is(table, tmp_path):
    save_style(table, Style("comma", 'a "b", c\nd', "{prompt}"))
    save_style(table, Style("soft", "softer"))
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["name", "prompt", "negative_prompt"]
    divided = ["None", "------- art -------", "poster", "soft", "no photo", "two\nlines", "comma"]
    assert [row[0] for row in rows[1:]] == divided
    assert (rows[4], rows[7]) == (["soft", "softer", ""], ["comma", 'a "b", c\nd', "{prompt}"])
    more = tmp_path / "more.csv"
    more.write_text("name,text,tag\nsoft,soft light,7\n")
    save_style(more, Style("poster", "flat", "photo"))
    assert more.read_text() == "name,text,tag,negative_prompt\nsoft,soft light,7,\nposter,flat,,photo\n"
    for empty, said in ((Style(" ", "words"), "no name"), (Style("x", " "), "no words")):
        with pytest.raises(EffiLoRAError, match=said):
            save_style(table, empty)


def test_the_form_puts_styles_around_every_prompt(session):
    tab = built(session)
    (session.outputs / STYLES).write_text(OF_A1111, encoding="utf-8")
    values = [*form(prompt="a fox\n\na rose"), None, 0.6, ["poster", "soft"], True]
    asked = tab.requests(*values)
    assert [one.prompt for one in asked] == [
        f"poster of {what}, flat, bold, soft light" for what in ("a fox", "a rose")
    ]
    assert {one.negative_prompt for one in asked} == {"photo, blurry"}
    _, (image,) = generated(tab, prompt="a fox")
    assert image["prompt"] == "a fox"
    *_, last = tab.draw(VISIT, *[*form(prompt="a fox"), None, 0.6, ["gone"], False])
    assert "there is no style 'gone'" in last[tab.status]
    length, _ = tab.told("a fox", False, ["poster"], "none", 1.0, True)
    assert int(length.split()[0]) > int(tab.told("a fox", False, [], "none", 1.0, True)[0].split()[0])
    assert tab.told("a fox", False, ["gone"], "none", 1.0, True)[0].startswith("**there is no style")


def test_the_prompts_are_saved_as_a_style(session):
    with gr.Blocks():
        part = StylesForm(session)
        part.build()
    choice, name, note = part.keep(" poster\n", "poster of {prompt}", "photo")
    assert (choice["choices"], name, note) == (["poster"], "", "Saved as poster.")
    assert part.keep("", "a", "")[2].startswith("**Not saved:** the style has no name")
    (session.outputs / STYLES).write_text("nothing")
    choices, note = part.refresh()
    assert choices["choices"] == []
    assert "must have the columns" in note


def test_the_command_takes_styles(place, table, tmp_path, capsys):
    command = ["generate", "--model", str(place / "model"), "--outputs", str(tmp_path), "--num_inference_steps", "1",
               "--width", "32", "--height", "32", "--prompt", "a fox", "--output", str(tmp_path / "x.png")]  # fmt: skip
    cli.main([*command, "--style", "poster"])
    assert read_parameters(tmp_path / "x.png")["prompt"] == "poster of a fox, flat, bold"
    assert cli.main([*command, "--style", "postr"]) == 2
    assert "there is no style 'postr': there are poster, soft, no photo, two lines\n" in capsys.readouterr().err

"""The page of a run and the page of several: self-contained, complete, and true in light and dark, wide and narrow."""

import json
import re
import shutil

import pytest
from helpers import make_subject, trainer
from playwright.sync_api import sync_playwright
from tiny_judges import dino
from visits import executable

from effilora_diffusion.cli import main
from effilora_diffusion.core.errors import EffiLoRAError
from effilora_diffusion.diffusion.report.charts import Curve, chart, smoothed, thinned, ticks
from effilora_diffusion.diffusion.report.compare import write_comparison
from effilora_diffusion.diffusion.report.run import read_run

HOSTILE = 'a sks <script>alert(1)</script> & "cat"'
RUN = {
    "max_train_steps": 4,
    "checkpointing_steps": 2,
    "validation_steps": 2,
    "reducer": "importance",
    "reducer_warmup": 1,
    "reducer_interval": 1,
    "learning_rate": 1e-2,
    "instance_prompt": HOSTILE,
}


@pytest.fixture(scope="module")
def runs(tiny_pipeline, tmp_path_factory):
    """Two runs on the same images; the first has a judge, and the bytes of its page at step 2."""
    folder = tmp_path_factory.mktemp("report")
    subject, judge = make_subject(folder / "subject", captions=["a caption of its own"]), dino(folder / "judge")
    one = trainer(tiny_pipeline, subject, folder / "one", judge=str(judge), **RUN)
    early, write = {}, one.examiner.write_page

    def writing(last=False):
        write(last)
        early.setdefault(one.step, (folder / "one" / "report.html").read_text(encoding="utf-8"))

    one.examiner.write_page = writing
    one.run()
    trainer(tiny_pipeline, subject, folder / "two", **{**RUN, "learning_rate": 2e-2, "seed": 1}).run()
    return folder, early


def text_of(page):
    return re.sub(r"<[^>]+>", " ", re.sub(r"data:image/webp;base64,[\w+/=]+", "IMAGE", page))


def test_the_page_is_written_at_every_validation_and_at_the_end(runs):
    folder, early = runs
    assert "step 2 of 4, not finished" in text_of(early[2])
    assert "step 4" not in text_of(early[2])
    last = (folder / "one" / "report.html").read_text(encoding="utf-8")
    assert ": finished." in text_of(last)
    assert "step 4" in text_of(last)


def test_the_page_has_curves_scores_samples_layers_images_settings_and_files(runs):
    folder = runs[0]
    page = (folder / "one" / "report.html").read_text(encoding="utf-8")
    words = text_of(page)
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings == [
        "Training",
        "Scores of the checkpoints",
        "Samples",
        "Active layers",
        "Images",
        "Settings",
        "Files",
    ]
    best = json.loads((folder / "one" / "best.json").read_text())
    assert f"Best by likeness and drift: step {best['step']}" in words
    lines = [json.loads(line) for line in (folder / "one" / "scores.jsonl").read_text().splitlines()]
    assert all(f"Drift, step {line['step']}: " in page for line in lines)
    assert page.count("<polyline") >= 8
    assert page.count("data:image/webp;base64,") == 3 + 3 + 2, "grids, images, before and after, plain LoRA"
    assert "a caption of its own" in words
    assert re.search(r"learning_rate\s+0\.01", words)
    assert "pytorch_lora_weights.safetensors" in words
    assert "load_adapter(pipe," in words
    assert "one@2" in words


def test_nothing_on_the_page_is_run_or_fetched(runs):
    page = (runs[0] / "one" / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert not re.findall(r"(?:src|href)=[\"'](?!data:)", page)
    assert "url(" not in page
    assert "default-src 'none'" in page


@pytest.mark.parametrize("name", ["one/report.html", "both.html"])
def test_the_pages_fit_every_screen_and_ask_nobody_for_anything(runs, name):
    folder = runs[0]
    if name == "both.html":
        write_comparison([folder / "one", folder / "two"], folder / name)
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=executable(), args=["--no-sandbox", "--disable-gpu"])
        colours = set()
        for scheme in ("light", "dark"):
            for width in (1440, 390):
                page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
                asked, said = [], []
                page.on("request", lambda request, asked=asked: asked.append(request.url))
                page.on("console", lambda message, said=said: said.append(message.text))
                page.goto((folder / name).as_uri())
                assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
                assert page.evaluate("[...document.images].every(one => one.complete && one.naturalWidth > 0)")
                assert [url for url in asked if not url.startswith("data:")] == [(folder / name).as_uri()]
                assert said == []
                colours.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
                page.close()
        assert len(colours) == 2
        browser.close()


def test_the_page_of_an_old_run_is_written_again_and_nobody_else_s_file_is_touched(runs, tmp_path, capsys):
    old = tmp_path / "old"
    shutil.copytree(runs[0] / "one", old)
    first = (old / "report.html").read_text(encoding="utf-8")
    for name in ("report.html", "scores.jsonl", "best.json"):
        (old / name).unlink()
    assert main(["report", str(old)]) == 0
    assert capsys.readouterr().out.strip() == str(old / "report.html")
    again = (old / "report.html").read_text(encoding="utf-8")
    assert "Scores of the checkpoints" not in again
    assert [one for one in re.findall(r"<h2>(.*?)</h2>", first) if not one.startswith("Scores")] == re.findall(
        r"<h2>(.*?)</h2>", again
    )
    record = json.loads((old / ".run.json").read_text())
    (old / ".run.json").write_text(
        json.dumps({**record, "written": [n for n in record["written"] if n != "report.html"]})
    )
    assert main(["report", str(old)]) == 2
    assert "is not this run's" in capsys.readouterr().err
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no image run" in capsys.readouterr().err


def test_a_run_without_its_images_or_with_damaged_logs_still_has_a_page(runs, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(runs[0] / "two", old)
    config = (old / "config.yaml").read_text().replace(str(runs[0] / "subject"), str(tmp_path / "gone"))
    (old / "config.yaml").write_text(config)
    with (old / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": NaN}\n{"step": "x"}\n[1]\n{"step": 6, "lo')
    (old / "samples" / "step-000002.png").write_bytes(b"no image")
    assert main(["report", str(old)]) == 0
    page = (old / "report.html").read_text(encoding="utf-8")
    assert "They are not where the settings say they were." in page
    assert "nan" not in text_of(page).lower()


def test_runs_are_compared_by_settings_curves_samples_and_figures(runs, tmp_path, capsys):
    folder = runs[0]
    assert main(["compare", str(folder / "one"), str(folder / "two"), "--output", str(tmp_path / "c.html")]) == 0
    page = (tmp_path / "c.html").read_text(encoding="utf-8")
    words = " ".join(text_of(page).split())
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["Figures", "Settings that differ", "Curves", "Samples"]
    assert re.search(r"learning_rate 0\.01 0\.02 ", words)
    assert re.search(r"seed 0 1 ", words)
    assert "output_dir" not in words
    assert "resolution" not in words.split("Settings that differ")[1].split("Curves")[0]
    assert page.count("data:image/webp;base64,") == 4, "the last grids, and those of step 2"
    assert main(["compare", str(folder / "one"), "--output", str(tmp_path / "c.html")]) == 2
    assert "give 2 to 8 runs" in capsys.readouterr().err
    (tmp_path / "mine.html").write_text("mine")
    with pytest.raises(EffiLoRAError, match="no comparison"):
        write_comparison([folder / "one", folder / "two"], tmp_path / "mine.html")
    assert (tmp_path / "mine.html").read_text() == "mine"


def test_curves_keep_their_shape():
    points = [(step, float(step % 2)) for step in range(1, 2001)]
    assert len(thinned(points, 500)) == 500
    assert thinned(points, 500)[-1] == (2000, 0.5)
    assert abs(smoothed(points)[-1][1] - 0.5) < 0.05
    assert smoothed([(1, 3.0)]) == [(1, 3.0)]
    assert ticks(0, 1) == [0, 0.25, 0.5, 0.75, 1]
    assert chart("empty", [Curve("none", [])]) == ""
    flat = chart("flat", [Curve("one", [(1, 2.0), (2, 2.0)])])
    assert "nan" not in flat
    assert flat.count("<polyline") == 1


def test_a_run_is_read_from_its_folder_alone(runs):
    run = read_run(runs[0] / "one")
    assert (run.name, run.step, run.finished, run.checkpoints, sorted(run.samples)) == (
        "one",
        4,
        True,
        [2, 4],
        [0, 2, 4],
    )
    assert run.changed()["learning_rate"] == 0.01
    assert (
        not {"a_sharing", "loss_type", "caption_separator", "bucket_no_upscale", "token_abstraction"}
        & run.changed().keys()
    )

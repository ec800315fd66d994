"""What people do with training runs in the web UI, on the embedded base: start, queue, watch, stop, choose, use, delete."""

import json
import os
import re
import shutil
import signal

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect
from visits import browser, served, settle, visit  # noqa: F401 (fixtures)

from effilora_diffusion.core.run_folder import RunFolder
from effilora_diffusion.diffusion.training.checkpoints import IMAGE_RUN
from effilora_diffusion.diffusion.training.example import example_settings
from effilora_diffusion.studio.runs import Run

SHORT = {"long": {"max_train_steps": "12", "train_batch_size": "2"}, "samples": {"num_validation_images": "1"},
         "expert": {"validation_inference_steps": "4", "export_distillation_steps": "2"}}  # fmt: skip


def accessible(page):
    """Nothing on the page shuts out who can't see or point."""
    settle(page)
    found = Axe().run(page).response["violations"]
    assert [(issue["id"], [node["target"] for node in issue["nodes"]]) for issue in found] == []


def start(one, name):
    """Start a training of the name in the form."""
    one.fill("#train-name", name)
    one.page.locator("#train-start").click()


def test_trainings_wait_are_rearranged_and_start_by_themselves(visit, served):
    by_hand = RunFolder(served[1] / "by hand", IMAGE_RUN)
    by_hand.claim(overwrite=False, checkpoint=None)  # as a trainer of the command line does
    one = visit()
    page = one.page
    one.tab("Train")
    page.locator("#train-example").click()
    expect(page.locator("#train-prompt textarea, #train-prompt input").first).to_have_value("an emoji of sks cat")
    for group, values in SHORT.items():
        page.locator(f"#train-{group} > button").click()
        for name, value in values.items():
            one.fill(f"#train-{name}", value)
    for number, name in enumerate(("first", "second", "third"), 1):
        start(one, name)
        one.says("#train-note", f"{name} waits in the queue, as number {number}")
    page.locator("#train-go").click()
    expect(page.locator("#runs-which input")).to_have_value(re.compile("third"))
    one.says("#runs-status", "Number 3 in the queue")
    one.says("#runs-queue-status", "Now training: by hand. 3 wait.")
    page.get_by_label("3. third, 12 steps").check()
    page.locator("#runs-up").click()
    page.get_by_label("2. third, 12 steps").wait_for()
    page.locator("#runs-up").click()
    page.get_by_label("1. third, 12 steps").wait_for()
    page.get_by_label("2. first, 12 steps").check()
    page.locator("#runs-remove").click()
    page.get_by_label("2. second, 12 steps").check()
    page.locator("#runs-remove").click()
    one.says("#runs-queue-status", "Now training: by hand. 1 waits.")
    accessible(page)
    one.shot("runs-queue")

    one.reload()  # the queue is on the disk
    by_hand.release()
    one.tab("Runs")
    one.says("#runs-queue-status", "Now training: third.")
    one.choose("#runs-which", "third (training)")
    expect(page.locator("#runs-progress")).to_contain_text(re.compile(r"Step \d+ of 12, loss"))
    one.says("#runs-status", "Done: the adapter third can be used.")
    expect(page.locator("#runs-stop")).to_be_disabled()


def test_the_best_checkpoint_is_used_and_the_run_is_gone_on_with_renamed_and_deleted(visit, served):
    folder = shutil.copytree(served[1] / "cat", served[1] / "scored")
    lines = [{"step": step, "likeness": like, "drift": 0.1, "loss": 0.5} for step, like in ((6, 0.8), (12, 0.5))]
    (folder / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    one = visit()
    page = one.page
    one.tab("Runs")
    one.choose("#runs-which", "scored")
    expect(page.locator("#runs-scores tr.best")).to_contain_text("6 (best)")
    expect(page.locator("#runs-samples img").first).to_be_visible()
    page.locator("#runs-log-scale input").check()
    accessible(page)
    one.shot("runs")
    one.choose("#runs-checkpoint", "Step 6 (best)")
    page.locator("#runs-use").click()
    expect(page.locator("#adapter-1 input").first).to_have_value("scored @ 6")
    expect(page.locator("#prompt textarea")).to_have_value("an emoji of sks cat")

    one.tab("Runs")
    page.locator("#runs-continue").click()
    one.says("#train-note", "The form holds the settings of scored")
    expect(page.locator("#train-name textarea, #train-name input").first).to_have_value("scored 2")
    expect(page.locator("#train-cards .image-card")).to_have_count(5)
    page.locator("#train-long > button").click()
    expect(page.locator("#train-max_train_steps textarea, #train-max_train_steps input").first).to_have_value("12")

    one.tab("Runs")
    page.locator("#runs-page > button").click()
    expect(page.frame_locator("#runs-page iframe").locator("h1")).to_have_text("cat")
    page.locator("#runs-manage > button").click()
    one.fill("#runs-new-name", "chosen")
    page.locator("#runs-rename").click()
    one.says("#runs-note", "scored is now named chosen.")
    page.locator("#runs-delete").click()
    one.says("#runs-question", "Delete chosen: its adapter, 2 checkpoints")
    accessible(page)
    page.locator("#runs-keep").click()
    expect(page.locator("#runs-question")).not_to_be_visible()
    assert (served[1] / "chosen").exists()
    page.locator("#runs-delete").click()
    page.locator("#runs-really").click()
    one.says("#runs-note", "chosen is deleted.")
    assert not (served[1] / "chosen").exists()


def test_a_run_is_stopped_resumed_and_a_crash_is_told(visit, served):
    settings = {**example_settings(), "with_prior_preservation": False, "class_data_dir": None, "max_train_steps": 400,
                "num_validation_images": 0, "checkpointing_steps": 5}  # fmt: skip
    run = Run(served[1], "long run")
    run.start(settings)
    one = visit()
    page = one.page
    one.tab("Runs")
    one.choose("#runs-which", "long run (training)")
    expect(page.locator("#runs-progress")).to_contain_text(re.compile(r"Step [1-9]\d* of 400"))
    expect(page.locator("#runs-resume")).to_be_disabled()
    page.locator("#runs-stop").click()
    one.says("#runs-note", "Stopping after this step")
    one.says("#runs-status", "Stopped; its checkpoint is written.")
    expect(page.locator("#runs-stop")).to_be_disabled()
    reached = run.status().step
    page.locator("#runs-resume").click()
    one.says("#runs-status", "Training.")
    expect(page.locator("#runs-progress")).to_contain_text(re.compile(rf"Step (?!{reached} )\d+ of 400"))
    run_group = json.loads((run.folder / "run.json").read_text())["pid"]
    os.killpg(os.getpgid(run_group), signal.SIGKILL)
    one.says("#runs-status", "Training was killed.")
    page.locator("#runs-log > button").click()
    expect(page.locator("#runs-log textarea")).to_have_value(re.compile("stopping after this step"))
    shutil.rmtree(run.folder)

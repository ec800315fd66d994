"""Trainings over HTTP: started, queued, watched and stopped by programs, and bad requests that change nothing."""

import argparse
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from gradio_client import Client, handle_file
from helpers import make_subject

from benchmarks.hostile_images import IMAGES
from effilora_diffusion.core.run_folder import RunFolder
from effilora_diffusion.diffusion.training.checkpoints import IMAGE_RUN
from effilora_diffusion.studio.server import serve

PATIENCE = 600
DOCS = Path(__file__).parents[1] / "docs" / "app.md"

QUICK = {"instance_prompt": "a sks cat", "max_train_steps": 2, "num_validation_images": 0, "with_prior_preservation": False,
         "train_batch_size": 1, "export_distillation_steps": 1}  # fmt: skip


@pytest.fixture(scope="module")
def server(place, tmp_path_factory):
    outputs = tmp_path_factory.mktemp("api") / "outputs"
    shutil.copytree(place / "outputs", outputs)
    args = argparse.Namespace(
        mixed_precision="no",
        model=str(place / "model"),
        outputs=outputs,
        port=None,
        listen=False,
        allowed_host=[],
        models=None,
    )
    page = serve(args, block=False)
    yield page, outputs
    page.close()


@pytest.fixture(scope="module")
def client(server):
    return Client(server[0].local_url, verbose=False)


@pytest.fixture
def busy(server):
    """While a run of the command line is being trained in the outputs folder, nothing else starts."""
    folder = RunFolder(server[1] / "by hand", IMAGE_RUN)
    folder.claim(overwrite=False, checkpoint=None)
    yield folder
    folder.release()


def example():
    """The code of the documentation that starts a training."""
    (found,) = [code for code in re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
                if "/train_start" in code]  # fmt: skip
    return found


def test_the_documented_example_waits_in_the_queue_and_leaves_it(client, server, busy, tmp_path, monkeypatch):
    make_subject(tmp_path / "photos", 3)
    monkeypatch.chdir(tmp_path)
    answers = []

    class Recording:
        def predict(self, *args, **kwargs):
            answers.append(client.predict(*args, **kwargs))

    exec(example(), {"client": Recording(), "handle_file": handle_file})
    started, queue, stopped = answers
    assert (started["state"], started["place"]) == ("waiting", 1)
    assert queue == {"running": "by hand", "waiting": [{"name": "my-dog", "resume": False, "fault": None}]}
    assert (stopped["state"], stopped["place"]) == ("new", None)
    assert sorted(path.name for path in (server[1] / "datasets" / "my-dog").iterdir()) == ["000-1.png", "001-2.png"]


def test_a_program_trains_an_adapter_and_sees_it_end(client, server, tmp_path):
    images = [handle_file(str(path)) for path in sorted(make_subject(tmp_path / "p", 2).iterdir())]
    started = client.predict("by api", images, QUICK, api_name="/train_start")
    assert started["state"] == "running"
    end = time.monotonic() + PATIENCE
    while (found := client.predict("by api", api_name="/train_status"))["state"] == "running":
        assert time.monotonic() < end, found
        time.sleep(0.2)
    assert (found["state"], found["step"], found["steps"]) == ("done", 2, 2)
    assert "by api" in [entry["name"] for entry in client.predict(api_name="/list_adapters")]
    with pytest.raises(Exception, match="finished run named by api"):
        client.predict("by api", images, QUICK, api_name="/train_start")
    with pytest.raises(Exception, match="not running, and does not wait"):
        client.predict("by api", api_name="/train_stop")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"pretrained_model_name_or_path": "/etc"}, "pretrained_model_name_or_path can't be given here"),
        ({"output_dir": "/tmp/x"}, "output_dir can't be given here"),
        ({"class_data_dir": "/etc"}, "class_data_dir can't be given here"),
        ({"init_from": "/etc/passwd"}, "init_from can't be given here"),
        ({"push_to_hub": True}, "push_to_hub can't be given here"),
        ({"hub_token": "x"}, "hub_token can't be given here"),
        ({"dataset_name": "x/y"}, "dataset_name can't be given here"),
        ({"instance_data_dir": "/etc"}, "must be a folder in the outputs folder"),
        ({"instance_data_dir": "../model"}, "must be a folder in the outputs folder"),
        ({"instance_data_dir": "datasets/none"}, "must be a folder in the outputs folder"),
        ({"instance_data_dir": ""}, "must be a folder in the outputs folder"),
        ({"instance_data_dir": "history"}, "no images"),
        ({"__class__": 1}, "is no setting of the trainer"),
        ({"rank": -1}, "--rank"),
        ({"rank": "many"}, "rank must be of type int"),
        ({"max_train_steps": -1}, "--max_train_steps"),
        ({"resolution": 33}, "--resolution"),
        ({"learning_rate": "fast"}, "learning_rate must be of type float"),
        ({"preset": "fastest"}, "preset"),
        ({"preset": ["fast"]}, "preset"),
        ({"instance_prompt": " "}, "instance_prompt is missing"),
        ({}, "upload images"),
    ],
)
def test_settings_that_no_program_may_give_are_refused(client, server, busy, tmp_path, change, word):
    before = sorted(server[1].rglob("*"))
    bare = not change or "instance_data_dir" in change
    images = None if bare else [handle_file(str(path)) for path in make_subject(tmp_path / "p", 1).iterdir()]
    with pytest.raises(Exception, match=re.escape(word)):
        client.predict("bad", images, {**QUICK, **change}, api_name="/train_start")
    assert sorted(server[1].rglob("*")) == before


@pytest.mark.parametrize("name", ["", "../cat", "/etc", "cat", "history", "a/b", "con", "x" * 200, "by hand"])
def test_names_that_can_t_be_trained_under_are_refused(client, server, busy, name, tmp_path):
    images = [handle_file(str(path)) for path in make_subject(tmp_path / "p", 1).iterdir()]
    before = sorted(server[1].rglob("*"))
    with pytest.raises(Exception, match=r"name|finished run|is being trained"):
        client.predict(name, images, QUICK, api_name="/train_start")
    assert sorted(server[1].rglob("*")) == before
    with pytest.raises(Exception, match=r"name|not running"):
        client.predict(name, api_name="/train_stop") if name != "by hand" else client.predict(
            "../x", api_name="/train_stop"
        )


def test_files_of_the_server_are_no_uploads(client, server, busy):
    path = str(server[1] / "cat" / "samples" / "step-000004.png")
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}  # the client would upload it
    url = f"{server[0].local_url}gradio_api/call/train_start"
    call = httpx.post(url, json={"data": ["bad", [file], QUICK]}).json()["event_id"]
    assert "event: error" in httpx.get(f"{url}/{call}", timeout=PATIENCE).text
    assert not (server[1] / "datasets" / "bad").exists()


def test_ten_visitors_at_once_fill_the_queue_and_empty_it(server, busy, tmp_path):
    images = [handle_file(str(path)) for path in make_subject(tmp_path / "p", 1).iterdir()]
    before = sorted(server[1].rglob("*"))

    def visit(number):
        own = Client(server[0].local_url, verbose=False)
        try:
            return own.predict(f"ours {number % 5}", images, QUICK, api_name="/train_start")["state"]
        except Exception as refused:
            return str(refused)

    with ThreadPoolExecutor(10) as pool:
        found = list(pool.map(visit, range(10)))
        own = Client(server[0].local_url, verbose=False)
        waiting = own.predict(api_name="/queue")["waiting"]
        assert sorted(entry["name"] for entry in waiting) == [f"ours {number}" for number in range(5)]
        assert found.count("waiting") == 5
        assert all("is in the queue already" in text for text in found if text != "waiting"), found
        stopped = list(pool.map(lambda number: own.predict(f"ours {number}", api_name="/train_stop"), range(5)))
    assert {one["state"] for one in stopped} == {"new"}
    assert own.predict(api_name="/queue") == {"running": "by hand", "waiting": []}
    for number in range(5):
        shutil.rmtree(server[1] / "datasets" / f"ours {number}")
    assert sorted({*server[1].rglob("*")} - {*before}) in ([], [server[1] / "training_queue.json"])


HOSTILE = [name for name in IMAGES if not name.startswith(("camera", "61-"))]


def test_hostile_images_wait_or_are_refused_in_a_sentence(client, server, busy, tmp_path):
    assert len(HOSTILE) > 20
    outcomes = {}
    for name in HOSTILE:
        (tmp_path / name).write_bytes(IMAGES[name]())
        before = sorted((server[1] / "datasets").rglob("*"))
        try:
            client.predict("hostile", [handle_file(str(tmp_path / name))], QUICK, api_name="/train_start")
        except Exception as refused:
            outcomes[name] = str(refused)
            assert 15 < len(outcomes[name]) < 400
            assert "Traceback" not in outcomes[name]
            assert str(server[1]) not in outcomes[name]
            assert sorted((server[1] / "datasets").rglob("*")) == before
        else:
            outcomes[name] = ""
            client.predict("hostile", api_name="/train_stop")
            shutil.rmtree(server[1] / "datasets" / "hostile")
    used = [name for name, said in outcomes.items() if not said]
    assert min(len(used), len(outcomes) - len(used)) > 8, outcomes


def test_what_is_no_image_is_refused_and_kept_nowhere(client, server, busy, tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(Exception, match=r"image|a\.png"):
        client.predict("bad", [handle_file(str(tmp_path / "a.png"))], QUICK, api_name="/train_start")
    assert not (server[1] / "datasets" / "bad").exists()
    with pytest.raises(Exception, match="object of names"):
        client.predict("bad", None, [1], api_name="/train_start")

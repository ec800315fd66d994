"""Uploading to the hub, against a local server that answers as the hub's API does."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from helpers import arguments, make_subject, settings


class Hub(BaseHTTPRequestHandler):
    """Models, uploads in one commit, and files of git-lfs; ``server.broken`` refuses what its name says."""

    def reply(self, content, status=200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_GET(self):
        if self.headers.get("Authorization") != "Bearer hf_good":
            return self.reply({"error": "Invalid username or password."}, 401)
        if self.path == "/api/whoami-v2":
            return self.reply({"name": "me", "type": "user", "auth": {"accessToken": {"role": "write"}}})
        return self.reply({"id": "me/cat", "sha": "0" * 40, "siblings": []})

    def do_POST(self):
        body, server = self.body(), self.server
        if self.headers.get("Authorization") != "Bearer hf_good":
            return self.reply({"error": "Invalid username or password."}, 401)
        if self.path == "/api/repos/create":
            server.created.append(json.loads(body)["name"])
            return self.reply({"url": f"{server.address}/me/{server.created[-1]}", "id": f"me/{server.created[-1]}"})
        if server.broken:
            return self.reply({"error": "out of order"}, 503)
        if self.path == "/api/validate-yaml":
            return self.reply({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = [{"path": one["path"], "uploadMode": "lfs" if one["size"] > 9_000 else "regular", "shouldIgnore": False}
                     for one in json.loads(body)["files"]]  # fmt: skip
            return self.reply({"files": files})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = [{**one, "actions": {"upload": {"href": f"{server.address}/lfs/{one['oid']}"}}}
                       for one in json.loads(body)["objects"]]  # fmt: skip
            return self.reply({"transfer": "basic", "objects": objects})
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                server.files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                server.files[value["path"]] = server.stored[value["oid"]]
        return self.reply({"commitUrl": f"{server.address}/me/cat/commit/1", "commitOid": "1" * 40})

    def do_PUT(self):
        self.server.stored[self.path.rpartition("/")[2]] = self.body()
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    one = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    one.address = f"http://127.0.0.1:{one.server_port}"
    one.created, one.files, one.stored, one.broken = [], {}, {}, False
    threading.Thread(target=one.serve_forever, daemon=True).start()
    yield one
    one.shutdown()


@pytest.fixture
def train(server, tiny_pipeline, tmp_path):
    """Runs the command against the server: the hub's address is known to its library from the start only."""
    subject = make_subject(tmp_path / "s", 2, size=(32, 32))

    def command(token):
        config = settings(
            tiny_pipeline, subject, tmp_path / "cat", push_to_hub=True, hub_token=token, checkpointing_steps=1
        )
        environment = {**os.environ, "HF_ENDPOINT": server.address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        words = [sys.executable, "-m", "effilora_diffusion", "train", *arguments(config)]
        return subprocess.run(words, env=environment, capture_output=True, text=True)

    return command


def test_the_result_is_on_the_hub_as_it_is_in_the_folder(server, train, tmp_path):
    done = train("hf_good")
    assert done.returncode == 0, done.stderr
    assert server.created == ["cat"]
    assert f"uploaded    {server.address}/me/cat" in done.stdout
    wanted = {
        "README.md",
        "config.yaml",
        "effilora.safetensors",
        "pytorch_lora_weights.safetensors",
        "before_after.png",
    }
    assert wanted <= server.files.keys()
    assert not [name for name in server.files if name.startswith(("checkpoint-", ".", "logs", "report"))]
    for name, content in server.files.items():
        assert content == (tmp_path / "cat" / name).read_bytes(), name


def test_a_hub_that_is_gone_at_the_end_loses_nothing(server, train, tmp_path):
    server.broken = True
    done = train("hf_good")
    assert done.returncode == 0, done.stderr
    assert "note: the run is complete in" in done.stdout
    assert f"hf upload me/cat {tmp_path / 'cat'}" in done.stdout
    assert (tmp_path / "cat" / "effilora.safetensors").exists()


def test_a_token_that_may_not_write_is_told_before_training(server, train, tmp_path):
    done = train("hf_bad")
    assert done.returncode == 2
    assert "error: --push_to_hub: the model cat can't be made" in done.stderr
    assert "hf auth login" in done.stderr
    assert not (tmp_path / "cat").exists()

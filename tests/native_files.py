"""A native file that tests damage and forge."""

import json

import pytest
from conftest import make_adapter
from safetensors import safe_open
from safetensors.torch import save_file

from effilora_diffusion.core import (
    AdapterFile,
    EffiLoRAError,
    load_adapter_file,
    save_adapter_file,
)
from effilora_diffusion.core.files import header_sha256, tensors_sha256

METADATA = {"base_model": "some/model", "trigger_prompt": "ein Bild von sks Kätzchen \N{CAT FACE}", "steps": 12}


def save_native(path):
    """Save a fresh adapter; returns the path."""
    save_adapter_file(path, AdapterFile(make_adapter(), dict(METADATA)))
    return path


def read_raw(path):
    with safe_open(str(path), "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return json.loads(file.metadata()["effilora"]), tensors


def forge(path, header=None, tensors=None):
    """Rewrite a native file with other contents and correct checksums."""
    old_header, old_tensors = read_raw(path)
    header, tensors = header or old_header, tensors or old_tensors
    header["sha256"] = tensors_sha256(tensors)
    header["header_sha256"] = header_sha256(header)
    save_file(tensors, path, metadata={"effilora": json.dumps(header)})


def assert_refused(path, match=None):
    with pytest.raises(EffiLoRAError, match=match) as caught:
        load_adapter_file(path)
    assert str(path) in str(caught.value)

"""How commands end: a mistake, a bug, no memory left."""

import pytest
import torch

from effilora_diffusion.core import EffiLoRAError
from effilora_diffusion.core.errors import exit_code, is_out_of_memory


def fail_with(error):
    def command():
        raise error

    return command


def test_a_command_ends_with_its_own_code():
    assert exit_code(lambda: None) == 0
    assert exit_code(lambda: 130) == 130


def test_a_mistake_is_one_sentence_and_code_two(capsys, monkeypatch):
    monkeypatch.delenv("EFFILORA_DEBUG", raising=False)
    assert exit_code(fail_with(EffiLoRAError("--rank must be at least 1, not 0"))) == 2
    assert capsys.readouterr().err == "error: --rank must be at least 1, not 0\n"


def test_the_debug_variable_shows_the_traceback_of_a_mistake(capsys, monkeypatch):
    monkeypatch.setenv("EFFILORA_DEBUG", "1")
    assert exit_code(fail_with(EffiLoRAError("a mistake"))) == 2
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert said.endswith("error: a mistake\n")


def test_ctrl_c_while_a_command_loads_is_no_traceback(capsys):
    assert exit_code(fail_with(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "stopped\n"


@pytest.mark.parametrize(
    "error", [TypeError("a bug"), KeyError("x"), RuntimeError("shapes"), ValueError("no"), OSError("x")]
)
def test_a_bug_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        exit_code(fail_with(error))


def test_no_memory_left_names_the_settings_that_help(capsys):
    found = [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")]
    try:
        torch.empty(1 << 50)
    except RuntimeError as error:
        found.append(error)
    assert len(found) == 3
    for error in found:
        assert is_out_of_memory(error)
        assert exit_code(fail_with(error), "--train_batch_size 1") == 2
        said = capsys.readouterr().err
        assert said.startswith("error: out of memory (")
        assert said.endswith("): try --train_batch_size 1\n")
        assert said.count("\n") == 1

"""Language runs that are stopped: a sentence and an exit code at any moment, and resuming ends where an unbroken run does."""

import os
import signal

import pytest
import torch
from language_runs import make_place, weights, words

import effilora_diffusion.language.trainer as trainer_module
from effilora_diffusion.cli.train_llm import main
from effilora_diffusion.language.callbacks import ReducerCallback


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("language"))


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "out"
    assert main(words(place, folder)) == 0
    return folder


def interrupt(monkeypatch, where, name, number, when=lambda *args: True):
    """Have ``where.name`` send this process a signal when it is called."""
    called = getattr(where, name)

    def interrupted(*args, **kwargs):
        if when(*args):
            os.kill(os.getpid(), number)
        return called(*args, **kwargs)

    monkeypatch.setattr(where, name, interrupted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_between_steps_leaves_a_checkpoint_to_go_on_from(place, whole, tmp_path, monkeypatch, capsys, number):
    with monkeypatch.context() as patch:
        at_step_2 = lambda self, args, state, control: state.global_step == 1
        interrupt(patch, ReducerCallback, "on_step_begin", number, at_step_2)
        assert main(words(place, tmp_path / "out")) == 128 + number
    assert "at step 2; continue with --resume_from_checkpoint latest" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]
    assert main([*words(place, tmp_path / "out"), "--resume_from_checkpoint", "latest"]) == 0
    for old, new in zip(weights(whole), weights(tmp_path / "out"), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize("moment", ["_load", "build_datasets"])
def test_a_signal_while_loading_leaves_nothing(place, tmp_path, monkeypatch, capsys, moment):
    interrupt(monkeypatch, trainer_module, moment, signal.SIGTERM)
    assert main(words(place, tmp_path / "out")) == 143
    assert "stopped by signal 15 before its first step" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("moment", ["measure", "write_peft_folder"])
def test_a_signal_while_the_result_is_written_is_made_good_by_resuming(
    place, whole, tmp_path, monkeypatch, capsys, moment
):
    with monkeypatch.context() as patch:
        interrupt(patch, trainer_module, moment, signal.SIGTERM)
        assert main(words(place, tmp_path / "out")) == 143
    assert "while the result was written" in capsys.readouterr().err
    resume = [*words(place, tmp_path / "out"), "--resume_from_checkpoint", "latest"]
    assert main(resume) == 0
    for name in ("effilora.safetensors", "adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (whole / name).read_bytes()
    assert main(resume) == 2
    assert "steps behind it" in capsys.readouterr().err


def test_a_half_written_checkpoint_is_passed_over(place, whole, tmp_path, capsys):
    assert main(words(place, tmp_path / "out")) == 0
    (tmp_path / "out" / "checkpoint-6" / "trainer_state.json").write_text('{"global_st')
    for name in ("effilora.safetensors", "adapter_model.safetensors"):
        (tmp_path / "out" / name).unlink()
    assert main([*words(place, tmp_path / "out"), "--resume_from_checkpoint", "latest"]) == 0
    for old, new in zip(weights(whole), weights(tmp_path / "out"), strict=True):
        assert torch.equal(old, new)

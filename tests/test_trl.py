"""The examples of docs/trl.md, run with TRL on a tiny model: what is learned is the adapter, and the reference is the base."""

import math
import re
from pathlib import Path

import pytest
import torch
from tiny_language import build, rows, save

from effilora_diffusion import (
    EffiLoRAConfig,
    EffiLoRAError,
    attach,
    create_adapter,
    detach,
    load_adapter,
    merge,
    reference_model,
)

PAGE = (Path(__file__).parents[1] / "docs" / "trl.md").read_text(encoding="utf-8")
BLOCKS = {key: block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
          for key in ("AutoTokenizer", "SFTTrainer", "DPOTrainer", "GRPOTrainer", "TrainerCallback") if key in block}  # fmt: skip
SMALL = {
    r"HuggingFaceTB/SmolLM2-135M-Instruct": "model",
    r"max_steps=\d+": "max_steps=3, logging_steps=1, use_cpu=True, report_to='none', disable_tqdm=True",
    r"max_completion_length=\d+": "max_completion_length=4",
    r"global_step % 100": "global_step % 2",
    r" in Spanish": "",
    r"perro": "un",
}


@pytest.fixture
def page(tmp_path, monkeypatch):
    """Runs the page's examples in small, one after the other; the trainers that they make are kept."""
    import trl

    save(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    names = {"made": []}
    for kind in ("SFTTrainer", "DPOTrainer", "GRPOTrainer"):
        known = getattr(trl, kind)

        def init(self, *args, _known=known, **options):
            options.setdefault("callbacks", [names["Keep"]()] if "Keep" in names else None)
            _known.__init__(self, *args, **options)
            names["made"].append(self)

        monkeypatch.setattr(trl, kind, type(kind, (known,), {"__init__": init}))

    def run(*keys):
        for key in keys:
            code = BLOCKS[key]
            for pattern, small in SMALL.items():
                code = re.sub(pattern, small, code)
            exec(compile(code, f"docs/trl.md, {key}", "exec"), names)
        return names

    return run


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def base_of(names):
    """What the model computes with the adapter taken off; TRL leaves it in bfloat16."""
    detach(names["model"])
    return names["model"].eval()(input_ids=rows()).logits


def untouched(names):
    """Whether every weight of the base is what it was, once the adapter is taken off."""
    detach(names["model"])
    kept, before = names["model"].state_dict(), build("llama").state_dict()
    return kept.keys() == before.keys() and all(torch.equal(kept[name], before[name]) for name in before)


def test_sft_trains_the_adapter_alone(page):
    names = page("AutoTokenizer", "TrainerCallback", "SFTTrainer")
    (trainer,) = names["made"]
    assert losses(trainer)[-1] < losses(trainer)[0]
    loaded = load_adapter(build("llama"), "outputs/sft")
    assert all(map(torch.equal, loaded.parameters(), names["adapter"].parameters()))
    assert loaded.B[0].any()
    early = load_adapter(build("llama"), "outputs/sft@2")
    assert not torch.equal(early.B[0], loaded.B[0])
    assert untouched(names)


def test_dpo_starts_at_log_2_and_compares_with_the_untouched_base(page):
    names = page("AutoTokenizer", "SFTTrainer")
    for heads in names["adapter"].B:
        heads.data.zero_()
    names = page("DPOTrainer")
    trainer = names["made"][-1]
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert names["adapter"].B[0].any()
    found = trainer.ref_model(input_ids=rows()).logits
    assert not torch.equal(found, names["model"](input_ids=rows()).logits)
    assert torch.equal(found, base_of(names))
    assert untouched(names)
    assert {id(one) for one in trainer.ref_model.parameters()} <= {id(one) for one in names["model"].parameters()}


def test_grpo_takes_steps_towards_its_reward(page):
    names = page("AutoTokenizer", "SFTTrainer")
    before = names["adapter"].B[0].detach().clone()
    names = page("GRPOTrainer")
    trainer = names["made"][-1]
    logged = [entry for entry in trainer.state.log_history if "kl" in entry]
    assert logged[0]["kl"] > 1e-3  # an adapter that has learned is away from the reference
    assert not torch.equal(names["adapter"].B[0], before)
    assert untouched(names)


def test_the_reference_may_keep_an_earlier_adapter():
    model = build("llama")
    first, second = (
        attach(model, create_adapter(model, EffiLoRAConfig(rank=2, target_modules=("paper",))), name)
        for name in ("sft", "dpo")
    )
    for adapter in (first, second):
        for heads in adapter.B:
            torch.nn.init.normal_(heads, generator=torch.Generator().manual_seed(len(heads)))
    reference = reference_model(model, "dpo")
    with second.disabled():
        expected = model(input_ids=rows()).logits
    assert torch.equal(reference(input_ids=rows()).logits, expected)
    assert not torch.equal(reference_model(model)(input_ids=rows()).logits, expected)
    assert isinstance(reference, type(model))
    assert second.enabled


def test_what_can_be_no_reference_is_refused():
    model = build("llama")
    with pytest.raises(EffiLoRAError, match="no adapter is attached"):
        reference_model(model)
    attach(model, create_adapter(model, EffiLoRAConfig(rank=2, heads=1, target_modules=("paper",))), "one")
    with pytest.raises(EffiLoRAError, match="no adapter named 'two'"):
        reference_model(model, "two")
    merge(model, "one")
    with pytest.raises(EffiLoRAError, match="unmerge it first"):
        reference_model(model)

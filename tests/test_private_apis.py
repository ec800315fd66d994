"""Canaries: every private or undocumented part of a library that the package relies on, so that its bounds can be loosened.

When one of these fails with a new version of a library, look at the module that its docstring names.
"""

import argparse
import ast
import copy
import inspect
from dataclasses import make_dataclass
from pathlib import Path

import pytest
import torch
from conftest import build_tiny_pipeline, tiny_unet
from diffusers import DiffusionPipeline
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny_families import FAMILIES, build
from tiny_language import build as build_language
from tiny_language import build_mixture
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedModel, Trainer, TrainingArguments
from transformers.hf_argparser import HfArgumentParser
from transformers.utils.chat_template_utils import render_jinja_template

from effilora_diffusion.core.peft_format import TAKEN

PACKAGE = Path(__file__).parents[1] / "effilora_diffusion"

COVERED = {
    "_actions",
    "_argument_group_name",
    "_buffers",
    "_cdata",
    "_class_name",
    "_forward_hooks",
    "_from_config",
    "_get_available_adapters",
    "_growth_tracker",
    "_modules",
    "_num_timesteps",
    "_option_string_actions",
    "_parameters",
    "_orig_mod",
    "_save_checkpoint",
    "_supports_gradient_checkpointing",
    "__tensor_flatten__",
}
"""The private names that the tests of this file look at."""

PYTHONS = {
    "__call__",
    "__class__",
    "__init__",
    "__new__",
    "__dict__",
    "__doc__",
    "__eq__",
    "__mro__",
    "__module__",
    "__name__",
    "__path__",
    "__post_init__",
    "__qualname__",
    "__setattr__",
    "__signature__",
}
"""Names of the language itself and of its dataclasses."""

OWN = {"_effilora_base", "_effilora_scope", "_effilora_words", "_assets", "_"}


def private_names(tree):
    """Names with a leading underscore that a file takes from objects other than its own, or looks up as strings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if not own and node.attr not in PYTHONS:
                yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            dunder = node.value.startswith("__") and node.value != "__tensor_flatten__"
            if node.value.startswith("_") and node.value.isidentifier() and not dunder:
                yield node.value


def test_every_private_name_that_the_package_uses_has_a_canary():
    found = {}
    for path in PACKAGE.rglob("*.py"):
        for name in private_names(ast.parse(path.read_text(encoding="utf-8"))):
            found.setdefault(name, path)
    assert {name: path for name, path in found.items() if name not in COVERED | OWN} == {}
    assert set(found) >= COVERED


# --------------------------------------------------------------------------------------------------------------- torch


def test_modules_keep_their_hooks_and_children_in_dictionaries():
    """core/attachment.py: ``_forward_hooks`` decides on in-place addition, ``_modules`` hides the adapters while saving."""
    linear = nn.Linear(2, 2)
    hook = lambda module, args, output: output
    handle = linear.register_forward_hook(hook)
    assert list(linear._forward_hooks.values()) == [hook]
    handle.remove()
    assert not linear._forward_hooks
    parent = nn.Sequential(linear)
    kept = parent._modules.pop("0")
    assert not list(parent.parameters())
    parent._modules["0"] = kept
    assert next(iter(parent.state_dict())) == "0.weight"


def test_modules_keep_their_values_in_dictionaries_that_take_others():
    """diffusion/models/hollow.py: weights are replaced by values without memory, in place."""
    norm = nn.BatchNorm1d(2)
    norm._parameters["weight"] = nn.Parameter(torch.full((2,), 3.0))
    norm._buffers["running_mean"] = torch.ones(2)
    assert (norm.weight.tolist(), norm.running_mean.tolist()) == ([3.0, 3.0], [1.0, 1.0])


def test_models_are_made_of_a_configuration_and_know_whether_they_can_checkpoint():
    """diffusion/models/hollow.py and diffusion/training/build.py."""
    encoder = CLIPTextModel._from_config(CLIPTextConfig(hidden_size=8, intermediate_size=8, num_attention_heads=2))
    assert encoder.config.hidden_size == 8
    assert tiny_unet()._supports_gradient_checkpointing


def test_hooks_that_are_always_called_run_after_errors():
    """core/attachment.py: a scope is closed when its module's call fails."""
    linear, closed = nn.Linear(2, 2), []
    linear.register_forward_hook(lambda module, args, output: closed.append(output), always_call=True)
    with pytest.raises(RuntimeError):
        linear(torch.zeros(1, 3))
    assert closed == [None]


def test_compiled_modules_name_the_original():
    """core/attachment.py: adapters go on the original."""
    linear = nn.Linear(2, 2)
    assert torch.compile(linear, backend="eager")._orig_mod is linear


def test_fake_tensors_have_storages_of_a_size_and_an_identity():
    """training/dry_run.py: activations are counted by running the model on fake tensors."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    value = torch.zeros(3, 4)
    with mode:
        fake = torch.empty(3, 4)
        storage = (fake + value).untyped_storage()
    assert storage.nbytes() == 48
    assert storage._cdata != fake.untyped_storage()._cdata
    assert mode.from_tensor(value).untyped_storage()._cdata == mode.from_tensor(value).untyped_storage()._cdata


def test_quantised_weights_are_made_of_several_tensors():
    """training/dry_run.py: their bytes are those of their parts."""
    quantization = pytest.importorskip("torchao.quantization")
    linear = nn.Linear(32, 32, bias=False)
    quantization.quantize_(linear, quantization.Int8WeightOnlyConfig())
    names, _ = linear.weight.__tensor_flatten__()
    assert len(names) >= 2
    assert all(isinstance(getattr(linear.weight, name), torch.Tensor) for name in names)


# ----------------------------------------------------------------------------------------------------------- diffusers


def test_attention_asks_its_processor_s_signature_and_class():
    """adapters/processors.py: the swapped class passes for the original one."""
    source = inspect.getsource(Attention.forward)
    assert "inspect.signature(self.processor.__call__)" in source
    attention = Attention(8, heads=2, dim_head=4)
    assert isinstance(attention.processor, AttnProcessor2_0)
    assert attention.fused_projections is False
    attention.fuse_projections()
    assert attention.fused_projections is True
    assert not hasattr(AttnProcessor2_0(), "_effilora_base")


@pytest.mark.parametrize("name", FAMILIES)
def test_encode_prompt_takes_what_families_pass_by_name(name):
    """models/base.py: ``text_options`` come from the signatures of ``encode_prompt`` and ``__call__``."""
    pipe = build(name)
    names = inspect.signature(pipe.encode_prompt).parameters
    assert "prompt" in names
    assert "device" in names or names.keys() & {"text_encoder_out_layers"}


def test_pipelines_count_their_steps_while_they_draw():
    """sampling/stream.py: ``_num_timesteps`` is the number that progress is shown of."""
    pipe, seen = build_tiny_pipeline(), []

    def note(pipe, step, timestep, tensors):
        seen.append(pipe._num_timesteps)
        return tensors

    pipe("a cat", num_inference_steps=3, output_type="latent", callback_on_step_end=note)
    assert seen == [3, 3, 3]


# ---------------------------------------------------------------------------------------------------------------- peft


def test_tuner_layers_wrap_a_base_layer_and_list_their_adapters():
    """core/sites.py finds the wrapped linear by ``base_layer``; adapters/lora_files.py counts layers by their adapters."""
    unet = tiny_unet()
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "x")
    layers = [layer for layer in unet.modules() if isinstance(layer, BaseTunerLayer)]
    assert layers
    for layer in layers:
        assert type(layer.base_layer) is nn.Linear
        assert set(layer._get_available_adapters()) == {"x"}
        assert list(layer.active_adapters) == ["x"]


def test_peft_takes_linears_with_names_of_experts_for_experts():
    """core/peft_format.py: of a mixture they are written as target_parameters."""
    from peft.utils.transformers_weight_conversion import _MOE_TARGET_MODULE_MAPPING

    assert {name for names in _MOE_TARGET_MODULE_MAPPING.values() for name in names} <= {*TAKEN}


# -------------------------------------------------------------------------------------------------------- transformers


def test_experts_say_how_their_weights_lie_and_are_asked_for_by_name():
    """core/weights.py and core/experts.py: ``is_transposed``, and names on the module before its parameters."""
    for name, lies in (("mixtral", False), ("gpt_oss", True)):
        experts = build_mixture(name).model.layers[0].mlp.experts
        assert experts.is_transposed is lies
        shadow = torch.zeros(1)
        experts.__dict__["down_proj"] = shadow
        assert experts.down_proj is shadow
        del experts.__dict__["down_proj"]
        assert experts.down_proj is experts._parameters["down_proj"]
    assert isinstance(PreTrainedModel.use_kernels, property)


def test_trainer_saves_and_loads_through_the_methods_that_are_overridden():
    """language/trainer.py: ``LanguageTrainer`` replaces four private methods and the label smoother's call."""
    assert list(inspect.signature(Trainer._save_checkpoint).parameters) == ["self", "model", "trial"]
    assert list(inspect.signature(Trainer._save).parameters) == ["self", "output_dir", "state_dict"]
    assert list(inspect.signature(Trainer._load_from_checkpoint).parameters)[:2] == ["self", "resume_from_checkpoint"]
    assert list(inspect.signature(Trainer._load_best_model).parameters) == ["self"]
    source = inspect.getsource(Trainer)
    for call in ("self._load_from_checkpoint(", "self._load_best_model()", "self._save("):
        assert call in source
    assert "self.label_smoother(" in inspect.getsource(Trainer.compute_loss)
    assert list(inspect.signature(Trainer._prepare_inputs).parameters) == ["self", "inputs"]  # language/evaluation.py


def test_trainer_refuses_quantised_models_by_their_mark(tmp_path):
    """language/trainer.py: the mark is taken off while the trainer is made."""
    model = build_language("llama")
    model.is_quantized = True
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[])
    with pytest.raises(ValueError, match="quantized"):
        Trainer(model=model, args=arguments)
    model.is_quantized = False
    Trainer(model=model, args=arguments)


def test_the_parser_makes_a_group_of_every_dataclass_and_knows_its_actions():
    """cli/settings_parser.py: groups by ``_argument_group_name``, absent settings by the actions' defaults."""
    group = make_dataclass(
        "Group", [("some_size", int, 3), ("flag", bool, True)], namespace={"_argument_group_name": "G"}
    )
    parser = HfArgumentParser([group], allow_abbrev=False)
    assert "G:" in parser.format_help()
    assert {"--some_size", "--some-size", "--flag", "--no_flag", "--no-flag"} <= set(parser._option_string_actions)
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    assert vars(parser.parse_known_args([])[0]) == {}
    assert vars(parser.parse_known_args(["--some-size", "4"])[0]) == {"some_size": 4}


def test_the_index_of_a_pipeline_names_its_class(tmp_path):
    """models/pipelines.py: a pipeline that can't be trained is refused before its weights are read."""
    build_tiny_pipeline().save_pretrained(tmp_path)
    assert DiffusionPipeline.load_config(tmp_path)["_class_name"] == "StableDiffusionPipeline"


def test_the_state_of_a_loss_scaler_is_five_numbers():
    """training/checkpoints.py: the state in a checkpoint is checked before it is taken over."""
    state = torch.amp.GradScaler("cpu", enabled=True).state_dict()
    assert state.keys() == {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}
    assert all(isinstance(value, int | float) for value in state.values())


def test_models_can_be_copied_with_hooks_and_handles():
    """core/attachment.py: a deep copy of a model carries its own hooks, which its own handles remove."""
    linear = nn.Linear(2, 2)
    linear.handle = linear.register_forward_pre_hook(print)
    twin = copy.deepcopy(linear)
    twin.handle.remove()
    assert not twin._forward_pre_hooks
    assert linear._forward_pre_hooks


def test_chat_templates_are_rendered_with_the_places_of_what_they_mark_as_generated():
    """language/encoding.py: ``render_jinja_template`` is what ``apply_chat_template`` takes its mask of answers from."""
    source = "{% for m in messages %}<{% generation %}{{ m.content }}{% endgeneration %}>{% endfor %}{{ eos_token }}{{ own }}"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bc"}]
    more = {"chat_template": source, "eos_token": ".", "own": "!"}
    assert render_jinja_template([messages], return_assistant_tokens_mask=True, **more) == (
        ["<a><bc>.!"],
        [[(1, 2), (4, 6)]],
    )

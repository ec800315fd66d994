"""The command line and config file of the training commands, made from dataclasses by transformers' ``HfArgumentParser``."""

from __future__ import annotations

import argparse
import difflib
import sys
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import yaml
from transformers.hf_argparser import HfArgumentParser

from ..core.errors import EffiLoRAError
from ..core.options import ADAPTER, REDUCER, default_of, from_text, hints_of
from ..core.text_io import read_user_text

USUAL = "Usual settings"

ELSEWHERE = {
    **dict.fromkeys(("lora_r", "lora_rank", "network_dim", "linear", "rank_dim"), "rank"),
    **dict.fromkeys(("network_alpha", "linear_alpha", "alpha"), "lora_alpha"),
    **dict.fromkeys(("network_dropout", "dropout"), "lora_dropout"),
    **dict.fromkeys(("lora_target", "lora_target_modules", "lora_modules_to_save"), "target_modules"),
    **dict.fromkeys(("cutoff_len", "max_seq_length", "max_seq_len", "model_max_length", "sequence_len"), "max_length"),
    "template": "prompt_template",
    "chat_template_path": "chat_template",
    "enable_thinking": """chat_template_kwargs '{"enable_thinking": true}'""",
    **dict.fromkeys(("data_path", "dataset", "datasets"), "train_file"),
    **dict.fromkeys(("dataset_num_proc", "num_proc"), "preprocessing_num_workers"),
    **dict.fromkeys(("dataset_config", "subset"), "dataset_config_name"),
    **dict.fromkeys(("dataset_train_split", "train_split"), "train_split_name"),
    **dict.fromkeys(("dataset_test_split", "eval_split", "test_split"), "eval_split_name"),
    **dict.fromkeys(("train_data_dir", "folder_path", "dataset_path", "image_dir"), "instance_data_dir"),
    **dict.fromkeys(("reg_data_dir", "regularization_dir"), "class_data_dir"),
    **dict.fromkeys(("default_caption", "class_tokens"), "instance_prompt"),
    "trigger_word": "trigger for [trigger] in captions, or the whole --instance_prompt",
    **dict.fromkeys(("name_or_path", "ckpt", "model_name"), "pretrained_model_name_or_path"),
    "base_model": "model_name_or_path",
    **dict.fromkeys(("lr", "unet_lr"), "learning_rate"),
    **dict.fromkeys(("steps", "max_train_step", "total_steps"), "max_train_steps"),
    **dict.fromkeys(("max_train_epochs", "epochs", "num_epochs"), "num_train_epochs"),
    **dict.fromkeys(("batch_size", "micro_batch_size"), "train_batch_size"),
    **dict.fromkeys(("gradient_accumulation", "grad_accum"), "gradient_accumulation_steps"),
    **dict.fromkeys(("save_every_n_steps", "save_every"), "checkpointing_steps"),
    **dict.fromkeys(("save_last_n_steps", "max_step_saves_to_keep"), "checkpoints_total_limit"),
    **dict.fromkeys(("sample_prompts", "sample_prompt", "prompts"), "validation_prompt"),
    **dict.fromkeys(("sample_every_n_steps", "sample_every"), "validation_steps"),
    **dict.fromkeys(("output_name", "training_folder", "workspace_dir"), "output_dir"),
    "min_snr_gamma": "snr_gamma",
    "soft_min_snr_gamma": "use_soft_min_snr with --snr_gamma",
    "ip_noise_gamma": "input_perturbation",
    "offset_noise": "noise_offset",
    "v_parameterization": "prediction_type v_prediction",
    "rescale_betas_zero_snr": "zero_terminal_snr",
    **dict.fromkeys(("flow_shift", "flow_schedule_shift", "training_shift", "timestep_shift"), "discrete_flow_shift"),
    **dict.fromkeys(("eval_data_dir", "val_data_dir"), "validation_data_dir"),
    "resume": "resume_from_checkpoint",
    **dict.fromkeys(("quantize", "fp8_base"), "quantization"),
    "load_in_4bit": "quantization bnb-4bit",
    "load_in_8bit": "quantization bnb-8bit",
    "torch_dtype": "dtype",
    **dict.fromkeys(("dtype", "train_dtype"), "mixed_precision"),
}
"""Settings of other trainers (sd-scripts, ai-toolkit, OneTrainer, LLaMA-Factory, axolotl), and ours."""


@dataclass(frozen=True)
class Given:
    """What a command line and its config file name, by setting; what neither names is absent."""

    values: dict[str, Any]
    extra: dict[str, Any]


class _Extend(argparse.Action):
    """Values of a list setting: a flag that is given again adds to what it had; a prompt without quotes is not a list."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        words = [value for value in values if value.split() == [value]]
        if self.dest.endswith("prompt") and len(words) > 1:
            raise EffiLoRAError(
                f"--{self.dest} got {len(values)} prompts, among them single words ({', '.join(words[:5])}): quote a prompt that "
                f"has spaces, or repeat --{self.dest} for each single word"
            )
        setattr(namespace, self.dest, [*getattr(namespace, self.dest, []), *values])


class _Strict(yaml.SafeLoader):
    """YAML in which a name that stands twice is a mistake: the second one would replace the first without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [str(key.value) for key, _ in node.value]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]!r} stands there twice", node.start_mark)
        return super().construct_mapping(node, deep)


class _OneName(argparse.HelpFormatter):
    """Help with one spelling of every option."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return ", ".join(action.option_strings)
        return f"{action.option_strings[0]} {self._format_args(action, action.dest.upper())}"


def groups_of(kinds: Sequence[type], usual: Iterable[str] = ()) -> dict[str, list[tuple[Field[Any], Any]]]:
    """Fields and types of several dataclasses by group, the usual settings first.

    Fields that no :func:`~effilora_diffusion.core.options.option` made (transformers' own) are a group of their own; those of
    them that are usual are named in ``usual``.
    """
    found: dict[str, list[tuple[Field[Any], Any]]] = {USUAL: []}
    for kind in kinds:
        hints = get_type_hints(kind)
        # inherited settings come first in a dataclass, and what is trained on what should come first in the help
        for entry in sorted(fields(kind), key=lambda entry: entry.metadata.get("group") in (ADAPTER, REDUCER)):
            if entry.init and entry.metadata.get("command", True):
                is_usual = entry.metadata.get("usual") or entry.name in usual
                group = USUAL if is_usual else entry.metadata.get("group", "Settings of transformers' Trainer")
                found.setdefault(group, []).append((entry, hints[entry.name]))
    return found


def make_parser(
    kinds: Sequence[type], description: str, prog: str | None = None, usual: Iterable[str] = ()
) -> HfArgumentParser:
    """A parser of the settings of ``kinds``: grouped help; absent settings stay absent from its result."""
    groups = groups_of(kinds, usual)
    parser = HfArgumentParser(
        [_as_dataclass(title, entries) for title, entries in groups.items()],
        description=description, prog=prog, usage="%(prog)s [--config FILE] [--SETTING VALUE ...]",
        allow_abbrev=False, formatter_class=_OneName,
    )  # fmt: skip
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML or YAML file with any of these settings")
    for entry, hint in (pair for entries in groups.values() for pair in entries):
        if hint is bool:
            dashed = entry.name.replace("_", "-")
            spellings = [f"--no_{entry.name}", f"--no-{entry.name}", f"--no-{dashed}"]
            fresh = [one for one in dict.fromkeys(spellings) if one not in parser._option_string_actions]
            if fresh:
                parser.add_argument(*fresh, dest=entry.name, action="store_false", help=argparse.SUPPRESS)
    for action in parser._actions:
        action.default = argparse.SUPPRESS if action.dest != "config" else None
    return parser


def _as_dataclass(title: str, entries: list[tuple[Field[Any], Any]]) -> type:
    """One group as the dataclass that ``HfArgumentParser`` makes an argument group of; all metadata go to argparse."""
    made: list[tuple[str, Any, Any]] = []
    for entry, hint in entries:
        metadata: dict[str, Any] = {"help": _help(entry)}
        if entry.metadata.get("choices"):
            metadata["choices"] = entry.metadata["choices"]
        if "aliases" in entry.metadata:
            metadata["aliases"] = entry.metadata["aliases"]
        if get_origin(hint) is list:
            metadata["action"] = _Extend
        default: Any = {"default": entry.default}
        if entry.default_factory is not MISSING:
            default = {"default_factory": entry.default_factory}
        made.append((entry.name, hint, field(metadata=metadata, **default)))
    return make_dataclass("Group", made, namespace={"_argument_group_name": title}, kw_only=True)


def _help(entry: Field[Any]) -> str:
    default = default_of(entry)
    shown = "" if default in (None, False, [], MISSING) or "default" in str(entry.metadata.get("help")) else default
    shown = " ".join(shown) if isinstance(shown, list) else shown
    text = str(entry.metadata.get("help", ""))
    if "group" in entry.metadata:
        text = text.replace("%", "%%")
    return f"{text} (default: {shown})" if shown != "" else text


def parse(
    parser: HfArgumentParser, kinds: Sequence[type], arguments: list[str] | None, flags: Iterable[str] = ()
) -> Given:
    """What ``arguments`` and the config file that they name say; the command line wins.

    Args:
        parser: of :func:`make_parser`.
        kinds: the dataclasses it was made of.
        arguments: words after the command's name; ``None``: those of the process.
        flags: further options of ``parser`` that are no settings.

    Raises:
        EffiLoRAError: an unknown name, answered with the nearest known one or ours for another trainer's; a bad config file.
    """
    words = sys.argv[1:] if arguments is None else arguments
    namespace, unknown = parser.parse_known_args(words)
    given = vars(namespace)
    config = given.pop("config")
    hints = hints_of(kinds)
    if unknown:
        own = [name for name in hints if f"--{name}" in parser._option_string_actions]
        raise _unknown(unknown[0].split("=")[0], [*own, *flags], "this command")
    found = {**(read_config_file(config, hints, [*flags]) if config else {}), **given}
    extra = {name: found.pop(name) for name in list(found) if name not in hints}
    return Given(found, extra)


def _unknown(word: str, known: Iterable[str], where: str) -> EffiLoRAError:
    """The error for a name that ``where`` does not have."""
    name = word.lstrip("-").replace("-", "_")
    known = list(known)
    ours = ELSEWHERE.get(name)
    if not word.startswith("-") and where == "this command":
        return EffiLoRAError(f"{word!r} belongs to no setting: quote values that have spaces")
    if ours is not None and ours.split()[0] in known:
        return EffiLoRAError(f"{word} is no setting of {where}: here it is --{ours}")
    near = difflib.get_close_matches(name, known, 1, 0.7)
    hint = f"did you mean --{near[0]}?" if near else "--help lists what there is"
    return EffiLoRAError(f"{word} is no setting of {where}: {hint}")


def read_config_file(path: Path, hints: dict[str, Any], flags: Sequence[str] = ()) -> dict[str, Any]:
    """The settings in a TOML or YAML file, of the types in ``hints``, and ``flags`` as the words of a command line.

    Raises :class:`EffiLoRAError` for unknown names, values of another type and files that can't be read.
    """
    text = read_user_text(path, what=f"--config {path}")
    try:
        data = tomllib.loads(text) if path.suffix.lower() == ".toml" else yaml.load(text, _Strict)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise EffiLoRAError(f"--config {path} can't be read: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(data, dict):
        raise EffiLoRAError(f"--config {path} must hold settings as 'name: value', in TOML or YAML")
    for name in data:
        if name not in hints and name not in flags:
            raise _unknown(str(name), [*hints, *flags], f"--config {path}")
    return {
        name: from_text(name, hints[name], value) if name in hints else _words(value)
        for name, value in data.items()
        if name in hints or value not in (None, False)
    }


def _words(value: Any) -> list[str]:
    """What would stand behind a flag on the command line: nothing behind one that is switched on."""
    values = value if isinstance(value, list) else [value]
    return [str(one) for one in values if one is not True]

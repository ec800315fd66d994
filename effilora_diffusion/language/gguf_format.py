"""Adapters of language models as GGUF files: llama.cpp's LoRA, and a copy of a model's GGUF file with the update added.

llama.cpp names weights by block (``blk.0.attn_q.weight``) and keeps the rows of q and k of some architectures in another order:
there its rotary embedding turns neighbouring rows, where transformers' turns a head's first half with its second.
"""

from __future__ import annotations

import importlib.util
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from ..core import AdapterFile, EffiLoRAError, to_lora
from ..core.convert import PlainLoRA
from ..core.sites import Site
from ..core.writing import write_atomic

ARCHITECTURES: dict[str, tuple[str, bool]] = {
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "mixtral": ("llama", True),
    "smollm3": ("smollm3", True),
    "granite": ("granite", True),
    "granitemoe": ("granitemoe", True),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
    "qwen3_moe": ("qwen3moe", False),
    "gemma": ("gemma", False),
    "gemma2": ("gemma2", False),
    "gemma3_text": ("gemma3", False),
    "phi3": ("phi3", False),
    "olmo2": ("olmo2", False),
    "starcoder2": ("starcoder2", False),
    "gpt2": ("gpt2", False),
}
"""GGUF's name for transformers' ``model_type``, and whether llama.cpp orders the rows of q and k in its own way.

Models of which it takes weights apart or together in other ways (fused q, k and v of Falcon, Bloom and GPT-NeoX, the latent
attention of DeepSeek, the interleaved experts of gpt-oss) are not among them.
"""

_BLOCK = re.compile(r"\.(?:layers|h)\.(\d+)\.")


@dataclass(frozen=True)
class Form:
    """How llama.cpp keeps a model: its architecture's name and, where it orders q and k by itself, their numbers of heads."""

    architecture: str
    query_heads: int | None = None
    key_heads: int | None = None

    def ordered(self, name: str, up: Tensor) -> Tensor:
        """``up`` ``(out, r)`` of the weight ``name`` with the rows in llama.cpp's order."""
        heads = self.query_heads if name.endswith("attn_q") else self.key_heads if name.endswith("attn_k") else None
        if heads is None:
            return up
        return up.view(heads, 2, -1, up.shape[-1]).transpose(1, 2).reshape(up.shape)


def form_of(content: AdapterFile, model: str | None = None) -> Form:
    """llama.cpp's form of the model that ``content`` was trained on; raises :class:`EffiLoRAError` where it is not known here."""
    facts = content.metadata
    kind = str(facts.get("model_type") or "")
    if not kind:
        if not (named := model or facts.get("base_model")):
            raise EffiLoRAError("the adapter does not say what model it is for: name it with --model")
        facts = _facts_of_config(str(named))
        kind = str(facts["model_type"])
    if kind not in ARCHITECTURES:
        raise EffiLoRAError(
            f"no GGUF of an adapter for {kind}: llama.cpp keeps its weights in a form of its own; known are "
            f"{', '.join(ARCHITECTURES)}; else export --format merged and convert that folder with llama.cpp's "
            "convert_hf_to_gguf.py"
        )
    architecture, ordered = ARCHITECTURES[kind]
    if not ordered:
        return Form(architecture)
    return Form(architecture, int(facts["attention_heads"]), int(facts["key_value_heads"]))


def _facts_of_config(base: str) -> dict[str, Any]:
    """What files of earlier versions do not say of their model, from its configuration."""
    from transformers import AutoConfig

    from .coverage import config_facts

    try:
        path = Path(base)
        where = {"gguf_file": path.name} if base.endswith(".gguf") else {}
        return config_facts(AutoConfig.from_pretrained(str(path.parent) if where else base, **where))
    except (OSError, ValueError) as error:
        raise EffiLoRAError(
            f"the adapter does not say what model it is for, and {base} can't be read: name it with --model"
        ) from error


def gguf_factors(content: AdapterFile, form: Form) -> dict[str, PlainLoRA]:
    """The plain LoRA by the names of GGUF's weights.

    Of experts ``down`` is ``(experts, r, in)`` and ``up`` ``(experts, out, r)``.
    """
    import gguf

    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == form.architecture)
    sites = {path: site for site in content.adapter.sites for path, _ in site.linears}
    names = gguf.get_tensor_name_map(architecture, 1 + max(_block(path) for path in sites))
    found: dict[str, PlainLoRA] = {}
    for path, pair in to_lora(content.adapter, content.calibration).items():
        if sites[path].experts:
            found |= _of_experts(path, pair, sites[path])
            continue
        name = names.get_name(path.replace("language_model.", ""))
        if name is None:
            raise EffiLoRAError(f"llama.cpp has no weight for {path}: the adapter can't become a GGUF file")
        found[name] = PlainLoRA(pair.down, form.ordered(name, pair.up).contiguous())
    return found


def _block(path: str) -> int:
    found = _BLOCK.search(path)
    return int(found.group(1)) if found else 0


def _of_experts(path: str, pair: PlainLoRA, site: Site) -> dict[str, PlainLoRA]:
    """Experts' factors by llama.cpp's names: it keeps gate and up apart, which transformers has one behind the other."""
    import gguf

    kinds, block = gguf.MODEL_TENSOR, _block(path)
    up = pair.up.view(site.experts, -1, pair.up.shape[1])
    down = pair.down.expand(site.experts, *pair.down.shape).contiguous()
    if path.endswith(".down_proj"):
        parts = {kinds.FFN_DOWN_EXP: up}
    elif path.endswith(".gate_up_proj"):
        parts = dict(zip((kinds.FFN_GATE_EXP, kinds.FFN_UP_EXP), up.chunk(2, 1), strict=True))
    else:
        raise EffiLoRAError(f"llama.cpp has no weight for {path}: the adapter can't become a GGUF file")
    return {
        gguf.TENSOR_NAMES[kind].format(bid=block): PlainLoRA(down, part.contiguous()) for kind, part in parts.items()
    }


def need_gguf() -> None:
    """Raise :class:`EffiLoRAError` where the package ``gguf`` is missing."""
    if importlib.util.find_spec("gguf") is None:
        raise EffiLoRAError("a GGUF file needs the package gguf: pip install 'effilora-diffusion[language]'")


def write_gguf_lora(output: Path, content: AdapterFile, model: str | None = None) -> None:
    """Write the adapter as the LoRA that llama.cpp loads with ``--lora``, in float32."""
    need_gguf()
    import gguf

    form = form_of(content, model)
    factors = gguf_factors(content, form)

    def write(temporary: Path) -> None:
        writer = gguf.GGUFWriter(temporary, form.architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(content.adapter.config.rank))  # the scale is in B
        writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        for name, pair in factors.items():
            writer.add_tensor(f"{name}.weight.lora_a", pair.down.numpy())
            writer.add_tensor(f"{name}.weight.lora_b", pair.up.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    write_atomic(output, write)


def base_gguf(content: AdapterFile, model: str | None = None) -> Path:
    """The GGUF file of the base: ``model``, else that the adapter was trained on; :class:`EffiLoRAError` if there is none."""
    named, file = model or str(content.metadata.get("base_model") or ""), content.metadata.get("gguf_file")
    path = Path(named) / str(file) if file and model is None else Path(named)
    if path.suffix != ".gguf":
        raise EffiLoRAError(
            "--format merged-gguf adds the adapter to a GGUF file of its base: name it with --model FILE.gguf; without one, "
            "export --format merged, and run llama.cpp's 'python convert_hf_to_gguf.py FOLDER --outfile MODEL.gguf'"
        )
    if not path.is_file():
        raise EffiLoRAError(f"{path}: no such GGUF file; name it with --model")
    return path


def write_merged_gguf(output: Path, content: AdapterFile, model: str | None = None) -> float:
    """Write a copy of the base's GGUF file with the update added, and return how much of the update rounding has cost.

    All that is not adapted is copied bit for bit, tokenizer included. Weights that are adapted are kept in float16, those that
    are float32 already in float32.
    """
    need_gguf()
    import gguf

    base = base_gguf(content, model)
    if output.resolve() == base.resolve():
        raise EffiLoRAError(f"{output} is the base itself: give another name")
    try:
        reader = gguf.GGUFReader(base)
    except (ValueError, OSError, IndexError, KeyError) as error:
        raise EffiLoRAError(f"{base} can't be read as GGUF: {error}") from error
    form = form_of(content, model)
    field = reader.fields.get("general.architecture")
    architecture = field.contents() if field is not None else "(it names none)"
    if architecture != form.architecture:
        raise EffiLoRAError(f"{base} is of the architecture {architecture}, the adapter of {form.architecture}")
    updates = {f"{name}.weight": pair for name, pair in gguf_factors(content, form).items()}
    _check_fit(base, reader, updates)
    rounding = Rounding()
    write_atomic(output, lambda temporary: _write_copy(temporary, reader, updates, rounding))
    return rounding.share


def _check_fit(base: Path, reader: Any, updates: dict[str, PlainLoRA]) -> None:
    """Raise :class:`EffiLoRAError` if a weight is missing from the file or has another shape."""
    if "split.count" in reader.fields and int(reader.fields["split.count"].contents()) > 1:
        raise EffiLoRAError(f"{base} is one of several parts: join them with llama.cpp's llama-gguf-split --merge")
    shapes = {tensor.name: tuple(int(size) for size in reversed(tensor.shape)) for tensor in reader.tensors}
    for name, pair in updates.items():
        wanted = (*pair.up.shape[:-1], pair.down.shape[-1])
        if shapes.get(name) != wanted:
            has = f"is {shapes[name]} there" if name in shapes else "is not in it"
            raise EffiLoRAError(f"{base} is another model than the adapter's: {name}, {wanted} wide, {has}")


class Rounding:
    """How far the stored weights are from the exact ones, beside the size of the update."""

    def __init__(self) -> None:
        self.missing = self.whole = 0.0

    def add(self, exact: Tensor, stored: Tensor, update: Tensor) -> None:
        """Take in a weight."""
        self.missing += float((exact.double() - stored.double()).square().sum())
        self.whole += float(update.double().square().sum())

    @property
    def share(self) -> float:
        """Root of the squared differences over the squared updates."""
        return (self.missing / self.whole) ** 0.5 if self.whole else 0.0


def _write_copy(path: Path, reader: Any, updates: dict[str, PlainLoRA], rounding: Rounding) -> None:
    """Write the file of ``reader`` with ``updates``, one weight in memory at a time."""
    import gguf

    kinds = gguf.GGMLQuantizationType
    writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        if name == "general.alignment":
            writer.add_custom_alignment(int(field.contents()))
            continue
        inner, value = field.types[-1] if len(field.types) > 1 else None, field.contents()
        if value == []:
            warnings.warn(f"{name}, an empty list, is left out: the package gguf writes none", stacklevel=2)
            continue
        writer.add_key_value(name, value, field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        if tensor.name in updates:
            kind = kinds.F32 if tensor.tensor_type == kinds.F32 else kinds.F16
            shape = [int(size) for size in reversed(tensor.shape)]
            size = int(tensor.n_elements) * (4 if kind == kinds.F32 else 2)
            writer.add_tensor_info(
                tensor.name, shape, numpy.dtype(numpy.float32 if kind == kinds.F32 else numpy.float16), size, kind
            )
        else:
            data = tensor.data
            writer.add_tensor_info(tensor.name, data.shape, data.dtype, data.nbytes, tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in reader.tensors:
        writer.write_tensor_data(
            _updated(tensor, updates[tensor.name], rounding) if tensor.name in updates else tensor.data
        )
    writer.close()


def _updated(tensor: Any, pair: PlainLoRA, rounding: Rounding) -> Any:
    """The numbers of a weight with its update added, in the type that is stored."""
    import gguf

    try:
        weight = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
    except (NotImplementedError, ValueError) as error:
        raise EffiLoRAError(
            f"{tensor.name} is {tensor.tensor_type.name}, which the package gguf can't dequantise"
        ) from error
    update = pair.up @ pair.down
    exact = weight + update
    stored = exact if tensor.tensor_type == gguf.GGMLQuantizationType.F32 else exact.half()
    if not stored.isfinite().all():
        raise EffiLoRAError(f"the adapter would make {tensor.name} infinite in float16: nothing was written")
    rounding.add(exact, stored, update)
    return stored.numpy()

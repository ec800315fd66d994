"""The public functions: one each for diffusers pipelines, diffusers models, transformers models and other modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from . import core
from .core import AdapterFile, EffiLoRA, EffiLoRAConfig, EffiLoRAError, load_adapter_file, save_adapter_file
from .core.convert import without_concepts
from .core.files import LANGUAGE
from .core.fingerprint import base_fingerprint
from .core.load import Attach, attach_parts, for_parts, host_model, load, parts_of, remove
from .core.load import detach as detach_parts
from .core.reference import adapter_file
from .core.sites import single_sites
from .language.reference_model import reference_model as reference_model


def _comes_from(model: nn.Module, library: str) -> bool:
    return any(kind.__module__.split(".")[0] == library for kind in type(core.unwrap(model)).__mro__)


def _attach_of(model: nn.Module) -> Attach:
    """How ``model`` takes an adapter: the attention processors of diffusers models are swapped as well."""
    if _comes_from(model, "diffusers"):
        from .diffusion.adapters.processors import attach

        return attach
    return core.attach


def _follow_prompts(pipeline_or_model: Any, adapter: EffiLoRA) -> None:
    """Let an adapter of several concepts find them in the prompts of a diffusers pipeline."""
    if adapter.concepts and not isinstance(pipeline_or_model, nn.Module):
        from .diffusion.adapters.prompts import follow_prompts

        follow_prompts(pipeline_or_model)


def create_adapter(
    pipeline_or_model: Any, config: EffiLoRAConfig | None = None, seed: int = 0, a_start: str | None = None
) -> EffiLoRA:
    """Create an adapter to be trained; until then it changes nothing.

    Args:
        pipeline_or_model: diffusers pipeline or model, transformers model, or any module with linears.
        config: rank, heads, routing, targets; default: ``EffiLoRAConfig()``. ``target_modules`` are groups
            (``attention``, ``feed_forward``, for language models also ``paper`` and ``all-linear``) and name endings.
        seed: of the initial values of A and the routers.
        a_start: what A starts as: ``"gaussian"`` as in diffusers' scripts (the default for diffusers models, whose learning
            rates mean the same then) or ``"kaiming"`` as PEFT's LoRA elsewhere (the default for all other models).

    Returns:
        The adapter, on the CPU in float32, not yet attached.

    Raises:
        EffiLoRAError: no linear of the model is targeted.

    Example:
        >>> from effilora_diffusion import EffiLoRAConfig, attach, create_adapter
        >>> adapter = attach(pipe, create_adapter(pipe, EffiLoRAConfig(rank=8)))
        >>> optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-3)
    """
    model, config = core.unwrap(host_model(pipeline_or_model)), config or EffiLoRAConfig()
    if _comes_from(model, "diffusers"):
        from .diffusion.adapters.processors import create_adapter as create

        return create(model, config, seed, a_start or "gaussian")
    if _comes_from(model, "transformers"):
        from .language.targets import create_adapter as create

        return create(model, config, seed, a_start or "kaiming")
    return EffiLoRA(config, single_sites(model, config.target_modules), seed, a_start or "kaiming")


def attach(pipeline_or_model: Any, adapter: EffiLoRA, name: str = "default") -> EffiLoRA:
    """Let an adapter act on a model: hooks on its linears, and on diffusers models EffiLoRA attention processors.

    Args:
        pipeline_or_model: as for :func:`create_adapter`; it may be compiled or quantised, or carry plain LoRAs.
        adapter: of :func:`create_adapter`, for a model with the same linears.
        name: under which it can be detached and merged.

    Returns:
        The adapter, moved to the model's device. Its ``strength`` and ``enabled`` may change at any time; at strength 0
        the model computes what it did before, bit for bit.

    Raises:
        EffiLoRAError: the name is taken, the adapter is attached already or does not fit; nothing is changed then.

    Example:
        >>> adapter = attach(pipe, create_adapter(pipe))
        >>> adapter.strength = 0.5
    """
    attach_parts(pipeline_or_model, adapter, name, _attach_of(host_model(pipeline_or_model)))
    _follow_prompts(pipeline_or_model, adapter)
    return adapter


def detach(pipeline_or_model: Any, name: str | None = None) -> None:
    """Take one adapter, or all, off a model, which is then what it was, bit for bit.

    Args:
        pipeline_or_model: what the adapter was attached to.
        name: of the adapter; ``None`` for all.

    Raises:
        EffiLoRAError: no adapter of that name is attached.

    Example:
        >>> detach(pipe, "default")
    """
    detach_parts(pipeline_or_model, name)


def merge(pipeline_or_model: Any, name: str = "default", concept: str | None = None) -> None:
    """Add an attached adapter's update to the base weights, so that it costs nothing more.

    Args:
        pipeline_or_model: what the adapter is attached to.
        name: of the adapter.
        concept: which one, of an adapter with several.

    Raises:
        EffiLoRAError: the update is no fixed matrix (several heads with token or timestep routing), or a weight is
            quantised; nothing is changed then.

    Example:
        >>> load_adapter(pipe, "outputs/my-dog", name="dog")
        >>> merge(pipe, "dog")
    """
    fresh = [part for part in parts_of(pipeline_or_model) if _acts_unmerged(part, name)]
    try:
        for_parts(lambda part, own: core.merge(part, own, concept), pipeline_or_model, name)
    except EffiLoRAError:
        for part in fresh:
            core.unmerge(part, name)
        raise


def _acts_unmerged(part: Any, name: str) -> bool:
    found = core.adapters_of(part).get(name)
    return found is not None and not found.merged


def unmerge(pipeline_or_model: Any, name: str = "default") -> None:
    """Undo :func:`merge`, bit for bit; the adapter acts through its hooks again.

    Example:
        >>> unmerge(pipe, "dog")
    """
    for_parts(core.unmerge, pipeline_or_model, name)


def load_adapter(
    pipeline_or_model: Any, path: str | Path | AdapterFile, scale: float = 1.0, name: str | None = None
) -> EffiLoRA:
    """Load an adapter for inference; several may act together, also with plain LoRAs, in any order.

    Args:
        pipeline_or_model: stock diffusers pipeline or model, or transformers model.
        path: native ``.safetensors`` file, output folder of a training run, ``"RUN@STEP"`` for one of its checkpoints, or an
            :class:`AdapterFile`.
        scale: strength; 0 gives the base's output bit for bit, negative values push away from the subject.
        name: under which it can be removed; default: the file's or folder's name, numbered if it is taken.

    Returns:
        The adapter: set ``strength`` and ``enabled`` on it at any time.

    Raises:
        EffiLoRAError: the file is damaged, no EffiLoRA adapter, or made for another architecture.

    Example:
        >>> pipe = StableDiffusionPipeline.from_pretrained("assets/base")
        >>> dog = load_adapter(pipe, "outputs/my-dog", scale=0.8)
        >>> image = pipe("a photo of sks dog").images[0]
    """
    adapter = load(pipeline_or_model, path, scale, name, _attach_of(host_model(pipeline_or_model)))
    _follow_prompts(pipeline_or_model, adapter)
    return adapter


def remove_adapter(pipeline_or_model: Any, name: str | EffiLoRA | None = None) -> None:
    """Take an adapter off again: afterwards the model is the base, bit for bit.

    Args:
        pipeline_or_model: what it was loaded into.
        name: its name, or what :func:`load_adapter` returned; ``None`` for all.

    Raises:
        EffiLoRAError: it is not attached there.

    Example:
        >>> remove_adapter(pipe, dog)
    """
    remove(pipeline_or_model, name)


def save_adapter(
    adapter: EffiLoRA,
    path: str | Path,
    model: Any = None,
    run: Callable[[], object] | None = None,
    **metadata: Any,
) -> None:
    """Write an adapter as a native file: one ``.safetensors`` with configuration, origin and checksum.

    Args:
        adapter: trained; attached or not.
        path: of the file, written whole or not at all.
        model: the pipeline or model it was trained on, whose identity the file then names; without it the export formats
            do not know which component the adapter is for.
        run: drives the model over a few typical inputs while the adapter is attached. Adapters with several heads and
            token or timestep routing need it to become plain LoRA later; others do not.
        metadata: further JSON-ready facts, as ``trigger_prompt="a photo of sks dog"``.

    Raises:
        EffiLoRAError: weights that are not finite, or ``run`` without ``model``.
        OSError: the file can't be written.

    Example:
        >>> save_adapter(adapter, "dog.safetensors", pipe, trigger_prompt="a photo of sks dog")
    """
    if run is not None and model is None:
        raise EffiLoRAError("save_adapter: to calibrate with run, give the model that it drives")
    facts: dict[str, Any] = {}
    calibration: dict[str, Any] = {}
    if model is not None:
        bare = core.unwrap(host_model(model))
        facts = {"base_model": getattr(model, "name_or_path", None), "base_class": type(bare).__name__}
        facts |= {**base_fingerprint(bare), "component": _component(model, bare)}
        if facts["component"] == LANGUAGE:
            from .language.coverage import model_facts

            facts |= model_facts(bare)
        if run is not None:
            calibration, facts["export_error"] = core.calibrate(bare, adapter, run)
    save_adapter_file(Path(path), AdapterFile(adapter, {**facts, **metadata}, calibration))


def _component(pipeline_or_model: Any, model: nn.Module) -> str:
    """The part of a pipeline that the adapter is for, which is the prefix of its names in plain LoRA files."""
    if _comes_from(model, "transformers"):
        return LANGUAGE
    if isinstance(pipeline_or_model, nn.Module):
        return "unet" if "UNet" in type(model).__name__ else "transformer"
    return "unet" if getattr(pipeline_or_model, "unet", None) is not None else "transformer"


def export_lora(
    adapter: str | Path | AdapterFile,
    output: str | Path,
    format: str | None = None,
    model: str | None = None,
    single_file_config: str | None = None,
    concept: str | None = None,
) -> float:
    """Write an adapter as plain LoRA, or its base model with the update merged in.

    Args:
        adapter: native file, output folder of a training run, ``"RUN@STEP"`` for one of its checkpoints, or an
            :class:`AdapterFile`. Where gates depend on their input, a checkpoint's plain LoRA is fitted (and of images
            distilled) on the run's data, which takes as long as at a run's end; else nothing is loaded but the file.
        output: file for ``diffusers``, ``kohya``, ``gguf`` and ``merged-gguf``, folder for ``peft`` and ``merged``.
        format: ``diffusers`` (default of image models), ``kohya`` (UNets, for ComfyUI and A1111), ``peft`` (default of
            language models) or ``merged``; of language models also ``gguf`` (llama.cpp's LoRA) and ``merged-gguf`` (a copy of
            the base's GGUF file with the update added).
        model: for ``merged``: folder or hub id of the base, for ``merged-gguf`` its GGUF file; default: the one that the
            adapter names.
        single_file_config: configuration and tokenizers of the base if it is one checkpoint file.
        concept: which one, of an adapter with several: a plain LoRA acts on every prompt, so it can hold one only.

    Returns:
        Relative error of the plain LoRA: 0 where it is exact (one head, static gates, a concept); else of the model's
        predictions for the subject, as the training run measured it, or of the linears' outputs.

    Raises:
        EffiLoRAError: the format does not suit the model, the adapter has several concepts and none of them is named, or
            the output can't be written.

    Example:
        >>> export_lora("outputs/my-dog", "dog.safetensors", format="kohya")
        0.0
    """
    if isinstance(adapter, AdapterFile):
        content = adapter
    else:
        file = adapter_file(adapter)
        content = exportable(file, load_adapter_file(file))
    format = format or default_format(content)
    if content.metadata.get("component") == LANGUAGE:
        from .language.export import export as export_language_adapter

        if concept is not None:
            raise EffiLoRAError("adapters of language models have no concepts: leave the concept out")
        return export_language_adapter(content, Path(output), format, model)
    from .diffusion.adapters.export import export as export_image_adapter

    return export_image_adapter(content, Path(output), format, model, single_file_config, concept=concept)


def encode_prompt(
    pipe: Any,
    prompt: str | Sequence[str],
    negative_prompt: str | Sequence[str] | None = None,
    guided: bool = True,
    clip_skip: int | None = None,
) -> dict[str, Tensor]:
    """Read prompts of any length for a stock pipeline of Stable Diffusion 1.x, 2.x or XL, in chunks of 75 tokens.

    Every chunk has a beginning and an end of its own, and their states stand one behind the other, as in A1111 and sd-scripts.

    Args:
        pipe: the pipeline, also one for image to image, inpainting or ControlNet.
        prompt: one, or one per image; all are padded to the chunks of the longest, as is the negative prompt.
        negative_prompt: one for all, or one per prompt.
        guided: whether the pipeline is called with guidance.
        clip_skip: as the pipeline takes it.

    Returns:
        Arguments for the pipeline instead of the prompts: ``prompt_embeds`` and with guidance ``negative_prompt_embeds``,
        ``(n, chunks x 77, width)``, and the pooled ones of XL, ``(n, width)``, which are those of the first chunk. Short prompts
        give what the pipeline's own ``encode_prompt`` gives, bit for bit.

    Raises:
        EffiLoRAError: the pipeline is none of these.

    Example:
        >>> image = pipe(**encode_prompt(pipe, "a very long description of a scene ..."), num_inference_steps=25).images[0]
    """
    from .diffusion.models.long_prompts import prompt_embeds

    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if negative_prompt is not None:
        one = isinstance(negative_prompt, str)
        negative_prompt = [str(negative_prompt)] * len(prompts) if one else list(negative_prompt)
    return prompt_embeds(pipe, prompts, negative_prompt, guided, clip_skip)


def exportable(path: Path, content: AdapterFile) -> AdapterFile:
    """``content`` with all that its plain LoRA needs, which the file of a checkpoint lacks where gates depend on their input."""
    made = core.is_exact(content.adapter) or content.plain is not None or bool(content.calibration)
    if made:
        return content
    if content.metadata.get("component") == LANGUAGE:
        from .language.calibration import with_calibration

        return with_calibration(path, content)
    from .diffusion.training.checkpoint_export import with_plain

    return with_plain(path, content)


def remove_concepts(adapter: str | Path | AdapterFile, output: str | Path, *names: str) -> AdapterFile:
    """Write an adapter of several concepts without some of them; nothing is trained, the others keep their bits.

    Args:
        adapter: native file, output folder of a training run, ``"RUN@STEP"``, or an :class:`AdapterFile`; it is not changed.
        output: the native file to write.
        names: of the concepts to take out.

    Returns:
        What was written.

    Raises:
        EffiLoRAError: it has no concept of such a name, none would be left, or the output can't be written.

    Example:
        >>> remove_concepts("outputs/rex-and-mug", "rex.safetensors", "mug")
    """
    content = adapter if isinstance(adapter, AdapterFile) else load_adapter_file(adapter_file(adapter))
    smaller = without_concepts(content.adapter, names)
    facts = dict(content.metadata)
    if facts.get("trigger_prompt") not in [concept.prompt for concept in smaller.concepts]:
        facts["trigger_prompt"] = smaller.concepts[0].prompt or smaller.concepts[0].triggers[0]
    found = AdapterFile(smaller, facts)
    found.sha256 = save_adapter_file(Path(output), found)
    return found


def default_format(content: AdapterFile) -> str:
    """The format that :func:`export_lora` writes if none is named."""
    return "peft" if content.metadata.get("component") == LANGUAGE else "diffusers"

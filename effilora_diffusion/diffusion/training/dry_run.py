"""The report before a run: what will be trained on what, for how long, and the memory it will take."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ...core.file_size import native_bytes, plain_bytes
from ..config import PRECISIONS, TrainingConfig
from ..data.prior import ClassFolder
from ..models import IMAGE, Family
from ..models.pipelines import EMBEDDED_BASE
from ..run_options import SAVED
from .build import RunParts

BYTES_PER_TRAINED = 16
"""Per trained parameter: float32 value, gradient and AdamW's two moments."""


@dataclass
class DryRunReport:
    """Facts about a run that is about to start; memory and files in bytes, ``activations`` ``None`` where it is not known.

    ``file`` is the native adapter, ``plain`` its plain LoRA (of one concept, if it has several).
    """

    name: str
    family: str
    objective: str
    model: str
    placed: str
    config: TrainingConfig
    counts: dict[str, int]
    layers: int
    linears: int
    sizes: list[tuple[int, int]]
    captions: int
    steps: int
    processes: int
    weights: int
    encoders: int
    activations: int | None
    file: int
    plain: int
    classes: list[str] = field(default_factory=list)
    concepts: list[str] = field(default_factory=list)

    @property
    def trained(self) -> int:
        """Memory of the adapter: its values, their gradients and the optimizer's state."""
        return self.counts["stored"] * BYTES_PER_TRAINED

    @property
    def known(self) -> int:
        """Memory while training, without what is not known."""
        return self.weights + self.trained + (self.activations or 0)

    @property
    def memory(self) -> str:
        """Memory while training, in words."""
        return f"{'more than' if self.activations is None else 'about'} {size_text(self.known)}"

    def lines(self) -> list[str]:
        """The report as lines of text."""
        c = self.config
        per_step = c.train_batch_size * c.gradient_accumulation_steps * self.processes
        epochs = self.steps * per_step / len(self.sizes)
        small = sum(min(size) < c.resolution for size in self.sizes)
        captions = f"{self.captions} distinct caption{'s' if self.captions > 1 else ''}"
        enlarged = f", {small} smaller than that and enlarged" if small else ""
        activations = "not predicted for this model" if self.activations is None else size_text(self.activations)
        start = f"; starts from {c.init_from}" if c.init_from else ""
        if c.gradient_checkpointing:
            activations += " kept, one block more at a time"
        return [
            f"model       {self.name}: {self.family} ({self.model}), {self.objective}, {self.placed}",
            f"images      {len(self.sizes)}, {captions}, at {c.resolution} px{enlarged}",
            *(f"{'' if index else 'concepts':12}{concept}" for index, concept in enumerate(self.concepts)),
            *(f"class       {found}" for found in self.classes),
            f"adapter     rank {c.rank}, {c.heads} head{'s' if c.heads > 1 else ''}, {c.routing} routing on {self.linears} "
            f"linears in {self.layers} blocks: {self.counts['stored']:,} parameters, {size_text(self.file)} on disk{start}",
            f"steps       {self.steps}, batch size {per_step}, {epochs:.1f} epochs",
            f"memory      {self.memory} while training: weights {size_text(self.weights)}, adapter {size_text(self.trained)}, "
            f"activations {activations}; encoders before that {size_text(self.encoders)}",
        ]


def size_text(count: float) -> str:
    """Bytes in words."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def dry_run_report(parts: RunParts, processes: int) -> DryRunReport:
    """Gather the report; nothing is computed and nothing moves to the device."""
    family, adapter, c = parts.family, parts.adapter, parts.config
    own = {id(parameter) for parameter in adapter.parameters()}
    others = [part for part in family.parts() if part is not family.model]
    precision = f"{PRECISIONS[c.mixed_precision]}{f', {c.quantization}' if c.quantization else ''}"
    longest = max(
        (example.caption for example in parts.examples), key=lambda caption: family.prompt_length(caption)[0]
    )
    return DryRunReport(
        name=c.pretrained_model_name_or_path or EMBEDDED_BASE,
        family=family.title,
        objective=parts.objective.name,
        model=type(family.model).__name__,
        placed=f"{precision} on {family.device.type}",
        config=parts.config,
        counts=adapter.parameter_counts(),
        layers=len(adapter.blocks),
        linears=sum(len(site.linears) for site in adapter.sites),
        sizes=[example.size for example in parts.examples],
        captions=len({example.caption for example in parts.examples}),
        steps=parts.steps,
        processes=processes,
        weights=sum(_bytes(value) for value in family.model.parameters() if id(value) not in own),
        encoders=sum(_bytes(value) for part in others for value in part.parameters()),
        activations=_activations(parts, longest),
        file=native_bytes(adapter, getattr(torch, SAVED[c.save_precision]), c.export_distillation_steps > 0),
        plain=plain_bytes(adapter, getattr(torch, SAVED[c.save_precision]), family.component),
        classes=_class_term(parts),
        concepts=_concepts(parts),
    )


def _concepts(parts: RunParts) -> list[str]:
    """Each subject of a run with several: what names it, how many images it has, and its share of the rows."""
    counts = [sum(one.concept == concept.name for one in parts.examples) for concept in parts.concepts]
    total = sum(parts.weights)
    return [
        f"{concept.name}: {', '.join(map(repr, concept.triggers))}, {count} image{'s' if count > 1 else ''}, "
        f"{weight / total:.0%} of the rows"
        for concept, count, weight in zip(parts.concepts, counts, parts.weights, strict=True)
    ]


def _activations(parts: RunParts, caption: str) -> int | None:
    """:func:`activation_bytes` of a run; of several subjects the rows take turns."""
    config, adapter, prior = parts.config, parts.adapter, parts.prior
    classes = len(prior.positions(0, config.train_batch_size)) if prior else 0
    if not adapter.concepts:
        return activation_bytes(config, parts.family, caption, classes)
    turns = [[row % len(adapter.concepts)] for row in range(config.train_batch_size + classes)]
    adapter.route(adapter.concept_gates(turns))
    try:
        return activation_bytes(config, parts.family, caption, classes)
    finally:
        adapter.clear_concept()


def _class_term(parts: RunParts) -> list[str]:
    """What the class is held to, what each class folder holds, and what is still to be drawn."""
    prior = parts.prior
    if prior is None:
        return []
    held = "the base's own prediction" if prior.from_base else "their images"
    found = [_class_images(folder) for folder in dict.fromkeys(parts.classes)]
    prompts = parts.config.class_prompt
    who = f"{prompts[0]!r} goes" if len(prompts) == 1 else "the class prompts go"
    rows = found or [f"no images, {who} with the instance images"]
    return [*rows, f"held to {held}, weight {prior.weight:g}, one to {prior.interval} of the images"]


def _class_images(wanted: ClassFolder) -> str:
    """What a class folder holds, and what is still to be drawn."""
    prompts = repr(wanted.caption) if wanted.caption is not None else f"{len(wanted.prompts)} prompts"
    there = len(wanted.scan()[0])
    missing = max(0, wanted.count - there)
    left = f", {there - wanted.count} more are there and not used" if there > wanted.count else ""
    return f"{wanted.count} images of {prompts} in {wanted.path}, {missing} of them to be drawn first{left}"


def _shortened(caption: str, family: Family) -> str:
    """``caption`` without the words that no text encoder reads: a warning about those would look at values."""
    limit = family.prompt_length(caption)[1]
    while limit is not None and (tokens := family.prompt_length(caption)[0]) > limit:
        caption = caption[: len(caption) * limit // (tokens + 1)]
    return caption


def _bytes(value: Tensor) -> int:
    if hasattr(value, "__tensor_flatten__"):  # a quantised weight of torchao is made of several tensors
        return sum(_bytes(getattr(value, name)) for name in value.__tensor_flatten__()[0])
    return value.numel() * value.element_size()


def activation_bytes(config: TrainingConfig, family: Family, caption: str, classes: int = 0) -> int | None:
    """Memory of what a forward pass keeps for the backward pass, found by running it on shapes without values.

    A micro-batch has ``classes`` class images beside its instance images.

    ``None`` for models whose shapes depend on values (prompts of free length, some masks), and for quantised ones:
    their layers keep tensors from one call to the next, which must not be without values.
    """
    if getattr(family.model, "hf_quantizer", None) is not None:
        return None
    kept: dict[Any, int] = {}
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def keep(value: Tensor) -> None:
        if isinstance(value, nn.Parameter):
            return
        storage = value.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        alive.append(value)  # so that no other storage gets the same address

    alive: list[Tensor] = []
    rows = config.train_batch_size + classes
    edge = config.resolution
    try:
        with mode:
            with torch.no_grad(), family.encoding_on(torch.device("cpu")):  # nothing is on the device yet
                conditions = family.prompt_conditions(_shortened(caption, family))
                image = torch.empty(1, 3, edge, edge, dtype=family.pipe.vae.dtype)
                latents = family.latent_moments(image)[0]
            batch = family.collate([{**conditions, IMAGE: torch.zeros(6)}] * rows)
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
                family.predict(torch.empty(rows, *latents.shape), torch.full((rows,), 500.0), batch)
            weights = [mode.from_tensor(value).untyped_storage()._cdata for value in family.model.parameters()]
    except (RuntimeError, TypeError, ValueError, AttributeError, AssertionError):
        return None
    finally:
        alive.clear()
    return sum(size for storage, size in kept.items() if storage not in set(weights))

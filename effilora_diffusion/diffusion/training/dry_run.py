"""The report before a run: what will be trained on what, for how long, and the memory it will take."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from heapq import nlargest
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ...core.config import heads_text
from ...core.file_size import native_bytes, plain_bytes
from ...core.files import encoders_of
from ..config import PRECISIONS, TrainingConfig
from ..data.buckets import Size, bucket_table
from ..data.prior import ClassFolder
from ..models import IMAGE, Family
from ..models.pipelines import EMBEDDED_BASE
from ..run_options import SAVED
from ..text_options import words_share
from .build import RunParts
from .notes import notes

BYTES_PER_TRAINED = 16
"""Per trained parameter: float32 value, gradient and AdamW's two moments."""


@dataclass
class DryRunReport:
    """Facts about a run that is about to start; memory and files in bytes, ``activations`` ``None`` where it is not known.

    ``file`` is the native adapter, ``plain`` its plain LoRA (of one concept, if it has several). ``sizes`` are those
    of the images, ``cut`` those of what is cut out of them where there are buckets, and ``masks`` have
    how many of them.
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
    epoch: int
    steps: int
    processes: int
    weights: int
    encoders: int
    activations: int | None
    file: int
    plain: int
    text: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    concepts: list[str] = field(default_factory=list)
    held_out: int = 0
    cut: list[Size] = field(default_factory=list)
    masks: int = 0

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
        epochs = self.steps * per_step / self.epoch
        small = 0 if self.cut else sum(min(size) < c.resolution for size in self.sizes)
        buckets = bucket_table(self.sizes, self.cut, c.train_batch_size) if self.cut else []
        at = f"in {len(buckets)} bucket{'s' if len(buckets) > 1 else ''}" if buckets else f"at {c.resolution} px"
        captions = f"{self.captions} distinct caption{'s' if self.captions > 1 else ''}"
        repeated = f" ({self.epoch} an epoch)" if self.epoch != len(self.sizes) else ""
        enlarged = f", {small} smaller than that and enlarged" if small else ""
        activations = "not predicted for this model" if self.activations is None else size_text(self.activations)
        start = f"; starts from {c.init_from}" if c.init_from else ""
        if c.gradient_checkpointing:
            activations += " kept, one block more at a time"
        return [
            f"model       {self.name}: {self.family} ({self.model}), {self.objective}, {self.placed}",
            f"images      {len(self.sizes)}{repeated}, {captions}, {at}{enlarged}",
            *([f"held out    {self.held_out}, for the validation loss"] if self.held_out else []),
            *(f"{'' if index else 'buckets':12}{line}" for index, line in enumerate(buckets)),
            *([f"masks       {self.masks} of the images, weight {c.unmasked_weight:g} outside"] if self.masks else []),
            *(f"{'' if index else 'concepts':12}{concept}" for index, concept in enumerate(self.concepts)),
            *(f"class       {found}" for found in self.classes),
            f"adapter     rank {c.rank}, {heads_text(c.heads, c.routing)} on {self.linears} linears in {self.layers} blocks: "
            f"{self.counts['stored']:,} parameters, {size_text(self.file)} on disk{start}",
            *(f"text        {found}" for found in self.text),
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
    captions = {caption for example in parts.examples for caption in example.captions}
    longest = max(nlargest(64, sorted(captions), len), key=lambda caption: family.prompt_length(caption)[0])
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
        captions=len(captions),
        epoch=parts.epoch,
        steps=parts.steps,
        processes=processes,
        weights=sum(
            _bytes(value)
            for part in (family.model, *family.trained)
            for value in part.parameters()
            if id(value) not in own
        ),
        encoders=sum(_bytes(value) for part in others for value in part.parameters()),
        text=_text(parts),
        activations=_activations(parts, longest),
        file=native_bytes(adapter, getattr(torch, SAVED[c.save_precision]), c.export_distillation_steps > 0),
        plain=plain_bytes(adapter, getattr(torch, SAVED[c.save_precision]), family.component),
        classes=_class_term(parts),
        concepts=_concepts(parts),
        held_out=len(parts.held_out),
        masks=sum(example.mask is not None for example in parts.examples),
        cut=parts.sizes if parts.preparation.buckets is not None else [],
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


def _text(parts: RunParts) -> list[str]:
    """What is trained in text encoders, and at which rate."""
    c, found = parts.config, encoders_of(parts.adapter)
    words = parts.adapter.words
    if words is None and not found:
        return []
    linears = sum(len(site.linears) for part in found.values() for site in part.sites)
    rate = c.text_encoder_lr or c.learning_rate
    until = f", the first {c.train_text_encoder_frac:.0%} of the steps" if c.train_text_encoder_frac < 1 else ""
    lines = [f"{' and '.join(found)}: one head on {linears} linears, rate {rate:g}{until}"] if found else []
    for placeholder, tokens in (words.meanings if words else {}).items():
        where = " and ".join(words.embeddings) if words else ""
        share = f"the first {words_share(c):.0%} of the steps"
        lines.append(f"{placeholder} stands for {''.join(tokens)}, new words of {where}, rate {rate:g}, {share}")
    return lines


def _activations(parts: RunParts, caption: str) -> int | None:
    """:func:`activation_bytes` of a run; of several subjects the rows take turns."""
    config, adapter, prior = parts.config, parts.adapter, parts.prior
    classes = len(prior.positions(0, config.train_batch_size)) if prior else 0
    size = max(parts.sizes, key=math.prod)
    if not adapter.concepts:
        return activation_bytes(config, parts.family, caption, classes, size)
    turns = [[row % len(adapter.concepts)] for row in range(config.train_batch_size + classes)]
    adapter.route(adapter.concept_gates(turns))
    try:
        return activation_bytes(config, parts.family, caption, classes, size)
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


def activation_bytes(
    config: TrainingConfig, family: Family, caption: str, classes: int = 0, size: Size | None = None
) -> int | None:
    """Memory of what a forward pass keeps for the backward pass, found by running it on shapes without values.

    A micro-batch has ``classes`` class images beside its instance images; ``size`` is that of all of them.

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
    width, height = size or (config.resolution, config.resolution)
    try:
        with mode:
            keeping = torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value)
            # nothing is on the device yet
            with keeping if family.trained else torch.no_grad(), family.encoding_on(torch.device("cpu")):
                conditions = family.live_conditions(_shortened(caption, family))
            with torch.no_grad():
                image = torch.empty(1, 3, height, width, dtype=family.pipe.vae.dtype)
                latents = family.latent_moments(image)[0]
            batch = family.collate([{**conditions, IMAGE: torch.zeros(6)}] * rows)
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
                family.predict(torch.empty(rows, *latents.shape), torch.full((rows,), 500.0), batch)
            known = [value for part in (family.model, *family.trained) for value in part.parameters()]
            weights = [mode.from_tensor(value).untyped_storage()._cdata for value in known]
    except (RuntimeError, TypeError, ValueError, AttributeError, AssertionError):
        return None
    finally:
        alive.clear()
    return sum(size for storage, size in kept.items() if storage not in set(weights))


def report_lines(parts: RunParts, processes: int) -> list[str]:
    """What will be trained, and what is worth knowing about it."""
    return [*dry_run_report(parts, processes).lines(), *(f"note: {note}" for note in notes(parts))]

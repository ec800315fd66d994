"""The rows of a run's batches: class images, drawn where they are missing, and what the encoders make of every image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ...core import is_exact
from ...core.phases import Tell, nobody
from ...core.run_folder import CACHE_FOLDER
from ..data.cache import Caches, DiskCache, latent_facts, text_facts
from ..data.concepts import ConceptSource, concept_rows
from ..data.folder import Example
from ..data.latents import ExampleSource
from ..data.prior import class_examples, without_images
from .batches import BatchDrawer
from .build import RunParts, sampler
from .processes import Processes

OTHER_IMAGES = 16
"""Images that are enough to see what an adapter does to unrelated prompts."""

Source = ExampleSource | ConceptSource
"""Where rows come from: one list of images, or one for each of several subjects."""


def class_prompts(parts: RunParts) -> list[tuple[list[Example], list[str]]]:
    """The images of every subject of a run, with the prompts of its class."""
    shared = parts.config.class_prompt
    if not parts.concepts:
        return [(parts.examples, shared)]
    return [
        (
            [one for one in parts.examples if one.concept == each.name],
            [each.class_prompt] if each.class_prompt else shared,
        )
        for each in parts.concepts
    ]


def example_sources(
    parts: RunParts, prior: list[list[Example]], caches: Caches
) -> tuple[Source, Source | None, ExampleSource | None]:
    """Where the rows of a run's batches come from: its images, and its class images, by folder, if it has any.

    Without class images the third is what stands for everything but the subject where a plain LoRA has to be fitted: some
    of the images without a prompt, which is also what guidance draws with.
    """

    def source(examples: list[Example], purpose: str) -> ExampleSource:
        # a class image is cut to the size of the images that it goes with; the subject's own, under the class prompt, are so
        own = purpose.startswith("instance") or not parts.classes
        how = parts.preparation if own else replace(parts.preparation, buckets=None)
        return ExampleSource(parts.family, examples, how, purpose, caches)

    names = [concept.name for concept in parts.concepts]
    rows = 1 if len(set(parts.sizes)) == 1 else parts.config.train_batch_size
    classes: Source | None = source(prior[0], "class") if prior else None
    others = None
    if classes is None and not is_exact(parts.adapter):
        others = source(without_images(parts.examples[:OTHER_IMAGES], [""]), "class")
    if len(prior) > 1:
        classes = concept_rows(source, zip(names, prior, strict=True), parts.weights, "class", rows)
    if not names:
        return source(parts.examples, "instance"), classes, others
    groups = [(name, [example for example in parts.examples if example.concept == name]) for name in names]
    return concept_rows(source, groups, parts.weights, "instance", rows), classes, others


def held_out_source(parts: RunParts, caches: Caches) -> ExampleSource | None:
    """Where the rows of the validation loss come from, cut out at the centre; ``None``: no image is held out."""
    if not parts.held_out:
        return None
    how = replace(parts.preparation, center_crop=True, random_flip=False, batch=1)
    return ExampleSource(parts.family, parts.held_out, how, "held out", caches)


def class_images(
    parts: RunParts, say: Callable[[str], None], processes: Processes, tell: Tell = nobody
) -> list[list[Example]]:
    """The images of every class folder, drawn where they are missing; without folders the instance images."""
    if parts.prior is None:
        return []
    if not parts.classes:
        return [without_images(examples, prompts) for examples, prompts in class_prompts(parts)]
    draw = sampler(parts.config, parts.family)
    with parts.adapter.disabled():  # fresh, so it changes nothing; but it would cost time
        found = {folder: class_examples(folder, draw, say, processes, tell) for folder in dict.fromkeys(parts.classes)}
    return [found[folder] for folder in parts.classes]


def batch_drawer(
    parts: RunParts,
    prior: list[list[Example]],
    everything: bool,
    say: Callable[[str], None],
    processes: Processes,
    done: int = 0,
    tell: Tell = nobody,
) -> BatchDrawer:
    """Draws the run's batches; encodes its images first.

    ``everything``: all of them now, after which the encoders leave the GPU; else what is drawn, when it is first drawn. What is
    kept on disk is all encoded now, shared out among the processes. ``done`` steps are not drawn again: captions are encoded
    from there on.
    """
    rows = range(done * parts.images_per_step, max(parts.steps, done + 1) * parts.images_per_step)
    kept = caches(parts, say, processes)
    instance, classes, others = example_sources(parts, prior, kept)
    held_out = held_out_source(parts, kept)
    with parts.family.encoders():
        for source in (instance, classes, others):
            if source is not None:
                source.fill(everything, instance.sizes, rows if source is instance else None, tell)
        if held_out is not None:
            held_out.fill(everything, tell=tell)
    if parts.config.cache_latents_to_disk or parts.config.cache_text_encoder_outputs_to_disk:
        processes.wait_for_everyone()
    return BatchDrawer(parts.family, parts.objective, instance, classes, parts.prior, others, held_out)


def caches(parts: RunParts, say: Callable[[str], None], processes: Processes) -> Caches:
    """Where the outputs of a run's encoders are kept."""
    config, family = parts.config, parts.family
    folder = Path(config.latents_cache_dir or Path(config.output_dir) / CACHE_FOLDER)
    source = [config.pretrained_model_name_or_path, config.revision, config.variant]
    return Caches(
        DiskCache(folder, latent_facts(family, source), say) if config.cache_latents_to_disk else None,
        DiskCache(folder, text_facts(family, source), say) if config.cache_text_encoder_outputs_to_disk else None,
        processes.process_index,
        processes.num_processes,
    )

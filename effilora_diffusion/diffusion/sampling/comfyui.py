"""The graph that ComfyUI keeps in images, read from its sampler back to prompts, sizes and LoRAs. Nothing of it is run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from ...core import EffiLoRAError
from .sampler_names import from_comfyui

MOST_LETTERS = 4_000_000
MOST_NODES = 5000
DEEPEST = 100
"""Links that are followed from one node to the next."""

SAMPLERS = ("KSampler", "KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced")

WIDGETS = {
    "KSampler": ("seed", "", "steps", "cfg", "sampler_name", "scheduler", "denoise"),
    "KSamplerAdvanced": ("add_noise", "noise_seed", "", "steps", "cfg", "sampler_name", "scheduler"),
    "CLIPTextEncode": ("text",), "CheckpointLoaderSimple": ("ckpt_name",), "UNETLoader": ("unet_name",),
    "EmptyLatentImage": ("width", "height"), "EmptySD3LatentImage": ("width", "height"), "FluxGuidance": ("guidance",),
    "LoraLoader": ("lora_name", "strength_model"), "LoraLoaderModelOnly": ("lora_name", "strength_model"),
    "RandomNoise": ("noise_seed",), "KSamplerSelect": ("sampler_name",), "BasicScheduler": ("scheduler", "steps"),
}  # fmt: skip
"""The order in which a ``workflow`` has the values of these nodes."""

TEXTS = ("text", "text_g", "text_l", "t5xxl", "clip_l", "string", "value", "prompt", "string_a", "string_b")
"""Inputs that hold words, the most telling first."""

CONDITIONS = ("conditioning", "conditioning_1", "conditioning_2", "conditioning_to", "conditioning_from")

Node = dict[str, Any]


def parse_graph(prompt: str | None, workflow: str | None) -> tuple[dict[str, Any], list[str]]:
    """Parameters in the form of :meth:`~.request.GenerationRequest.parameters`, and what could not be taken over, in words.

    Args:
        prompt: JSON of the graph that was run.
        workflow: JSON of the graph as it is shown, for images without the other.

    Raises:
        EffiLoRAError: neither is a graph with a sampler.
    """
    graph = _Graph(_nodes(prompt) or _from_workflow(workflow))
    samplers = [name for name, node in graph.nodes.items() if node["class_type"] in SAMPLERS]
    if not samplers:
        raise EffiLoRAError("this image's ComfyUI graph has no sampler that is known here")
    first = graph.first_pass(samplers)
    facts, notes = graph.facts(graph.nodes[first])
    if len(samplers) > 1:
        notes.append(f"{len(samplers) - 1} more sampler{'s' if len(samplers) > 2 else ''}, as of a second pass")
    return facts, notes


def _loaded(text: str | None) -> Any:
    if not text:
        return None
    if len(text) > MOST_LETTERS:
        raise EffiLoRAError("this image's ComfyUI graph is too large to be read")
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _nodes(text: str | None) -> dict[str, Node]:
    """The nodes of a ``prompt`` by their number; what is none is left out."""
    found = _loaded(text)
    if not isinstance(found, dict):
        return {}
    pairs = [(str(name), node) for name, node in found.items() if isinstance(node, dict)]
    return {
        name: {"class_type": str(node.get("class_type")), "inputs": node["inputs"]}
        for name, node in pairs[:MOST_NODES]
        if isinstance(node.get("inputs"), dict)
    }


def _from_workflow(text: str | None) -> dict[str, Node]:
    """The nodes of a ``workflow`` in the form of a ``prompt``, as far as :data:`WIDGETS` knows their values."""
    found = _loaded(text)
    if not isinstance(found, dict) or not isinstance(found.get("nodes"), list):
        return {}
    links, listed = {}, found.get("links")
    for link in listed if isinstance(listed, list) else ():
        if isinstance(link, list) and len(link) > 2 and isinstance(link[0], int):
            links[link[0]] = [str(link[1]), link[2]]
    nodes: dict[str, Node] = {}
    for node in found["nodes"][:MOST_NODES]:
        if not isinstance(node, dict) or node.get("mode") in (2, 4):  # muted, bypassed
            continue
        values, kind = node.get("widgets_values"), str(node.get("type"))
        inputs: dict[str, Any] = {}
        if isinstance(values, list):
            inputs = {name: value for name, value in zip(WIDGETS.get(kind, ()), values, strict=False) if name}
        slots = node.get("inputs")
        for slot in slots if isinstance(slots, list) else ():
            if isinstance(slot, dict) and isinstance(slot.get("link"), int) and slot["link"] in links:
                inputs[str(slot.get("name"))] = links[slot["link"]]
        nodes[str(node.get("id"))] = {"class_type": kind, "inputs": inputs}
    return nodes


class _Graph:
    """Nodes whose inputs are values, or links ``[node, output]`` to others."""

    def __init__(self, nodes: Mapping[str, Node]):
        self.nodes = nodes

    def linked(self, value: Any) -> Node | None:
        """The node behind a link."""
        return self.nodes.get(str(value[0])) if isinstance(value, list) and len(value) == 2 else None

    def upstream(self, node: Node, *names: str) -> Iterator[Node]:
        """The nodes before ``node`` along the first linked input among ``names``, nearest first."""
        for _ in range(DEEPEST):
            links = [found for name in names if (found := self.linked(node["inputs"].get(name)))]
            if not links:
                return
            node = links[0]
            yield node

    def first_pass(self, samplers: list[str]) -> str:
        """The first sampler whose latents come from no other sampler."""
        numbers = {id(self.nodes[name]): name for name in samplers}
        for name in samplers:
            before = self.upstream(self.nodes[name], "latent_image", "samples", "latent", "pixels", "image")
            if not any(id(node) in numbers for node in before):
                return name
        return samplers[0]

    def value(self, node: Node | None, *names: str) -> Any:
        """The first input among ``names`` that is there, followed through nodes that only hold a value."""
        for _ in range(DEEPEST):
            found = (
                None if node is None else next((v for n in names if (v := node["inputs"].get(n)) is not None), None)
            )
            if not isinstance(found, list):
                return found
            node, names = (
                self.linked(found),
                ("value", "seed", "noise_seed", "int", "float", "number", "string", "text"),
            )
        return None

    def facts(self, sampler: Node) -> tuple[dict[str, Any], list[str]]:
        """What a sampler's node and those before it say."""
        inputs = sampler["inputs"]
        guider, noise, sigmas, select = (
            self.linked(inputs.get(name)) for name in ("guider", "noise", "sigmas", "sampler")
        )
        source = guider or sampler
        notes: list[str] = []
        name, said = from_comfyui(
            _word(self.value(sampler, "sampler_name") or self.value(select, "sampler_name")),
            _word(self.value(sampler, "scheduler") or self.value(sigmas, "scheduler")),
        )
        notes += said
        words = {}
        for side, link in (("prompt", "positive"), ("negative_prompt", "negative")):
            start = source["inputs"].get(link, source["inputs"].get("conditioning") if side == "prompt" else None)
            words[side] = "\n".join(dict.fromkeys(self.words(start, notes, set())))
        adapters, model = self.loaders(source, notes)
        latents = [sampler, *self.upstream(sampler, "latent_image", "samples", "pixels", "image")]
        sizes = [(self.value(node, "width"), self.value(node, "height")) for node in latents[1:]]
        width, height = next((pair for pair in sizes if all(isinstance(edge, int) for edge in pair)), (None, None))
        if any("LoadImage" in node["class_type"] for node in latents):
            notes.append("the image that it began with")
        guidance = self.guidance(source, self.value(source, "cfg"))
        seed = self.value(sampler, "seed", "noise_seed") if noise is None else self.value(noise, "noise_seed")
        return {
            **words, "seed": _number(seed, int), "guidance_scale": _number(guidance, float),
            "num_inference_steps": _number(self.value(sampler, "steps") or self.value(sigmas, "steps"), int),
            "width": width, "height": height, "model": model, "adapters": adapters, "sampler": name, "literal": False,
        }, list(dict.fromkeys(notes))  # fmt: skip

    def guidance(self, source: Node, cfg: Any) -> Any:
        """The guidance of distilled models, which is a node of its own, or ``cfg``."""
        start = self.linked(source["inputs"].get("positive", source["inputs"].get("conditioning")))
        for node in [] if start is None else [start, *self.upstream(start, *CONDITIONS)]:
            if node["class_type"] == "FluxGuidance":
                return self.value(node, "guidance")
        return cfg

    def words(self, link: Any, notes: list[str], seen: set[int]) -> Iterator[str]:
        """The texts behind a conditioning, those of combined ones too; every node of ``seen`` was read already."""
        if isinstance(link, str):
            yield link.replace("[", r"\[").replace("]", r"\]")  # ComfyUI has no weights in square brackets
            return
        node = self.linked(link)
        if node is None or id(node) in seen or len(seen) > DEEPEST or "ZeroOut" in node["class_type"]:
            return
        inner = bool(seen)
        seen.add(id(node))
        inputs = node["inputs"]
        if {"positive", "negative"} <= inputs.keys():  # a ControlNet's, which passes on both
            notes.append(f"what {node['class_type'][:60]} does")
            yield from self.words(inputs["negative" if link[1] == 1 else "positive"], notes, seen)
            return
        texts = TEXTS if inner or "Encode" in node["class_type"] else ()
        if sum(name in inputs for name in CONDITIONS) > 1:
            notes.append(f"how {node['class_type'][:60]} joins prompts: their words stand one behind the other")
        for name in (*CONDITIONS, *texts):
            if name in inputs:
                yield from self.words(inputs[name], notes, seen)

    def loaders(self, source: Node, notes: list[str]) -> tuple[list[dict[str, Any]], str | None]:
        """The LoRAs between a sampler and its checkpoint, and the checkpoint's name."""
        adapters, model = [], None
        for node in self.upstream(source, "model"):
            inputs = node["inputs"]
            stacked = [value for value in inputs.values() if isinstance(value, dict) and "lora" in value]
            if "lora_name" in inputs:
                name = _word(self.value(node, "lora_name"))
                if name is None:
                    notes.append(f"the LoRA of {node['class_type'][:60]}, whose name is not said")
                else:
                    adapters.append(_adapter(name, self.value(node, "strength_model", "strength")))
            elif stacked:
                adapters += [_adapter(one["lora"], one.get("strength")) for one in stacked if one.get("on", True)]
            elif found := self.value(node, "ckpt_name", "unet_name"):
                model = _stem(found)
        return [one for one in reversed(adapters) if one["file"] != "None"][:20], model


def _adapter(name: Any, strength: Any) -> dict[str, Any]:
    number = _number(strength, float)
    return {"file": _stem(name), "strength": 1.0 if number is None else number}


def _stem(name: Any) -> str:
    """A file's name without folders and ending."""
    return PurePosixPath(str(name)[:300].replace("\\", "/")).name.removesuffix(".safetensors")


def _word(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _number(value: Any, kind: type) -> Any:
    try:
        return kind(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
    except (ValueError, OverflowError):
        return None

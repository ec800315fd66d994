"""Concept routing in stock pipelines: the gates follow the prompts of a call.

The pipeline gets a subclass of its own class, of the same name, whose ``__call__`` reads the prompts before the pipeline
does. Both halves of classifier-free guidance have the gates of their prompt, as with a plain LoRA of the concept.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ...core import EffiLoRA, EffiLoRAError
from ...core.attachment import adapters_of, host_of
from ...core.concept_gates import ConceptGates
from ...core.load import host_model

_PROMPTS = ("prompt", "prompt_2", "prompt_3", "prompt_4")
"""Arguments of the pipelines for one image's words, by text encoder."""


def follow_prompts(pipe: Any) -> None:
    """Let the concept adapters on a diffusers pipeline follow its prompts, until its last adapter is taken off."""
    kind: Any = type(pipe)
    if isinstance(pipe, nn.Module) or _is_following(kind):
        return
    model = host_model(pipe)
    if any(adapter.concepts for adapter in adapters_of(model).values()):
        pipe.__class__ = _following_class(kind)
        host_of(model).cleanups.append(_Unfollow(pipe))


def follow_as(other: Any, pipe: Any) -> None:
    """Let another pipeline of the same parts follow its prompts, where ``pipe`` does."""
    if _is_following(type(pipe)):
        kind: Any = type(other)
        other.__class__ = _following_class(kind)


def _is_following(kind: type) -> bool:
    return "_effilora_base" in vars(kind)


class _Unfollow:
    """Gives a pipeline its own class back; copies of the model know nothing of the pipeline."""

    def __init__(self, pipe: Any):
        self.pipe: Any = weakref.ref(pipe)

    def __call__(self, model: nn.Module) -> None:
        pipe = self.pipe and self.pipe()
        if pipe is not None and _is_following(type(pipe)):
            pipe.__class__ = type(pipe)._effilora_base

    def __getstate__(self) -> dict[str, Any]:
        return {"pipe": None}


@functools.cache
def _following_class(base: Any) -> type:
    """A subclass of the pipeline class ``base`` whose calls set the gates of concept adapters."""
    call = base.__call__

    @functools.wraps(call)
    def following_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            given = inspect.signature(call).bind(self, *args, **kwargs).arguments
        except TypeError:  # the pipeline says what is wrong with its arguments
            given = {}
        with _routed(self, given):
            return call(self, *args, **kwargs)

    names = {
        "__call__": following_call,
        "__module__": base.__module__,
        "__doc__": base.__doc__,
        "_effilora_base": base,
    }
    return type(base.__name__, (base,), {**names, "__qualname__": base.__qualname__, "__reduce_ex__": _reduced})


def _reduced(self: Any, protocol: Any) -> Any:
    """Pickle and copy by the pipeline's own class, which can be found by its name."""
    return (_new, (type(self)._effilora_base,), self.__dict__.copy())


def _new(base: Any) -> Any:
    return object.__new__(_following_class(base))


@contextmanager
def _routed(pipe: Any, given: dict[str, Any]) -> Iterator[None]:
    """Let the adapters' gates be those of a call's prompts in this context."""
    adapters = [one for one in adapters_of(host_model(pipe)).values() if one.concepts and not one.merged]
    before = [(adapter, adapter.routed) for adapter in adapters]
    images = int(given.get("num_images_per_prompt") or 1)
    try:
        for adapter in adapters:
            gates = _gates(adapter, given)
            adapter.route(None if gates is None else gates.repeated(images))
        yield
    finally:
        for adapter, routed in before:
            if not adapter.merged:
                adapter.route(routed)


def _gates(adapter: EffiLoRA, given: dict[str, Any]) -> ConceptGates | None:
    """The gates of every prompt of a call: those that were set, else those of the triggers in it."""
    if adapter.chosen is not None:
        return adapter.chosen
    texts = [value for name in _PROMPTS if (value := given.get(name)) is not None]
    if texts:
        columns = [[value] if isinstance(value, str) else list(value) for value in texts]
        count = max(map(len, columns))
        columns = [column * count if len(column) == 1 else column for column in columns]
        return adapter.prompt_gates(" \n ".join(map(str, row)) for row in zip(*columns, strict=False))
    if any(name.endswith("prompt_embeds") for name, value in given.items() if value is not None) and _would_act(
        adapter
    ):
        raise EffiLoRAError(
            "prompt_embeds do not tell which concepts are meant: call adapter.set_concept(NAME), or set_concept() for none, "
            "before the pipeline"
        )
    return None


def _would_act(adapter: EffiLoRA) -> bool:
    return adapter.enabled and adapter.strength != 0

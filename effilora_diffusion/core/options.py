"""The adapter's settings as options of a command line, the same for images and for language."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .config import A_SHARINGS, EffiLoRAConfig, ReducerConfig


def option(default: Any, text: str, choices: tuple[str, ...] | None = None) -> Any:
    """A dataclass field that is also a command-line option with this help text."""
    metadata = {"help": text, "choices": choices}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class AdapterOptions:
    """What an adapter is and how its Reducer works, by the names that every training command has."""

    rank: int = option(4, "rank of the shared A")
    lora_alpha: float | None = option(None, "the update is scaled by lora_alpha / rank (default: rank)")
    lora_dropout: float = option(0.0, "dropout on the adapter's input")
    heads: int = option(3, "B heads per adapted layer; 1 is plain LoRA with a shared A")
    routing: str = option("token", "what the gates of the heads depend on", ("token", "static", "timestep"))
    a_sharing: str = option("width", "one A per input width, one sliced A, or one per layer (HydraLoRA)", A_SHARINGS)
    target_modules: list[str] = option(["attention"], "groups (attention, feed_forward) and name endings to adapt")
    adapt_feed_forward: bool = option(False, "adapt the feed-forward layers too")
    reducer: str = option("off", "which layers' heads are trained", ("importance", "random", "off"))
    reducer_active: float = option(0.5, "share of the layers trained per step")
    reducer_interval: int = option(10, "optimizer steps between two measurements of importance")
    reducer_warmup: int = option(20, "optimizer steps before the first measurement")
    reducer_train_shared: bool = option(False, "let frozen layers train A and routers (as in the paper; saves less)")

    def adapter_config(self) -> EffiLoRAConfig:
        """The adapter these settings describe."""
        extra = ("feed_forward",) if self.adapt_feed_forward else ()
        return EffiLoRAConfig(
            rank=self.rank,
            alpha=self.lora_alpha,
            heads=self.heads,
            routing=self.routing,
            a_sharing=self.a_sharing,
            target_modules=tuple(dict.fromkeys((*self.target_modules, *extra))),
            dropout=self.lora_dropout,
            reducer=ReducerConfig(
                mode=self.reducer,
                active=self.reducer_active,
                interval=self.reducer_interval,
                warmup=self.reducer_warmup,
                train_shared=self.reducer_train_shared,
            ),
        )

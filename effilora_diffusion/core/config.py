"""The validated, serialisable configuration of an EffiLoRA adapter and its Reducer."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from .concepts import Concept, check_concepts
from .errors import EffiLoRAError

FORMAT_VERSION = 1
"""Version of the configuration as JSON, and of the native file that contains it."""

ROUTINGS = ("token", "static", "timestep", "concept")
A_SHARINGS = ("width", "slice", "none")
A_STARTS = ("kaiming", "gaussian")
SCALINGS = ("standard", "rslora")
PAPER_MODES = ("importance", "random", "off")
REDUCER_MODES = (*PAPER_MODES, "depth")
TARGET_GROUPS: dict[str, tuple[str, ...]] = {
    "attention": (
        *("to_q", "to_k", "to_v", "to_out.0", "to_out", "to_gate"),
        *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),  # joint attention: projections of the text stream
        *("to_q_t", "to_k_t", "to_v_t", "to_out_t"),
        *("to_query", "to_key", "to_value", "*_attention.out_layer"),
        *("to_qkv", "to_kv", "to_qkv_mlp_proj", "img_qkv_proj", "txt_kv_proj"),  # projections that are always fused
        *("img_attn_qkv", "img_attn_proj", "txt_attn_qkv", "txt_attn_proj"),
        *("q_img", "k_img", "v_img"),
    ),
    "feed_forward": (
        *("ff*.net.0.proj", "ff*.net.2", "*_mlp.net.0.proj", "*_mlp.net.2"),
        *("single_transformer_blocks.*.proj_mlp", "single_transformer_blocks.*.proj_out"),
        *("ff*.linear_in", "ff*.linear_out", "ff*.linear_1", "ff*.linear_2", "ff*.out_projection"),
        *("feed_forward.w*", "feed_forward.linear_*", "ff.gate", "ff.up", "ff.down"),
        *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "mlp.linear_fc2"),
    ),
}
"""Named sets of target modules, by their names in diffusers' models."""


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise EffiLoRAError(message[:300])  # it may quote what a file says


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any, least: float, most: float) -> bool:
    """Whether ``value`` is a number, neither NaN nor a truth value, from ``least`` to ``most``."""
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most


def _from_dict(cls: type, data: Any, where: str) -> dict[str, Any]:
    """Copy ``data``; refuse keys that ``cls`` does not have, since ignoring one would silently change the meaning."""
    _check(isinstance(data, dict), f"{where} must be a JSON object")
    unknown = set(data) - {f.name for f in fields(cls)}
    _check(not unknown, f"{where} has unknown keys {sorted(unknown)}: it was written by a newer version or by hand")
    return dict(data)


def heads_text(heads: int, routing: str) -> str:
    """Heads in words: ``3 heads, token routing``; a single one has no gates, but for those of concepts."""
    if heads == 1 and routing != "concept":
        return "1 head"
    return f"{heads} head{'s' if heads > 1 else ''}, {routing} routing"


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 300 and value.isprintable()


@dataclass(frozen=True)
class ReducerConfig:
    """Selection of the blocks whose heads are trained (paper section 3.2; constants from IST, arXiv 2410.11772).

    Args:
        mode: ``"importance"``, ``"random"`` (as many blocks, drawn uniformly), ``"depth"`` (all blocks after a cut in the
            order of execution, see :class:`.DepthPlan`; not in the paper) or ``"off"``.
        active: share of the blocks trained per step.
        interval: optimizer steps between importance evaluations.
        warmup: optimizer steps before the first evaluation, in which all blocks are trained.
        rollouts: suppressed subsets per evaluation.
        suppress_share: share of the blocks in a subset.
        suppress_factor: factor on the strength of suppressed blocks.
        step_size: scale of the score update.
        train_shared: also accumulate gradients of A and the routers in frozen blocks (the paper); otherwise
            backpropagation stops at the earliest active block, which saves time and memory.
    """

    mode: str = "off"
    active: float = 0.5
    interval: int = 10
    warmup: int = 20
    rollouts: int = 3
    suppress_share: float = 0.5
    suppress_factor: float = 0.0
    step_size: float = 1.0
    train_shared: bool = False

    def __post_init__(self) -> None:
        _check(self.mode in REDUCER_MODES, f"reducer mode must be one of {REDUCER_MODES}, not {self.mode!r}")
        share_ok = is_number(self.active, 0, 1) and self.active > 0
        _check(share_ok, f"reducer share of active blocks must be in (0, 1], not {self.active!r}")
        for name, least, most in (("interval", 1, 10**9), ("warmup", 0, 10**9), ("rollouts", 2, 10_000)):
            value = getattr(self, name)
            value_ok = _is_int(value) and least <= value <= most
            _check(value_ok, f"reducer {name} must be {least} to {most}, not {value!r}")
        share_ok = is_number(self.suppress_share, 0, 1) and 0 < self.suppress_share < 1
        _check(share_ok, f"reducer suppress_share must be in (0, 1), not {self.suppress_share!r}")
        factor_ok = is_number(self.suppress_factor, 0, 1) and self.suppress_factor < 1
        _check(factor_ok, f"reducer suppress_factor must be in [0, 1), not {self.suppress_factor!r}")
        step_ok = is_number(self.step_size, 0, 1e6) and self.step_size > 0
        _check(step_ok, f"reducer step_size must be positive and at most 1e6, not {self.step_size!r}")
        _check(
            isinstance(self.train_shared, bool),
            f"reducer train_shared must be true or false, not {self.train_shared!r}",
        )
        _check(
            not (self.mode == "depth" and self.train_shared),
            "reducer train_shared makes blocks before a cut keep their activations, so that mode depth would save nothing",
        )


@dataclass(frozen=True)
class EffiLoRAConfig:
    """Configuration of an adapter (paper section 3.1).

    Args:
        rank: r, rows of every shared A and columns of every head.
        alpha: the update is scaled by ``alpha / rank`` (or ``alpha / sqrt(rank)``); ``None`` means ``rank``.
        heads: N, number of B matrices per adapted linear layer.
        routing: ``"token"`` gates softmax(G A x) per token (the paper), ``"static"`` learned constant gates,
            ``"timestep"`` gates from the timestep only, ``"concept"`` one head per concept, which acts where the prompt names it.
        a_sharing: ``"width"`` one A per input width, ``"slice"`` one A of the largest width whose columns are sliced,
            ``"none"`` one A per site, shared only by its heads (HydraLoRA, arXiv 2404.19245).
        target_modules: groups of :data:`TARGET_GROUPS` and name suffixes of linear layers; ``*`` matches any part of a
            name between two dots.
        dropout: dropout probability on the adapter's input in training.
        timestep_range: the model's timestep argument at pure noise, for ``timestep`` routing.
        scaling: ``"standard"`` or ``"rslora"`` (arXiv 2312.03732).
        reducer: see :class:`ReducerConfig`.
        concepts: of ``concept`` routing, in the order of their heads.
        common_head: whether there is one more head, the last one, that acts always (``concept`` routing only).
    """

    rank: int = 4
    alpha: float | None = None
    heads: int = 3
    routing: str = "token"
    a_sharing: str = "width"
    target_modules: tuple[str, ...] = ("attention",)
    dropout: float = 0.0
    timestep_range: float = 1000.0
    scaling: str = "standard"
    reducer: ReducerConfig = field(default_factory=ReducerConfig)
    concepts: tuple[Concept, ...] = ()
    common_head: bool = False

    def __post_init__(self) -> None:
        _check(_is_int(self.rank) and 1 <= self.rank <= 4096, f"rank must be 1 to 4096, not {self.rank!r}")
        _check(_is_int(self.heads) and 1 <= self.heads <= 64, f"heads must be 1 to 64, not {self.heads!r}")
        alpha_ok = self.alpha is None or is_number(self.alpha, 1e-6, 1e6)
        _check(alpha_ok, f"alpha must be 1e-6 to 1e6, not {self.alpha!r}")
        _check(self.routing in ROUTINGS, f"routing must be one of {ROUTINGS}, not {self.routing!r}")
        _check(self.a_sharing in A_SHARINGS, f"a_sharing must be one of {A_SHARINGS}, not {self.a_sharing!r}")
        _check(self.scaling in SCALINGS, f"scaling must be one of {SCALINGS}, not {self.scaling!r}")
        dropout_ok = is_number(self.dropout, 0, 1) and self.dropout < 1
        _check(dropout_ok, f"dropout must be in [0, 1), not {self.dropout!r}")
        range_ok = is_number(self.timestep_range, 1e-6, 1e9)
        _check(range_ok, f"timestep_range must be 1e-6 to 1e9, not {self.timestep_range!r}")
        targets = self.target_modules
        _check(
            isinstance(targets, tuple | list) and len(targets) > 0 and all(map(_is_name, targets)),
            f"target_modules must name at least one linear layer, not {targets!r}",
        )
        object.__setattr__(self, "target_modules", tuple(targets))
        _check(isinstance(self.common_head, bool), f"common_head must be true or false, not {self.common_head!r}")
        if self.routing == "concept":
            object.__setattr__(self, "concepts", tuple(self.concepts))
            check_concepts(self.concepts)
            needed = len(self.concepts) + self.common_head
            _check(len(self.concepts) > 0, "concept routing needs the concepts that it tells apart")
            _check(
                self.heads == needed,
                f"concept routing has a head per concept: heads must be {needed}, not {self.heads}",
            )
        else:
            _check(not self.concepts and not self.common_head, "concepts and common_head are for concept routing")

    @property
    def has_routers(self) -> bool:
        """Whether the gates are learned: one head and concept routing need none."""
        return self.heads > 1 and self.routing != "concept"

    @property
    def scale(self) -> float:
        """Factor on the update: alpha / rank, or alpha / sqrt(rank) for rsLoRA."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.scaling == "rslora" else self.rank)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-serialisable dictionary with the format version.

        Without what only concept routing has, where there is none: earlier versions read the others.
        """
        found = {"format_version": FORMAT_VERSION, **asdict(self)}
        if self.routing != "concept":
            del found["concepts"], found["common_head"]
        return found

    def to_json(self) -> str:
        """Return the configuration as JSON text."""
        return json.dumps(self.to_dict(), sort_keys=True)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> EffiLoRAConfig:
        """Inverse of :meth:`to_dict`; raises :class:`EffiLoRAError` for unknown keys and invalid values."""
        _check(isinstance(data, dict), "the adapter's configuration must be a JSON object")
        data = dict(data)
        version = data.pop("format_version", None)
        _check(
            version == FORMAT_VERSION,
            f"the configuration has format version {version!r}, this library reads {FORMAT_VERSION}: update it",
        )
        data = _from_dict(cls, data, "the adapter's configuration")
        reducer = _from_dict(ReducerConfig, data.pop("reducer", {}), "the reducer's configuration")
        concepts = data.pop("concepts", ())
        _check(isinstance(concepts, tuple | list), "the adapter's concepts must be a list")
        found = tuple(Concept.from_dict(entry) for entry in concepts)
        return cls(**data, reducer=ReducerConfig(**reducer), concepts=found)

    @classmethod
    def from_json(cls, text: str) -> EffiLoRAConfig:
        """Inverse of :meth:`to_json`."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise EffiLoRAError(f"the adapter's configuration is not JSON: {error}") from error
        return cls.from_dict(data)

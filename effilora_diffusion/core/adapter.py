"""The trained weights and their arithmetic: shared A, stacked heads, routers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .concept_gates import ConceptGates, per_row
from .concepts import Concept, find_concepts, number_of
from .config import A_STARTS, EffiLoRAConfig
from .errors import EffiLoRAError
from .sites import Site
from .switch import Switch, Switched
from .words import NewWords

TIMESTEP_FEATURES = 16
"""Width of the noise level's encoding that the ``timestep`` router reads."""

GATE_LENGTH = 2.0
"""Length of the rows of a fresh token router on an A by Kaiming's rule: at rank 4 its entries have deviation 1."""

SharedActivations = tuple[Tensor, tuple[Tensor, ...]]
"""What the linears of one site share for one input, see :meth:`EffiLoRA.activations`."""


def timestep_features(timesteps: Tensor) -> Tensor:
    """Sinusoids of timesteps in [0, 1000]: ``(n,)`` to ``(n, TIMESTEP_FEATURES)``, the first one a constant 1."""
    half = TIMESTEP_FEATURES // 2
    frequencies = torch.arange(half, device=timesteps.device, dtype=torch.float32) * (math.pi / 2)
    angles = timesteps.float().reshape(-1, 1) / 1000 * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def a_widths(config: EffiLoRAConfig, sites: Iterable[Site]) -> dict[str, int]:
    """The matrices A of an adapter by key, each with its width: one per input width, one of the largest, or one per site.

    A site's own A is HydraLoRA's (2404.19245), where only the heads share it.
    """
    if config.a_sharing == "none":
        return {a_key(config, site): site.in_features for site in sites}
    found = sorted({site.in_features for site in sites})
    return {str(width): width for width in (found if config.a_sharing == "width" else found[-1:])}


def a_key(config: EffiLoRAConfig, site: Site) -> str:
    """Key of the A that reads the input of ``site``, but with ``slice``, where there is only one."""
    return site.name.replace(".", "/") if config.a_sharing == "none" else str(site.in_features)


def router_shape(config: EffiLoRAConfig) -> tuple[int, ...]:
    """Shape of the router of one site: a row for every head."""
    rows = {"token": (config.rank,), "static": (), "timestep": (TIMESTEP_FEATURES,)}[config.routing]
    return (config.heads, *rows)


def a_length(start: str, rank: int, width: int) -> float:
    """How much longer than by Kaiming's rule the rows of a fresh A ``(rank, width)`` are."""
    return math.sqrt(3 * width) / rank if start == "gaussian" else 1.0


def fresh_a(start: str, rank: int, width: int, generator: torch.Generator) -> Tensor:
    """A fresh A, ``(rank, width)``: one of :data:`.A_STARTS`."""
    if start == "gaussian":
        return torch.randn(rank, width, generator=generator) / rank
    bound = math.sqrt(3 / width) / math.sqrt(3)  # kaiming_uniform with a = sqrt(5), as PEFT's LoRA
    return (torch.rand(rank, width, generator=generator) * 2 - 1) * bound


def _check_experts(config: EffiLoRAConfig, sites: Iterable[Site]) -> None:
    """Raise :class:`EffiLoRAError` where experts are adapted by what is no update of their weights."""
    if not any(site.experts for site in sites):
        return
    if config.heads > 1 and config.routing != "static":
        raise EffiLoRAError(
            f"experts are adapted by one update of their weights, which {config.routing} routing has not: with experts in "
            "--target_modules use --routing static or --heads 1"
        )
    if config.dropout:
        raise EffiLoRAError(
            "--lora_dropout acts on the input of a linear, which the weights of experts do not see: set it to 0, or leave "
            "experts out of --target_modules"
        )


class EffiLoRA(Switched, nn.Module):
    """Owner of every A, head and router of one adapter (paper equations 1 and 2).

    For a linear map W of a site with input x: ``h = A x``, ``w = softmax(G h)``,
    ``y = W x + strength * scale * sum_i w_i B_i h``. Heads start at zero, so a fresh adapter changes nothing. Routers
    start at random: from equal gates all heads would receive the same gradient and stay copies of one another. Token routers
    start shorter the longer the code h is, so that gates are as soft at rank 64 as at rank 4.

    Parameters by site index ``s``: ``B[s]`` is ``(sum of d_out, N, r)``, the heads of all maps of the site stacked;
    ``G[s]`` is ``(N, r)``, ``(N,)`` (static) or ``(N, features)`` (timestep), absent with one head and concept routing; ``A``
    maps the keys of :func:`a_widths` to ``(r, width)``.

    Args:
        config: the adapter's configuration.
        sites: where it acts; at least one.
        seed: of the initial values of A and the routers.
        a_start: what A starts as, one of :data:`.A_STARTS`: ``"kaiming"`` as PEFT's LoRA by itself, ``"gaussian"`` as that of
            diffusers' scripts; a learning rate means what it does there if A is as long.

    Attributes:
        switch: its strength, and whether it is on; see :class:`.Switched`.
        call_scale: what the call that runs multiplies its strength with.
        routed: gates of the rows that the model runs now (concept routing only); ``None``: nobody has said.
        kept_heads: numbers of heads that training leaves as they are, see :meth:`keep_heads`.
        tokens_first: whether the model hands some linears its tokens before its batch, see :func:`.per_row`.
        chosen: those that :meth:`set_concept` or :meth:`set_concepts` named, which prompts do not change.
        encoders: its parts on the pipeline's text encoders, by the names of those there; see :meth:`add_encoder`.
        words: new words of the pipeline's text encoders.
    """

    def __init__(self, config: EffiLoRAConfig, sites: Iterable[Site], seed: int = 0, a_start: str = "kaiming"):
        super().__init__()
        if a_start not in A_STARTS:
            raise EffiLoRAError(f"a_start must be one of {A_STARTS}, not {a_start!r}")
        self.config = config
        self.sites = tuple(sites)
        if not self.sites:
            raise EffiLoRAError(f"the model has no linear layer of the target_modules {list(config.target_modules)}")
        _check_experts(config, self.sites)
        self.switch = Switch()
        self.encoders = nn.ModuleDict()
        self.words: NewWords | None = None
        self.merged = False
        self.call_scale = 1.0
        self.block_strength: dict[str, float] = {}
        self.cut_sites = [False] * len(self.sites)
        self.noise_features: Tensor | None = None
        self.routed: ConceptGates | None = None
        self.chosen: ConceptGates | None = None
        self.row_gates: Tensor | None = None
        self.tokens_first = False
        self.kept_heads: tuple[int, ...] = ()
        self.attached = False
        self.A = nn.ParameterDict()
        generator = torch.Generator().manual_seed(seed)
        for key, width in a_widths(config, self.sites).items():
            self.A[key] = nn.Parameter(fresh_a(a_start, config.rank, width, generator))
        self.B = nn.ParameterList(
            nn.Parameter(torch.zeros(site.out_features, config.heads, config.rank)) for site in self.sites
        )
        routed = self.sites if config.has_routers else ()
        self.G = nn.ParameterList(
            nn.Parameter(
                torch.randn(*router_shape(config), generator=generator) * self._router_deviation(site, a_start)
            )
            for site in routed
        )

    def _router_deviation(self, site: Site, a_start: str) -> float:
        """Of the entries of a fresh router: for inputs of the same size the logits of all sites and ranks have the same one."""
        if self.config.routing != "token":
            return 1.0
        rank, width = self.config.rank, site.in_features
        widest = max(each.in_features for each in self.sites) if self.config.a_sharing == "slice" else width
        return GATE_LENGTH / math.sqrt(rank) / (a_length(a_start, rank, widest) * math.sqrt(width / widest))

    def shared_a(self, site: Site) -> Tensor:
        """The A that reads this site's input, ``(r, in_features)``; with ``slice`` the first columns of the only one."""
        if self.config.a_sharing == "slice":
            (single,) = self.A.values()
            return single[:, : site.in_features]
        return self.A[a_key(self.config, site)]

    def add_encoder(self, name: str, part: EffiLoRA) -> None:
        """Make ``part`` this adapter's part on the text encoder ``name``: with its switch, trained and saved with it."""
        self.encoders[name] = part
        part.switch = self.switch

    @property
    def blocks(self) -> tuple[str, ...]:
        """The Reducer's units in model order."""
        return tuple(dict.fromkeys(site.block for site in self.sites))

    @property
    def acts(self) -> bool:
        """Whether the adapter changes anything in a forward pass."""
        if self.routed is not None and not len(self.routed.heads):
            return False
        return self.enabled and not self.merged and self.strength != 0 and self.call_scale != 0

    @property
    def concepts(self) -> tuple[Concept, ...]:
        """The concepts that the adapter tells apart, in the order of their heads; empty but for concept routing."""
        return self.config.concepts

    def set_concept(self, *names: str) -> None:
        """Let the heads of these concepts act from now on, whatever prompts say; without a name: the base.

        Raises:
            EffiLoRAError: an unknown name, or the adapter is merged.

        Example:
            >>> adapter.set_concept("cat")
            >>> images = pipe(prompt_embeds=states).images
        """
        self.set_concepts([names])

    def set_concepts(self, rows: Sequence[Sequence[str]]) -> None:
        """:meth:`set_concept` for a batch of several prompts: the names of the concepts of each, none for the base.

        Example:
            >>> adapter.set_concepts([["cat"], [], ["cat", "dog"]])
        """
        if self.config.routing != "concept":
            raise EffiLoRAError("the adapter has no concepts: its routing is not 'concept'")
        self.chosen = self.concept_gates([[number_of(self.concepts, name) for name in row] for row in rows])
        self.route(self.chosen)

    def clear_concept(self) -> None:
        """Forget :meth:`set_concept`: prompts decide again."""
        self.chosen = None
        self.route(None)

    def concept_gates(self, rows: Sequence[Sequence[int]]) -> ConceptGates:
        """The gates of rows that are given by the numbers of their concepts; the common head acts on each."""
        return ConceptGates.of(rows, [len(self.concepts)] if self.config.common_head else ())

    def prompt_gates(self, prompts: Iterable[str]) -> ConceptGates:
        """The gates of the concepts that each of these prompts names."""
        return self.concept_gates([find_concepts(prompt, self.concepts) for prompt in prompts])

    def route(self, gates: ConceptGates | None) -> None:
        """Let ``gates`` decide about the next forward passes; raises :class:`EffiLoRAError` while the adapter is merged."""
        if self.merged:
            raise EffiLoRAError("a concept of the adapter is merged into the model: call unmerge first")
        self.routed, self.row_gates = gates, None

    def site_scale(self, site: Site) -> float:
        """Everything the site's update is multiplied with."""
        return self.config.scale * self.strength * self.call_scale * self.block_strength.get(site.block, 1.0)

    def gates(self, index: int, h: Tensor | None = None) -> Tensor | None:
        """Softmax gates of site ``index``, heads first; ``None`` with one head.

        ``h`` is ``(r, rows)``; the result is ``(N, rows)`` for token routing, ``(N,)`` for static routing and
        ``(N, batch or 1)`` for timestep routing. With concept routing it is ``(k, batch)`` for the k heads that act on a part
        of the batch, and ``None`` where the same act on all of it.
        """
        if self.config.routing == "concept":
            return self.row_gates
        if not len(self.G):
            return None
        router = self.G[index].detach() if self.cut_sites[index] else self.G[index]
        if self.config.routing == "token":
            assert h is not None
            return torch.mm(router, h).softmax(0)
        if self.config.routing == "static":
            return router.softmax(0)
        if self.noise_features is None:
            raise EffiLoRAError("timestep routing needs the timestep: run the model the adapter is attached to")
        return torch.mm(router, self.noise_features.to(router).t()).softmax(0)

    def activations(self, index: int, x: Tensor) -> SharedActivations:
        """What the linears of site ``index`` share for x ``(..., d_in)``: low-rank activations and each linear's heads.

        The activations are ``(rows, K)``, a linear's heads ``(d_out, K)``: K is r where heads are mixed before they are applied
        (one head, static gates, one concept), else N r, the gated activations of all heads side by side for one product.
        """
        site = self.sites[index]
        shared = self.shared_a(site)
        if self.cut_sites[index]:
            shared = shared.detach()
        x = x.to(shared.dtype)
        if self.config.dropout and self.training:
            x = F.dropout(x, self.config.dropout)
        # Features first: with the few heads and ranks of an adapter, softmax and gating along the long dimension are
        # several times faster than along the short one.
        h = torch.mm(x.flatten(0, -2), shared.t()).t()
        heads = self.mixed_heads(index)
        weights = None if self.config.routing == "static" else self.gates(index, h)
        if weights is not None:
            weights = per_row(weights.to(h), x, self.tokens_first)
            h = (weights.unsqueeze(1) * h).flatten(0, 1)
        return h.t(), heads.split([width for _, width in site.linears])

    def mixed_heads(self, index: int) -> Tensor:
        """The heads of site ``index`` as one matrix: ``(sum of d_out, r)`` if they can be mixed, else ``(.., N r)``.

        With concept routing only the heads that act are computed: their mean, or ``(.., k r)`` where they differ by row.
        """
        heads = self.B[index]
        if self.config.routing == "concept":
            if self.routed is None:
                raise EffiLoRAError(
                    "which concept is meant is not known: call the pipeline with a prompt that names it, or first "
                    f"adapter.set_concept({self.concepts[0].name!r})"
                )
            acting = heads.index_select(1, self.routed.heads.to(heads.device))
            if self.row_gates is not None:
                return acting.flatten(1)
            shares = self.routed.shares
            return acting.sum(1) if shares is None else torch.matmul(shares.to(acting), acting)
        if self.config.heads > 1 and self.config.routing == "static":
            gates = self.gates(index)
            assert gates is not None
            return torch.matmul(gates, heads)
        return heads.flatten(1)

    def factors(self, index: int) -> tuple[Tensor, Tensor]:
        """The update of site ``index`` but for its scale: A ``(r, in)`` and the mixed heads ``(sum of d_out, r)``."""
        shared = self.shared_a(self.sites[index])
        return shared.detach() if self.cut_sites[index] else shared, self.mixed_heads(index)

    def add_to(self, output: Tensor, index: int, position: int, shared: SharedActivations, fresh: bool) -> Tensor:
        """``output + scale * heads * activations`` in one product.

        ``output`` ``(..., d_out)`` is that of the site's linear number ``position``.

        ``fresh`` outputs (of a plain linear layer, which nobody else holds) are added to in place.
        """
        activations, heads = shared[0], shared[1][position]
        scale = self.site_scale(self.sites[index])
        if output.dtype != heads.dtype:  # the base may be fp16 or quantised; the adapter computes in its own dtype
            update = F.linear(activations, heads) * scale
            return output + update.view(output.shape).to(output.dtype)
        flat = output.flatten(0, -2)
        matrix = heads.t()
        if fresh:
            return flat.addmm_(activations, matrix, alpha=scale).view(output.shape)
        return torch.addmm(flat, activations, matrix, alpha=scale).view(output.shape)

    def set_active(self, layers: Sequence[str] | None, train_shared: bool = True) -> None:
        """Train the heads of ``layers`` only (``None``: all). Frozen heads keep no gradient, so no optimizer moves them.

        With ``train_shared`` false, frozen layers also give no gradient to A and routers.
        """
        known = set(self.blocks)
        active = known if layers is None else set(layers)
        if active - known:
            raise EffiLoRAError(f"unknown layers {sorted(active - known)}")
        for site, heads in zip(self.sites, self.B, strict=True):
            heads.requires_grad_(site.block in active)
            if site.block not in active:
                heads.grad = None
        # By site, in place: what torch.compile has made of a block depends on that block's entry alone.
        self.cut_sites[:] = [not train_shared and site.block not in active for site in self.sites]

    @property
    def cut_blocks(self) -> frozenset[str]:
        """The blocks that give no gradient to A and routers."""
        return frozenset(site.block for site, cut in zip(self.sites, self.cut_sites, strict=True) if cut)

    def keep_heads(self, optimizer: torch.optim.Optimizer) -> None:
        """Put :attr:`kept_heads` back after each of the optimizer's steps: decay moves what has no gradient, too."""
        kept = list(self.kept_heads)
        if not kept:
            return
        before = [heads.detach()[:, kept].clone() for heads in self.B]

        def restore(*_: Any) -> None:
            with torch.no_grad():
                for heads, value in zip(self.B, before, strict=True):
                    heads[:, kept] = value

        optimizer.register_step_post_hook(restore)

    def parameter_counts(self) -> dict[str, int]:
        """Numbers of parameters: ``trained_per_step`` now, ``trained_ever`` and ``stored``."""
        stored = sum(p.numel() for p in self.parameters())
        active = sum(p.numel() for p in self.parameters() if p.requires_grad)
        share = len(self.kept_heads) / self.config.heads
        active -= round(sum(heads.numel() * share for heads in self.B if heads.requires_grad))
        for index, site in enumerate(self.sites):  # what only cut layers use asks for gradients, but none reaches it
            if self.cut_sites[index]:
                active -= self.G[index].numel() if len(self.G) else 0
                active -= self.shared_a(site).numel() if self.config.a_sharing == "none" else 0
        return {"trained_per_step": active, "trained_ever": stored, "stored": stored}

    def extra_repr(self) -> str:
        """One line about the configuration."""
        c = self.config
        return (
            f"rank={c.rank}, heads={c.heads}, routing={c.routing}, sites={len(self.sites)}, blocks={len(self.blocks)}"
        )

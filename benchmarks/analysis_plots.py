"""The plots of ``python -m benchmarks.analysis``; needs matplotlib."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

from .analysis_costs import MEASURES, USUAL

mpl.rcParams.update({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})
COLOURS = dict(zip(MEASURES, ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#8c564b"), strict=True))
NAMES = {
    "active": "share of blocks trained (random)", "heads": "heads", "rank": "rank", "resolution": "pixels",
    "adapters": "adapters loaded (sampling)",
}  # fmt: skip
Runs = Sequence[dict[str, Any]]


def save(figure: Any, file: Path) -> None:
    """Write a small PNG."""
    figure.tight_layout()
    figure.savefig(file, dpi=100, pil_kwargs={"optimize": True})
    plt.close(figure)


def short(block: str) -> str:
    """A block's name as it fits under a bar."""
    parts = block.replace(".transformer_blocks.0", "").replace("_blocks", "").replace("attentions.", "").split(".")
    return " ".join(parts).replace("mid block 0", "mid").replace("mid_block 0", "mid")


def costs(found: dict[str, Runs], file: Path) -> None:
    """Every cost beside the usual adapter's, by one choice a panel."""
    figure, axes = plt.subplots(1, len(found), figsize=(10, 2.7))
    for axis, (name, rows) in zip(axes, found.items(), strict=True):
        usual = next(row for row in rows if row[name] == USUAL[name])
        for measure in MEASURES:
            if usual[measure]:
                values = [row[measure] / usual[measure] for row in rows]
                axis.plot(
                    [row[name] for row in rows], values, "o-", ms=3, lw=1.2, color=COLOURS[measure], label=measure
                )
        if name != "active":
            axis.set_xscale("log", base=2)
            axis.set_yscale("log", base=2)
            axis.yaxis.set_major_formatter("{x:g}")
        axis.set_xticks([row[name] for row in rows], [f"{row[name]:g}" for row in rows])
        axis.minorticks_off()
        axis.set_xlabel(NAMES[name])
    axes[0].set_ylim(0.4, 1.1)
    axes[0].set_ylabel(
        f"of the usual adapter's\n({USUAL['heads']} heads, rank {USUAL['rank']}, {USUAL['resolution']} pixels)"
    )
    axes[0].legend(loc="lower right", fontsize=7)
    save(figure, file)


def full_size(found: dict[str, Any], file: Path) -> None:
    """Operations of Stable Diffusion 1.5's step by depth, and what the adapter adds."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.5, 2.7))
    left.plot(*zip(*found["cuts"], strict=True), "o-", ms=3, label="the last blocks")
    left.plot(*zip(*[*found["random"], (1.0, 1.0)], strict=True), "s--", ms=3, label="random blocks")
    left.axhline(found["forward"], color="grey", lw=0.8, ls=":")
    left.text(0.72, found["forward"] + 0.015, "forward pass alone", color="grey", fontsize=7)
    left.set(xlabel="share of blocks trained", ylabel="operations of a full step", ylim=(0.4, 1.2))
    left.legend(loc="upper left", ncols=2)
    for name, values in found["added"].items():
        right.plot([rank for rank, _ in values], [100 * share for _, share in values], "o-", ms=3, label=name)
    right.set(xlabel="rank", ylabel="% of the base's forward pass")
    right.set_title("what the adapter adds", fontsize=8)
    right.legend()
    save(figure, file)


def reducer(runs: Mapping[str, Runs], shares: Sequence[float], heads: Sequence[int], file: Path) -> None:
    """The paper's Figures 5 and 6: held-out loss, mean and every seed."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.5, 2.7), sharey=True)

    def draw(axis: Any, points: list[tuple[float, str]], style: str, label: str, colour: str) -> None:
        points = sorted(points)
        losses = [[one["loss"] for one in runs[name]] for _, name in points]
        places = [place for place, _ in points]
        axis.plot(
            places, [statistics.mean(values) for values in losses], style, color=colour, label=label, lw=1.2, ms=4
        )
        for place, values in zip(places, losses, strict=True):
            axis.scatter([place] * len(values), values, s=6, color=colour, alpha=0.5)

    for mode, colour in (("importance", "#1f77b4"), ("random", "#d62728")):
        draw(left, [(0.0, "off"), *((1 - share, f"{mode} {share:g}") for share in shares)], "o-", mode, colour)
    lora = [one["loss"] for one in runs["LoRA"]]
    left.axhline(statistics.mean(lora), color="grey", lw=0.9, ls="--", label="plain LoRA, all blocks")
    left.set(xlabel="share of blocks frozen in a step", ylabel="held-out loss (lower is better)")
    left.legend(fontsize=7)
    draw(right, [(3.0, "off"), *((float(count), f"{count} heads") for count in heads)], "o-", "heads", "#2ca02c")
    right.axhline(statistics.mean(lora), color="grey", lw=0.9, ls="--", label="plain LoRA, all blocks")
    right.set(xlabel="heads")
    save(figure, file)


def overlaps(found: dict[str, Any], file: Path) -> None:
    """Distributions of overlaps; a dash marks what random spaces have on average."""
    wanted = {
        "LoRA A between layers": "LoRA: A\nbetween layers", "LoRA B between layers": "LoRA: B\nbetween layers",
        "LoRA A between runs": "LoRA: A\ntwo runs", "LoRA B between runs": "LoRA: B\ntwo runs",
        "LoRA A with its start": "LoRA: A\nand its start", "off A with its start": "shared A\nand its start",
        "off B between layers": "3 heads: B\nbetween layers", "off B between runs": "3 heads: B\ntwo runs",
    }  # fmt: skip
    figure, axis = plt.subplots(figsize=(7.5, 2.8))
    wanted = {name: label for name, label in wanted.items() if found[name]}
    for place, name in enumerate(wanted):
        values = [one[2] if isinstance(one, list) else one for one in found[name]]
        axis.boxplot([values], positions=[place], widths=0.6, showfliers=False, medianprops={"color": "#d62728"})
        if isinstance(found[name][0], list):
            chance = statistics.mean(one[3] for one in found[name])
            axis.plot([place - 0.4, place + 0.4], [chance, chance], color="grey", ls=":", lw=1.5)
    axis.set_xticks(range(len(wanted)), list(wanted.values()), fontsize=7)
    axis.set(ylabel="overlap of subspaces", ylim=(0, 1.02))
    save(figure, file)


def usage(runs: Runs, file: Path) -> None:
    """Gates by block, noise level and word: means over the seeds."""
    figure, axes = plt.subplots(1, 3, figsize=(9, 2.8))
    found = [one["usage"] for one in runs]
    names = list(found[0]["blocks"])
    bottom = [0.0] * len(names)
    for head in range(len(found[0]["blocks"][names[0]])):
        sizes = [statistics.mean(one["blocks"][name][head] for one in found) for name in names]
        axes[0].bar(range(len(names)), sizes, bottom=bottom, width=0.7, label=f"head {head + 1}")
        bottom = [low + size for low, size in zip(bottom, sizes, strict=True)]
    axes[0].set_xticks(range(len(names)), [short(name) for name in names], rotation=60, ha="right", fontsize=6)
    axes[0].set(ylabel="mean gate, largest first")
    for one in found:
        axes[1].plot(one["timesteps"], one["levels"], lw=1, color="#1f77b4")
    axes[1].set(xlabel="timestep (1000: noise)", ylabel="entropy of gates (1: equal)", ylim=(0, 1.02))
    words = found[0]["words"]
    entropies = [statistics.mean(one["token entropy"][index] for one in found) for index in range(len(words))]
    axes[2].bar(range(len(words)), entropies, width=0.7, color="#2ca02c")
    axes[2].set_xticks(range(len(words)), words, rotation=60, ha="right", fontsize=7)
    axes[2].set(ylabel="entropy by word of the prompt", ylim=(0, 1.02))
    save(figure, file)


def removal(runs: Runs, file: Path) -> None:
    """What is lost without a block, and without a kind of layer: bars of means, dots of seeds."""
    figure, axes = plt.subplots(1, 2, figsize=(7.5, 2.8), sharey=True)
    for axis, key in zip(axes, ("blocks", "kinds"), strict=True):
        names = list(runs[0]["removal"][key])
        values = [[one["removal"][key][name] for one in runs] for name in names]
        axis.bar(range(len(names)), [statistics.mean(one) for one in values], width=0.7, color="#1f77b4")
        for place, one in enumerate(values):
            axis.scatter([place] * len(one), one, s=7, color="black", zorder=3)
        axis.set_xticks(range(len(names)), [short(name) for name in names], rotation=60, ha="right", fontsize=7)
    axes[0].set_ylabel("share of the gain lost")
    save(figure, file)

"""What a run leaves to read: the model card in the output folder, and the summary on the screen."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...core.concepts import Concept
from ...core.config import heads_text
from ...core.run_folder import CARD_FILE, COMPARISON_FILE, PLAIN_COMPARISON_FILE, plain_names, separate
from ...core.scores import BY_LIKENESS, HELD_OUT
from ...core.writing import write_text
from ..config import TrainingConfig
from ..models.pipelines import public_name
from .plain import PlainForm


@dataclass
class Summary:
    """Figures of a finished run: ``seconds`` of training, ``parameters`` by kind, and the ``plain`` LoRA.

    ``prompt`` is the one that the adapter was trained with, ``component`` the trained part;
    ``loader`` and ``comfyui`` tell whether diffusers and ComfyUI can load the LoRA, of which there is one for each of
    ``concepts``, if there are any; ``best`` is the best checkpoint (:func:`.choose_best`).
    """

    config: TrainingConfig
    steps: int
    seconds: float
    prompt: str = ""
    parameters: dict[str, int] = field(default_factory=dict)
    plain: PlainForm = field(default_factory=lambda: PlainForm({}))
    component: str = "unet"
    loader: bool = True
    comfyui: bool = True
    concepts: tuple[Concept, ...] = ()
    best: dict[str, Any] | None = None

    @property
    def files(self) -> list[tuple[str, str]]:
        """Names of the plain LoRAs, by diffusers' and by kohya's names of layers."""
        return [plain_names(name) for name in separate(self.concepts)]

    @property
    def export_error(self) -> float:
        """The plain LoRA's relative error on the subject; 0 where it is exact."""
        return self.plain.gap.subject

    def lines(self, output: Path) -> list[str]:
        """The summary as lines of text."""
        counts, exact = self.parameters, self.plain.words
        if not self.loader:
            exact += "; diffusers has no loader for it in this pipeline: use load_adapter, or export --format merged"
        return [
            f"trained {self.steps} steps in {self.seconds:.0f} s ({self.seconds / max(1, self.steps):.3f} s a step)",
            f"parameters: {counts['trained_per_step']:,} trained per step, {counts['trained_ever']:,} ever, "
            f"{counts['stored']:,} stored",
            f"adapter     {_described(output / 'effilora.safetensors')}",
            *(line for files in self.files for line in _file_lines(output, *files, exact)),
            *self.plain.lines,
            *([] if self.best is None else [f"best        {best_words(self.best, self.steps)}, as {output}@best"]),
            f"model card  {output / 'README.md'}",
        ]


def best_words(best: dict[str, Any], last: int) -> str:
    """The best checkpoint and what it is the best by, as ``checkpoint-300, by likeness and drift (0.610, 0.050)``."""
    name = "the last step" if best["step"] == last else str(best["checkpoint"])
    if best["by"] == BY_LIKENESS:
        return f"{name}, by {best['by']} ({best['likeness']:.3f}, {best['drift']:.3f})"
    return f"{name}, by {best['by']} ({best[HELD_OUT]:.4f})"


def _file_lines(output: Path, plain: str, kohya: str, exact: str) -> list[str]:
    """What is told of one plain LoRA."""
    lines = [f"plain LoRA  {_described(output / plain)}, {exact}"]
    if (output / kohya).exists():
        lines.append(f"  as kohya  {_described(output / kohya)}, for ComfyUI, A1111 and sd-scripts")
    return lines


def _described(path: Path) -> str:
    return f"{path} ({path.stat().st_size / 1000:.0f} kB)"


def write_report(output: Path, summary: Summary) -> None:
    """Write ``README.md``, a model card with the run's images and how to use the result."""
    c = summary.config
    base = public_name(c.pretrained_model_name_or_path)
    counts = summary.parameters
    images = "![before and after](before_after.png)\n" if (output / COMPARISON_FILE).exists() else ""
    front = [f"base_model: {base}"] if base == c.pretrained_model_name_or_path else []  # an id of the hub
    head = "\n".join(["---", *front, "library_name: diffusers", "tags: [effilora, lora, text-to-image]",
                      f"instance_prompt: {json.dumps(summary.prompt, ensure_ascii=False)}", "---"])  # fmt: skip
    text = f"""{head}

# {summary.prompt if summary.prompt == c.instance_prompt else output.name}

An EffiLoRA adapter for {base}.

{images}
| | |
|---|---|
| steps | {summary.steps} of batch {c.train_batch_size} x {c.gradient_accumulation_steps}, {summary.seconds:.0f} s |
| adapter | rank {c.rank}, {heads_text(c.heads, c.routing)}, Reducer {c.reducer} |
| parameters | {counts["trained_per_step"]:,} trained per step, {counts["trained_ever"]:,} ever, {counts["stored"]:,} stored |
{_best_row(summary)}| settings | [config.yaml](config.yaml) repeats the run |

## Use

```python
from effilora_diffusion import load_adapter

load_adapter(pipe, "effilora.safetensors", scale=1.0)  # pipe: a stock pipeline of {base}
```

{_plain_words(summary, output)}
"""
    write_text(output / CARD_FILE, text)


def _best_row(summary: Summary) -> str:
    """The row of the card that names the best checkpoint; empty where none was found."""
    if summary.best is None:
        return ""
    file = summary.best["adapter"]
    return f"| best | {best_words(summary.best, summary.steps)}: [{file}]({file}) |\n"


def _plain_words(summary: Summary, output: Path) -> str:
    """What the card says of the plain LoRA, or of those of several concepts."""
    plain, kohya = summary.files[0]
    if not summary.concepts:
        told = "".join(f"\n\n{line[12].upper()}{line[13:]}." for line in summary.plain.lines)
        if (output / PLAIN_COMPARISON_FILE).exists():
            told += f"\n\n![the adapter, and its plain LoRA]({PLAIN_COMPARISON_FILE})"
        return f"`{plain}` is its plain LoRA, {summary.plain.words}.{_elsewhere(summary, output, kohya)}{told}"
    rows = [
        f"| {concept.name} | {', '.join(f'`{word}`' for word in concept.triggers)} | {concept.prompt} | `{file}` |"
        for concept, (file, _) in zip(summary.concepts, summary.files, strict=True)
    ]
    always = " One more head acts on every prompt." if summary.config.common_head else ""
    if len(rows) == 1:
        words = " or ".join(f"`{word}`" for word in summary.concepts[0].triggers)
        rest = "the common head acts on others" if always else "others are the base's, bit for bit"
        return (
            f"The adapter acts on prompts with {words}; {rest}.\n\n`{plain}` is its plain LoRA, {summary.plain.words}, which "
            f"acts on every prompt.{_elsewhere(summary, output, kohya)}"
        )
    return "\n".join([
        f"The adapter finds a concept by its trigger in the prompt; a prompt may name several.{always}", "",
        "| concept | trigger | trained with | as plain LoRA |", "|---|---|---|---|", *rows, "",
        f"Each file holds one concept exactly, as plain LoRA.{_elsewhere(summary, output, kohya)} A plain LoRA acts on every "
        "prompt, whatever it names: two of them loaded together add up, and each also changes the other's subject. Load one at "
        "a time, or this adapter, which keeps them apart.",
    ])  # fmt: skip


def _elsewhere(summary: Summary, output: Path, kohya: str) -> str:
    """Where the plain LoRA can be used, in sentences; ``kohya`` is its file with kohya's names."""
    if summary.loader:
        text = ' It loads with `pipe.load_lora_weights("...")`'
    else:
        text = " diffusers has no loader for it in this pipeline"
    if (output / kohya).exists():
        return f"{text}. ComfyUI, A1111, Forge and sd-scripts read `{kohya}`."
    if summary.comfyui:
        text += " and in ComfyUI" if summary.loader else "; ComfyUI reads it"
    return f"{text}."

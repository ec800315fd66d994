"""What a run leaves to read: the model card in the output folder, and the summary on the screen."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from ...core.convert import describe_export_error
from ...core.run_folder import CARD_FILE, COMPARISON_FILE, KOHYA_FILE, LORA_FILE
from ...core.writing import write_text
from ..config import TrainingConfig
from ..models.pipelines import public_name


@dataclass
class Summary:
    """Figures of a finished run: ``seconds`` of training, ``parameters`` by kind, ``export_error`` (relative).

    ``prompt`` is the one that the adapter was trained with, ``component`` the trained part;
    ``loader`` and ``comfyui`` tell whether diffusers and ComfyUI can load the LoRA.
    """

    config: TrainingConfig
    steps: int
    seconds: float
    prompt: str = ""
    parameters: dict[str, int] = field(default_factory=dict)
    export_error: float = 0.0
    component: str = "unet"
    loader: bool = True
    comfyui: bool = True

    def lines(self, output: Path) -> list[str]:
        """The summary as lines of text."""
        counts = self.parameters
        exact = describe_export_error(self.export_error or None) + (
            " (none with --routing static)" if self.export_error else ""
        )
        if not self.loader:
            exact += "; diffusers has no loader for it in this pipeline: use load_adapter, or export --format merged"
        return [
            f"trained {self.steps} steps in {self.seconds:.0f} s ({self.seconds / max(1, self.steps):.3f} s a step)",
            f"parameters: {counts['trained_per_step']:,} trained per step, {counts['trained_ever']:,} ever, "
            f"{counts['stored']:,} stored",
            f"adapter     {_described(output / 'effilora.safetensors')}",
            f"plain LoRA  {_described(output / LORA_FILE)}, {exact}",
            *(
                [f"  as kohya  {_described(output / KOHYA_FILE)}, for ComfyUI, A1111 and sd-scripts"]
                if (output / KOHYA_FILE).exists()
                else []
            ),
            f"model card  {output / 'README.md'}",
        ]


def _described(path: Path) -> str:
    return f"{path} ({path.stat().st_size / 1000:.0f} kB)"


def write_report(output: Path, summary: Summary) -> None:
    """Write ``README.md``, a model card with the run's images and how to use the result."""
    c = summary.config
    base = public_name(c.pretrained_model_name_or_path)
    counts = summary.parameters
    gap = "exactly" if summary.export_error == 0 else f"but for {summary.export_error:.1%} of its update"
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
| adapter | rank {c.rank}, {c.heads} heads, {c.routing} routing, Reducer {c.reducer} |
| parameters | {counts["trained_per_step"]:,} trained per step, {counts["trained_ever"]:,} ever, {counts["stored"]:,} stored |
| settings | [config.yaml](config.yaml) repeats the run |

## Use

```python
from effilora_diffusion import load_adapter

load_adapter(pipe, "effilora.safetensors", scale=1.0)  # pipe: a stock pipeline of {base}
```

`pytorch_lora_weights.safetensors` is the same as plain LoRA{_elsewhere(summary, output)}; it reproduces the adapter {gap}.
"""
    write_text(output / CARD_FILE, text)


def _elsewhere(summary: Summary, output: Path) -> str:
    """Where the plain LoRA can be used."""
    places = [' for `pipe.load_lora_weights("...")`'] if summary.loader else []
    if (output / KOHYA_FILE).exists():
        places.append(f" for ComfyUI, A1111, Forge and sd-scripts `{KOHYA_FILE}`")
    elif summary.comfyui:
        places.append(" for ComfyUI")
    if not summary.loader:
        places.append(" diffusers has no loader for it in this pipeline")
    return "," + ",".join(places)

"""What a finished run writes: the adapter, its plain forms, and what shows them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ...core import AdapterFile, save_adapter_file
from ...core.errors import DEBUG
from ...core.files import ADAPTER_FILE
from ...core.run_folder import CARD_FILE, COMPARISON_FILE, PLAIN_COMPARISON_FILE, RunFolder, plain_names, separate
from ..adapters.export import export, has_kohya_form
from ..adapters.new_words import WORDS_FILE, t5_of, write_words
from ..models.pipelines import EMBEDDED_BASE
from ..run_options import SAVED
from .batches import BatchDrawer
from .build import RunParts
from .examiner import Examiner
from .model_card import Summary, write_report
from .notes import trigger_prompt
from .plain import PlainMaker
from .validation import Validation


@dataclass
class Result:
    """Writes the output of a run whose adapter is trained, on the main process.

    The adapter comes first: whatever goes wrong with what only shows it, the run is a success.
    """

    parts: RunParts
    batches: BatchDrawer
    validation: Validation
    folder: RunFolder
    say: Callable[[str], None]
    examiner: Examiner

    def write(self, summary: Summary, device: torch.device, scaled: bool) -> None:
        """Write every file, and complete ``summary`` with what is known of the plain LoRA.

        Args:
            summary: of the run, without its plain LoRA.
            device: where the model is.
            scaled: whether losses are scaled, as with float16.
        """
        c, adapter = self.parts.config, self.parts.adapter
        # as many rows at a time as a training step has
        maker = PlainMaker(self.parts.family, self.parts.objective, adapter, self.batches, device, c.train_batch_size)
        summary.plain = maker.make(c.export_distillation_steps, self.say, scaled)
        content = AdapterFile(
            adapter, origin(self.parts, summary.steps) | summary.plain.facts, summary.plain.calibration
        )
        content.plain = summary.plain.adapter if summary.plain.distilled else None
        dtype = getattr(torch, SAVED[c.save_precision])
        content.sha256 = save_adapter_file(self.folder.own(ADAPTER_FILE), content, dtype)
        self.folder.forget_earlier()
        if adapter.words is not None:
            write_words(self.folder.own(f"{self.folder.path.resolve().name}{WORDS_FILE}"), content)
        for concept in separate(adapter.concepts):
            self._export(content, dtype, concept)
        self._show("the last images", lambda: self.validation.draw(summary.steps))
        self._show("the scores", lambda: self.examiner.visit(summary.steps, last=True))
        summary.best = self.examiner.best
        images = [example.path for example in self.parts.images]
        self._show(COMPARISON_FILE, lambda: self.validation.before_after(images))
        if (plain := summary.plain.adapter) is not None:
            self._show(PLAIN_COMPARISON_FILE, lambda: self.validation.beside_plain(lambda: maker.instead(plain)))
        self._show(CARD_FILE, lambda: write_report(self.folder.own(CARD_FILE).parent, summary))
        self.examiner.write_page(last=True)
        self.folder.finish()

    def _export(self, content: AdapterFile, dtype: torch.dtype, concept: str | None) -> None:
        """Write the plain LoRA, of one concept where there are several."""
        plain, kohya = plain_names(concept)
        export(content, self.folder.own(plain), "diffusers", dtype=dtype, concept=concept, words=False)
        if has_kohya_form(content):
            self._show(
                kohya, lambda: export(
                    content, self.folder.own(kohya), "kohya", dtype=dtype, concept=concept, words=False
                )
            )  # fmt: skip

    def _show(self, what: str, write: Callable[[], object]) -> None:
        """Write what shows the result: whatever goes wrong here, the adapter is saved, and the run is a success."""
        try:
            write()
        except Exception as error:
            if os.environ.get(DEBUG) == "1":
                raise
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            self.say(f"note: the adapter is saved, but {what} could not be written: {reason}")


def origin(parts: RunParts, steps: int) -> dict[str, Any]:
    """What a native file says of the run that its adapter comes from, after so many ``steps``."""
    family = parts.family
    return {
        "base_model": parts.config.pretrained_model_name_or_path or EMBEDDED_BASE,
        "single_file_config": parts.config.single_file_config,
        **parts.base,
        "base_class": type(family.model).__name__,
        "component": family.component,
        "architecture": family.architecture,
        "layers_per_block": family.model.config.get("layers_per_block"),
        "prediction_type": family.pipe.scheduler.config.get("prediction_type"),
        "resolution": parts.config.resolution,
        "trigger_prompt": trigger_prompt(parts),
        "t5": t5_of(family.pipe),
        "steps": steps,
        "images": len(parts.images),
    }

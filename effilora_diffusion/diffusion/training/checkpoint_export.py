"""The plain LoRA of a checkpoint whose gates depend on their input: fitted and distilled on the run's images, on demand.

At a run's end this is part of the result. At every checkpoint it would cost more time than it is worth: few are exported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ...core import AdapterFile, EffiLoRAError
from ...core.load import attach_parts, detach
from ...core.run_folder import CONFIG_FILE
from ...core.text_io import printable
from ..adapters.processors import attach
from ..config import read_settings
from .build import build, place, with_data
from .plain import PlainMaker
from .processes import Processes, start
from .rows import batch_drawer, class_images


def with_plain(path: Path, content: AdapterFile, say: Callable[[str], None] = print) -> AdapterFile:
    """The ``content`` of a checkpoint's adapter at ``path`` with its plain LoRA; what is no checkpoint is left as it is.

    Raises :class:`EffiLoRAError` where the run's settings, model or images are not what they were.
    """
    run = path.resolve().parent.parent
    if not path.resolve().parent.name.startswith("checkpoint-") or not (run / CONFIG_FILE).is_file():
        return content
    try:
        config = replace(read_settings(run / CONFIG_FILE), init_from=None, output_dir=str(run))
        say(
            f"{path.resolve().parent.name}: its gates depend on their input, so its plain LoRA is made on the run's images"
        )
        accelerator = start()
        config = with_data(config, lambda text: None)
        parts = build(config, accelerator, lambda text: None)
        detach(parts.family.pipe, None)
        parts.adapter = attach_parts(parts.family.pipe, content.adapter, "default", attach)
        parts.adapter.eval()
        for module in (parts.family.model, *parts.family.trained):
            place(module, accelerator.device)
        processes = Processes(accelerator)
        prior = class_images(parts, say, processes)
        with parts.adapter.disabled():  # text states on disk are the base's
            batches = batch_drawer(parts, prior, accelerator.device.type != "cpu", say, processes)
        if parts.family.trained:
            batches.encode_again()
    except EffiLoRAError as error:
        raise EffiLoRAError(
            f"{printable(path.parent.name)} can't become a plain LoRA, which needs the run's settings, model and images as they "
            f"were: {error}"
        ) from error
    maker = PlainMaker(
        parts.family, parts.objective, content.adapter, batches, accelerator.device, config.train_batch_size
    )
    form = maker.make(config.export_distillation_steps, say, config.mixed_precision == "fp16")
    detach(parts.family.pipe, None)
    content.metadata |= form.facts
    content.calibration = form.calibration
    content.plain = form.adapter if form.distilled else None
    return content

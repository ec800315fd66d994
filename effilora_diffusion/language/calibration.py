"""What token routing needs to become plain LoRA, measured on a run's training examples: at its end, or for a checkpoint later."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..core import AdapterFile, EffiLoRA, EffiLoRAError, attach, calibrate, detach, is_exact
from ..core.fingerprint import base_fingerprint, same_base
from ..core.text_io import printable
from .checkpoints import SETTINGS_FILE, read_fingerprint
from .datasets import Datasets, build_datasets, open_sources
from .encoders import template_facts
from .identity import IN_WORDS
from .models import load_model
from .run_settings import read_settings
from .tokenising import template_hash

CALIBRATION_EXAMPLES = 128


def measure(
    model: nn.Module, adapter: EffiLoRA, datasets: Datasets, autocast: str | None
) -> tuple[dict[str, Tensor], float]:
    """The calibration of the attached ``adapter`` and the relative error of its plain form.

    Args:
        model: the base, in the state of evaluation.
        adapter: attached to it.
        datasets: of the run.
        autocast: type in which the run computes, ``bfloat16`` or ``float16``; ``None``: the model's own. A trainer has wrapped
            the model by then, but not where a run only writes its result: so it is said here.
    """
    return calibrate(model, adapter, lambda: _drive(model, datasets, autocast))


@torch.no_grad()
def _drive(model: nn.Module, datasets: Datasets, autocast: str | None) -> None:
    """Run the model over examples without padding, so that only real tokens are measured."""
    device = next(model.parameters()).device
    kind = getattr(torch, autocast) if autocast else None
    for index in range(min(CALIBRATION_EXAMPLES, len(datasets.examples))):
        try:
            inputs = datasets.model_inputs(index)
        except EffiLoRAError as error:  # an image that the run has never come to
            warnings.warn(f"left out of the calibration: {error}", stacklevel=2)
            continue
        with torch.autocast(device.type, kind, enabled=kind is not None):
            model(**{name: value.to(device) for name, value in inputs.items()})


def with_calibration(path: Path, content: AdapterFile, say: Callable[[str], None] = print) -> AdapterFile:
    """The ``content`` of an adapter at ``path`` with its calibration, which the file of a checkpoint lacks.

    What needs none, has it or does not lie in a run's folder is left as it is. Raises :class:`EffiLoRAError` where the run's
    settings, model or data are not what they were.
    """
    folder = path.resolve().parent
    run = folder.parent if folder.name.startswith("checkpoint-") else folder
    if is_exact(content.adapter) or content.calibration or not (run / SETTINGS_FILE).is_file():
        return content
    say(f"{folder.name}: its gates depend on the token, so its plain LoRA is fitted on the run's data")
    try:
        _measure_again(run, folder, content)
    except (EffiLoRAError, OSError) as error:
        raise EffiLoRAError(
            f"{printable(folder.name)} can't become a plain LoRA, which needs the run's settings, model and data as they were: "
            f"{error}"
        ) from error
    return content


def _measure_again(run: Path, folder: Path, content: AdapterFile) -> None:
    """Load the run's model and data again and measure ``content``'s adapter on them."""
    options, data, autocast = read_settings(run / SETTINGS_FILE)
    sources = open_sources(data)
    more = {"revision": options.model_revision} if options.model_revision else {}
    images = bool(content.metadata.get("images"))
    name = str(options.model_name_or_path)
    model, reader = load_model(name, options.gguf_file, options.dtype, options.quantization, images, **more)
    if same_base(base_fingerprint(model), content.metadata) is False:
        raise EffiLoRAError(f"{name} has other weights by now")
    datasets = build_datasets(data, sources, model, reader, template_facts(content.metadata).get("template_date"))
    _check_data(folder, datasets)
    if torch.cuda.is_available() and not getattr(model, "is_quantized", False):
        model.to("cuda")
    adapter = attach(model, content.adapter).eval()
    try:
        content.calibration, content.metadata["export_error"] = measure(model, adapter, datasets, autocast)
    finally:
        detach(model)
        adapter.cpu()


def _check_data(folder: Path, datasets: Datasets) -> None:
    """Raise :class:`EffiLoRAError` if the examples are not those that the checkpoint in ``folder`` was trained on."""
    saved = read_fingerprint(folder)
    if saved is None:  # the end of a run keeps none
        return
    now = {**datasets.digests, "template": template_hash(datasets.encoder)}
    for name in ("template", "data", "tokens"):
        if name in now and saved.get(name) != now[name]:
            raise EffiLoRAError(IN_WORDS[name](saved.get(name), now[name])[0])

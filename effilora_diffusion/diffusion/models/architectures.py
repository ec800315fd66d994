"""Architectures by the names of modelspec, which other programs read in the metadata of a LoRA."""

from __future__ import annotations

SD1 = "stable-diffusion-v1"
SD2 = "stable-diffusion-v2-512"
SD2_V = "stable-diffusion-v2-768-v"
SDXL = "stable-diffusion-xl-v1-base"
LUMINA = "lumina-2"

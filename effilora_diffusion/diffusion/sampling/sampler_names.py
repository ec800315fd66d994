"""Names of samplers, as people know them, and what A1111 and ComfyUI call the same."""

from __future__ import annotations

KARRAS = "Karras"

NAMES = (
    "Euler", "Euler Karras", "Euler a", "Heun", "Heun Karras", "DPM++ 2M", "DPM++ 2M Karras", "DPM++ 2M SDE",
    "DPM++ 2M SDE Karras", "DPM++ SDE", "DPM++ SDE Karras", "DPM2", "DPM2 Karras", "DPM2 a", "UniPC", "UniPC Karras", "DEIS",
    "PLMS", "DDIM", "DDPM", "LCM", "TCD",
)  # fmt: skip
"""All that can be chosen with some model."""

_COMFYUI = {
    "euler": "Euler", "euler_ancestral": "Euler a", "heun": "Heun", "dpmpp_2m": "DPM++ 2M", "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_2m_sde_gpu": "DPM++ 2M SDE", "dpmpp_sde": "DPM++ SDE", "dpmpp_sde_gpu": "DPM++ SDE", "dpm_2": "DPM2",
    "dpm_2_ancestral": "DPM2 a", "uni_pc": "UniPC", "uni_pc_bh2": "UniPC", "deis": "DEIS", "ddim": "DDIM",
    "ddpm": "DDPM", "lcm": "LCM",
}  # fmt: skip

_KARRAS_BY_ITSELF = ("DPM++ 2M", "DPM++ SDE", "DPM2")
"""A1111's schedule ``Automatic`` of these is Karras'."""

_PLAIN_SCHEDULES = (
    "",
    "automatic",
    "normal",
    "simple",
    "uniform",
    "sgm_uniform",
    "sgm uniform",
    "ddim_uniform",
    "ddim",
)
"""Evenly spaced, in some way: a model has its own, which stays."""


def known_name(text: str | None) -> str | None:
    """The name among :data:`NAMES` that ``text`` is, whatever its case."""
    wanted = " ".join(str(text or "").casefold().split())
    return next((name for name in NAMES if name.casefold() == wanted), None)


def to_a1111(name: str | None) -> tuple[str | None, str | None]:
    """A1111's ``Sampler`` and ``Schedule type``; ``None`` for what is not known."""
    if name is None:
        return None, None
    plain = name.removesuffix(f" {KARRAS}")
    return plain, KARRAS if plain != name else "Automatic" if plain not in _KARRAS_BY_ITSELF else "Uniform"


def from_a1111(sampler: str | None, schedule: str | None) -> tuple[str | None, list[str]]:
    """Our name of A1111's sampler and schedule (also one that ends with it, as older versions wrote), and notes."""
    if not sampler:
        return None, []
    named = known_name(sampler)
    if named is None:
        return None, [f"the sampler {sampler[:60]}"]
    automatic = (schedule or "").casefold() == "automatic" and named in _KARRAS_BY_ITSELF
    return _scheduled(named, KARRAS if automatic else schedule)


def from_comfyui(sampler: str | None, schedule: str | None) -> tuple[str | None, list[str]]:
    """Our name of ComfyUI's ``sampler_name`` and ``scheduler``, and notes."""
    if not sampler:
        return None, []
    named = _COMFYUI.get(sampler)
    return _scheduled(named, schedule) if named else (None, [f"the sampler {sampler[:60]}"])


def _scheduled(named: str, schedule: str | None) -> tuple[str, list[str]]:
    """``named`` with its schedule of noise levels."""
    word = (schedule or "").casefold()
    if word == "karras":
        found = named if named.endswith(KARRAS) else known_name(f"{named} {KARRAS}")
        return (found, []) if found else (named, [f"the schedule Karras of {named}"])
    return named, [] if word in _PLAIN_SCHEDULES else [f"the schedule {(schedule or '')[:40]}"]

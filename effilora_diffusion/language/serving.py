"""What servers want of a PEFT folder beyond what is in it: flags, and layers that they can't apply."""

from __future__ import annotations

from ..core import AdapterFile

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM's ``--max-lora-rank`` may have; an adapter's rank must not be above it."""

VLLM_DEFAULT_RANK = 16


def serving_notes(content: AdapterFile) -> list[str]:
    """Sentences about serving the PEFT folder of ``content`` with vLLM and SGLang; none where both take it as it is."""
    rank, notes = content.adapter.config.rank, []
    if rank > VLLM_RANKS[-1]:
        notes.append(
            f"vLLM takes ranks up to {VLLM_RANKS[-1]}, this one is {rank}: serve the merged model (--format merged)"
        )
    elif rank > VLLM_DEFAULT_RANK:
        least = next(value for value in VLLM_RANKS if value >= rank)
        notes.append(f"rank {rank}: vLLM needs --max-lora-rank {least}")
    paths = [path for site in content.adapter.sites for path, _ in site.linears]
    if any(site.experts for site in content.adapter.sites):
        notes.append(
            "experts are in the folder as target_parameters, which PEFT 0.21 and later read, but servers not, or not "
            "rightly: serve the merged model (--format merged)"
        )
    lonely = [
        path for path in paths if path.endswith(".up_proj") and f"{path[: -len('up_proj')]}gate_proj" not in paths
    ]
    if lonely:
        notes.append(
            "SGLang applies up_proj only together with gate_proj, which this adapter does not have: serve it with vLLM, or "
            "the merged model, or train with gate_proj in --target_modules too"
        )
    if content.metadata.get("fan_in_fan_out"):
        notes.append("servers read no LoRA on GPT-2's Conv1D layers (fan_in_fan_out): serve the merged model")
    return notes

"""``effilora train-vlm``: train an adapter for a vision-language model on conversations about images."""

from __future__ import annotations

from .train_llm import main as train


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    """Run the training command; returns the exit code: 0, or 2 for a mistake to mend."""
    return train(arguments, prog, images=True)

"""What a run says before its first step about records that can't be learned as they are, counted by kind."""

from __future__ import annotations

from collections import Counter

SENTENCES = {
    "unanswered": "{n} record{s} end{v} without an answer: what follows the last one is left out",
    "greeting": "{n} answer{s} before the first question {are} left out",
    "masked": "{n} answer{s} {are} not learned, as the record says; context only",
    "empty": "{n} empty answer{s} {are} not learned; context only",
    "unmarked": "{n} answer{s} {are} not learned, as the chat template's generation marks leave {them} out",
    "system": "the chat template has no system prompt: it is put before the first question ({n} record{s})",
    "split": "the chat template rewrites earlier turns: {n} conversation{s} {are} learned as several examples each, so that "
    "every answer follows the prompt that will be asked",
    "written": "the chat template renders {n} answer{s} otherwise than after the prompt that it asks with: learned right after "
    "that prompt",
    "thought": "the reasoning of {n} answer{s} is left out, as the prompt that is asked closes the reasoning block",
    "rebuilt": "the chat template deletes the reasoning of answers, or its prompt opens a reasoning block: the block of {n} "
    "answer{s} is written as the model is to write it",
    "shortened": "{n} conversation{s} {are} longer than --max_length: the answers follow as many of the turns before them as fit",
    "too_long": "{n} answer{s} {are} left out: with the question alone longer than --max_length",
    "windows": "{n} text{s} {are} longer than --max_length: learned in several pieces",
}
"""A sentence for every kind of note; ``{n}`` is how often it was met, the others what follows from that."""

ONE = {"s": "", "v": "s", "are": "is", "them": "it"}
MANY = {"s": "s", "v": "", "are": "are", "them": "them"}


def describe(notes: Counter[str], what: str = "") -> list[str]:
    """Return the sentences for what ``notes`` count, in the order of :data:`SENTENCES`.

    Args:
        notes: counts by the names of :data:`SENTENCES`.
        what: the file they are of, put before each.
    """
    prefix = f"{what}: " if what else ""
    return [
        prefix + text.format(n=f"{notes[name]:,}", **(ONE if notes[name] == 1 else MANY))
        for name, text in SENTENCES.items()
        if notes[name]
    ]


def describe_ends(stop_tokens: list[int], end_text: str) -> list[str]:
    """Return sentences about answers whose end can't be learned, or not as one token.

    Args:
        stop_tokens: ids of the tokens that end an answer.
        end_text: what the chat template writes after an answer, if it is no special token.
    """
    if not stop_tokens:
        return [
            "the tokenizer has no end-of-text token and its template ends no answer: the model can't learn to stop, so that "
            "answers end at --max_new_tokens; give a tokenizer with an eos_token"
        ]
    if end_text:
        return [
            f"{end_text!r}, which the chat template writes after an answer, is no special token of this tokenizer: "
            "the end-of-text token is learned after it"
        ]
    return []

"""Gates of ``concept`` routing: constants per row of a batch, which average the heads of the row's concepts.

The mean, not the sum: two heads of full strength spoil what either draws (``benchmarks.concept_pairs``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import EffiLoRAError


@dataclass(frozen=True)
class ConceptGates:
    """Which heads act on which rows.

    Args:
        heads: ``(k,)`` numbers of the heads that act on any row.
        rows: ``(k, n)`` gates of the n rows; ``None``: all of ``heads`` act on every row, however many there are.
        shares: ``(k,)`` gates of all rows where ``rows`` is ``None``; ``None``: each is 1.
    """

    heads: Tensor
    rows: Tensor | None = None
    shares: Tensor | None = None

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], always: Sequence[int] = ()) -> ConceptGates:
        """Gates of rows that are given by the numbers of their heads, of which each gets an equal share.

        ``always``: heads that act on each row beside them, whole.
        """
        wanted = [{**{head: 1 / len({*row}) for head in row}, **dict.fromkeys(always, 1.0)} for row in rows]
        acting = sorted({head for row in wanted for head in row})
        heads = torch.tensor(acting, dtype=torch.long)
        if any(row != wanted[0] for row in wanted):
            return cls(heads, torch.tensor([[row.get(head, 0.0) for row in wanted] for head in acting]))
        shares = [wanted[0][head] for head in acting]
        return cls(heads, None, torch.tensor(shares) if any(share != 1 for share in shares) else None)

    def repeated(self, times: int) -> ConceptGates:
        """The gates of as many images of each row, which follow one another."""
        return self if self.rows is None else ConceptGates(self.heads, self.rows.repeat_interleave(times, 1))

    def taken(self, mask: Tensor) -> ConceptGates:
        """The gates of those rows that ``mask`` ``(n,)`` marks."""
        return self if self.rows is None else ConceptGates(self.heads, self.rows[:, mask.to(self.rows.device)])

    def for_batch(self, size: int) -> Tensor | None:
        """``(k, size)``: the rows once, or several times one after the other, as for the halves of guidance.

        Raises:
            EffiLoRAError: ``size`` is no multiple of the rows.
        """
        if self.rows is None:
            return None
        count = self.rows.shape[1]
        if size % count:
            raise EffiLoRAError(
                f"concepts are set for {count} rows, and the model is called with {size}: set them for every row of the batch"
            )
        return self.rows.repeat(1, size // count)


def per_row(gates: Tensor, x: Tensor, tokens_first: bool = False) -> Tensor:
    """Gates of the rows of x: ``(k, batch)`` to ``(k, rows)`` for x ``(batch, ..., d_in)`` or ``(batch x n, ..., d_in)``.

    With ``tokens_first`` x may also be ``(tokens, batch, d_in)``: which of both it is can't be told from its shape.

    Raises:
        EffiLoRAError: x has not the same number of rows for each item of the batch.
    """
    batch, rows = gates.shape[1], x.numel() // x.shape[-1]
    if rows == batch:
        return gates
    if tokens_first and x.ndim == 3 and x.shape[0] != batch and x.shape[1] == batch:
        return gates.repeat(1, x.shape[0])
    if rows % batch:
        raise EffiLoRAError(
            f"a linear of the model sees {rows} rows of a batch of {batch}, so they can't be told apart: leave it out of "
            "target_modules, or run one prompt at a time"
        )
    return gates.repeat_interleave(rows // batch, 1)

"""Which rows are computed together: supervised rows, sorted by sequence, cut into groups under a byte budget.

A weight may depend on its whole sequence (Σω is the denominator), so a group holds whole sequences. A sequence longer
than the budget becomes a group of several chunks, whose logits are computed twice: once for the weights, once for the
gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowPlan:
    """Supervised rows in sequence order.

    Attributes:
        rows: [n] indices into the flat batch, ascending within a sequence.
        labels: [n] their labels.
        lengths: rows of each sequence, in the order of `rows`.
    """

    rows: Tensor
    labels: Tensor
    lengths: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        return self.rows.numel()

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)

    @cached_property
    def _row_lengths(self) -> Tensor:
        lengths = torch.tensor(self.lengths, dtype=torch.long, device=self.rows.device)
        return lengths.repeat_interleave(lengths, output_size=self.num_rows)

    def sequence_lengths(self, rows: slice) -> Tensor:
        """For each of these rows, how many supervised rows its sequence has."""
        return self._row_lengths[rows]


@dataclass(frozen=True)
class RowGroup:
    """Rows [start, stop) of a plan, whole sequences of the given lengths, computed in `chunks`."""

    start: int
    stop: int
    lengths: tuple[int, ...]
    chunks: tuple[slice, ...]


def plan_rows(labels: Tensor, sequence_ids: Tensor | None, ignore_index: int) -> RowPlan:
    """Collect the supervised rows; `sequence_ids` [N] or None for a single sequence."""
    rows = (labels != ignore_index).nonzero().squeeze(1)
    if sequence_ids is None:
        return RowPlan(rows, labels[rows], (rows.numel(),) if rows.numel() else ())
    ids = sequence_ids[rows]
    ids, order = torch.sort(ids, stable=True)
    rows = rows[order]
    lengths = torch.unique_consecutive(ids, return_counts=True)[1]
    return RowPlan(rows, labels[rows], tuple(lengths.tolist()))


def split_rows(start: int, stop: int, max_rows: int) -> tuple[slice, ...]:
    """Cut [start, stop) into nearly equal slices of at most `max_rows`."""
    count = -(-(stop - start) // max_rows)
    bounds = [start + (stop - start) * i // count for i in range(count + 1)] if count else [start]
    return tuple(slice(a, b) for a, b in pairwise(bounds))


def group_rows(plan: RowPlan, max_rows: int, *, whole_sequences: bool) -> Iterator[RowGroup]:
    """Yield groups that cover the plan in order.

    With `whole_sequences=False` (weights of a row depend on that row only, denominators are counts) a group is any
    chunk of rows and its `lengths` is empty.
    """
    if not whole_sequences:
        for piece in split_rows(0, plan.num_rows, max_rows):
            yield RowGroup(piece.start, piece.stop, (), (piece,))
        return
    start, filled, lengths = 0, 0, list[int]()
    for length in plan.lengths:
        if lengths and filled + length > max_rows:
            yield _group(start, tuple(lengths), max_rows)
            start, filled, lengths = start + filled, 0, []
        lengths.append(length)
        filled += length
    if lengths:
        yield _group(start, tuple(lengths), max_rows)


def _group(start: int, lengths: tuple[int, ...], max_rows: int) -> RowGroup:
    stop = start + sum(lengths)
    return RowGroup(start, stop, lengths, split_rows(start, stop, max_rows))

"""Groups of rows to compute together: supervised rows, sorted by sequence, cut under a byte budget.

A weight may depend on its whole sequence (Σω is the denominator), so a group holds whole sequences. A sequence longer
than the budget becomes a group of several chunks. All but the last of them are computed twice, once for the weights and
once for the gradient, so the last is as large as the budget allows.

A plan is made on the host, because the number of rows decides the shapes of all matrix products. Labels and sequence
ids are read from the device once per call, together; no later step waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from nextquill.devices import send
from nextquill.errors import ArgumentError


@dataclass(frozen=True)
class RowPlan:
    """Supervised rows in sequence order.

    Attributes:
        rows: [n], int64, positions in the flat batch, ascending within a sequence.
        labels: [n], int64, labels of these rows.
        offsets: [S + 1], int64; sequence s is rows[offsets[s] : offsets[s + 1]].
        lengths: number of rows of each sequence, in the order of `rows`, on the host.
    """

    rows: Tensor
    labels: Tensor
    offsets: Tensor
    lengths: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        """The number n of supervised rows."""
        return self.rows.numel()

    @property
    def num_sequences(self) -> int:
        """The number S of sequences with a supervised row."""
        return len(self.lengths)

    @cached_property
    def row_lengths(self) -> Tensor:
        """The number of supervised rows in the sequence of each row: [n], int64."""
        lengths = self.offsets.diff()
        return lengths.repeat_interleave(lengths, output_size=self.num_rows)


@dataclass(frozen=True)
class RowGroup:
    """n neighbouring rows of a plan, whose coefficients are computed together.

    Attributes:
        plan: the whole plan.
        rows: which rows of the plan.
        sequences: the sequences in the group, as a slice of the plan's; None if the group cuts sequences, which is
            allowed only if rows do not depend on one another.
        chunks: `rows` cut into pieces whose logits fit the budget.
    """

    plan: RowPlan
    rows: slice
    sequences: slice | None
    chunks: tuple[slice, ...]

    @property
    def offsets(self) -> Tensor:
        """The bounds of the group's sequences among the plan's rows: [S + 1], int64."""
        assert self.sequences is not None
        return self.plan.offsets[self.sequences.start : self.sequences.stop + 1]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Number of rows of each of the group's sequences, on the host."""
        assert self.sequences is not None
        return self.plan.lengths[self.sequences]


def plan_rows(
    labels: Tensor,
    sequence_ids: Tensor | None,
    ignore_index: int,
    vocabulary: int,
    token_weights: Tensor | None = None,
) -> RowPlan:
    """Collect the supervised rows and check their labels and weights.

    Args:
        labels: [N], int64.
        sequence_ids: [N], int64; None for a single sequence.
        ignore_index: label of rows that do not count.
        vocabulary: V, the number of allowed labels.
        token_weights: [N], floating, or None.

    Raises:
        ArgumentError: a label is outside [0, vocabulary) and not `ignore_index`, or a supervised row's weight is
            negative or not finite.
    """
    device = labels.device
    unusable = None if token_weights is None else ~((token_weights >= 0) & token_weights.isfinite())
    if device.type != "cpu":
        given = [tensor for tensor in (labels, sequence_ids, unusable) if tensor is not None]
        read = iter(torch.stack([tensor.long() for tensor in given]).cpu())
        labels = next(read)
        sequence_ids = None if sequence_ids is None else next(read)
        unusable = None if unusable is None else next(read).bool()
    check_label_range(labels, ignore_index, vocabulary)
    if token_weights is not None and unusable is not None:
        _check_weights(token_weights, unusable & (labels != ignore_index))
    rows = (labels != ignore_index).nonzero().squeeze(1)
    if sequence_ids is None:
        lengths = rows.new_tensor([rows.numel()] if rows.numel() else [])
    else:
        ids, order = torch.sort(sequence_ids[rows], stable=True)
        rows = rows[order]
        lengths = torch.unique_consecutive(ids, return_counts=True)[1]
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    return RowPlan(send(rows, device), send(labels[rows], device), send(offsets, device), tuple(lengths.tolist()))


def _check_weights(token_weights: Tensor, unusable: Tensor) -> None:
    if bool(unusable.any()):
        position = int(unusable.nonzero()[0])
        raise ArgumentError(
            "token_weights: expected finite numbers of at least 0 where labels count, got "
            f"{float(token_weights[position])} at flat position {position}"
        )


def check_label_range(labels: Tensor, ignore_index: int, vocabulary: int) -> None:
    """Raise ArgumentError if one of the labels ([N], int64, on the host) is wrong, as `wrong_labels` finds them."""
    wrong = wrong_labels(labels, ignore_index, vocabulary)
    if bool(wrong.any()):
        position = int(wrong.nonzero()[0])
        raise ArgumentError(
            f"labels: expected values in [0, {vocabulary}) or ignore_index={ignore_index}, "
            f"got {int(labels[position])} at flat position {position}"
        )


def wrong_labels(labels: Tensor, ignore_index: int, vocabulary: int) -> Tensor:
    """Return which labels ([N], int64) are outside [0, vocabulary) and not `ignore_index`: [N], bool."""
    return (labels != ignore_index) & ((labels < 0) | (labels >= vocabulary))


def split_rows(start: int, stop: int, max_rows: int) -> tuple[slice, ...]:
    """Cut [start, stop) into nearly equal slices of at most `max_rows` rows."""
    count = -(-(stop - start) // max_rows)
    bounds = [start + (stop - start) * i // count for i in range(count + 1)] if count else [start]
    return tuple(slice(a, b) for a, b in pairwise(bounds))


def group_rows(plan: RowPlan, max_rows: int, *, whole_sequences: bool) -> Iterator[RowGroup]:
    """Yield groups that cover the plan in order.

    With `whole_sequences=False` a group is any chunk of rows, if there is more than one. That is allowed if the weight
    of a row depends on that row only and denominators are counts.
    """
    if not whole_sequences and plan.num_rows > max_rows:
        for piece in split_rows(0, plan.num_rows, max_rows):
            yield RowGroup(plan, piece, None, (piece,))
        return
    start = stop = first = 0
    for index, length in enumerate(plan.lengths):
        if index > first and stop + length - start > max_rows:
            yield RowGroup(plan, slice(start, stop), slice(first, index), _largest_last(start, stop, max_rows))
            start, first = stop, index
        stop += length
    if stop > start:
        last = slice(first, plan.num_sequences)
        yield RowGroup(plan, slice(start, stop), last, _largest_last(start, stop, max_rows))


def _largest_last(start: int, stop: int, max_rows: int) -> tuple[slice, ...]:
    """Cut [start, stop) into one slice of `max_rows` rows at the end, and nearly equal slices before it."""
    last = max(start, stop - max_rows)
    return (*split_rows(start, last, max_rows), slice(last, stop))

"""A tree's segments, the units of attention: runs of rows without a fork.

    rows       a b | c d | e        a b is shared; c d and e branch off
    segments   0 [0, 2) subtree to 5      1 [2, 4) to 4, parent 0      2 [4, 5) to 5, parent 0

Within a segment the mask is causal, and every later row of its subtree sees the whole segment. So two dense pieces per
segment cover exactly the visible entries: its own triangle, and the rectangle of its descendants' queries on its keys.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from nextquill.errors import ArgumentError, ArgumentTypeError
from nextquill.tree.prefix_tree import PrefixTree

START, STOP, SUBTREE_STOP, DEPTH, PARENT = range(5)


class TreeLayout:
    """The structure of one row of trees that attention needs, on the host.

    It is a plain class, so that wrappers that move the tensors in a model's keyword arguments leave it alone.

    Attributes:
        segments: int64 [S, 5] on the CPU: first row, one past the last, one past the subtree's last, depth of the first
            row, parent segment or -1.
        num_rows: T.
        depth: one more than the largest position.
        plans: results that kernels derived from the segments, by kernel and device; filled on use.
    """

    __slots__ = ("depth", "num_rows", "plans", "segments")

    def __init__(self, segments: Tensor, num_rows: int, depth: int) -> None:
        self.segments = segments
        self.num_rows = num_rows
        self.depth = depth
        self.plans: dict[Any, Any] = {}

    @classmethod
    def of(cls, position_ids: Tensor, subtree_end: Tensor) -> TreeLayout:
        """Return the layout of rows in depth-first order.

        Args:
            position_ids, subtree_end: integers [T] on the CPU, as in `PrefixTree`.

        Raises:
            ArgumentError, ArgumentTypeError: no tree in depth-first order has these arguments.
        """
        _check(position_ids, subtree_end)
        position_ids, subtree_end = position_ids.long(), subtree_end.long()
        goes_on = (position_ids[1:] == position_ids[:-1] + 1) & (subtree_end[1:] == subtree_end[:-1])
        starts = [0, *((~goes_on).nonzero().squeeze(1) + 1).tolist()]
        depths, ends = position_ids[starts].tolist(), subtree_end[starts].tolist()
        rows, path = list[tuple[int, ...]](), list[int]()  # the path holds the segments around the current one
        for index, (start, stop) in enumerate(pairwise([*starts, len(position_ids)])):
            while path and rows[path[-1]][SUBTREE_STOP] <= start:
                path.pop()
            parent = path[-1] if path else -1
            above = rows[parent] if path else (0, 0, len(position_ids), 0)
            if depths[index] != above[DEPTH] + above[STOP] - above[START] or not (
                stop <= ends[index] <= above[SUBTREE_STOP]
            ):
                raise ArgumentError(
                    f"position_ids, subtree_end: expected trees in depth-first order, not so at row {start}"
                )
            rows.append((start, stop, ends[index], depths[index], parent))
            path.append(index)
        return cls(torch.tensor(rows, dtype=torch.long), len(position_ids), int(position_ids.max()) + 1)

    @classmethod
    def of_tree(cls, tree: PrefixTree) -> TreeLayout:
        """Return the layout of one tree's row."""
        return cls.of(tree.position_ids, tree.subtree_end)


def row_depths(segments: Tensor) -> Tensor:
    """Return the depth of every row, int64 [T]; `segments` as in `TreeLayout`."""
    lengths = segments[:, STOP] - segments[:, START]
    shift = segments[:, DEPTH] - segments[:, START]
    return torch.arange(int(lengths.sum())) + shift.repeat_interleave(lengths)


def row_ends(segments: Tensor) -> Tensor:
    """Return one past the last row of every row's subtree, int64 [T]; `segments` as in `TreeLayout`."""
    return segments[:, SUBTREE_STOP].repeat_interleave(segments[:, STOP] - segments[:, START])


def _check(position_ids: Tensor, subtree_end: Tensor) -> None:
    for name, tensor in (("position_ids", position_ids), ("subtree_end", subtree_end)):
        if not isinstance(tensor, Tensor) or tensor.is_floating_point() or tensor.is_complex() or not tensor.is_cpu:
            raise ArgumentTypeError(f"{name}: expected an integer tensor on the CPU, got {tensor!r:.80}")
        if tensor.dim() != 1 or not tensor.numel():
            raise ArgumentError(f"{name}: expected [T] with at least one row, got shape {list(tensor.shape)}")
    if position_ids.shape != subtree_end.shape:
        raise ArgumentError(
            f"subtree_end: expected the shape of position_ids {list(position_ids.shape)}, got {list(subtree_end.shape)}"
        )

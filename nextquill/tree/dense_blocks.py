"""The dense pieces that cover a tree's mask: every segment's own triangle, and its descendants' queries on its keys.

A sliding window counts depths. A piece that the window cuts has a mask, and lacks the rows that see none of its keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nextquill.tree.segments import DEPTH, START, STOP, SUBTREE_STOP, row_depths

#: Largest number of entries of a mask; larger pieces are cut along their queries.
_MASK_ENTRIES = 2**24


@dataclass(frozen=True)
class Piece:
    """Queries and keys of one attention call.

    Attributes:
        queries: a slice of rows, or their indices, int64 [q].
        keys: a slice of rows.
        is_own: whether the keys are the queries' own segment. These pieces come first and cover every row once.
        mask: bool [q, k] on the CPU, True where visible. None means the lower triangle if `is_own`, else everything.
    """

    queries: slice | Tensor
    keys: slice
    is_own: bool
    mask: Tensor | None = None

    @property
    def is_causal(self) -> bool:
        """Whether the piece is a triangle."""
        return self.is_own and self.mask is None


def pieces(segments: Tensor, window: int | None = None) -> Iterator[Piece]:
    """Yield the pieces of a layout.

    Args:
        segments: int64 [S, 5], as `TreeLayout.segments`.
        window: keys a query sees along its path, itself included; None for all.
    """
    rows = segments.tolist()
    depth = None if window is None else row_depths(segments)
    for row in rows:
        own = slice(row[START], row[STOP])
        if depth is None or window is None or row[STOP] - row[START] <= window:
            yield Piece(own, own, is_own=True)
        else:
            yield from _banded(torch.arange(own.start, own.stop), own, depth, window, is_own=True)
    for row in rows:
        start, stop, end, first = row[START], row[STOP], row[SUBTREE_STOP], row[DEPTH]
        if end == stop:
            continue
        if depth is None or window is None or int(depth[stop:end].max()) - first < window:
            yield Piece(slice(stop, end), slice(start, stop), is_own=False)
            continue
        last = first + stop - start - 1
        seeing = (depth[stop:end] - last < window).nonzero().squeeze(1) + stop
        if len(seeing):
            yield from _banded(seeing, slice(start, stop), depth, window, is_own=False)


def _banded(queries: Tensor, keys: slice, depth: Tensor, window: int, *, is_own: bool) -> Iterator[Piece]:
    """Yield a piece that a window cuts, with its mask."""
    for part in queries.split(max(1, _MASK_ENTRIES // (keys.stop - keys.start))):
        distance = depth[part, None] - depth[None, keys]
        yield Piece(part, keys, is_own, (distance >= 0) & (distance < window))

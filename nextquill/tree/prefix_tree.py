"""Merging branches with a common beginning into one row, so that shared tokens are computed once.

Branches are token lists: prompts with their responses. They are sorted, and each appends to the row only the tokens
after its longest common prefix with the branch before it. The row then holds the whole trie in depth-first order:

    branches   a b c d     a b e     f          row            a  b  c  d  e  f
                                                position_ids   0  1  2  3  2  0      (depth)
                                                subtree_end    5  5  4  4  5  6

Key j is visible to query i iff `j <= i < subtree_end[j]`: i lies in j's subtree, so j lies on i's path to the root. One
integer per key is the whole attention mask, and each token has the position that it has in its branch alone.
"""

from __future__ import annotations

import ctypes
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from nextquill.errors import ArgumentError, ArgumentTypeError

#: Largest token id: ids are sorted as four bytes.
_LARGEST_ID = 2**31 - 1
_KEY_BYTES = 4


@dataclass(frozen=True, eq=False)
class PrefixTree:
    """Branches merged by common prefix, in depth-first order; any number of roots.

    Attributes:
        input_ids: int64 [T], one token for each distinct prefix: its last one.
        position_ids: int64 [T], depth: the token's position in every branch that holds it.
        subtree_end: int64 [T], one past the last row of the token's subtree.
        branch_rows: for each branch, in the order given, its tokens' rows, int64 [length]:
            `input_ids[branch_rows[b]]` is branch b.
    """

    input_ids: Tensor
    position_ids: Tensor
    subtree_end: Tensor
    branch_rows: tuple[Tensor, ...]

    def __len__(self) -> int:
        return self.input_ids.numel()

    @property
    def num_branch_tokens(self) -> int:
        """Number of tokens of all branches, each counted on its own."""
        return sum(rows.numel() for rows in self.branch_rows)

    @property
    def sharing_factor(self) -> float:
        """Number of tokens of all branches divided by that of the row, at least 1."""
        return self.num_branch_tokens / max(1, len(self))


def build_prefix_tree(branches: Sequence[Sequence[int] | Tensor]) -> PrefixTree:
    """Merge branches by token-level longest common prefix.

    Siblings are sorted by their tokens, whatever the order of `branches`; equal branches share all rows.

    Args:
        branches: at least one; each a sequence of token ids or an integer tensor [length], with at least one token.

    Returns:
        The tree, on the CPU.

    Raises:
        ArgumentError: no branches, an empty one, or a token id that is negative or above 2³¹ - 1.
        ArgumentTypeError: a branch is not a sequence of integers.
    """
    return sort_branches(branches).tree()


@dataclass(frozen=True, eq=False)
class SortedBranches:
    """Branches sorted by their tokens, and the prefixes that neighbours share; a selection needs no new sort.

    Attributes:
        ids: the branches as given, int64 [length] each.
        order: their indices, sorted.
        shared: in that order, the number of tokens that each branch shares with the one before it.
    """

    ids: list[Tensor]
    order: list[int]
    shared: list[int]

    def select(self, chosen: Sequence[int]) -> SortedBranches:
        """Return some of the branches, each once, numbered in the order of `chosen`."""
        number = {branch: index for index, branch in enumerate(chosen)}
        order, shared = list[int](), list[int]()
        least = _LARGEST_ID  # least prefix that neighbours share since the last chosen branch
        for branch, common in zip(self.order, self.shared, strict=True):
            least = min(least, common)
            if branch in number:
                order.append(number[branch])
                shared.append(least)
                least = _LARGEST_ID
        return SortedBranches([self.ids[branch] for branch in chosen], order, shared)

    def tree(self) -> PrefixTree:
        """Merge the branches: append each, in order, without the tokens that it shares with the one before it."""
        ids = self.ids
        lengths = [len(ids[branch]) for branch in self.order]
        stops = list(accumulate(length - kept for length, kept in zip(lengths, self.shared, strict=True)))
        runs = list(zip(self.order, self.shared, lengths, [0, *stops[:-1]], stops, strict=True))
        total, longest = stops[-1], max(lengths)

        path = torch.empty(longest, dtype=torch.long)  # row of the current branch's token at each depth
        branch_rows: list[Tensor] = [path] * len(ids)
        for branch, kept, length, start, stop in runs:
            path[kept:length] = torch.arange(start, stop)
            branch_rows[branch] = path[:length].clone()

        end = torch.full((longest,), total)  # where a token's subtree ends, by depth; filled from the last row up
        subtree_end = torch.empty(total, dtype=torch.long)
        for _, kept, length, start, stop in reversed(runs):
            subtree_end[start:stop] = end[kept:length]
            end[kept:] = start  # subtrees below the fork end where this branch's own tokens begin
        input_ids = torch.cat([ids[branch][kept:] for branch, kept, *_ in runs])
        position_ids = torch.cat([torch.arange(kept, length) for _, kept, length, *_ in runs])
        return PrefixTree(input_ids, position_ids, subtree_end, tuple(branch_rows))


def sort_branches(branches: Sequence[Sequence[int] | Tensor]) -> SortedBranches:
    """Check branches as `build_prefix_tree` does, sort them by tokens, and measure what neighbours share."""
    ids = [_token_ids(branch, position) for position, branch in enumerate(branches)]
    if not ids:
        raise ArgumentError("branches: expected at least one, got none")
    keys = _sort_keys(ids)
    order = sorted(range(len(ids)), key=keys.__getitem__)
    return SortedBranches(ids, order, [0, *(_common_prefix(keys[a], keys[b]) for a, b in pairwise(order))])


def _common_prefix(a: bytes, b: bytes) -> int:
    """Return how many leading tokens two sort keys share, comparing stretches whose length doubles, then halves."""
    same, step, most = 0, _KEY_BYTES * 16, min(len(a), len(b))
    while same < most and a[same : same + step] == b[same : same + step]:
        same, step = min(same + step, most), step * 2
    while step > _KEY_BYTES:  # the first difference, if there is one, lies within a step
        step //= 2
        if same < most and a[same : same + step] == b[same : same + step]:
            same = min(same + step, most)
    return same // _KEY_BYTES


def _token_ids(branch: Any, position: int) -> Tensor:
    """Return a branch as int64 [length]."""
    if isinstance(branch, Tensor):
        if branch.dim() != 1 or branch.is_floating_point() or branch.is_complex() or branch.dtype == torch.bool:
            raise ArgumentTypeError(
                f"branches[{position}]: expected a 1-D integer tensor, got {branch.dtype} of shape {list(branch.shape)}"
            )
        ids = branch.to("cpu", torch.long)
    elif isinstance(branch, (bytes, bytearray)):  # `array` would read the bytes as the memory of its integers
        raise ArgumentTypeError(f"branches[{position}]: expected a sequence of token ids, got {type(branch).__name__}")
    else:
        try:  # `array` converts Python integers several times faster than a tensor does
            tokens = array("q", branch)
        except (TypeError, OverflowError) as error:
            raise ArgumentTypeError(f"branches[{position}]: expected a sequence of token ids: {error}") from error
        ids = torch.frombuffer(tokens, dtype=torch.long) if tokens else torch.empty(0, dtype=torch.long)
    if not len(ids):
        raise ArgumentError(f"branches[{position}]: expected at least one token, got none")
    return ids


def _sort_keys(branches: list[Tensor]) -> list[bytes]:
    """Return the tokens of each branch as big-endian bytes, which sort in the same order as the tokens."""
    ids = torch.cat(branches)
    least, largest = (int(bound) for bound in ids.aminmax())
    if least < 0 or largest > _LARGEST_ID:
        position = next(at for at, each in enumerate(branches) if int(each.min()) < 0 or int(each.max()) > _LARGEST_ID)
        bad = branches[position]
        raise ArgumentError(
            f"branches[{position}]: expected token ids in [0, {_LARGEST_ID}], got {int(bad.min())} to {int(bad.max())}"
        )
    key = ids.to(torch.int32).view(torch.uint8)
    if sys.byteorder == "little":
        key = key.view(-1, _KEY_BYTES).flip(1).contiguous()
    keys, start = list[bytes](), key.data_ptr()
    for each in branches:
        keys.append(ctypes.string_at(start, len(each) * _KEY_BYTES))
        start += len(each) * _KEY_BYTES
    return keys

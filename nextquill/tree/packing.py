"""Which branches share a row: by a token budget, and by whether they need a gradient."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from itertools import accumulate

from torch import Tensor

from nextquill.errors import ArgumentError, BudgetError
from nextquill.tree.prefix_tree import PrefixTree, SortedBranches, build_prefix_tree, sort_branches


def pack_branches(groups: Sequence[Sequence[Sequence[int] | Tensor]], max_tokens: int | None = None) -> list[list[int]]:
    """Put groups of branches into few rows by a greedy pass; groups that share a prefix come side by side.

    Groups are taken in the order of their first branch's tokens. A row is closed when the next group would not fit. The
    size of a row counts shared tokens once.

    Args:
        groups: the branches of each group, which stay together; a branch is a sequence of token ids or an integer
            tensor [length].
        max_tokens: largest size of a row, in tokens; None puts everything into one row.

    Returns:
        For each row the indices of its groups, in the order they were taken.

    Raises:
        ArgumentError: no groups, an empty one, or a budget below 1.
        BudgetError: a group is larger than the budget on its own.
    """
    if not groups or any(not group for group in groups):
        raise ArgumentError("groups: expected at least one, each with at least one branch")
    ends = list(accumulate(map(len, groups)))
    indices = [range(end - len(group), end) for group, end in zip(groups, ends, strict=True)]
    return pack_sorted(sort_branches([branch for group in groups for branch in group]), indices, max_tokens)


def pack_sorted(
    branches: SortedBranches, groups: Sequence[Sequence[int]], max_tokens: int | None = None
) -> list[list[int]]:
    """Pack branches that are already sorted, as `pack_branches` does; a group is the indices of its branches."""
    if max_tokens is not None and max_tokens < 1:
        raise ArgumentError(f"max_tokens: expected a positive number or None, got {max_tokens}")
    rank_of = {branch: rank for rank, branch in enumerate(branches.order)}
    taken = sorted(range(len(groups)), key=lambda index: rank_of[groups[index][0]])
    if max_tokens is None:
        return [taken]

    lengths, shared = [len(branches.ids[branch]) for branch in branches.order], branches.shared
    rows: list[list[int]] = []
    members, size = list[int](), 0  # ranks in the current row, and its number of tokens
    for index in taken:
        ranks = sorted(rank_of[branch] for branch in groups[index])
        extended, larger = _extended(members, size, ranks, lengths, shared)
        if rows and members and larger <= max_tokens:
            rows[-1].append(index)
            members, size = extended, larger
            continue
        members, size = _extended([], 0, ranks, lengths, shared)
        if size > max_tokens:
            raise BudgetError(f"groups[{index}]: its branches take {size} tokens together; max_tokens is {max_tokens}")
        rows.append([index])
    return rows


def split_by_gradient(
    branches: Sequence[Sequence[int] | Tensor], needs_grad: Sequence[bool]
) -> tuple[PrefixTree | None, PrefixTree | None]:
    """Build two rows: one of the branches that need a gradient, one of the others, for a forward without gradient.

    Args:
        branches: as in `build_prefix_tree`, integers [length] each.
        needs_grad: one per branch.

    Returns:
        The tree of the branches with gradient and the tree of the others, each with its branches in the given order;
        None for a tree without branches.

    Raises:
        ArgumentError, ArgumentTypeError: as `build_prefix_tree`, or not one `needs_grad` per branch.
    """
    if len(needs_grad) != len(branches) or not branches:
        raise ArgumentError(
            f"needs_grad: expected one per branch of at least one, got {len(needs_grad)} for {len(branches)} branches"
        )
    groups = (
        [branch for branch, need in zip(branches, needs_grad, strict=True) if bool(need) is want]
        for want in (True, False)
    )
    trees = [build_prefix_tree(group) if group else None for group in groups]
    return trees[0], trees[1]


def _extended(
    members: list[int], size: int, new: list[int], lengths: list[int], shared: list[int]
) -> tuple[list[int], int]:
    """Return a row's sorted ranks and size after adding new ranks: each adds the tokens that no neighbour shares."""
    members = list(members)
    for rank in new:
        at = bisect_left(members, rank)
        before = _shared(members[at - 1], rank, shared) if at else 0
        after = _shared(rank, members[at], shared) if at < len(members) else 0
        size += lengths[rank] - max(before, after)
        insort(members, rank)
    return members, size


def _shared(low: int, high: int, shared: list[int]) -> int:
    """Return the common prefix of two branches, from the prefixes that sorted neighbours share."""
    return min(shared[low + 1 : high + 1])

"""Rows within a token budget: each fits, none was closed too early, and every branch occurs once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nextquill.errors import ArgumentError, ArgumentTypeError, BudgetError
from nextquill.tree import build_prefix_tree, pack_branches, split_by_gradient

# Few tokens, so that branches fork often, end inside one another, and stand in several groups.
BRANCH = st.lists(st.integers(0, 2), min_size=1, max_size=6)
GROUPS = st.lists(st.lists(BRANCH, min_size=1, max_size=3), min_size=1, max_size=7)


def size_of(groups: list[list[list[int]]], chosen: list[int]) -> int:
    """The number of rows in the tree of these groups."""
    return len(build_prefix_tree([branch for index in chosen for branch in groups[index]]))


@settings(deadline=None, max_examples=300)
@given(groups=GROUPS, budget=st.integers(1, 40))
def test_rows_fit_and_are_closed_only_when_the_next_group_would_not(groups: list[list[list[int]]], budget: int) -> None:
    """The exact size of the built tree counts."""
    largest = max(size_of(groups, [index]) for index in range(len(groups)))
    if largest > budget:
        with pytest.raises(BudgetError, match=f"max_tokens is {budget}$"):
            pack_branches(groups, budget)
        return
    rows = pack_branches(groups, budget)
    assert sorted(index for row in rows for index in row) == list(range(len(groups))), "each group once"
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        assert row
        assert size_of(groups, row) <= budget
        if following is not None:
            assert size_of(groups, [*row, following[0]]) > budget, "a row was closed although the next group fits"


@settings(deadline=None)
@given(groups=GROUPS, budget=st.integers(18, 60))
def test_groups_are_taken_in_the_order_of_their_first_branch(groups: list[list[list[int]]], budget: int) -> None:
    (whole,) = pack_branches(groups)
    assert [groups[index][0] for index in whole] == sorted(group[0] for group in groups)
    assert [index for row in pack_branches(groups, budget) for index in row] == whole


def test_groups_that_share_a_prefix_share_a_row() -> None:
    histories = [[1] * 10, [2] * 10, [3] * 10]
    groups = [[[*histories[i % 3], 5 + i]] for i in range(9)]
    assert pack_branches(groups, 13) == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]
    assert pack_branches(groups, 12) == [[0, 3], [6], [1, 4], [7], [2, 5], [8]]
    assert pack_branches(groups, 26) == [[0, 3, 6, 1, 4, 7], [2, 5, 8]]


def test_a_group_stays_together() -> None:
    groups = [[[1, 2], [9, 9]], [[1, 3], [9, 8]]]
    assert pack_branches(groups, 6) == [[0, 1]]
    assert pack_branches(groups, 5) == [[0], [1]]


def test_tensors_are_packed_as_lists_are() -> None:
    groups = [[[1, 2, 3], [4]], [[1, 2, 5]]]
    tensors = [[torch.tensor(branch) for branch in group] for group in groups]
    for budget in (None, 5, 4):
        assert pack_branches(tensors, budget) == pack_branches(groups, budget)


def test_a_group_that_is_too_large_is_named_with_its_size() -> None:
    with pytest.raises(BudgetError, match=r"^groups\[1\]: its branches take 5 tokens together; max_tokens is 4$"):
        pack_branches([[[1, 2]], [[1, 2, 3], [1, 4, 5]]], 4)


@pytest.mark.parametrize(
    ("groups", "budget", "error", "message"),
    [
        ([], None, ArgumentError, "groups: expected at least one, each with at least one branch"),
        ([[[1]], []], 5, ArgumentError, "groups: expected at least one, each with at least one branch"),
        ([[[1]]], 0, ArgumentError, "max_tokens: expected a positive number or None, got 0"),
        ([[[1]], [[]]], 5, ArgumentError, r"branches\[1\]: expected at least one token"),
        ([[[1.5]]], 5, ArgumentTypeError, r"branches\[0\]: expected a sequence of token ids"),
    ],
    ids=["no groups", "empty group", "no budget", "empty branch", "floats"],
)
def test_what_cannot_be_packed(groups, budget, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        pack_branches(groups, budget)


def test_branches_without_gradient_get_a_row_of_their_own() -> None:
    branches = [[1, 2, 3], [1, 2, 4], [1, 5], [1, 2, 4, 6]]
    with_grad, without = split_by_gradient(branches, [True, False, True, False])
    assert with_grad is not None
    assert without is not None
    for tree, expected in ((with_grad, branches[::2]), (without, branches[1::2])):
        assert [tree.input_ids[rows].tolist() for rows in tree.branch_rows] == expected
    assert (len(with_grad), len(without)) == (4, 4), "tokens are shared within a row only"
    assert split_by_gradient(branches, [True] * 4)[1] is None
    assert split_by_gradient(branches, [False] * 4)[0] is None


@pytest.mark.parametrize(("branches", "needs_grad"), [([[1], [2]], [True]), ([], [])])
def test_needs_grad_is_one_per_branch(branches: list[list[int]], needs_grad: list[bool]) -> None:
    with pytest.raises(ArgumentError, match=rf"needs_grad: expected one per branch .* got {len(needs_grad)} for"):
        split_by_gradient(branches, needs_grad)

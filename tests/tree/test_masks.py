"""Dense masks, against the rule for each pair and against prefixes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nextquill.tree import additive_mask, build_prefix_tree, visibility_mask
from tests.tree.strategies import branch_lists
from tests.tree.trees import SMALL, prefixes, visible_naively

few = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def padded(trees, length, first=0):
    """position_ids and subtree_end [B, length], with each tree from row `first` on. Padding rows have no subtree."""
    positions = torch.zeros(len(trees), length, dtype=torch.long)
    ends = torch.arange(length).repeat(len(trees), 1)
    for row, tree in enumerate(trees):
        rows = slice(first, first + len(tree))
        positions[row, rows], ends[row, rows] = tree.position_ids, tree.subtree_end + first
    return positions, ends


@few
@given(
    many=st.lists(branch_lists(most=4), min_size=1, max_size=3),
    window=st.none() | st.integers(1, 6),
    first=st.integers(0, 3),
    behind=st.integers(0, 3),
)
def test_a_batch_with_padding_sees_its_paths_and_padding_itself_only(many, window, first, behind):
    trees = [build_prefix_tree(branches) for branches in many]
    length = first + max(len(tree) for tree in trees) + behind
    visible = visibility_mask(*padded(trees, length, first), window)
    expected = torch.eye(length, dtype=torch.bool).repeat(len(trees), 1, 1)
    for row, (tree, branches) in enumerate(zip(trees, many, strict=True)):
        rows = slice(first, first + len(tree))
        expected[row, rows, rows] = visible_naively(prefixes(branches), window)
    assert visible.dtype == torch.bool
    assert torch.equal(visible, expected)


def test_padding_may_end_anywhere_up_to_its_own_row():
    positions, ends = torch.tensor([0, 1, 0, 0]), torch.tensor([2, 2, 0, 3])
    for end in range(4):
        ends[3] = end
        assert visibility_mask(positions, ends)[2:].tolist() == [
            [False, False, True, False],
            [False, False, False, True],
        ]


def test_the_window_counts_tokens_of_the_path_not_rows():
    tree = build_prefix_tree([[1, 2, 3, 4], [1, 5]])  # rows 1 2 3 4 | 5, whose parent is four rows before it
    visible = visibility_mask(tree.position_ids, tree.subtree_end, 2)
    assert visible[4].tolist() == [True, False, False, False, True]
    assert visible[3].tolist() == [False, False, True, True, False]


@few
@given(branches=branch_lists(), window=st.integers(1, 12))
def test_a_window_as_long_as_the_longest_branch_hides_nothing(branches, window):
    tree = build_prefix_tree(branches)
    whole = visibility_mask(tree.position_ids, tree.subtree_end)
    narrowed = visibility_mask(tree.position_ids, tree.subtree_end, window)
    assert torch.equal(whole, narrowed) == (window > tree.position_ids.max())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_additive_mask_is_zero_or_the_least_finite_number(dtype):
    tree = build_prefix_tree(SMALL)
    visible = visibility_mask(tree.position_ids, tree.subtree_end)
    mask = additive_mask(visible, dtype)
    assert mask.dtype == dtype
    assert mask.isfinite().all()
    assert torch.equal(mask == 0, visible)
    assert (mask[~visible] == torch.finfo(dtype).min).all()
    # Scores of any ordinary size vanish beside it.
    weights = (mask + 100 * torch.randn(mask.shape).to(dtype)).float().softmax(-1)
    assert (weights[~visible] == 0).all()


def test_additive_mask_keeps_the_shape_of_a_batch():
    visible = torch.rand(2, 3, 3) < 0.5
    assert additive_mask(visible, torch.float32).shape == (2, 3, 3)

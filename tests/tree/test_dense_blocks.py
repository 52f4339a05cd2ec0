"""The pieces cover all visible pairs once, and no others."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nextquill.tree import TreeLayout, build_prefix_tree, visibility_mask
from nextquill.tree import dense_blocks as pieces_module
from nextquill.tree.dense_blocks import pieces
from tests.tree.strategies import branch_lists
from tests.tree.trees import SMALL, grown_tree

few = settings(max_examples=80, deadline=None, derandomize=True, database=None)
windows = st.none() | st.integers(1, 8)
ENTRIES = pieces_module._MASK_ENTRIES


def rows_of(which, total):
    return torch.arange(total)[which] if isinstance(which, slice) else which


def seen(piece, total):
    """A piece as the kernels understand it: queries, keys, bool [q, k]."""
    queries, keys = rows_of(piece.queries, total), rows_of(piece.keys, total)
    block = torch.ones(len(queries), len(keys), dtype=torch.bool)
    assert piece.is_causal == (piece.is_own and piece.mask is None)
    if piece.mask is not None:
        assert piece.mask.shape == block.shape
        assert piece.mask.dtype == torch.bool
        block = piece.mask
    elif piece.is_own:
        assert torch.equal(queries, keys)
        block = block.tril()
    return queries, keys, block


def assert_exact_cover(tree, window, entries=ENTRIES):
    layout, total = TreeLayout.of_tree(tree), len(tree)
    times = torch.zeros(total, total, dtype=torch.long)
    own = torch.zeros(total, dtype=torch.long)
    owns = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces_module, "_MASK_ENTRIES", entries)
        found = list(pieces(layout.segments, window))
    for piece in found:
        queries, keys, block = seen(piece, total)
        assert len(queries) > 0
        assert block.any(1).all(), "a query without a key has no softmax"
        times[queries[:, None], keys] += block
        owns.append(piece.is_own)
        if piece.is_own:
            own[queries] += 1
        if piece.mask is not None:
            assert block.numel() <= max(entries, len(keys))
    assert torch.equal(times, visibility_mask(tree.position_ids, tree.subtree_end, window).long())
    assert (own == 1).all()
    assert owns == sorted(owns, reverse=True), "own pieces come first"
    return found


@few
@given(branches=branch_lists(), window=windows)
def test_pieces_cover_every_visible_pair_once(branches, window):
    assert_exact_cover(build_prefix_tree(branches), window)


@few
@given(branches=branch_lists(), window=st.integers(1, 8), entries=st.integers(1, 30))
def test_masks_of_few_entries_cut_pieces_along_their_queries(branches, window, entries):
    assert_exact_cover(build_prefix_tree(branches), window, entries)


@pytest.mark.parametrize("window", [None, 1, 2, 7, 39, 40, 60, 10_000], ids=str)
def test_pieces_of_a_large_tree(window):
    assert_exact_cover(grown_tree(600), window)


def test_the_bound_on_entries_splits_a_long_piece():
    chain = build_prefix_tree([range(20)])
    (whole,) = assert_exact_cover(chain, 5)
    assert whole.mask.shape == (20, 20)
    assert [len(p.queries) for p in assert_exact_cover(chain, 5, entries=7 * 20)] == [7, 7, 6]
    assert [len(p.queries) for p in assert_exact_cover(chain, 5, entries=1)] == [1] * 20


@few
@given(branches=branch_lists())
def test_a_segment_is_a_triangle_and_a_rectangle_and_no_mask(branches):
    layout = TreeLayout.of_tree(build_prefix_tree(branches))
    found = list(pieces(layout.segments))
    segments = layout.segments.tolist()
    assert all(piece.mask is None for piece in found)
    assert [piece.keys for piece in found if piece.is_own] == [slice(start, stop) for start, stop, *_ in segments]
    rest = [(piece.queries, piece.keys) for piece in found if not piece.is_own]
    assert rest == [(slice(stop, end), slice(start, stop)) for start, stop, end, *_ in segments if end > stop]


def test_pieces_that_a_window_does_not_cut_have_no_mask():
    tree = build_prefix_tree([[1, 2, 3, *range(10, 20)], [1, 2, 3, 4]])
    masked = [(p.is_own, p.keys) for p in assert_exact_cover(tree, 10) if p.mask is not None]
    assert masked == [(False, slice(0, 3))]  # the long branch leaves its prefix behind; its own ten are in its window
    assert all(piece.mask is None for piece in assert_exact_cover(tree, 13))


def test_rows_beyond_the_window_are_left_out():
    tree = build_prefix_tree([[1, 2, 3, *range(10, 20)], [1, 2, 3, 99]])
    (across,) = [piece for piece in assert_exact_cover(tree, 3) if not piece.is_own]
    assert across.queries.tolist() == [3, 4, 13]  # one or two tokens after the prefix, in both branches
    assert not [piece for piece in assert_exact_cover(tree, 1) if not piece.is_own]


def test_depths_do_not_need_the_rows():
    tree = build_prefix_tree(SMALL)
    depths = pieces_module.row_depths(TreeLayout.of_tree(tree).segments)
    assert torch.equal(depths, tree.position_ids)

"""Segments are the longest stretches of rows without a fork, and tensors that are not trees are refused."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nextquill.errors import ArgumentError, ArgumentTypeError
from nextquill.tree import TreeLayout, build_prefix_tree, visibility_mask
from nextquill.tree.dense_blocks import pieces
from tests.tree.strategies import branch_lists
from tests.tree.trees import SMALL, prefixes

few = settings(max_examples=80, deadline=None, derandomize=True, database=None)


def segments_naively(branches):
    """From the sets of children: a row continues its parent's segment if and only if it is the only child."""
    rows = prefixes(branches)
    index = {row: i for i, row in enumerate(rows)}
    children = {row: [other for other in rows if other[:-1] == row] for row in rows}
    segment_of, found = {}, []
    for i, row in enumerate(rows):
        above = row[:-1]
        if above and len(children[above]) == 1:
            segment_of[row] = segment_of[above]
            found[segment_of[row]][1] = i + 1
            continue
        segment_of[row] = len(found)
        end = 1 + max(index[other] for other in rows if other[: len(row)] == row)
        found.append([i, i + 1, end, len(row) - 1, segment_of[above] if above else -1])
    return found


def covered(layout):
    """The number of pieces, none of which has a mask, that cover each pair of rows."""
    times = torch.zeros(layout.num_rows, layout.num_rows, dtype=torch.int64)
    for piece in pieces(layout.segments):
        block = times[piece.queries, piece.keys]
        block += torch.ones_like(block).tril() if piece.is_own else 1
    return times


def assert_refused_or_right(position_ids, subtree_end):
    """Return whether the tensors were accepted; if so, assert that exactly the pairs they describe are attended."""
    try:
        layout = TreeLayout.of(position_ids, subtree_end)
    except ArgumentError:
        return False
    assert layout.segments[:, :3].max() <= len(position_ids)
    visible = visibility_mask(position_ids, subtree_end)
    assert torch.equal(covered(layout), visible.long())
    assert torch.equal(visible.sum(1) - 1, position_ids)
    return True


def test_the_example_of_the_documentation():
    layout = TreeLayout.of_tree(build_prefix_tree([[1, 2, 3, 4], [1, 2, 5]]))
    assert layout.segments.tolist() == [[0, 2, 5, 0, -1], [2, 4, 4, 2, 0], [4, 5, 5, 2, 0]]
    assert (layout.num_rows, layout.depth) == (5, 4)


@few
@given(branches=branch_lists())
def test_segments_are_the_longest_runs_without_a_fork(branches):
    layout = TreeLayout.of_tree(build_prefix_tree(branches))
    assert layout.segments.tolist() == segments_naively(branches)
    assert layout.segments.dtype == torch.int64
    assert layout.num_rows == len(prefixes(branches))
    assert layout.depth == max(len(branch) for branch in branches)


def test_a_fork_at_every_token_and_a_chain_without_one():
    deep = list(range(100))
    forks = [[*deep[:n], 1000] for n in range(100)] + [deep]
    assert TreeLayout.of_tree(build_prefix_tree(forks)).segments.tolist() == segments_naively(forks)
    assert TreeLayout.of_tree(build_prefix_tree([deep])).segments.tolist() == [[0, 100, 100, 0, -1]]


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_integers_of_any_size(dtype):
    tree = build_prefix_tree(SMALL)
    layout = TreeLayout.of(tree.position_ids.to(dtype), tree.subtree_end.to(dtype))
    assert torch.equal(layout.segments, TreeLayout.of_tree(tree).segments)
    assert isinstance(layout.depth, int)


def test_every_pair_of_small_tensors_is_refused_or_right():
    """All positions and ends in range and just outside: five of 27,000 pairs for three rows are trees."""
    for length, trees in ((1, 1), (2, 2), (3, 5)):
        found = 0
        for positions in product(range(-1, length + 1), repeat=length):
            for ends in product(range(-1, length + 2), repeat=length):
                found += assert_refused_or_right(torch.tensor(positions), torch.tensor(ends))
        assert found == trees


@settings(few, max_examples=150)
@given(branches=branch_lists(), data=st.data())
def test_a_corrupted_tree_is_refused_or_right(branches, data):
    tree = build_prefix_tree(branches)
    tensors = tree.position_ids.clone(), tree.subtree_end.clone()
    for _ in range(data.draw(st.integers(1, 2))):
        row = data.draw(st.integers(0, len(tree) - 1))
        tensors[data.draw(st.integers(0, 1))][row] += data.draw(st.sampled_from([-2, -1, 1, 2]))
    assert_refused_or_right(*tensors)


def test_a_subtree_that_ends_after_the_last_row_is_refused():
    """Queries that do not exist cause a division by zero in the fused kernel, which ends the process."""
    with pytest.raises(ArgumentError, match="position_ids, subtree_end"):
        TreeLayout.of(torch.tensor([0, 1]), torch.tensor([3, 3]))


def test_small_integers_do_not_wrap_into_a_tree():
    positions = torch.cat([torch.arange(256), torch.zeros(1)]).to(torch.uint8)
    with pytest.raises(ArgumentError, match="row 256"):
        TreeLayout.of(positions, torch.full((257,), 257))


@pytest.mark.parametrize(
    ("positions", "ends", "row"),
    [
        ([1, 2], [2, 2], 0),  # a root is at depth 0
        ([0, 2], [2, 2], 1),  # a depth is left out
        ([0, 1, 1], [2, 2, 3], 2),  # a child outside its parent's subtree
        ([0, 1, 2], [3, 2, 3], 2),  # and outside the subtree it lies in
        ([0, 1, 2, 0], [2, 2, 3, 4], 2),  # a subtree that ends after its parent's
        ([0, 0, 1], [1, 1, 3], 1),  # a subtree that ends before it begins
        ([0, 1, 2], [2, 2, 2], 0),
        ([0, 1, 0, 1], [2, 4, 4, 4], 1),
    ],
    ids=str,
)
def test_what_is_not_depth_first_is_refused_with_its_row(positions, ends, row):
    with pytest.raises(ArgumentError, match=f"expected trees in depth-first order, not so at row {row}$"):
        TreeLayout.of(torch.tensor(positions), torch.tensor(ends))


GOOD = torch.tensor([0, 1])
ENDS = torch.tensor([2, 2])


@pytest.mark.parametrize(
    ("positions", "ends", "error", "message"),
    [
        ([0, 1], ENDS, ArgumentTypeError, r"position_ids: .*got \[0, 1\]"),
        (GOOD, None, ArgumentTypeError, "subtree_end: .*got None"),
        (GOOD.float(), ENDS, ArgumentTypeError, "position_ids: expected an integer tensor"),
        (GOOD, ENDS.double(), ArgumentTypeError, "subtree_end: expected an integer tensor"),
        (GOOD, ENDS.to("meta"), ArgumentTypeError, "subtree_end: expected an integer tensor on the CPU"),
        (GOOD[None], ENDS[None], ArgumentError, r"position_ids: expected \[T\].*\[1, 2\]"),
        (GOOD[:0], ENDS[:0], ArgumentError, "position_ids: expected .* at least one row"),
        (GOOD, ENDS[0], ArgumentError, r"subtree_end: .*\[\]"),
        (GOOD, torch.tensor([3, 3, 3]), ArgumentError, r"subtree_end: expected the shape .*\[2\], got \[3\]"),
    ],
    ids=str,
)
def test_bad_tensors_are_named(positions, ends, error, message):
    with pytest.raises(error, match=message):
        TreeLayout.of(positions, ends)


def test_complex_positions_are_no_integers():
    with pytest.raises(ArgumentTypeError, match="position_ids"):
        TreeLayout.of(GOOD.to(torch.complex64), ENDS)

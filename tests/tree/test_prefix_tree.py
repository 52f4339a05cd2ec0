"""The tree of some branches, against the set of their prefixes."""

import time
from array import array

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nextquill.errors import ArgumentError, ArgumentTypeError
from nextquill.tree import PrefixTree, build_prefix_tree, visibility_mask
from tests.tree.strategies import branch_lists
from tests.tree.trees import SMALL, prefixes, visible_naively

few = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def lists(tree: PrefixTree):
    return tree.input_ids.tolist(), tree.position_ids.tolist(), tree.subtree_end.tolist()


def assert_is_the_tree_of(tree, branches):
    rows = prefixes(branches)
    ends = [1 + max(i for i, other in enumerate(rows) if other[: len(row)] == row) for row in rows]
    assert lists(tree) == ([row[-1] for row in rows], [len(row) - 1 for row in rows], ends)
    index = {row: i for i, row in enumerate(rows)}
    assert [each.tolist() for each in tree.branch_rows] == [
        [index[tuple(branch[: n + 1])] for n in range(len(branch))] for branch in branches
    ]
    for tensor in (tree.input_ids, tree.position_ids, tree.subtree_end, *tree.branch_rows):
        assert tensor.dtype == torch.int64
        assert tensor.device.type == "cpu"


def test_the_example_of_the_documentation():
    tree = build_prefix_tree([[7, 8, 9, 10], [7, 8, 20], [30]])
    assert lists(tree) == ([7, 8, 9, 10, 20, 30], [0, 1, 2, 3, 2, 0], [5, 5, 4, 4, 5, 6])
    assert [rows.tolist() for rows in tree.branch_rows] == [[0, 1, 2, 3], [0, 1, 4], [5]]


@few
@given(branches=branch_lists())
def test_rows_are_the_distinct_prefixes_in_depth_first_order(branches):
    assert_is_the_tree_of(build_prefix_tree(branches), branches)


@few
@given(branches=branch_lists())
def test_each_branch_reads_back_and_its_rows_lie_on_one_path(branches):
    tree = build_prefix_tree(branches)
    for branch, rows in zip(branches, tree.branch_rows, strict=True):
        assert tree.input_ids[rows].tolist() == branch
        assert tree.position_ids[rows].tolist() == list(range(len(branch)))
        assert (rows[:-1] < rows[1:]).all()
        assert (rows[-1] < tree.subtree_end[rows]).all()


@few
@given(branches=branch_lists(), window=st.none() | st.integers(1, 6))
def test_what_is_visible_is_the_path_to_the_root(branches, window):
    tree = build_prefix_tree(branches)
    naive = visible_naively(prefixes(branches), window)
    assert torch.equal(visibility_mask(tree.position_ids, tree.subtree_end, window), naive)
    for i in range(len(tree)):
        for j in range(len(tree)):
            rule = j <= i < tree.subtree_end[j] and (not window or tree.position_ids[i] - tree.position_ids[j] < window)
            assert bool(rule) == bool(naive[i, j])


@few
@given(branches=branch_lists(), data=st.data())
def test_neither_order_nor_repetition_of_branches_changes_the_rows(branches, data):
    picked = data.draw(
        st.permutations([*range(len(branches)), *data.draw(st.lists(st.sampled_from(range(len(branches)))))])
    )
    tree, other = build_prefix_tree(branches), build_prefix_tree([branches[b] for b in picked])
    assert lists(other) == lists(tree)
    for b, rows in zip(picked, other.branch_rows, strict=True):
        assert torch.equal(rows, tree.branch_rows[b])


def test_siblings_come_by_the_size_of_their_ids_over_all_bytes():
    ids = [2**31 - 1, 2**31 - 2, 2**24, 2**24 - 1, 65536, 65535, 257, 256, 255, 128, 127, 1, 0]
    assert build_prefix_tree([[i] for i in ids]).input_ids.tolist() == sorted(ids)
    assert build_prefix_tree([[5, i] for i in ids]).input_ids.tolist() == [5, *sorted(ids)]


def test_a_branch_that_ends_inside_another_adds_no_rows():
    long = list(range(50))
    tree = build_prefix_tree([long[:10], long, long[:1], long])
    assert len(tree) == 50
    assert tree.subtree_end.tolist() == [50] * 50
    assert [len(rows) for rows in tree.branch_rows] == [10, 50, 1, 50]


def test_one_token():
    tree = build_prefix_tree([[0]])
    assert lists(tree) == ([0], [0], [1])
    assert tree.branch_rows[0].tolist() == [0]


def test_many_roots():
    branches = [[root, root] for root in reversed(range(500))]
    tree = build_prefix_tree(branches)
    assert tree.position_ids.tolist() == [0, 1] * 500
    assert tree.subtree_end.tolist() == [2 * (row // 2) + 2 for row in range(1000)]


def test_a_deep_tree_with_a_fork_at_every_token():
    deep = list(range(300))
    branches = [[*deep[:n], 1000] for n in range(300)] + [deep]
    assert_is_the_tree_of(build_prefix_tree(branches), branches)


@pytest.mark.parametrize(
    "container",
    [
        tuple,
        lambda ids: array("i", ids),
        lambda ids: array("q", ids),
        lambda ids: torch.tensor(ids).numpy(),
        torch.tensor,
        lambda ids: torch.tensor(ids, dtype=torch.int32),
        lambda ids: torch.tensor(ids, dtype=torch.int16),
        lambda ids: torch.tensor(ids, dtype=torch.int8),
        lambda ids: torch.tensor(ids, dtype=torch.uint8),
        lambda ids: torch.tensor(ids).repeat_interleave(2)[::2],
        lambda ids: torch.tensor([ids, ids]).T[:, 0],
        lambda ids: [torch.tensor(i) for i in ids],
    ],
    ids="tuple array-i array-q numpy int64 int32 int16 int8 uint8 every-other column scalars".split(),
)
def test_whatever_holds_the_ids(container):
    tree = build_prefix_tree([container(branch) for branch in SMALL])
    assert_is_the_tree_of(tree, SMALL)


def test_rows_of_a_matrix_and_ranges_are_branches():
    matrix = torch.tensor([[4, 5, 6], [4, 5, 7]])
    assert_is_the_tree_of(build_prefix_tree(matrix), matrix.tolist())
    assert_is_the_tree_of(build_prefix_tree([range(3), range(5)]), [[0, 1, 2], [0, 1, 2, 3, 4]])
    assert_is_the_tree_of(build_prefix_tree([torch.tensor(6).expand(3)]), [[6, 6, 6]])


def test_one_token_out_of_a_strided_tensor():
    column = torch.arange(10)[::2][:1]
    assert column.stride() == (2,)
    assert_is_the_tree_of(build_prefix_tree([column, [0, 1]]), [[0], [0, 1]])


def test_the_tree_shares_no_memory_with_its_branches():
    branch, ids = torch.tensor([1, 2, 3]), array("q", [1, 2, 4])
    tree = build_prefix_tree([branch, ids, branch])
    tree.input_ids.fill_(9)
    tree.branch_rows[0].fill_(9)
    assert branch.tolist() == [1, 2, 3]
    assert ids.tolist() == [1, 2, 4]
    assert tree.branch_rows[1].tolist() == [0, 1, 3]
    assert tree.branch_rows[2].tolist() == [0, 1, 2]


def test_counts():
    tree = build_prefix_tree([[1, 2, 3], [1, 2, 4], [1, 2, 4]])
    assert tree.num_branch_tokens == 9
    assert len(tree) == 4
    assert tree.sharing_factor == 9 / 4
    assert build_prefix_tree([[1], [2]]).sharing_factor == 1


@pytest.mark.parametrize("shared", [0, 2000, 3000])
def test_building_costs_little_more_than_reading_the_tokens(shared):
    """64 branches of 3000 tokens take about 20 ms, as long as making a tensor of each, which is the yardstick.

    Comparing every pair of branches, or walking token by token, takes ten times as long.
    """
    branches = [list(range(shared)) + [10_000 + b] * (3000 - shared) for b in range(64)]

    def best(function):
        times = []
        for _ in range(7):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        return min(times)

    yardstick = best(lambda: [torch.tensor(branch) for branch in branches])
    assert best(lambda: build_prefix_tree(branches)) < 3 * yardstick


@pytest.mark.parametrize(
    ("branches", "error", "message"),
    [
        ([], ArgumentError, "branches: expected at least one, got none"),
        ([[1], []], ArgumentError, r"branches\[1\]: expected at least one token"),
        ([torch.empty(0, dtype=torch.long)], ArgumentError, r"branches\[0\]: expected at least one token"),
        ([[1, -1]], ArgumentError, r"branches\[0\]: .*got -1 to 1"),
        ([[1], [2**31]], ArgumentError, r"branches\[1\]: .*got 2147483648"),
        ([torch.tensor([2**31])], ArgumentError, r"branches\[0\]"),
        ([[2**63]], ArgumentTypeError, r"branches\[0\]"),
        ([[1.0]], ArgumentTypeError, r"branches\[0\]"),
        ([[1], ["2"]], ArgumentTypeError, r"branches\[1\]"),
        (["12"], ArgumentTypeError, r"branches\[0\]"),
        ("12", ArgumentTypeError, r"branches\[0\]"),
        ([[[1], [2]]], ArgumentTypeError, r"branches\[0\]"),
        ([1, 2], ArgumentTypeError, r"branches\[0\]"),
        ([None], ArgumentTypeError, r"branches\[0\]"),
        ([[None]], ArgumentTypeError, r"branches\[0\]"),
        ([torch.tensor([1.0])], ArgumentTypeError, r"branches\[0\]: .*float32"),
        ([torch.tensor([True])], ArgumentTypeError, r"branches\[0\]: .*bool"),
        ([torch.tensor([1j])], ArgumentTypeError, r"branches\[0\]: .*complex"),
        ([torch.tensor([[1]])], ArgumentTypeError, r"branches\[0\]: .*shape \[1, 1\]"),
        ([torch.tensor(1)], ArgumentTypeError, r"branches\[0\]: .*shape \[\]"),
    ],
    ids=str,
)
def test_bad_branches_are_named(branches, error, message):
    with pytest.raises(error, match=message):
        build_prefix_tree(branches)


@pytest.mark.parametrize("branch", [b"abc", b"\x05" + bytes(7)], ids=["3-bytes", "8-bytes"])
def test_bytes_are_no_branch(branch):
    """An array would read them as 64-bit integers."""
    with pytest.raises(ArgumentTypeError, match=r"branches\[0\]"):
        build_prefix_tree([branch])

"""Row plans and groups: every supervised row once, whole sequences together, nothing above the budget."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nextquill.ops.row_groups import group_rows, plan_rows, split_rows

property_test = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def test_plan_sorts_rows_by_sequence_and_keeps_their_order_within():
    labels = torch.tensor([4, -100, 5, 6, 7, 8])
    plan = plan_rows(labels, torch.tensor([9, 9, 2, 9, 2, -3]), -100, 9)
    assert plan.rows.tolist() == [5, 2, 4, 0, 3]
    assert plan.labels.tolist() == [8, 5, 7, 4, 6]
    assert plan.lengths == (1, 2, 2)
    assert plan.offsets.tolist() == [0, 1, 3, 5]
    assert plan.row_lengths.tolist() == [1, 2, 2, 2, 2]


def test_plan_without_ids_is_one_sequence_in_order():
    plan = plan_rows(torch.tensor([4, -100, 5]), None, -100, 9)
    assert (plan.rows.tolist(), plan.lengths) == ([0, 2], (2,))
    assert plan_rows(torch.tensor([-100]), None, -100, 9).lengths == ()


def test_sequences_without_a_supervised_row_do_not_count():
    plan = plan_rows(torch.tensor([-100, 1, -100]), torch.tensor([0, 1, 2]), -100, 9)
    assert plan.num_sequences == 1


@property_test
@given(start=st.integers(0, 5), length=st.integers(0, 40), max_rows=st.integers(1, 50))
def test_split_covers_the_range_in_nearly_equal_pieces(start, length, max_rows):
    pieces = split_rows(start, start + length, max_rows)
    sizes = [piece.stop - piece.start for piece in pieces]
    assert [row for piece in pieces for row in range(piece.start, piece.stop)] == list(range(start, start + length))
    assert all(0 < size <= max_rows for size in sizes)
    assert not sizes or max(sizes) - min(sizes) <= 1
    assert len(pieces) == -(-length // max_rows)


@property_test
@given(lengths=st.lists(st.integers(1, 12), max_size=8), max_rows=st.integers(1, 20), whole=st.booleans())
def test_groups_cover_the_plan_and_cut_only_what_does_not_fit(lengths, max_rows, whole):
    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.long))
    plan = plan_rows(torch.zeros(len(ids), dtype=torch.long), ids, -100, 1)
    groups = list(group_rows(plan, max_rows, whole_sequences=whole))
    covered = [row for group in groups for chunk in group.chunks for row in range(chunk.start, chunk.stop)]
    assert covered == list(range(len(ids)))
    for group in groups:
        assert slice(group.chunks[0].start, group.chunks[-1].stop) == group.rows
        assert all(chunk.stop - chunk.start <= max_rows for chunk in group.chunks)
        if whole or len(ids) <= max_rows:
            own = group.lengths
            assert sum(own) == group.rows.stop - group.rows.start
            assert group.offsets[0] == group.rows.start
            assert len(group.chunks) == 1 or len(own) == 1, "only a lone long sequence is cut"
        else:
            assert group.sequences is None
    if whole:
        assert [n for group in groups for n in plan.lengths[group.sequences]] == lengths

"""A loss does not depend on the order of rows, their layout, the chunk size, or the division of a batch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nextquill as nq
from tests.helpers import FLOAT64_RELATIVE, assert_close, assert_same_gradients, make_case

HIDDEN, VOCABULARY = 5, 11
FACTORIES = {
    "NextQuill": lambda **o: nq.NextQuillLoss(anchor=0.2, **o),
    "NextQuill-paper": lambda **o: nq.NextQuillLoss(weighted_effect=True, **o),
    "NextQuill-detached": lambda **o: nq.NextQuillLoss(detach_counterfactual=True, **o),
    "NextQuill-zero-weights": lambda **o: nq.NextQuillLoss(low_weight=0.0, **o),
    "PerCE": nq.PerCELoss,
    "LongCE": nq.LongCELoss,
    "SFT": nq.SFTLoss,
    "sequence-max": lambda **o: nq.PairLoss(lambda p: p.factual / p.factual.max(), alpha=0.3, **o),
}
losses = pytest.mark.parametrize("name", FACTORIES)
property_test = settings(max_examples=12, deadline=None, derandomize=True, database=None)


@st.composite
def batches(draw, min_sequences=1):
    """A case and sequence ids: sequences of 0 to 9 rows, some ignored, with ids in any order and with gaps."""
    lengths = draw(st.lists(st.integers(0, 9), min_size=min_sequences, max_size=6))
    names = draw(st.lists(st.integers(-50, 50), min_size=len(lengths), max_size=len(lengths), unique=True))
    case = make_case(sum(lengths), HIDDEN, VOCABULARY, dtype=torch.float64, ignored=0.0, seed=draw(st.integers(0, 999)))
    ignored = draw(st.lists(st.booleans(), min_size=sum(lengths), max_size=sum(lengths)))
    case.labels[torch.tensor(ignored, dtype=torch.bool)] = -100
    return case, torch.tensor(names).repeat_interleave(torch.tensor(lengths))


def run(loss_fn, case, ids, **kwargs):
    own = case.leaves()
    loss = loss_fn(*own.pair_args, own.bias, ids, **kwargs)
    loss.backward()
    return loss.detach(), own


def assert_same(actual, expected, relative=FLOAT64_RELATIVE):
    assert_close(actual[0], expected[0], relative, "loss")
    assert_same_gradients(actual[1], expected[1], relative)


@losses
@property_test
@given(batch=batches(), data=st.data())
def test_any_order_of_the_rows_gives_the_same_loss(name, batch, data):
    case, ids = batch
    order = torch.tensor(data.draw(st.permutations(range(len(ids)))), dtype=torch.long)
    loss_fn = FACTORIES[name]()
    plain, shuffled = run(loss_fn, case, ids), run(loss_fn, case.take(order), ids[order])
    for gradient in (plain[1].factual.grad, plain[1].counterfactual.grad):
        if gradient is not None:
            gradient.copy_(gradient[order])
    assert_same(shuffled, plain)


#: The memory of one row's logits in two float64 streams; rows are padded to a multiple of 16.
ONE_ROW = 2 * (-(-VOCABULARY // 16) * 16) * 8


@losses
@property_test
@given(batch=batches(), rows=st.integers(1, 60))
def test_any_chunk_size_gives_the_same_loss(name, batch, rows):
    case, ids = batch
    whole = run(FACTORIES[name](), case, ids)
    assert_same(run(FACTORIES[name](chunk_bytes=rows * ONE_ROW), case, ids), whole)


@losses
@pytest.mark.parametrize("reduction", ["sequence", "token", "micro_batch"])
def test_chunks_of_one_row_give_the_same_loss(name, reduction):
    case, ids = make_case(30, HIDDEN, VOCABULARY, dtype=torch.float64), torch.arange(30) // 7
    whole = run(FACTORIES[name](reduction=reduction), case, ids)
    assert_same(run(FACTORIES[name](reduction=reduction, chunk_bytes=ONE_ROW), case, ids), whole)


def count_items(case, ids, reduction):
    keep = case.labels != -100
    return ids[keep].unique().numel() if reduction == "sequence" else int(keep.sum())


@losses
@pytest.mark.parametrize("reduction", ["sequence", "token"])
@property_test
@given(batch=batches(min_sequences=2), data=st.data())
def test_any_split_into_micro_batches_gives_the_same_loss(name, reduction, batch, data):
    """Sequences go to up to four micro-batches, some of them empty. Losses and gradients add up."""
    case, ids = batch
    items = max(1, count_items(case, ids, reduction))
    distinct = ids.unique().tolist()
    owners = dict(zip(distinct, data.draw(st.lists(st.integers(0, 3), min_size=6, max_size=6)), strict=False))
    owner = torch.tensor([owners[i] for i in ids.tolist()], dtype=torch.long)
    loss_fn = FACTORIES[name](reduction=reduction)
    whole, parts = run(loss_fn, case, ids), case.leaves()
    total = torch.zeros((), dtype=torch.float64)
    for micro_batch in range(4):
        rows = (owner == micro_batch).nonzero().flatten()
        part = parts.take(rows)
        loss = loss_fn(*part.pair_args, part.bias, ids[rows], num_items_in_batch=items)
        loss.backward()
        total += loss.detach()
    assert_same((total, parts), whole)


def test_token_reduction_of_row_weights_may_even_split_a_sequence():
    case, ids = make_case(30, HIDDEN, VOCABULARY, dtype=torch.float64), torch.zeros(30, dtype=torch.long)
    loss_fn = nq.PerCELoss(reduction="token")
    whole, parts = run(loss_fn, case, ids), case.leaves()
    total = torch.zeros((), dtype=torch.float64)
    for rows in torch.arange(30).split(8):
        part = parts.take(rows)
        loss = loss_fn(*part.pair_args, part.bias, num_items_in_batch=count_items(case, ids, "token"))
        loss.backward()
        total += loss.detach()
    assert_same((total, parts), whole)


@losses
@pytest.mark.parametrize("reduction", ["sequence", "token", "micro_batch"])
def test_batched_rows_are_sequences(name, reduction):
    flat = make_case(24, HIDDEN, VOCABULARY, dtype=torch.float64)
    loss_fn = FACTORIES[name](reduction=reduction)
    expected, expected_case = run(loss_fn, flat, torch.arange(4).repeat_interleave(6))
    loss, batched = run(loss_fn, flat.view(4, 6), None)
    assert torch.equal(loss, expected)
    assert torch.equal(batched.factual.grad.view(24, -1), expected_case.factual.grad)
    assert torch.equal(batched.weight.grad, expected_case.weight.grad)


@losses
def test_packed_rows_take_their_ids_from_sequence_ids(name):
    """[B, T] has its own ids, as in a packed batch."""
    flat = make_case(24, HIDDEN, VOCABULARY, dtype=torch.float64)
    ids = torch.tensor([3, 1, 1, 2]).repeat_interleave(6)
    expected, _ = run(FACTORIES[name](), flat, ids)
    loss, _ = run(FACTORIES[name](), flat.view(4, 6), ids.view(4, 6))
    assert torch.equal(loss, expected)


@losses
def test_a_flat_batch_without_ids_is_one_sequence(name):
    case = make_case(24, HIDDEN, VOCABULARY, dtype=torch.float64)
    assert_same(run(FACTORIES[name](), case, None), run(FACTORIES[name](), case, torch.full((24,), 8)))


@losses
def test_micro_batch_reduction_is_one_sequence_of_all_rows(name):
    case = make_case(24, HIDDEN, VOCABULARY, dtype=torch.float64)
    merged = run(FACTORIES[name](reduction="micro_batch"), case, torch.arange(24) // 5)
    assert_same(merged, run(FACTORIES[name](reduction="sequence"), case, None))


def test_sequence_reduction_is_the_mean_of_single_sequences():
    """It equals the official code's value with a micro-batch of one."""
    case, ids = make_case(24, HIDDEN, VOCABULARY, dtype=torch.float64), torch.arange(24) // 5
    singles = [nq.NextQuillLoss()(*case.take((ids == i).nonzero().flatten()).leaves().pair_args) for i in range(5)]
    actual = nq.NextQuillLoss()(*case.pair_args, None, ids)
    assert_close(actual, torch.stack(singles).mean(), FLOAT64_RELATIVE)


@pytest.mark.parametrize("items", [7, 7.0, torch.tensor(7), torch.tensor([7.0])], ids=["int", "float", "0-d", "1-d"])
@pytest.mark.parametrize("reduction", ["sequence", "token", "micro_batch"])
def test_num_items_in_batch_is_the_divisor(reduction, items):
    case, ids = make_case(24, HIDDEN, VOCABULARY, dtype=torch.float64), torch.arange(24) // 5
    loss_fn = nq.NextQuillLoss(reduction=reduction)
    default = 1 if reduction == "micro_batch" else count_items(case, ids, reduction)
    expected = loss_fn(*case.pair_args, None, ids) * default / 7
    assert_close(loss_fn(*case.pair_args, None, ids, num_items_in_batch=items), expected, FLOAT64_RELATIVE)

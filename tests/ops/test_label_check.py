"""Labels out of range are an error: at once on a CPU, and at the next call on a GPU. They are never an address."""

import pytest
import torch

import nextquill as nq
from nextquill.ops import label_check
from tests.helpers import make_case


class Event:
    def __init__(self):
        self.done = False

    def query(self):
        return self.done


@pytest.fixture(autouse=True)
def _nothing_pending():
    label_check._pending.clear()
    yield
    label_check._pending.clear()


def test_on_a_cpu_the_call_itself_raises():
    with pytest.raises(nq.ArgumentError, match=r"labels: expected values in \[0, 5\).*got 5 at flat position 1"):
        label_check.check_labels(torch.tensor([-100, 5, 9]), -100, 5)
    label_check.check_labels(torch.tensor([-100, 0, 4]), -100, 5)
    label_check.check_labels(torch.tensor([], dtype=torch.long), -100, 5)


def test_a_deferred_flag_raises_once_it_has_arrived_and_only_once():
    event = Event()
    label_check.defer(torch.tensor([2, 77]), event, -100, 50)
    label_check.raise_pending()
    event.done = True
    with pytest.raises(nq.ArgumentError, match=r"^labels: .*2 others, such as 77"):
        label_check.raise_pending()
    label_check.raise_pending()


def test_flags_are_read_in_order_and_clean_ones_are_silent():
    events = [Event(), Event()]
    label_check.defer(torch.tensor([0, 0]), events[0], -100, 50)
    label_check.defer(torch.tensor([1, -3]), events[1], -100, 50)
    events[1].done = True
    label_check.raise_pending()
    assert len(label_check._pending) == 2, "the first is still on its way"
    events[0].done = True
    with pytest.raises(nq.ArgumentError, match="such as -3"):
        label_check.check_labels(torch.tensor([1]), -100, 50)


@pytest.mark.parametrize(
    ("labels", "expected"), [([0, -100, 4], [0, 0]), ([9, 2, -1], [2, 9]), ([-7, 3, -100], [1, -7])]
)
def test_summary_counts_and_gives_an_example(labels, expected):
    assert label_check._summary(torch.tensor(labels), -100, 5).tolist() == expected


@pytest.mark.gpu
def test_on_a_gpu_the_row_is_nan_and_a_later_call_raises():
    case = make_case(20, 8, 16, ignored=0.0).leaves()
    hidden, weight, labels = (t.detach().cuda() for t in (case.factual, case.weight, case.labels))
    labels[3] = 16
    nll = nq.linear_token_nll(hidden, weight, labels, impl="triton")
    assert torch.isnan(nll).nonzero().flatten().tolist() == [3]
    torch.cuda.synchronize()
    with pytest.raises(nq.ArgumentError, match="such as 16"):
        label_check.raise_pending()


@pytest.mark.gpu
def test_the_streaming_forward_never_waits_for_the_device():
    case = make_case(64, 16, 130)
    hidden, weight, labels = (t.cuda() for t in (case.factual, case.weight, case.labels))
    nq.linear_token_nll(hidden, weight, labels, impl="triton")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        nq.linear_token_nll(hidden, weight, labels, impl="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")

"""The cost of a call: the exact number of matrix products, and memory within the chunk budget."""

import json
import sys

import pytest
import torch

import nextquill as nq
from nextquill.outputs import AnchorRows
from tests.helpers import ProductCounter, make_case, run_python

N, D, V = 60, 7, 13
UNIT = D * V  # multiply-adds of one product for one row
IDS = torch.arange(N) // 10
ONE_ROW = 2 * 16 * 4  # both streams in float32, V padded to whole vectors
COSTS = {  # trainable head, frozen head, without gradient
    "NextQuill": (nq.NextQuillLoss, {}, 6, 4, 2),
    "NextQuill-anchored": (nq.NextQuillLoss, {"anchor": 0.1}, 6, 4, 2),
    "NextQuill-paper": (nq.NextQuillLoss, {"weighted_effect": True}, 6, 4, 2),
    "NextQuill-detached": (nq.NextQuillLoss, {"detach_counterfactual": True}, 4, 3, 2),
    "PerCE": (nq.PerCELoss, {}, 4, 3, 2),
    "LongCE": (nq.LongCELoss, {}, 4, 3, 2),
}


def products(loss_fn, case, ids=IDS, method="forward"):
    """The products of forward and backward per supervised row."""
    with ProductCounter() as counter:
        output = getattr(loss_fn, method)(*case.pair_args, case.bias, ids)
        loss = output if method == "forward" else output.loss
        if loss.requires_grad:
            loss.backward()
    return counter.multiply_adds / UNIT


@pytest.mark.parametrize("name", COSTS)
@pytest.mark.parametrize("method", ["forward", "compute"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_of_a_pair_loss(name, method, dtype):
    cls, options, trainable, frozen, scoring = COSTS[name]
    case, loss_fn = make_case(N, D, V, ignored=0.0, dtype=dtype), cls(**options)
    assert products(loss_fn, case.leaves(), method=method) == trainable * N
    assert products(loss_fn, case.leaves("factual", "counterfactual"), method=method) == frozen * N
    assert products(loss_fn, case, method=method) == scoring * N


def test_products_of_sft():
    case = make_case(N, D, V, ignored=0.0)
    for leaves, expected in ((("factual", "weight"), 3), (("factual",), 2)):
        own = case.leaves(*leaves)
        with ProductCounter() as counter:
            nq.SFTLoss()(own.factual, None, own.weight, own.labels, own.bias, IDS).backward()
        assert counter.multiply_adds == expected * N * UNIT


def test_ignored_rows_cost_nothing():
    case = make_case(N, D, V, ignored=0.5)
    supervised = int((case.labels != -100).sum())
    assert products(nq.NextQuillLoss(), case.leaves()) == 6 * supervised < 6 * N


def test_products_of_the_operators():
    case = make_case(N, D, V, ignored=0.0).leaves()
    with ProductCounter() as counter:
        pair = nq.linear_pair_nll(*case.pair_args)
        assert counter.multiply_adds == 2 * N * UNIT
        sum(pair).sum().backward()
    assert counter.multiply_adds == 8 * N * UNIT
    with ProductCounter() as counter:
        nq.linear_token_nll(case.factual, case.weight, case.labels).sum().backward()
    assert counter.multiply_adds == 4 * N * UNIT


@pytest.mark.parametrize("leaves", [("factual", "weight"), ("factual",), ("weight", "bias")], ids="+".join)
def test_products_of_the_divergence(leaves):
    """The logits of both streams twice, and one product for the student's hidden states and one for the weight."""
    case = make_case(N, D, V, ignored=0.5).leaves(*leaves)
    rows = int((case.labels != -100).sum())
    with ProductCounter() as counter:
        jsd = nq.linear_pair_jsd(*case.pair_args, bias=case.bias)
        assert counter.multiply_adds == 2 * rows * UNIT
        jsd.sum().backward()
    assert counter.multiply_adds == (4 + len({"factual", "weight"} & {*leaves})) * rows * UNIT


def test_products_of_mirror():
    """As a detached pair loss: the logged likelihoods take none. An anchor adds those of SFT for rows that count."""
    case = make_case(N, D, V, ignored=0.0)
    for leaves, expected in ((("factual", "weight"), 4), (("factual",), 3), ((), 2)):
        for method in ("forward", "compute"):
            own = case.leaves(*leaves) if leaves else case
            assert products(nq.MirrorLoss(), own, method=method) == expected * N
    rows = AnchorRows(case.factual[:9], case.labels[:9].clone(), IDS[:9])
    rows.labels[4:] = -100
    own = make_case(N, D, V, ignored=0.0).leaves()
    with ProductCounter() as counter:
        nq.MirrorLoss(alpha=0.5)(*own.pair_args, own.bias, IDS, anchor=rows).backward()
    assert counter.multiply_adds == (4 * N + (1 + 1) * 4) * UNIT


@pytest.mark.parametrize("options", [{}, {"detach_counterfactual": True}], ids=["both-passes", "detached"])
def test_only_rows_above_the_budget_are_computed_twice(options):
    case, ids = make_case(N, D, V, ignored=0.0).leaves(), torch.tensor([0] * 10 + [1] * 25 + [2] * 12 + [3] * 13)
    base = 4 if options else 6
    budget = 15 * ONE_ROW
    # Sequence 1 has 25 rows: ten more than fit. The last fifteen are used where they stand.
    assert products(nq.NextQuillLoss(**options, chunk_bytes=budget), case, ids) == base * N + 2 * 10


@pytest.mark.parametrize("cls", [nq.PerCELoss, nq.LongCELoss, nq.MirrorLoss])
def test_a_long_sequence_of_row_weights_costs_nothing_more(cls):
    case, ids = make_case(N, D, V, ignored=0.0).leaves(), torch.zeros(N, dtype=torch.long)
    assert products(cls(chunk_bytes=ONE_ROW), case, ids) == 4 * N
    assert products(nq.NextQuillLoss(reduction="token", chunk_bytes=ONE_ROW), case, ids) == 6 * N


MEMORY_PROBE = """
import json, sys, torch
import nextquill as nq
torch.set_num_threads(1)
V, D, BUDGET = 50304, 16, 64 * 2**20

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024

def step(n, chunk_bytes=BUDGET):
    h1, h0 = (torch.randn(n, D, requires_grad=True) for _ in range(2))
    labels, ids = torch.randint(V, (n,)), torch.arange(n) // 32
    before = peak()
    nq.NextQuillLoss(chunk_bytes=chunk_bytes)(h1, h0, weight, labels, sequence_ids=ids).backward()
    return peak() - before

weight = (torch.randn(V, D) * 0.2).requires_grad_()
step(4, chunk_bytes=2 * V * 4)
first = step(int(sys.argv[1]))
print(json.dumps({"first": first, "further": step(int(sys.argv[2]))}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak resident size from /proc")
def test_transient_memory_is_the_chunk_budget_whatever_the_rows():
    """VmHWM only grows. So a second call with twelve times the rows shows the memory that depends on N."""
    rows, vocabulary, budget = 6144, 50304, 64 * 2**20
    grown = json.loads(run_python(MEMORY_PROBE, "512", str(rows)))
    one_stream = rows * vocabulary * 4
    assert grown["first"] > 0.5 * budget, "the probe does not see the chunk's buffers"
    assert grown["first"] + grown["further"] < 0.4 * one_stream
    assert grown["first"] < 1.5 * budget
    assert grown["further"] < 0.1 * budget

"""MIRROR's loss against its formula in float64, and its reductions."""

from __future__ import annotations

import itertools

import pytest
import torch

import nextquill as nq
from nextquill import reference
from nextquill.errors import ArgumentError, ArgumentTypeError
from nextquill.ops.dispatch import why_not
from tests.helpers import assert_close, assert_same_gradients, make_case, relative_error

IDS = torch.arange(30) // 7
HEADS = {"plain": {}, "softcap-scale": {"softcap": 3.0, "logit_scale": -0.7}}
NAMES = ("factual", "weight", "bias")  # what gets a gradient: `factual` is the student
SUBSETS = [names for k in (1, 2, 3) for names in itertools.combinations(NAMES, k)]
ONE_ROW = 2 * 16 * 4  # both streams in float32, V padded to whole vectors


@pytest.fixture(params=["torch", "native", "triton"])
def impl(request):
    if reason := why_not(request.param, torch.device("cpu"), torch.float32):
        pytest.skip(reason)
    return request.param


def by_hand(case, ids, beta, reduction, weights=1.0, **head):
    """Mean of the divergence times `weights` over each sequence, then over sequences; or over all tokens."""
    jsd = weights * reference.linear_pair_jsd(
        case.factual, case.counterfactual.detach(), case.weight, case.labels, beta=beta, bias=case.bias, **head
    )
    keep = case.labels != -100
    if reduction == "token":
        return jsd[keep].mean()
    sequences = [jsd[keep & (ids == each)] for each in ids.unique()]
    return torch.stack([values.mean() for values in sequences if values.numel()]).mean()


@pytest.mark.parametrize("reduction", ["sequence", "token"])
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_value_and_gradients(beta, reduction):
    case = make_case(30, 7, 13, dtype=torch.float64).leaves()
    exact = make_case(30, 7, 13, dtype=torch.float64).leaves()
    loss = nq.MirrorLoss(beta, reduction=reduction)(*case.pair_args, case.bias, IDS)
    truth = by_hand(exact, IDS, beta, reduction)
    loss.backward()
    truth.backward()
    assert_close(loss, truth, 1e-10)
    assert case.counterfactual.grad is None
    for name in ("factual", "weight", "bias"):
        assert_close(getattr(case, name).grad, getattr(exact, name).grad, 1e-9, name)


@pytest.mark.covering(2)
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("rows", [1, 4, None], ids=["row-by-row", "chunks", "one-chunk"])
@pytest.mark.parametrize("reduction", ["sequence", "token"])
@pytest.mark.parametrize("effect", [True, False], ids=["effect", "no-effect"])
def test_every_implementation_against_float64(impl, beta, head, bias, rows, reduction, effect):
    """Interleaved sequences, one without a row that counts, NaN in rows that do not, and an upstream gradient."""
    case, ids = make_case(30, 7, 13, bias=bias), torch.arange(30) * 7 % 5
    case.labels[ids == 3] = -100
    own, exact, ignored = case.leaves(*NAMES), case.leaves(*NAMES, dtype=torch.float64), case.labels == -100
    with torch.no_grad():
        for stream in (own.factual, own.counterfactual):
            stream[ignored] = torch.nan
    budget = None if rows is None else rows * ONE_ROW
    loss_fn = nq.MirrorLoss(beta, reduction=reduction, impl=impl, chunk_bytes=budget, **head)
    output = loss_fn.compute(*own.pair_args, own.bias, ids, effect_nll=effect)
    truth = by_hand(exact, ids, beta, reduction, **head)
    (-3 * output.loss).backward()
    (-3 * truth).backward()
    assert_close(output.loss, truth)
    assert_same_gradients(own, exact)
    nlls = reference.linear_pair_nll(*exact.pair_args, bias=exact.bias, **head)
    for got, expected in zip(output.pair_nll if effect else output.pair_nll[:2], nlls, strict=False):
        assert_close(got, expected)
        assert torch.equal(got == 0, ignored)
    assert effect or output.pair_nll.effect is None


@pytest.mark.parametrize("leaves", SUBSETS, ids="+".join)
def test_a_subset_of_gradients(impl, leaves):
    case = make_case(30, 7, 13)
    own, every = case.leaves(*leaves), case.leaves(*NAMES, dtype=torch.float64)
    nq.MirrorLoss(0.3, impl=impl)(*own.pair_args, own.bias, IDS).backward()
    by_hand(every, IDS, 0.3, "sequence").backward()
    assert own.gradients().keys() == set(leaves)
    for name, gradient in own.gradients().items():
        assert_close(gradient, every.gradients()[name], what=name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_that_of_the_operator(dtype):
    """Only the rounding of the results differs from the operator for any upstream gradient."""
    case = make_case(30, 7, 13, dtype=dtype)
    own, other, exact = case.leaves(*NAMES), case.leaves(*NAMES), case.leaves(*NAMES, dtype=torch.float64)
    loss = nq.MirrorLoss(0.3, reduction="token")(*own.pair_args, own.bias)
    jsd = nq.linear_pair_jsd(*other.pair_args, bias=other.bias, beta=0.3)
    truth = by_hand(exact, IDS, 0.3, "token")
    loss.backward()
    (jsd.sum() / (case.labels != -100).sum()).backward()
    truth.backward()
    assert_close(loss, truth)
    for name, value in exact.gradients().items():
        assert own.gradients()[name].dtype == dtype
        errors = [relative_error(each.gradients()[name], value) for each in (own, other)]
        assert errors[0] <= 2 * max(errors[1], torch.finfo(dtype).eps), name


def test_a_beta_just_below_1_is_not_1(impl):
    """The divergence falls with 1 - beta; at 1 itself it is a whole KL."""
    case = make_case(30, 7, 13).leaves(*NAMES)
    losses = [nq.MirrorLoss(beta, impl=impl)(*case.pair_args, case.bias, IDS) for beta in (1 - 1e-12, 1.0)]
    losses[0].backward()
    assert losses[0] < 1e-5 < 0.1 < losses[1]
    assert case.weight.grad.abs().max() < 1e-5


def test_token_weights_are_those_of_the_divergence():
    case = make_case(30, 7, 13, dtype=torch.float64)
    own, exact, weights = case.leaves(*NAMES), case.leaves(*NAMES), torch.linspace(0, 2, 30, dtype=torch.float64)
    loss = nq.MirrorLoss(0.3)(*own.pair_args, own.bias, IDS, token_weights=weights)
    truth = by_hand(exact, IDS, 0.3, "sequence", weights)
    loss.backward()
    truth.backward()
    assert_close(loss, truth, 1e-10)
    assert_same_gradients(own, exact, 1e-10)


def test_rows_of_a_batch_are_sequences():
    case = make_case(12, 5, 11)
    output = nq.MirrorLoss().compute(*case.view(3, 4).pair_args, case.bias)
    assert output.token_loss.shape == output.pair_nll.counterfactual.shape == (3, 4)
    assert_close(output.loss, nq.MirrorLoss()(*case.pair_args, case.bias, torch.arange(12) // 4), 1e-6)


def test_parts_of_a_batch_add_up():
    case = make_case(30, 7, 13, dtype=torch.float64)
    loss = nq.MirrorLoss()
    whole = loss(*case.pair_args, case.bias, IDS)
    parts = [case.take(torch.arange(30)[IDS < 2]), case.take(torch.arange(30)[IDS >= 2])]
    ids = [IDS[IDS < 2], IDS[IDS >= 2]]
    items = len(IDS[case.labels != -100].unique())
    assert_close(sum(loss(*p.pair_args, p.bias, i, items) for p, i in zip(parts, ids, strict=True)), whole, 1e-12)


def test_diagnostics():
    case = make_case(30, 7, 13)
    output = nq.MirrorLoss().compute(*case.pair_args, case.bias, IDS)
    pair = nq.linear_pair_nll(*case.pair_args, bias=case.bias)
    assert_close(output.token_loss.sum(), output.loss)
    assert_close(output.pair_nll.factual, pair.factual)
    assert_close(output.mean_effect_logprob, pair.effect_logprob.sum() / (case.labels != -100).sum())
    assert output.num_tokens == int((case.labels != -100).sum())


def test_equal_branches_cost_nothing():
    case = make_case(12, 7, 13).leaves()
    loss = nq.MirrorLoss()(case.factual, case.factual.detach().clone(), case.weight, case.labels)
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert case.factual.grad.abs().max() < 1e-6


@pytest.mark.parametrize("rows", [0, 6])
def test_no_labels(rows):
    case = make_case(rows, 4, 5).leaves()
    case.labels.fill_(-100)
    loss = nq.MirrorLoss()(*case.pair_args)
    loss.backward()
    assert loss.item() == 0.0
    assert not case.factual.grad.any()
    assert not case.weight.grad.any()


def test_bad_input():
    case = make_case(6, 4, 5)
    with pytest.raises(ArgumentError, match=r"beta: expected a number from 0 to 1, got 1\.5"):
        nq.MirrorLoss(1.5)
    with pytest.raises(ArgumentError, match="beta: "):
        nq.MirrorLoss(-0.1)
    with pytest.raises(ArgumentError, match="reduction: expected 'sequence' or 'token', got 'micro_batch'"):
        nq.MirrorLoss(reduction="micro_batch")
    with pytest.raises(ArgumentTypeError, match="hidden_counterfactual: MirrorLoss expects a tensor, got None"):
        nq.MirrorLoss()(case.factual, None, case.weight, case.labels)
    with pytest.raises(ArgumentTypeError, match="hidden_counterfactual: MirrorLoss expects a tensor, got None"):
        nq.MirrorLoss()(case.factual, None, case.weight, case.labels, token_weights=torch.ones(6))
    with pytest.raises(ArgumentError, match=r"labels: expected values in \[0, 5\)"):
        nq.MirrorLoss()(*case.pair_args[:3], torch.full((6,), 5))

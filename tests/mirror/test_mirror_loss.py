"""MIRROR's loss against its formula in float64, and its reductions."""

from __future__ import annotations

import pytest
import torch

import nextquill as nq
from nextquill import reference
from nextquill.errors import ArgumentError, ArgumentTypeError
from tests.helpers import assert_close, make_case

IDS = torch.arange(30) // 7


def by_hand(case, ids, beta, reduction):
    """Mean of the divergence over each sequence, then over sequences; or over all tokens."""
    jsd = reference.linear_pair_jsd(
        case.factual, case.counterfactual.detach(), case.weight, case.labels, beta=beta, bias=case.bias
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


def test_no_labels():
    case = make_case(6, 4, 5).leaves()
    case.labels.fill_(-100)
    loss = nq.MirrorLoss()(*case.pair_args)
    loss.backward()
    assert loss.item() == 0.0
    assert not case.factual.grad.any()


def test_bad_input():
    case = make_case(6, 4, 5)
    with pytest.raises(ArgumentError, match=r"beta: expected a number from 0 to 1, got 1\.5"):
        nq.MirrorLoss(1.5)
    with pytest.raises(ArgumentError, match="beta: "):
        nq.MirrorLoss(-0.1)
    with pytest.raises(ArgumentError, match="reduction: expected 'sequence' or 'token', got 'micro_batch'"):
        nq.MirrorLoss(reduction="micro_batch")
    with pytest.raises(ArgumentTypeError, match="hidden_counterfactual: MirrorLoss expects the teacher's"):
        nq.MirrorLoss()(case.factual, None, case.weight, case.labels)
    with pytest.raises(ArgumentError, match="token_weights: expected None"):
        nq.MirrorLoss().compute(*case.pair_args, token_weights=torch.ones(6))

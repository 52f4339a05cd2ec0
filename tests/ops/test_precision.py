"""Half precision, autocast and float16 ranges: never worse than plain PyTorch, against float64 on the same inputs."""

import math

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

import nextquill as nq
from nextquill import reference
from tests.helpers import FLOAT32_RELATIVE, assert_close, assert_same_gradients, make_case, relative_error

HALF = [torch.bfloat16, torch.float16]
halves = pytest.mark.parametrize("dtype", HALF, ids=str)
HEADS = {"plain": {}, "softcap-scale": {"softcap": 5.0, "logit_scale": 0.6}}
heads = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)


def plain_logits(hidden, case, softcap=None, logit_scale=1.0):
    """The logits of a Hugging Face model, all in the inputs' dtype."""
    z = F.linear(hidden, case.weight, case.bias) * logit_scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def plain_pair(case, **head):
    z1, z0 = plain_logits(case.factual, case, **head), plain_logits(case.counterfactual, case, **head)
    nll = lambda z: F.cross_entropy(z.float(), case.labels, reduction="none")  # noqa: E731
    return nq.PairNLL(nll(z1), nll(z0), nll(z1 - z0))


def pair_results(function, case, **head):
    pair = function(case, **head)
    sum(nll.mean() * factor for nll, factor in zip(pair, (1.0, 0.3, -0.5), strict=True)).backward()
    return {**pair._asdict(), **case.gradients()}


def ours(case, **head):
    return nq.linear_pair_nll(*case.pair_args, bias=case.bias, **head)


def exact(case, **head):
    return reference.linear_pair_nll(*case.pair_args, bias=case.bias, **head)


@halves
@heads
def test_error_is_at_most_twice_that_of_plain_pytorch(dtype, head):
    case = make_case(96, 64, 211, dtype=dtype)
    truth = pair_results(exact, case.double(), **head)
    plain, actual = pair_results(plain_pair, case.leaves(), **head), pair_results(ours, case.leaves(), **head)
    assert actual.keys() == truth.keys()
    for name, value in truth.items():
        assert relative_error(actual[name], value) <= 2 * relative_error(plain[name], value), name


@halves
@heads
def test_values_are_float32_from_the_inputs_on(dtype, head):
    """Logits are never rounded: half-precision inputs give float32 accuracy."""
    case = make_case(96, 64, 211, dtype=dtype)
    for actual, truth in zip(ours(case, **head), exact(case.double(), **head), strict=True):
        assert actual.dtype == torch.float32
        assert_close(actual, truth, FLOAT32_RELATIVE)


@halves
def test_gradients_are_rounded_once(dtype):
    """The error is at most half an ulp, which two roundings would exceed in some of thousands of elements."""
    case, ids = make_case(96, 64, 211, dtype=dtype), torch.arange(96) // 9
    actual, truth = case.leaves(), case.double()
    nq.NextQuillLoss(chunk_bytes=211 * 8 * 9)(*actual.pair_args, actual.bias, ids).backward()
    nq.NextQuillLoss()(*truth.pair_args, truth.bias, ids).backward()
    for name, gradient in actual.gradients().items():
        expected = truth.gradients()[name]
        precision = torch.finfo(dtype)
        half_ulp = precision.eps / 2 * expected.abs().clamp(min=precision.smallest_normal)
        excess = (gradient.double() - expected).abs() - half_ulp
        assert excess.max() <= 1e-5 * expected.abs().max(), name


def test_weight_gradient_accumulates_in_float32_over_many_chunks():
    """Adding bfloat16 chunks harms training (Liger-Kernel #512, #827); here 200 chunks are rounded once."""
    case = make_case(400, 16, 23, dtype=torch.bfloat16, ignored=0.0)
    actual, truth, naive = case.leaves("weight"), case.double(), torch.zeros_like(case.weight)
    nq.PerCELoss(chunk_bytes=2 * 23 * 4)(*actual.pair_args).backward()
    nq.PerCELoss()(*truth.pair_args).backward()
    for rows in torch.arange(400).split(2):
        part = case.take(rows).leaves("weight")
        nq.PerCELoss()(*part.pair_args, num_items_in_batch=200.0).backward()
        naive += part.weight.grad
    assert relative_error(actual.weight.grad, truth.weight.grad) <= 2**-8
    assert relative_error(naive, truth.weight.grad) > 2**-7, "the case is too easy to tell the two apart"


def test_bfloat16_inputs_decide_the_threshold_as_float64_does():
    """The published code's differences of bfloat16 probabilities flip decisions (compare speculators #788)."""
    case = make_case(3000, 32, 24, dtype=torch.bfloat16, ignored=0.0)
    case.counterfactual = (0.5 * case.factual.float() + 0.5 * case.counterfactual.float()).bfloat16()
    case.labels = plain_logits(case.factual, case).float().softmax(-1).multinomial(1).squeeze(1)
    truth = exact(case.double()).effect_prob > 0.05
    output = nq.NextQuillLoss().compute(*case.pair_args, case.bias)
    decided = output.token_weights > 0.5
    p1, p0 = (plain_logits(h, case).softmax(-1) for h in (case.factual, case.counterfactual))
    labels = case.labels[:, None]
    rounded = (p1.gather(1, labels) - p0.gather(1, labels)).squeeze(1) > 0.05
    assert 0.02 < truth.float().mean() < 0.98
    assert (rounded != truth).float().mean() > 0.003, "the case has nothing near the threshold"
    assert torch.equal(decided, truth)


@pytest.mark.parametrize("reduction", ["sequence", "micro_batch"])
def test_weights_of_a_long_response_add_up(reduction):
    """One float32 sum in order of these 20,000 weights is off by 5e-5."""
    case, ids = make_case(20_000, 2, 3, ignored=0.0), torch.zeros(20_000, dtype=torch.int64)
    actual, truth = case.leaves(), case.double()
    loss, exact_loss = (
        nq.NextQuillLoss(reduction=reduction)(*each.pair_args, each.bias, ids) for each in (actual, truth)
    )
    loss.backward()
    exact_loss.backward()
    assert_close(loss, exact_loss, 1e-6)
    assert_same_gradients(actual, truth)


def test_float16_gradients_survive_under_a_loss_scale():
    """A mean over thousands of tokens underflows float16 before the scaler could lift it, unless kept in float32."""
    case = make_case(4000, 16, 7, dtype=torch.float16, ignored=0.0)
    actual, truth = case.leaves(), case.double()
    (nq.NextQuillLoss()(*actual.pair_args, actual.bias) * 2.0**16).backward()
    (nq.NextQuillLoss()(*truth.pair_args, truth.bias) * 2.0**16).backward()
    for name, gradient in actual.gradients().items():
        expected = truth.gradients()[name]
        assert relative_error(gradient, expected) <= 2**-10, name
        visible = expected.abs() > 0.01 * expected.abs().max()
        assert relative_error(gradient[visible] / expected[visible], torch.ones(int(visible.sum()))) < 0.01, name


def test_large_float16_logits_do_not_overflow():
    hidden, weight = torch.full((2, 4), 200.0, dtype=torch.float16), torch.full((3, 4), 200.0, dtype=torch.float16)
    weight[1] *= -1
    nll = nq.linear_token_nll(hidden, weight, torch.tensor([0, 1]))
    assert nll[1].item() == pytest.approx(320_000.0 + math.log(2), abs=0.02)
    assert torch.isfinite(nll).all()


def autocast_case(hidden_dtype):
    case = make_case(96, 64, 211)
    case.factual, case.counterfactual = case.factual.to(hidden_dtype), case.counterfactual.to(hidden_dtype)
    return case


@pytest.mark.parametrize("hidden_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_operator_under_autocast_is_no_worse_than_linear_and_cross_entropy(hidden_dtype):
    case = autocast_case(hidden_dtype)
    truth = pair_results(exact, case.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain, actual = pair_results(plain_pair, case.leaves()), pair_results(ours, case.leaves())
    for name, value in truth.items():
        assert torch.isfinite(actual[name]).all()
        assert relative_error(actual[name], value) <= relative_error(plain[name], value), name
    assert actual["effect"].dtype == torch.float32


@pytest.mark.parametrize("hidden_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("backward_inside", [True, False], ids=["backward-inside", "backward-outside"])
def test_loss_under_autocast_equals_the_loss_of_widened_inputs(hidden_dtype, backward_inside):
    """On the CPU nothing is rounded, as if the inputs were cast to float32 first."""
    case = autocast_case(hidden_dtype)
    own, wide = case.leaves(), case.leaves(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = nq.NextQuillLoss()(*own.pair_args, own.bias)
        if backward_inside:
            loss.backward()
    if not backward_inside:
        loss.backward()
    expected = nq.NextQuillLoss()(*wide.pair_args, wide.bias)
    expected.backward()
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    for name, gradient in own.gradients().items():
        assert gradient.dtype == case.tensors[name].dtype
        assert torch.equal(gradient, wide.gradients()[name].to(gradient.dtype)), name


def test_autocast_is_left_as_it_was():
    case = autocast_case(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        nq.NextQuillLoss()(*case.pair_args, case.bias)
        assert torch.is_autocast_enabled("cpu")
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16

"""Every loss against float64: the published objectives, user weightings, reductions, gradients and diagnostics."""

import dataclasses

import pytest
import torch
from torch.autograd import gradcheck

import nextquill as nq
from nextquill import reference
from tests import oracle
from tests.helpers import (
    FLOAT64_RELATIVE,
    assert_close,
    assert_gradients_round_like,
    assert_rounds_like,
    assert_same_gradients,
    make_case,
    named,
)

REDUCTIONS = ("sequence", "token", "micro_batch")
LOSSES = [
    (nq.NextQuillLoss, {}),
    (nq.NextQuillLoss, {"weighted_effect": True}),
    (nq.NextQuillLoss, {"detach_counterfactual": True}),
    (nq.NextQuillLoss, {"anchor": 0.3}),
    (nq.NextQuillLoss, {"alpha": 0.0}),
    (nq.NextQuillLoss, {"alpha": 0.0, "anchor": 0.3}),
    (nq.NextQuillLoss, {"weighted_effect": True, "detach_counterfactual": True, "alpha": 0.7, "threshold": 0.0}),
    (nq.PerCELoss, {}),
    (nq.LongCELoss, {}),
    (nq.SFTLoss, {}),
]
all_losses = pytest.mark.parametrize(("cls", "options"), LOSSES, ids=[named(c, **o) for c, o in LOSSES])
all_reductions = pytest.mark.parametrize("reduction", REDUCTIONS)
ORACLES = {
    "NextQuill": (nq.NextQuillLoss(), oracle.nextquill_sequence, {}),
    "NextQuill-paper": (nq.NextQuillLoss(weighted_effect=True), oracle.nextquill_sequence, {"paper": True}),
    "NextQuill-detached": (
        nq.NextQuillLoss(detach_counterfactual=True, alpha=0.5), oracle.nextquill_sequence,
        {"detached": True, "alpha": 0.5},
    ),
    "NextQuill-anchored": (nq.NextQuillLoss(anchor=0.3), oracle.nextquill_sequence, {"anchor": 0.3}),
    "NextQuill-tuned": (
        nq.NextQuillLoss(0.01, 2.0, 0.5, 1.5), oracle.nextquill_sequence,
        {"threshold": 0.01, "high": 2.0, "low": 0.5, "alpha": 1.5},
    ),
    "PerCE": (nq.PerCELoss(), oracle.perce_sequence, {}),
    "PerCE-wide": (nq.PerCELoss(0.0, 0.5), oracle.perce_sequence, {"low": 0.0, "high": 0.5}),
    "LongCE": (nq.LongCELoss(), oracle.longce_sequence, {}),
    "SFT": (nq.SFTLoss(), oracle.sft_sequence, {}),
}  # fmt: skip


#: The longest sum in a gradient of `loss_case`: over the rows.
TERMS = 40


def loss_case(**options):
    """Forty rows of five interleaved sequences of different lengths, one of which is entirely ignored."""
    case = make_case(40, 12, 29, **options)
    ids = torch.tensor([9, 2, 2, 5, 2, 9, 7, 4]).repeat(5)
    case.labels[ids == 4] = -100
    return case, ids


def run(loss_fn, case, ids, **kwargs):
    output = loss_fn.compute(*case.pair_args, case.bias, ids, **kwargs)
    output.loss.backward()
    return output


def reference_loss(loss_fn, case, ids):
    """`loss_fn` by nextquill.reference, with weights from the float64 NLLs."""
    objective = loss_fn.objective
    head = {"bias": case.bias, "softcap": loss_fn.softcap, "logit_scale": loss_fn.logit_scale}
    pair = reference.linear_pair_nll(*case.pair_args, **head)
    weights = loss_fn.objective.weighting(nq.PairNLL(*(nll.detach() for nll in pair)))
    return reference.pair_loss(
        *case.pair_args,
        token_weights=weights,
        normalize_weights=objective.normalize_weights,
        alpha=objective.alpha,
        weighted_effect=objective.weighted_effect,
        detach_counterfactual=loss_fn.detaches_counterfactual,
        anchor=objective.anchor,
        reduction=objective.reduction,
        sequence_ids=ids,
        **head,
    )


def assert_is_the_loss(loss, own, loss_fn, ids):
    """Assert that `loss` and the gradients in `own` are as exact as plain PyTorch's in the same dtype."""
    plain, exact = own.leaves(), own.double()
    values = [reference_loss(loss_fn, case, ids) for case in (plain, exact)]
    for value in values:
        value.backward()
    assert_rounds_like(loss, *values, TERMS, "loss")
    assert_gradients_round_like(own, plain, exact, TERMS)


@pytest.mark.parametrize("name", ORACLES)
def test_loss_is_the_published_formula(name):
    """Value and every gradient equal the tests' own version of the equations, in float64."""
    loss_fn, sequence_loss, options = ORACLES[name]
    case, ids = loss_case(dtype=torch.float64)
    actual, exact = case.leaves(), case.leaves()
    loss = loss_fn(*actual.pair_args, actual.bias, ids)
    loss.backward()
    truth = oracle.batch_loss(
        sequence_loss, exact.factual, exact.counterfactual, exact.weight, exact.labels, ids, bias=exact.bias, **options
    )
    truth.backward()
    assert_close(loss, truth, FLOAT64_RELATIVE)
    assert_same_gradients(actual, exact, FLOAT64_RELATIVE)


@all_losses
@all_reductions
@pytest.mark.parametrize("head", [{}, {"softcap": 3.0, "logit_scale": 0.7}], ids=["plain", "softcap-scale"])
def test_float32_loss_matches_float64(cls, options, reduction, head):
    loss_fn = cls(**options, **head, reduction=reduction)
    case, ids = loss_case()
    actual, exact = case.leaves(), case.double()
    output = run(loss_fn, actual, ids)
    truth = reference_loss(loss_fn, exact, ids)
    truth.backward()
    assert_close(output.loss, truth)
    assert_same_gradients(actual, exact)


@all_losses
@all_reductions
def test_forward_is_the_loss_of_compute(cls, options, reduction):
    loss_fn, (case, ids) = cls(**options, reduction=reduction), loss_case()
    full, light = case.leaves(), case.leaves()
    assert_is_the_loss(run(loss_fn, full, ids).loss, full, loss_fn, ids)
    loss = loss_fn(*light.pair_args, light.bias, ids)
    loss.backward()
    assert_is_the_loss(loss, light, loss_fn, ids)


@all_losses
@all_reductions
def test_diagnostics_add_up(cls, options, reduction):
    loss_fn, (case, ids) = cls(**options, reduction=reduction), loss_case()
    output, objective = loss_fn.compute(*case.pair_args, case.bias, ids), loss_fn.objective
    terms = output.factual + objective.alpha * output.effect + objective.anchor * output.counterfactual
    assert_close(terms, output.loss, 1e-6)
    assert_close(output.token_loss.sum(), output.loss, 1e-6)
    keep, pair = case.labels != -100, output.pair_nll
    assert output.num_tokens == int(keep.sum())
    assert output.num_sequences == (1 if reduction == "micro_batch" else ids[keep].unique().numel())
    for per_token in (output.token_weights, output.token_loss, *pair):
        assert per_token.shape == case.labels.shape
        assert not per_token[~keep].any()
        assert not per_token.requires_grad
    assert_close(output.weight_sum, output.token_weights.sum(), 1e-6)
    assert_close(output.mean_effect_logprob, pair.effect_logprob[keep].mean(), 1e-5)
    assert_close(output.mean_effect_prob, pair.effect_prob[keep].mean(), 1e-5)
    assert_close(output.share_above_threshold, (pair.effect_prob[keep] > loss_fn.threshold).float().mean(), 1e-6)


def test_reported_pair_nll_is_that_of_the_operator():
    case, ids = loss_case()
    output = nq.PerCELoss().compute(*case.pair_args, case.bias, ids)
    for reported, expected in zip(output.pair_nll, nq.linear_pair_nll(*case.pair_args, bias=case.bias), strict=True):
        assert_close(reported, expected, 1e-6)
    own = case.leaves()
    without = run(nq.PerCELoss(), own, ids, effect_nll=False)
    assert without.pair_nll.effect is None
    assert_is_the_loss(without.loss, own, nq.PerCELoss(), ids)


def test_sft_needs_no_counterfactual():
    case, ids = loss_case()
    alone, paired = case.leaves(), case.leaves()
    output = nq.SFTLoss().compute(alone.factual, None, alone.weight, alone.labels, alone.bias, ids)
    output.loss.backward()
    full = run(nq.SFTLoss(), paired, ids)
    assert_is_the_loss(output.loss, alone, nq.SFTLoss(), ids)
    assert_is_the_loss(full.loss, paired, nq.SFTLoss(), ids)
    assert output.pair_nll.counterfactual is None
    assert output.counterfactual == 0
    assert full.mean_effect_prob != 0
    with pytest.raises(AttributeError, match="counterfactual"):
        _ = output.pair_nll.effect_prob


def test_sft_is_cross_entropy():
    case = make_case(30, 8, 11, dtype=torch.float64)
    logits = case.factual @ case.weight.T + case.bias
    expected = torch.nn.functional.cross_entropy(logits, case.labels)
    actual = nq.SFTLoss(reduction="token")(case.factual, None, case.weight, case.labels, case.bias)
    assert_close(actual, expected, FLOAT64_RELATIVE)


CONSTANT_Z0 = [nq.NextQuillLoss(detach_counterfactual=True), nq.NextQuillLoss(alpha=0.0), nq.PerCELoss(),
               nq.LongCELoss(), nq.SFTLoss()]  # fmt: skip


@pytest.mark.parametrize("loss_fn", CONSTANT_Z0, ids=lambda fn: type(fn).__name__)
def test_constant_counterfactual_gets_no_gradient(loss_fn):
    case, ids = loss_case()
    own = case.leaves()
    run(loss_fn, own, ids)
    assert loss_fn.detaches_counterfactual
    assert own.counterfactual.grad is None
    assert own.weight.grad.any()


def test_gradient_reaches_both_passes_otherwise():
    for loss_fn in (nq.NextQuillLoss(), nq.NextQuillLoss(alpha=0.0, anchor=0.1)):
        case, ids = loss_case()
        own = case.leaves()
        run(loss_fn, own, ids)
        assert not loss_fn.detaches_counterfactual
        assert own.counterfactual.grad.any()


@pytest.mark.parametrize("leaves", [("factual",), ("counterfactual",), ("weight",), ("bias",), ("factual", "weight"),
                                    ("factual", "counterfactual"), ("weight", "bias")], ids="+".join)  # fmt: skip
@pytest.mark.parametrize("loss_fn", [nq.NextQuillLoss(anchor=0.2), nq.NextQuillLoss(detach_counterfactual=True)],
                         ids=["both-passes", "detached"])  # fmt: skip
def test_gradients_for_subsets_of_requires_grad(loss_fn, leaves):
    case, ids = loss_case()
    actual, exact = case.leaves(*leaves), case.leaves(*leaves, dtype=torch.float64)
    run(loss_fn, actual, ids)
    truth = reference_loss(loss_fn, exact, ids)
    if truth.requires_grad:
        truth.backward()
    assert_same_gradients(actual, exact)


@pytest.mark.parametrize("constant", [True, False], ids=["constant-weights", "nextquill"])
def test_loss_gradcheck(constant):
    case = make_case(6, 3, 4, dtype=torch.float64, ignored=0.0).leaves()
    ids = torch.tensor([0, 0, 1, 1, 1, 2])
    weighting = lambda pair: torch.arange(1.0, 1.0 + len(pair.factual))  # noqa: E731
    loss_fn = nq.PairLoss(weighting, alpha=0.4, anchor=0.2) if constant else nq.NextQuillLoss(anchor=0.2, softcap=4.0)
    margin = (nq.linear_pair_nll(*case.pair_args, bias=case.bias).effect_prob - 0.05).abs().min()
    assert margin > 1e-4, "a row this near the threshold would make the objective discontinuous"

    def function(h1, h0, weight, bias):
        return loss_fn(h1, h0, weight, case.labels, bias, ids)

    assert gradcheck(function, (case.factual, case.counterfactual, case.weight, case.bias))


def test_upstream_gradient_scales_every_gradient():
    case, ids = loss_case()
    one, three = case.leaves(), case.leaves()
    nq.NextQuillLoss()(*one.pair_args, one.bias, ids).backward()
    (-3 * nq.NextQuillLoss()(*three.pair_args, three.bias, ids)).backward()
    for name, gradient in one.gradients().items():
        assert_close(three.gradients()[name], -3 * gradient, 1e-6, name)


def test_backward_twice_through_a_retained_graph_gives_the_same_gradient():
    case, ids = loss_case()
    own = case.leaves()
    loss = nq.NextQuillLoss()(*own.pair_args, own.bias, ids)
    first = torch.autograd.grad(loss * 2, list(own.tensors.values()), retain_graph=True)
    second = torch.autograd.grad(loss * 2, list(own.tensors.values()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_second_derivative_is_refused_not_silently_zero():
    case, ids = loss_case()
    own = case.leaves()
    loss = nq.NextQuillLoss()(*own.pair_args, own.bias, ids)
    with pytest.raises(nq.GradientError, match="create_graph"):
        torch.autograd.grad(loss, own.factual, create_graph=True)


@all_losses
def test_losses_are_bitwise_repeatable(cls, options):
    runs = []
    for _ in range(2):
        case, ids = loss_case()
        own = case.leaves()
        output = run(cls(**options, chunk_bytes=29 * 4 * 2 * 7), own, ids)
        runs.append([output.loss, output.token_loss, *own.gradients().values()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_without_gradient_the_loss_is_the_same_number():
    case, ids = loss_case()
    plain, exact = (reference_loss(nq.NextQuillLoss(), c, ids) for c in (case, case.double()))
    with torch.no_grad():
        actual = nq.NextQuillLoss()(*case.leaves().pair_args, case.bias, ids)
    assert not actual.requires_grad
    assert_rounds_like(actual, plain, exact, TERMS)


@all_losses
@all_reductions
def test_batch_without_a_supervised_row_is_zero_not_nan(cls, options, reduction):
    case = make_case(6, 4, 5, ignored=1.0).leaves()
    output = cls(**options, reduction=reduction).compute(*case.pair_args, case.bias)
    output.loss.backward()
    for field in dataclasses.fields(output):
        value = getattr(output, field.name)
        values = value if isinstance(value, tuple) else [torch.as_tensor(value)]
        assert all(not v.any() for v in values), field.name
    assert case.gradients()
    assert all(not gradient.any() for gradient in case.gradients().values())


def test_empty_batch_is_zero_not_nan():
    case = make_case(0, 4, 5).leaves()
    loss = nq.NextQuillLoss()(*case.pair_args, case.bias)
    loss.backward()
    assert loss == 0
    assert not case.weight.grad.any()


def test_module_settings_can_be_read():
    loss_fn = nq.NextQuillLoss(reduction="token", anchor=0.25)
    assert loss_fn.reduction == "token"
    assert "anchor=0.25" in repr(loss_fn)
    assert not list(loss_fn.parameters())

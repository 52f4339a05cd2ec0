"""The published weightings as functions of the NLLs, and user weightings inside PairLoss."""

import math

import pytest
import torch

import nextquill as nq
from nextquill import reference
from nextquill.weighting import (
    ClipWeighting,
    ExpClipWeighting,
    ThresholdWeighting,
    UniformWeighting,
)
from tests.helpers import FLOAT64_RELATIVE, assert_close, assert_same_gradients, make_case


def pair_of(factual_probs, counterfactual_probs, dtype=torch.float64):
    factual, counterfactual = (-torch.tensor(p, dtype=dtype).log() for p in (factual_probs, counterfactual_probs))
    return nq.PairNLL(factual, counterfactual, None)


PAIR = pair_of([0.5, 0.5, 0.1, 0.9, 0.3], [0.25, 0.48, 0.6, 0.0001, 0.3])


def test_threshold_weights_by_probability_difference():
    assert ThresholdWeighting()(PAIR).tolist() == [0.9, 0.1, 0.1, 0.9, 0.1]


def test_threshold_itself_is_low():
    pair = nq.PairNLL(torch.tensor([0.0]), torch.tensor([math.inf]), None)
    assert ThresholdWeighting(threshold=1.0)(pair).tolist() == pytest.approx([0.1])
    assert ThresholdWeighting(threshold=0.999)(pair).tolist() == pytest.approx([0.9])


def test_clip_weights_by_log_probability_difference():
    expected = [0.8, 0.8, 0.8, 5.0, 0.8]
    assert ClipWeighting()(PAIR).tolist() == expected
    assert ClipWeighting(0.0, 10.0)(PAIR).tolist() == pytest.approx(
        [math.log(2), math.log(0.5 / 0.48), 0.0, math.log(9000), 0.0], rel=1e-12, abs=1e-15
    )


def test_exponential_clip_weights_by_probability_ratio():
    assert ExpClipWeighting()(PAIR).tolist() == pytest.approx([2.0, 0.5 / 0.48, 1 / 6, 5.0, 1.0])


def test_exponential_clip_of_an_overflowing_ratio_is_the_maximum():
    pair = nq.PairNLL(torch.tensor([1.0]), torch.tensor([1000.0]), None)
    assert ExpClipWeighting()(pair).tolist() == [5.0]


def test_uniform_weights_are_one():
    assert UniformWeighting()(PAIR).tolist() == [1.0] * 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "weighting", [ThresholdWeighting(), ClipWeighting(), ExpClipWeighting(), UniformWeighting()],
    ids=lambda w: type(w).__name__,
)  # fmt: skip
def test_weights_keep_dtype_and_are_elementwise(weighting, dtype):
    pair = pair_of([0.5, 0.1, 0.9], [0.25, 0.6, 0.1], dtype)
    weights = weighting(pair)
    assert weights.dtype == dtype
    alone = [weighting(nq.PairNLL(pair.factual[i : i + 1], pair.counterfactual[i : i + 1], None)) for i in range(3)]
    assert weighting.elementwise
    assert torch.equal(torch.cat(alone), weights)


def test_reference_weights_agree():
    assert_close(ThresholdWeighting(0.02, 3.0, 2.0)(PAIR), reference.threshold_weights(PAIR, 0.02, 3.0, 2.0), 0.0)
    assert_close(ClipWeighting(0.1, 2.0)(PAIR), reference.clip_weights(PAIR, 0.1, 2.0), 0.0)
    assert_close(ExpClipWeighting(1.5)(PAIR), reference.exp_clip_weights(PAIR, 1.5), 0.0)


def relative_to_best(pair):
    """A weighting that looks at its whole sequence."""
    return (pair.effect_logprob - pair.effect_logprob.max()).exp()


def by_effect_nll(pair):
    return 1.0 / (1.0 + pair.effect)


class Doubled:
    elementwise = True

    def __call__(self, pair):
        return 2.0 * torch.sigmoid(pair.effect_logprob)


IDS = torch.tensor([9, 2, 2, 5, 2, 9, 7, 4]).repeat(5)


@pytest.mark.parametrize("weighting", [relative_to_best, by_effect_nll, Doubled()], ids=["sequence", "effect", "row"])
@pytest.mark.parametrize("reduction", ["sequence", "token", "micro_batch"])
@pytest.mark.parametrize("normalize", [False, True], ids=["mean", "normalized"])
@pytest.mark.parametrize("chunk_bytes", [512, 2**28], ids=["row-chunks", "one-chunk"])
def test_user_weighting_sees_exactly_one_sequence(weighting, reduction, normalize, chunk_bytes):
    """With any chunks, the weights equal those computed from each sequence's own float64 NLLs."""
    case = make_case(40, 12, 29, dtype=torch.float64)
    loss_fn = nq.PairLoss(
        weighting, alpha=0.2, normalize_weights=normalize, reduction=reduction, chunk_bytes=chunk_bytes
    )
    actual, exact = case.leaves(), case.leaves()
    output = loss_fn.compute(*actual.pair_args, actual.bias, IDS)
    output.loss.backward()

    pair = reference.linear_pair_nll(*case.pair_args, bias=case.bias)
    weights = torch.zeros_like(pair.factual)
    groups = IDS if reduction != "micro_batch" else torch.zeros_like(IDS)
    for sequence in groups.unique():
        rows = (groups == sequence) & (case.labels != -100)
        weights[rows] = weighting(nq.PairNLL(*(nll[rows] for nll in pair)))
    truth = reference.pair_loss(
        *exact.pair_args, bias=exact.bias, token_weights=weights, normalize_weights=normalize, alpha=0.2,
        reduction=reduction, sequence_ids=IDS,
    )  # fmt: skip
    truth.backward()
    assert_close(output.token_weights, weights, FLOAT64_RELATIVE)
    assert_close(output.loss, truth, FLOAT64_RELATIVE)
    assert_same_gradients(actual, exact, FLOAT64_RELATIVE)


@pytest.mark.parametrize("elementwise", [False, True], ids=["sequence", "elementwise"])
@pytest.mark.parametrize(
    "wrong",
    [lambda p: p.factual.mean(), lambda p: p.factual[:-1], lambda p: p.factual[:, None], lambda p: 1.0, lambda p: None],
    ids=["scalar", "short", "column", "float", "none"],
)
def test_weighting_of_the_wrong_shape_is_refused(wrong, elementwise):
    wrong.elementwise = elementwise
    case = make_case(12, 4, 5)
    with pytest.raises(nq.ArgumentError, match="weighting: expected a tensor of shape"):
        nq.PairLoss(wrong)(*case.pair_args, case.bias)


def test_integer_weights_are_accepted():
    case = make_case(12, 4, 5)
    as_int = nq.PairLoss(lambda p: (p.effect_prob > 0).long() + 1)
    as_float = nq.PairLoss(lambda p: (p.effect_prob > 0).float() + 1)
    assert torch.equal(as_int(*case.pair_args), as_float(*case.pair_args))


def test_weights_carry_no_gradient():
    """The gradient is that of constant weights, even if the weighting is differentiable."""
    case = make_case(12, 4, 5, dtype=torch.float64)
    free, fixed = case.leaves(), case.leaves()
    output = nq.PairLoss(relative_to_best)(*free.pair_args)
    output.backward()
    weights = nq.PairLoss(relative_to_best).compute(*case.pair_args).token_weights[case.labels != -100]
    nq.PairLoss(lambda _: weights)(*fixed.pair_args).backward()
    assert_same_gradients(free, fixed, 0.0)


@pytest.mark.parametrize("weighted_effect", [False, True])
def test_sequence_whose_weights_sum_to_zero_is_zero_not_nan(weighted_effect):
    """With low_weight=0, a sequence without a personal token has Σω = 0."""
    case = make_case(20, 6, 7, ignored=0.0)
    case.counterfactual[:10] = case.factual[:10]  # no effect, so no personal token
    ids = torch.arange(2).repeat_interleave(10)
    loss_fn = nq.NextQuillLoss(low_weight=0.0, high_weight=1.0, weighted_effect=weighted_effect, alpha=0.5)
    own = case.leaves()
    output = loss_fn.compute(*own.pair_args, own.bias, ids)
    output.loss.backward()
    rest = case.take(torch.arange(10, 20)).leaves()
    other = loss_fn(*rest.pair_args, rest.bias)
    uniform = 0.0 if weighted_effect else 0.5 * math.log(7)
    assert output.loss.item() == pytest.approx((other.item() + uniform) / 2, rel=1e-6)
    for gradient in own.gradients().values():
        assert torch.isfinite(gradient).all()
    assert not output.token_weights[:10].any()
    if weighted_effect:
        assert not own.factual.grad[:10].any()


def test_threshold_weights_are_nan_where_the_counterfactual_is():
    pair = nq.PairNLL(torch.tensor([1.0, 1.0]), torch.tensor([torch.nan, 5.0]), None)
    weights = ThresholdWeighting()(pair)
    assert weights.isnan().tolist() == [True, False]


def test_nan_counterfactual_is_visible_without_an_effect_term():
    hidden, weight, labels = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 2])
    broken = torch.full((3, 4), torch.nan)
    assert nq.NextQuillLoss(alpha=0.0)(hidden, broken, weight, labels).isnan()


def test_elementwise_weighting_of_ones_own_may_read_the_effect():
    class EffectWeighting:
        elementwise = True

        def __call__(self, pair):
            return pair.effect.detach().exp()

    hidden, other, weight, labels = torch.randn(3, 4), torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 2])
    loss_fn = nq.PairLoss(EffectWeighting())
    expected = loss_fn.compute(*(t.double() for t in (hidden, other, weight)), labels).loss
    assert_close(loss_fn(hidden, other, weight, labels), expected)


def test_a_weighting_that_works_in_place_harms_nothing_but_itself():
    case = make_case(20, 5, 11)
    results = [
        nq.PairLoss(weighting).compute(*case.pair_args)
        for weighting in (lambda p: p.factual.exp(), lambda p: p.factual.exp_())
    ]
    assert torch.equal(results[0].loss, results[1].loss)
    assert torch.equal(results[0].pair_nll.factual, results[1].pair_nll.factual)


def test_complex_weights_are_refused():
    case = make_case(20, 5, 11)
    with pytest.raises(nq.ArgumentError, match=r"^weighting: expected real weights"):
        nq.PairLoss(lambda p: p.factual.to(torch.complex64))(*case.pair_args)

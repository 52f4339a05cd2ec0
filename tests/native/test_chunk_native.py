"""The native chunk kernels against float64, at every instruction set of this machine."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nextquill.ops import chunk_native
from tests.native.cases import (
    ISAS,
    assert_gradient,
    make_pair,
    needs_native,
    pair_grad_,
    token_grad_,
    true_pair_grad,
    true_pair_stats,
    true_token_grad,
    true_token_stats,
)

pytestmark = needs_native

SHAPES = [(252, 123), (1, 5), (7, 1), (3, 1031), (2, 70001)]
CAPS = [(None, 1.0), (None, 0.25), (30.0, 1.0), (2.0, 3.0)]
NAN = float("nan")


def stats_of(logits: Tensor, labels: Tensor) -> Tensor:
    out = torch.full((3, len(labels)), NAN)
    chunk_native.token_stats(logits, labels, out)
    return out


def pair_stats_of(factual: Tensor, counterfactual: Tensor, labels: Tensor, rows: int = 11) -> Tensor:
    out = torch.full((rows, len(labels)), NAN)
    chunk_native.pair_stats((factual, counterfactual), labels, out)
    return out


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_token_stats(isa: str, shape: tuple[int, int]) -> None:
    pair = make_pair(*shape)
    close(stats_of(pair.factual, pair.labels), true_token_stats(pair.factual, pair.labels))


@pytest.mark.parametrize("rows", [9, 11])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pair_stats(isa: str, shape: tuple[int, int], rows: int) -> None:
    pair = make_pair(*shape)
    close(
        pair_stats_of(*pair.logits, pair.labels, rows),
        true_pair_stats(pair.factual, pair.counterfactual, pair.labels)[:rows],
    )


@pytest.mark.parametrize(("softcap", "logit_scale"), CAPS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_token_grad(isa: str, shape: tuple[int, int], softcap: float | None, logit_scale: float) -> None:
    pair = make_pair(*shape, softcap=softcap)
    logits, stats = pair.factual.clone(), true_token_stats(pair.factual, pair.labels).float()
    result = token_grad_(logits, pair.labels, stats, pair.grad_factual, softcap, logit_scale)
    assert result is logits
    assert_gradient(result, true_token_grad(pair.factual, pair.labels, pair.grad_factual, softcap, logit_scale))


@pytest.mark.parametrize("counterfactual", ["own-gradient", "no-own-gradient", "detached"])
@pytest.mark.parametrize(("softcap", "logit_scale"), CAPS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pair_grad(
    isa: str, shape: tuple[int, int], softcap: float | None, logit_scale: float, counterfactual: str
) -> None:
    pair = make_pair(*shape, softcap=softcap)
    factual, other = pair.logits
    own, detach = counterfactual == "own-gradient", counterfactual == "detached"
    result1, result0 = pair_grad_(
        (factual, other),
        pair.labels,
        true_pair_stats(factual, other, pair.labels)[:9].float(),
        (pair.grad_factual, pair.grad_counterfactual if own else None, pair.grad_effect),
        softcap,
        logit_scale,
        detach,
    )
    expected1, expected0 = true_pair_grad(pair, softcap, logit_scale, with_counterfactual=own)
    assert result1 is factual
    assert_gradient(result1, expected1)
    if detach:
        assert result0 is None
        assert torch.equal(other, pair.counterfactual)
    else:
        assert result0 is other
        assert_gradient(other, expected0)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    n=st.integers(1, 6),
    vocabulary=st.integers(1, 2200),
    before=st.integers(0, 5),
    after=st.integers(0, 5),
    cap=st.sampled_from(CAPS),
    counterfactual=st.sampled_from(["own-gradient", "no-own-gradient", "detached"]),
    isa=st.sampled_from(ISAS),
)
def test_views_of_a_poisoned_buffer(
    n: int,
    vocabulary: int,
    before: int,
    after: int,
    cap: tuple[float | None, float],
    counterfactual: str,
    isa: str,
) -> None:
    """Rows of any length at any alignment; the memory around them and around `out` is NaN and stays so."""
    import nextquill_ext

    softcap, logit_scale = cap
    pair = make_pair(n, vocabulary, softcap=softcap, seed=vocabulary)
    views = []
    for source in pair.logits:
        buffer = torch.full((n, before + vocabulary + after), NAN)
        buffer[:, before : before + vocabulary] = source
        views.append((buffer, buffer[:, before : before + vocabulary]))
    (buffer1, z1), (buffer0, z0) = views
    stats = torch.full((13, before + n + after), NAN)
    out = stats[1:12, before : before + n]
    own, detach = counterfactual == "own-gradient", counterfactual == "detached"
    chosen = nextquill_ext.current_isa()
    nextquill_ext.set_isa(isa)
    try:
        chunk_native.pair_stats((z1, z0), pair.labels, out)
        close(out, true_pair_stats(pair.factual, pair.counterfactual, pair.labels))
        gradients = (pair.grad_factual, pair.grad_counterfactual if own else None, pair.grad_effect)
        pair_grad_((z1, z0), pair.labels, out[:9], gradients, softcap, logit_scale, detach)
    finally:
        nextquill_ext.set_isa(chosen)
    expected1, expected0 = true_pair_grad(pair, softcap, logit_scale, with_counterfactual=own)
    assert_gradient(z1, expected1)
    if detach:
        assert torch.equal(z0, pair.counterfactual)
    else:
        assert_gradient(z0, expected0)
    for buffer in (buffer1, buffer0):
        assert buffer[:, :before].isnan().all()
        assert buffer[:, before + vocabulary :].isnan().all()
    assert int(stats.isnan().sum()) == stats.numel() - out.numel()


@pytest.mark.parametrize("vocabulary", [32768, 262144])
def test_long_rows_keep_their_precision(isa: str, vocabulary: int) -> None:
    """An error of at most 1e-6 of the sum for equal logits, the worst case of float32 sums."""
    logits = torch.rand(1, vocabulary) * 0.1
    labels = torch.zeros(1, dtype=torch.int64)
    out = stats_of(logits, labels)
    expected = true_token_stats(logits, labels)
    assert abs(float(out[1, 0]) / float(expected[1]) - 1) < 1e-6
    assert abs(float(out[2, 0]) - float(expected[2])) < 1e-6 + 2.0**-24 * float(expected[2])  # it is rounded to float32


def test_exponential_is_within_two_units_in_the_last_place(isa: str) -> None:
    """With maximum 0, sum 1 and gradient 1, token_grad_ is exp(z) for all columns but the label."""
    logits = torch.cat((torch.linspace(-87.3, 0, 200001), torch.linspace(-1, 88, 100001)))[None]
    result = logits.clone()
    stats, label = torch.tensor([[0.0], [1.0], [0.0]]), torch.zeros(1, dtype=torch.int64)
    token_grad_(result, label, stats, torch.ones(1))
    expected = logits.double().exp()
    unit = 2.0 ** (torch.floor(torch.log2(expected)) - 23)
    assert float(((result.double() - expected) / unit).abs()[0, 1:].max()) < 2


def test_rising_rows(isa: str) -> None:
    """The largest logit comes last, so each block rescales the sums before it."""
    logits = torch.linspace(-300, 300, 20000).repeat(2, 1)
    other = logits.flip(1).contiguous()
    labels = torch.tensor([19999, 3])
    close(stats_of(logits, labels), true_token_stats(logits, labels))
    for pair in ((logits, other), (other, logits), (logits, logits * 0.5)):
        close(pair_stats_of(*pair, labels), true_pair_stats(*pair, labels))


@pytest.mark.parametrize("size", [1e4, 1e30])
def test_large_logits_do_not_overflow(isa: str, size: float) -> None:
    logits = torch.tensor([[size, -size, 0.0, size], [-size, -size, -size, -size]])
    labels = torch.tensor([0, 1])
    expected = torch.tensor([math.log(2), math.log(4)])
    out = stats_of(logits, labels)
    assert torch.isfinite(out).all()
    if size < 1e6:
        torch.testing.assert_close(out[2], expected)
    assert torch.isfinite(token_grad_(logits, labels, out, torch.ones(2))).all()


@pytest.mark.parametrize("column", [0, 5, 20, 1030])
@pytest.mark.parametrize("poison", [NAN, math.inf])
def test_poison_reaches_its_own_row_only(isa: str, poison: float, column: int) -> None:
    pair = make_pair(3, 1031)
    factual, other = pair.logits
    factual[1, column] = poison
    clean = pair_stats_of(*pair.logits, pair.labels)
    out = pair_stats_of(factual, other, pair.labels)
    assert torch.equal(out[:, [0, 2]], clean[:, [0, 2]])
    assert not torch.isfinite(out[[2, 8, 9, 10], 1]).any()
    assert torch.equal(out[3:6, 1], clean[3:6, 1])
    tokens = stats_of(factual, pair.labels)
    assert not torch.isfinite(tokens[2, 1])
    assert torch.isfinite(tokens[:, [0, 2]]).all()
    gradient = token_grad_(factual, pair.labels, tokens, pair.grad_factual)
    assert not torch.isfinite(gradient[1]).any()
    assert torch.isfinite(gradient[[0, 2]]).all()


@pytest.mark.parametrize("fill", [-math.inf, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("masked", [slice(0, 2000), slice(1, 3000), slice(2990, 3000)], ids=str)
def test_masked_vocabulary(isa: str, masked: slice, fill: float) -> None:
    logits = torch.randn(2, 3000)
    logits[:, masked] = fill
    logits[:, 0] = 1.0
    labels = torch.zeros(2, dtype=torch.int64)
    out = stats_of(logits, labels)
    close(out, true_token_stats(logits, labels))
    expected = true_token_grad(logits, labels, torch.ones(2), None, 1.0)
    gradient = token_grad_(logits, labels, out, torch.ones(2))
    assert_gradient(gradient, expected)
    hidden = torch.arange(3000)[masked]
    assert bool((gradient[:, hidden[hidden > 0]] == 0).all())


def test_entry_masked_in_one_stream_adds_nothing_to_divergence_and_entropy(isa: str) -> None:
    pair = make_pair(2, 1031)
    factual, other = pair.logits
    factual[:, 7] = -math.inf
    labels = torch.tensor([1, 2])
    kept = torch.arange(1031) != 7
    out = pair_stats_of(factual, other, labels)
    expected = true_token_stats(factual, labels)
    close(out[:3], expected)
    p1 = factual[:, kept].double().softmax(-1)
    log_p0 = other.double().log_softmax(-1)[:, kept]
    close(out[9], (p1 * (p1.log() - log_p0)).sum(-1))
    close(out[10], -(p1 * p1.log()).sum(-1))


def test_row_of_masked_entries_alone_is_not_finite(isa: str) -> None:
    out = stats_of(torch.full((1, 40), -math.inf), torch.tensor([3]))
    assert not torch.isfinite(out[2]).any()


def test_zero_gradient_gives_zero(isa: str) -> None:
    pair = make_pair(4, 77, spread=50.0)
    zero = torch.zeros(4)
    stats = pair_stats_of(*pair.logits, pair.labels)
    for z in pair_grad_(pair.logits, pair.labels, stats[:9], (zero,) * 3, 60.0, 2.0):
        assert z is not None
        assert bool((z == 0).all())


def test_single_entry_vocabulary_is_certain(isa: str) -> None:
    pair = make_pair(5, 1)
    out = pair_stats_of(*pair.logits, pair.labels)
    assert torch.equal(out[0], pair.factual[:, 0])
    assert bool((out[[1, 4, 7]] == 1).all())
    assert bool((out[[2, 5, 8, 9, 10]] == 0).all())


def test_instruction_sets_agree() -> None:
    import nextquill_ext

    pair = make_pair(3, 1031)
    before = nextquill_ext.current_isa()
    results = []
    for name in nextquill_ext.available_isas():
        nextquill_ext.set_isa(name)
        results.append(pair_stats_of(*pair.logits, pair.labels))
    nextquill_ext.set_isa(before)
    for result in results:
        torch.testing.assert_close(result, results[0], rtol=1e-6, atol=2e-6)


def test_gradients_and_labels_may_be_strided(isa: str) -> None:
    pair = make_pair(6, 33)
    labels, grad = pair.labels.repeat_interleave(2)[::2], torch.tensor(0.5).expand(6)
    out = stats_of(pair.factual, labels)
    expected = true_token_grad(pair.factual, pair.labels, grad, None, 1.0)
    result = token_grad_(pair.factual.clone(), labels, out, grad)
    assert_gradient(result, expected)


def test_logits_that_require_grad_are_read() -> None:
    pair = make_pair(2, 9)
    torch.testing.assert_close(
        stats_of(pair.factual.requires_grad_(), pair.labels), stats_of(pair.factual, pair.labels)
    )


def test_a_gradient_for_other_memory() -> None:
    pair = make_pair(5, 301)
    stats = true_pair_stats(pair.factual, pair.counterfactual, pair.labels)[:9].float()
    grads = (pair.grad_factual, pair.grad_counterfactual, pair.grad_effect)
    outs = torch.full((5, 301), NAN), torch.full((5, 301), NAN, dtype=torch.bfloat16)
    chunk_native.pair_grad((pair.factual.clone(), pair.counterfactual.clone()), pair.labels, stats, grads, outs)
    expected = pair_grad_((pair.factual, pair.counterfactual), pair.labels, stats, grads)
    assert torch.equal(outs[0], expected[0])
    assert torch.equal(outs[1], expected[1].bfloat16())


def test_no_rows() -> None:
    empty, labels, none = torch.empty(0, 7), torch.empty(0, dtype=torch.int64), torch.empty(0)
    chunk_native.token_stats(empty, labels, torch.empty(3, 0))
    chunk_native.pair_stats((empty, empty), labels, torch.empty(9, 0))
    assert token_grad_(empty, labels, torch.empty(3, 0), none) is empty
    results = pair_grad_((empty, empty), labels, torch.empty(9, 0), (none, None, none))
    assert results == (empty, empty)

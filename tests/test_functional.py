"""linear_token_nll and linear_pair_nll against float64: values and every gradient, over shapes, dtypes and layouts."""

import itertools

import pytest
import torch
from torch.autograd import gradcheck

import nextquill as nq
from nextquill import reference
from tests.helpers import (
    FLOAT32_RELATIVE,
    FLOAT64_RELATIVE,
    assert_close,
    assert_same_gradients,
    make_case,
    relative_error,
)

SHAPES = [(252, 507, 123), (1, 7, 5), (5, 1, 3), (17, 8, 1), (3, 4, 2), (64, 16, 1031), (33, 64, 128)]
OPTIONS = {
    "plain": {},
    "softcap": {"softcap": 3.0},
    "scale": {"logit_scale": 0.25},
    "negative-scale": {"logit_scale": -0.5},
    "softcap-scale": {"softcap": 3.0, "logit_scale": 1.7},
}
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "N{}-D{}-V{}".format(*s))
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
with_bias = pytest.mark.parametrize("bias", [False, True], ids=["nobias", "bias"])
FIELDS = ("factual", "counterfactual", "effect")


def upstream(case, seed=1):
    """Upstream gradients of both signs that differ for each token and output."""
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(case.labels.shape, generator=rng, dtype=torch.float64) for _ in FIELDS]


def backward_pair(function, case, grads, fields=FIELDS, **kwargs):
    pair = function(*case.pair_args, bias=case.bias, **kwargs)
    used = [(nll, g.to(nll.dtype)) for f, nll, g in zip(FIELDS, pair, grads, strict=True) if f in fields]
    used = [(nll, g) for nll, g in used if nll.requires_grad]
    torch.autograd.backward(*zip(*used, strict=True))
    return pair


def check_pair(case, fields=FIELDS, leaves=(), relative=FLOAT32_RELATIVE, **kwargs):
    """Assert that values and gradients of a case equal the float64 reference's."""
    actual, exact, grads = case.leaves(*leaves), case.leaves(*leaves, dtype=torch.float64), upstream(case)
    pair = backward_pair(nq.linear_pair_nll, actual, grads, fields, **kwargs)
    truth = backward_pair(reference.linear_pair_nll, exact, grads, fields, **kwargs)
    for field in FIELDS:
        assert_close(getattr(pair, field), getattr(truth, field), relative, field)
    assert_same_gradients(actual, exact, relative)


def check_token(case, leaves=(), relative=FLOAT32_RELATIVE, **kwargs):
    grad = upstream(case)[0]
    results = []
    for function, dtype in ((nq.linear_token_nll, None), (reference.linear_token_nll, torch.float64)):
        own = case.leaves(*leaves, dtype=dtype)
        nll = function(own.factual, own.weight, own.labels, bias=own.bias, **kwargs)
        nll.backward(grad.to(nll.dtype))
        results.append((own, nll))
    (actual, nll), (exact, truth) = results
    assert_close(nll, truth, relative)
    assert_same_gradients(actual, exact, relative)


@shapes
@with_bias
def test_pair_nll_matches_float64(shape, bias):
    check_pair(make_case(*shape, bias=bias))


@shapes
@with_bias
def test_token_nll_matches_float64(shape, bias):
    check_token(make_case(*shape, bias=bias))


@options
@with_bias
def test_pair_nll_with_scaled_and_capped_logits(options, bias):
    check_pair(make_case(40, 24, 97, bias=bias), **options)


@options
@with_bias
def test_token_nll_with_scaled_and_capped_logits(options, bias):
    check_token(make_case(40, 24, 97, bias=bias), **options)


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "logit_scale": 1.7}], ids=["plain", "softcap-scale"])
def test_pair_nll_float64_inputs_are_computed_in_float64(options):
    check_pair(make_case(37, 19, 53, dtype=torch.float64), relative=FLOAT64_RELATIVE, **options)


NAMES = ("factual", "counterfactual", "weight", "bias")
SUBSETS = [s for k in range(1, 5) for s in itertools.combinations(NAMES, k)]


@pytest.mark.parametrize("leaves", SUBSETS, ids="+".join)
def test_pair_nll_gradients_for_every_subset_of_requires_grad(leaves):
    check_pair(make_case(23, 9, 31), leaves=leaves, softcap=4.0)


@pytest.mark.parametrize("leaves", [s for s in SUBSETS if "counterfactual" not in s], ids="+".join)
def test_token_nll_gradients_for_every_subset_of_requires_grad(leaves):
    check_token(make_case(23, 9, 31), leaves=leaves)


@pytest.mark.parametrize("fields", [s for k in (1, 2) for s in itertools.combinations(FIELDS, k)], ids="+".join)
def test_pair_nll_used_in_part(fields):
    """Outputs without an upstream gradient count as zero."""
    check_pair(make_case(23, 9, 31), fields=fields, softcap=4.0)


def test_no_input_requires_grad_gives_plain_values():
    case = make_case(6, 3, 5)
    pair = nq.linear_pair_nll(*case.pair_args, bias=case.bias)
    assert not any(t.requires_grad for t in pair)


@pytest.mark.parametrize("ignored", [0.0, 0.2, 1.0], ids=["none", "fifth", "all"])
def test_ignored_rows_are_exactly_zero(ignored):
    case = make_case(50, 8, 11, ignored=ignored).leaves()
    skipped = case.labels == -100
    pair = backward_pair(nq.linear_pair_nll, case, upstream(case))
    for nll in pair:
        assert torch.equal(nll == 0, skipped)
    for gradient in (case.factual.grad, case.counterfactual.grad):
        assert torch.equal((gradient == 0).all(-1), skipped)
    if ignored == 1.0:
        assert not case.weight.grad.any()
        assert not case.bias.grad.any()


def test_no_rows_at_all():
    case = make_case(0, 8, 11).leaves()
    pair = backward_pair(nq.linear_pair_nll, case, upstream(case))
    assert [tuple(nll.shape) for nll in pair] == [(0,)] * 3
    assert case.factual.grad.shape == (0, 8)
    assert not case.weight.grad.any()


def test_vocabulary_of_one_has_no_loss_and_no_gradient():
    case = make_case(9, 4, 1, ignored=0.0).leaves()
    pair = backward_pair(nq.linear_pair_nll, case, upstream(case))
    assert all(not nll.any() for nll in pair)
    assert all(not gradient.any() for gradient in case.gradients().values())


@pytest.mark.parametrize("ignore_index", [-1, 3, 10_000], ids=["negative", "in-vocabulary", "beyond"])
def test_ignore_index_may_be_any_integer(ignore_index):
    case = make_case(30, 8, 11, ignored=0.0)
    case.labels[::4] = ignore_index
    check_pair(case, ignore_index=ignore_index)
    nll = nq.linear_token_nll(case.factual, case.weight, case.labels, ignore_index=ignore_index)
    assert torch.equal(nll == 0, case.labels == ignore_index)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32], ids=str)
def test_labels_of_any_integer_dtype(dtype):
    case = make_case(30, 8, 11, ignored=0.0)
    expected = nq.linear_token_nll(case.factual, case.weight, case.labels)
    assert torch.equal(nq.linear_token_nll(case.factual, case.weight, case.labels.to(dtype)), expected)


def test_batched_inputs_equal_flat_ones():
    flat, batched = make_case(24, 8, 11).leaves(), make_case(24, 8, 11).view(4, 6).leaves()
    grads = upstream(flat)
    expected = backward_pair(nq.linear_pair_nll, flat, grads)
    actual = backward_pair(nq.linear_pair_nll, batched, [g.view(4, 6) for g in grads])
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e.view(4, 6))
    assert torch.equal(batched.factual.grad, flat.factual.grad.view(4, 6, 8))
    assert torch.equal(batched.counterfactual.grad, flat.counterfactual.grad.view(4, 6, 8))
    assert torch.equal(batched.weight.grad, flat.weight.grad)


def layouts(tensor):
    """The same values as a transpose, a strided slice and a slice of a larger buffer poisoned with NaN."""
    yield "transposed", tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    yield "every-second", torch.stack([tensor, torch.full_like(tensor, torch.nan)], -1)[..., 0]
    padded = torch.full([s + 2 for s in tensor.shape], torch.nan, dtype=tensor.dtype)
    inner = padded[tuple(slice(1, -1) for _ in tensor.shape)]
    yield "inside-nan", inner.copy_(tensor)


@pytest.mark.parametrize("name", ["factual", "counterfactual", "weight"])
def test_strided_inputs_read_as_their_values(name):
    case = make_case(24, 8, 11)
    expected = nq.linear_pair_nll(*case.pair_args, bias=case.bias)
    for layout, tensor in layouts(case.tensors[name]):
        assert not tensor.is_contiguous()
        own = case.leaves()
        setattr(own, name, tensor.requires_grad_())
        pair = backward_pair(nq.linear_pair_nll, own, upstream(own))
        exact = case.double()
        backward_pair(reference.linear_pair_nll, exact, upstream(case))
        for field in FIELDS:
            assert_close(getattr(pair, field), getattr(expected, field), 1e-6, f"{layout} {field}")
        assert_same_gradients(own, exact)


def test_expanded_inputs_read_as_their_values():
    """With stride 0, all rows share one hidden state and one label."""
    row, weight = torch.randn(1, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    label = torch.tensor([4])
    nll = nq.linear_token_nll(row.expand(6, 8), weight, label.expand(6))
    nll.sum().backward()
    exact, exact_weight = (t.detach().double().requires_grad_() for t in (row, weight))
    truth = 6 * reference.linear_token_nll(exact, exact_weight, label)
    truth.sum().backward()
    assert_close(nll, truth.expand(6) / 6)
    assert_close(row.grad, exact.grad)
    assert_close(weight.grad, exact_weight.grad)


def test_upstream_gradients_are_taken_per_token():
    """Each token has its own gradient (Liger-Kernel #968 took the first for all), from any memory layout."""
    case = make_case(16, 8, 11, ignored=0.0)
    strided = torch.stack([torch.randn(16), torch.full((16,), torch.nan)], 1)[:, 0]
    expanded = torch.tensor(0.5).expand(16)
    for grad in (strided, expanded, strided.flip(0)):
        own, exact = case.leaves(), case.double()
        nq.linear_token_nll(own.factual, own.weight, own.labels, bias=own.bias).backward(grad)
        truth = reference.linear_token_nll(exact.factual, exact.weight, exact.labels, bias=exact.bias)
        truth.backward(grad.double())
        assert_same_gradients(own, exact)


def test_a_token_without_upstream_gradient_gets_none():
    case = make_case(16, 8, 11, ignored=0.0).leaves()
    nq.linear_pair_nll(*case.pair_args).effect[5].backward()
    others = torch.arange(16) != 5
    assert case.factual.grad[5].any()
    assert not case.factual.grad[others].any()
    assert not case.counterfactual.grad[others].any()


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "logit_scale": 0.7}], ids=["plain", "softcap-scale"])
@pytest.mark.parametrize("field", FIELDS)
def test_pair_nll_gradcheck(field, options):
    case = make_case(5, 3, 4, dtype=torch.float64).leaves()

    def function(h1, h0, weight, bias):
        return getattr(nq.linear_pair_nll(h1, h0, weight, case.labels, bias=bias, **options), field)

    assert gradcheck(function, (case.factual, case.counterfactual, case.weight, case.bias))


def test_backward_twice_through_a_retained_graph_gives_the_same_gradient():
    case = make_case(16, 8, 11).leaves()
    total = sum(nll.square().sum() for nll in nq.linear_pair_nll(*case.pair_args, bias=case.bias))
    tensors = list(case.tensors.values())
    first = torch.autograd.grad(total, tensors, retain_graph=True)
    second = torch.autograd.grad(total, tensors)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("penalty", ["gradient", "hessian"])
def test_second_derivative_is_refused_not_silently_zero(penalty):
    case = make_case(5, 3, 4).leaves()
    token_loss = lambda h: nq.linear_token_nll(h, case.weight, case.labels).sum()  # noqa: E731
    derivative = {
        "gradient": lambda: torch.autograd.grad(token_loss(case.factual), case.factual, create_graph=True),
        "hessian": lambda: torch.autograd.functional.hessian(token_loss, case.factual),
    }[penalty]
    with pytest.raises(nq.GradientError, match="create_graph"):
        derivative()


@pytest.fixture
def _two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_two_threads")
def test_results_are_bitwise_repeatable():
    runs = []
    for _ in range(2):
        case = make_case(200, 32, 517).leaves()
        pair = backward_pair(nq.linear_pair_nll, case, upstream(case))
        runs.append([*pair, *case.gradients().values()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_inputs_are_left_as_they_were():
    case = make_case(16, 8, 11).leaves()
    before = {name: tensor.detach().clone() for name, tensor in case.tensors.items()}
    labels, grads = case.labels.clone(), upstream(case)
    kept = [g.clone() for g in grads]
    backward_pair(nq.linear_pair_nll, case, grads, softcap=2.0)
    assert all(torch.equal(before[name], tensor) for name, tensor in case.tensors.items())
    assert torch.equal(labels, case.labels)
    assert all(torch.equal(a, b) for a, b in zip(kept, grads, strict=True))


def test_many_chunks_equal_one():
    case = make_case(41, 8, 11).leaves()
    whole = backward_pair(nq.linear_pair_nll, case, upstream(case))
    cut = make_case(41, 8, 11).leaves()
    parts = backward_pair(nq.linear_pair_nll, cut, upstream(cut), chunk_bytes=3 * 2 * 16 * 4)
    assert all(relative_error(a, b) <= 1e-6 for a, b in zip(parts, whole, strict=True))
    assert_same_gradients(cut, case, 1e-6)

"""Every implementation gives the same results through the public names: triton ≡ native ≡ torch ≡ float64 reference.

They run on a GPU if there is one; on a CPU, Triton's interpreter runs the kernels. Only torch and pytest are needed.
"""

import pytest
import torch

import nextquill as nq
from nextquill import reference
from nextquill.ops import loss_operator
from nextquill.ops.dispatch import why_not
from tests.helpers import FLOAT32_RELATIVE, assert_close, assert_same_gradients, make_case, relative_error

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LOSSES = {
    "NextQuill": lambda **o: nq.NextQuillLoss(anchor=0.1, **o),
    "NextQuill-paper": lambda **o: nq.NextQuillLoss(weighted_effect=True, **o),
    "NextQuill-detached": lambda **o: nq.NextQuillLoss(detach_counterfactual=True, **o),
    "NextQuill-zero-weights": lambda **o: nq.NextQuillLoss(low_weight=0.0, threshold=0.2, **o),
    "PerCE": nq.PerCELoss,
    "LongCE": nq.LongCELoss,
    "SFT": nq.SFTLoss,
    # The reduction "micro_batch" is not among those of MIRROR.
    "MIRROR": lambda reduction="token", **o: nq.MirrorLoss(
        0.3, reduction=reduction.replace("micro_batch", "token"), **o
    ),
    "user": lambda **o: nq.PairLoss(lambda p: p.factual / p.factual.max(), alpha=0.3, **o),
}
HEADS = {"plain": {}, "softcap-scale": {"softcap": 3.0, "logit_scale": -0.7}}
# (N, D, V): a vocabulary that no tile divides, one row, one column, odd everything.
SHAPES = [(23, 19, 301), (1, 8, 5), (5, 3, 1), (13, 33, 130)]
losses = pytest.mark.parametrize("name", LOSSES)
heads = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
shapes = pytest.mark.parametrize(("n", "d", "v"), SHAPES, ids=lambda x: str(x))


@pytest.fixture(params=["torch", "native", "triton"])
def impl(request):
    if reason := why_not(request.param, DEVICE, torch.float32):
        pytest.skip(reason)
    return request.param


def placed(case, *names):
    """The case on the device under test, with fresh leaves."""
    for field in ("factual", "counterfactual", "weight", "bias", "labels"):
        tensor = getattr(case, field)
        setattr(case, field, None if tensor is None else tensor.to(DEVICE))
    return case.leaves(*names)


def run_loss(loss_fn, case, ids):
    output = loss_fn.compute(*case.pair_args, case.bias, ids)
    output.loss.backward()
    return output


@pytest.mark.covering(2)
@losses
@heads
@pytest.mark.parametrize("reduction", ["sequence", "token", "micro_batch"])
def test_losses_and_their_gradients(impl, name, head, reduction):
    case = placed(make_case(23, 19, 301))
    exact, ids = case.double(), (torch.arange(23, device=DEVICE) // 6) % 3
    # Two or three rows a chunk for losses whose rows do not depend on one another; whole sequences otherwise.
    actual = run_loss(LOSSES[name](impl=impl, reduction=reduction, chunk_bytes=5 * 301 * 4, **head), case, ids)
    truth = run_loss(LOSSES[name](impl="torch", reduction=reduction, **head), exact, ids)
    assert_close(actual.loss, truth.loss)
    for field, value in truth.pair_nll._asdict().items():
        assert_close(getattr(actual.pair_nll, field), value, what=field)
    assert_close(actual.token_weights, truth.token_weights)
    assert (actual.num_tokens, actual.num_sequences) == (truth.num_tokens, truth.num_sequences)
    assert_same_gradients(case, exact)


@heads
@shapes
def test_operators_against_the_plain_twins(impl, head, n, d, v):
    case = placed(make_case(n, d, v, ignored=0.2 if n > 5 else 0.0))
    exact, grads = case.double(), torch.randn(3, n, device=DEVICE)
    for function, own, options in (
        (nq.linear_pair_nll, case, {"impl": impl}),
        (reference.linear_pair_nll, exact, {}),
    ):
        pair = function(*own.pair_args, bias=own.bias, **head, **options)
        sum((nll * g).sum() for nll, g in zip(pair, grads, strict=True)).backward()
        own.results = pair
    for actual, truth in zip(case.results, exact.results, strict=True):
        # A single column has nll 0, where only the absolute error means something.
        error = (actual - truth).abs().max() / (1 + truth.abs().max())
        assert error <= FLOAT32_RELATIVE
    if v > 1:
        assert_same_gradients(case, exact)


@heads
def test_single_stream_operator(impl, head):
    case = placed(make_case(23, 19, 301))
    exact, g = case.double(), torch.randn(23, device=DEVICE)
    actual = nq.linear_token_nll(case.factual, case.weight, case.labels, bias=case.bias, impl=impl, **head)
    truth = reference.linear_token_nll(exact.factual, exact.weight, exact.labels, bias=exact.bias, **head)
    (actual * g).sum().backward()
    (truth * g).sum().backward()
    assert_close(actual, truth)
    assert_same_gradients(case, exact)


@heads
def test_statistics_with_divergences(impl, head):
    case = placed(make_case(23, 19, 301), "none")
    exact = case.double()
    stats = nq.linear_pair_stats(*case.pair_args, bias=case.bias, impl=impl, **head)
    truth = reference.linear_pair_stats(*exact.pair_args, bias=exact.bias, **head)
    assert_close(stats.kl, truth.kl)
    assert_close(stats.entropy, truth.entropy)
    for actual, expected in zip(stats.pair_nll, truth.pair_nll, strict=True):
        assert_close(actual, expected)
    assert not stats.kl.requires_grad


@pytest.mark.covering(1)
@pytest.mark.parametrize(
    "needs", ["factual", "counterfactual", "weight", "bias", "factual weight", "counterfactual bias"]
)
def test_a_subset_of_gradients(impl, needs):
    case = placed(make_case(13, 9, 31), *needs.split())
    full, grads = case.leaves(), torch.randn(3, 13, device=DEVICE)
    for own in (case, full):
        pair = nq.linear_pair_nll(*own.pair_args, bias=own.bias, impl=impl)
        torch.autograd.backward(list(pair), list(grads))
    assert case.gradients().keys() == set(needs.split())
    for key, gradient in case.gradients().items():
        assert_close(gradient, full.gradients()[key], 1e-6, key)


def test_strided_and_stride_0_inputs(impl):
    """Slices of wider tensors, a transposed weight, and one row for all (TransformerEngine #2734 read them wrongly)."""
    wide = torch.randn(11, 2, 24, device=DEVICE)
    hidden, counterfactual = wide[:, 0, 3:12], wide[:, 1, 12:21]
    weight = torch.randn(9, 40, device=DEVICE)[:, 5:36].T
    labels = torch.randint(31, (11,), device=DEVICE)
    same = torch.randn(9, device=DEVICE).expand(11, 9)
    for h1, h0 in ((hidden, counterfactual), (same, hidden), (hidden, same)):
        case = [t.detach().requires_grad_() for t in (h1, h0, weight)]
        exact = [t.detach().double().requires_grad_() for t in (h1, h0, weight)]
        actual = nq.linear_pair_nll(*case, labels, impl=impl)
        truth = reference.linear_pair_nll(*exact, labels)
        for a, b in zip(actual, truth, strict=True):
            assert_close(a, b)
        # An expanded upstream gradient, as `.sum()` gives.
        sum(nll.sum() for nll in actual).backward()
        sum(nll.sum() for nll in truth).backward()
        for a, b in zip(case, exact, strict=True):
            assert_close(a.grad, b.grad)


@pytest.mark.parametrize("ignored", ["all", "none-left-in-the-first-tile", "empty"])
def test_degenerate_batches(impl, ignored):
    case = placed(make_case(0 if ignored == "empty" else 40, 9, 31, ignored=0.0))
    case.labels[: 40 if ignored == "all" else 33] = -100
    with torch.no_grad():
        case.factual[case.labels == -100] = torch.nan
    pair = nq.linear_pair_nll(*case.pair_args, bias=case.bias, impl=impl)
    loss = nq.NextQuillLoss(impl=impl)(*case.pair_args, case.bias) + sum(nll.sum() for nll in pair)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(g).all() for g in case.gradients().values())
    assert not any(nll[case.labels == -100].any() for nll in pair)
    if ignored != "none-left-in-the-first-tile":
        assert loss == 0
        assert not any(g.any() for g in case.gradients().values())


@pytest.mark.covering(1)
@losses
def test_two_runs_are_bitwise_equal(impl, name):
    runs = []
    for _ in range(2):
        case = placed(make_case(40, 19, 301))
        output = run_loss(LOSSES[name](impl=impl, chunk_bytes=60 * 301 * 4), case, None)
        pair = nq.linear_pair_nll(*case.pair_args, bias=case.bias, impl=impl)
        runs.append([output.loss, output.token_weights, *pair, *case.gradients().values()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.covering(1)
@pytest.mark.parametrize("softcap", [None, 30.0], ids=["plain", "softcap"])
def test_non_finite_hidden_states_are_never_silently_finite(impl, softcap):
    """A cap makes an infinite logit finite, but its hidden state stays infinite."""
    for bad in (torch.nan, torch.inf, -torch.inf):
        for stream in ("factual", "counterfactual"):
            case = placed(make_case(13, 9, 31, ignored=0.0), "none")
            case.tensors[stream][4, 2] = bad
            pair = nq.linear_pair_nll(*case.pair_args, impl=impl, softcap=softcap)
            assert not torch.isfinite(getattr(pair, stream)[4])
            assert not torch.isfinite(pair.effect[4])
            others = torch.arange(13, device=DEVICE) != 4
            assert all(torch.isfinite(nll[others]).all() for nll in pair)
            assert not torch.isfinite(nq.NextQuillLoss(impl=impl, softcap=softcap)(*case.pair_args))


def test_half_precision_is_no_worse_than_plain_pytorch(impl):
    """float16 runs everywhere. bfloat16 does not run under Triton's interpreter, which multiplies it wrongly."""
    dtypes = [torch.float16] + [torch.bfloat16] * (impl != "triton" or DEVICE.type == "cuda")
    for dtype in dtypes:
        case = placed(make_case(29, 24, 301, dtype=dtype))
        plain, exact = case.leaves(), case.double()
        z1, z0 = (
            torch.nn.functional.linear(h, plain.weight, plain.bias) for h in (plain.factual, plain.counterfactual)
        )
        by_hand = [
            torch.nn.functional.cross_entropy(z.float(), plain.labels, reduction="none") for z in (z1, z0, z1 - z0)
        ]
        ours = nq.linear_pair_nll(*case.pair_args, bias=case.bias, impl=impl)
        truth = reference.linear_pair_nll(*exact.pair_args, bias=exact.bias)
        for nlls in (by_hand, ours, truth):
            sum(nll.sum() for nll in nlls).backward()
        for a, b, t in zip(ours, by_hand, truth, strict=True):
            assert_close(a, t)
            assert relative_error(a, t) <= relative_error(b, t)
        for key, value in exact.gradients().items():
            own, other = relative_error(case.gradients()[key], value), relative_error(plain.gradients()[key], value)
            assert own <= 2 * other, (dtype, key)


def test_the_operators_forward_in_chunks_or_without_logits(impl):
    case, bound = placed(make_case(40, 12, 77)), 5 * 2 * 80 * 4
    for operator, arguments in (
        (nq.linear_pair_nll, case.pair_args),
        (nq.linear_token_nll, (case.factual, case.weight, case.labels)),
    ):
        stacked = [operator(*arguments, bias=case.bias, impl=impl, chunk_bytes=each) for each in (None, bound)]
        streamed, chunked = (torch.stack(tuple(each)) if isinstance(each, tuple) else each for each in stacked)
        assert_close(streamed, chunked, FLOAT32_RELATIVE)
    with pytest.raises(nq.ArgumentError, match="chunk_bytes: expected a positive number of bytes, got 0"):
        nq.linear_pair_nll(*case.pair_args, impl=impl, chunk_bytes=0)


@pytest.mark.gpu
@losses
def test_nothing_waits_for_the_device_once_rows_are_planned(name, monkeypatch):
    case = placed(make_case(300, 64, 1031))
    loss_fn = LOSSES[name](impl="triton", chunk_bytes=100 * 2 * 1031 * 4)
    ids = torch.arange(300, device=DEVICE) // 40
    run_loss(loss_fn, case, ids)  # compiles
    plan = loss_operator.plan_rows(case.labels, ids, -100, 1031)
    monkeypatch.setattr(loss_operator, "plan_rows", lambda *_: plan)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_loss(loss_fn, case, ids)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_a_model_sized_head_in_bfloat16(softcap):
    """Many tiles in each direction, several chunks, and half-precision products with float32 results."""
    case = placed(make_case(700, 1000, 50257, dtype=torch.bfloat16, bias=False))
    exact, ids = case.double(), torch.arange(700, device=DEVICE) // 70
    loss = nq.NextQuillLoss(impl="triton", softcap=softcap, chunk_bytes=2**27)
    actual = run_loss(loss, case, ids)
    truth = run_loss(nq.NextQuillLoss(impl="torch", softcap=softcap), exact, ids)
    assert_close(actual.loss, truth.loss)
    for field, value in truth.pair_nll._asdict().items():
        assert_close(getattr(actual.pair_nll, field), value, what=field)
    for key, value in exact.gradients().items():
        assert relative_error(case.gradients()[key], value) <= 2**-7, key
    pair = nq.linear_pair_nll(*case.pair_args, softcap=softcap, impl="triton")
    for field, value in truth.pair_nll._asdict().items():
        assert_close(getattr(pair, field), value, what=f"streamed {field}")


@pytest.mark.gpu
def test_transient_memory_on_a_gpu_is_the_chunk_budget():
    case, budget = placed(make_case(2048, 256, 32768, dtype=torch.bfloat16, bias=False)), 2**26
    loss_fn, ids = nq.NextQuillLoss(impl="triton", chunk_bytes=budget), torch.arange(2048, device=DEVICE) // 32
    run_loss(loss_fn, case, ids)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss_fn(*case.pair_args, None, ids)
    kept = 2 * case.factual.numel() * 2 + case.weight.numel() * 4  # dh1, dh0 in bfloat16; dW in float32
    assert torch.cuda.max_memory_allocated() - before - kept < 1.5 * budget

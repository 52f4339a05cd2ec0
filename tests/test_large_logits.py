"""Logits of any size: a number added to all logits of a row changes no probability, and must not reduce precision.

Every value and gradient is compared with the plain PyTorch composition (float32 logits, log_softmax, autograd) on the
same inputs and machine, both against float64.

Inputs are small multiples of powers of two, so that any product gives exact logits in float32. So these tests measure
the softmax and later steps, but not the rounding of the logits, which at 1e4 is 1e-3 for every implementation.

The longest sum in a result is over the vocabulary, so its error may be √77 = 9 times plain PyTorch's on any processor
(see `assert_rounds_like`; 1 to 2 times were measured). With a rounded logsumexp it is 200 times at logits of 1e3.
"""

import pytest
import torch

import nextquill as nq
from nextquill import reference
from nextquill.ops.dispatch import why_not
from nextquill.reference.losses import pair_loss
from tests.helpers import HeadCase, assert_rounds_like

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROWS, WIDTH, VOCABULARY = 15, 8, 77
IDS = torch.arange(ROWS, device=DEVICE) // 5
#: Two rows of two streams: a sequence takes several chunks, whose logits are computed again for their gradient.
CHUNK_BYTES = 2 * 2 * 80 * 4
# 10240 = 5 · 2^11 has three significant bits, as half precision needs.
sizes = pytest.mark.parametrize("size", [1, 1024, 10240])
LOSSES = {
    "both-passes": {"alpha": 0.5, "anchor": 0.3},
    "detached": {"alpha": 0.5, "detach_counterfactual": True},
    "anchored": {"anchor": 0.3},
    "one-pass": {},
}


@pytest.fixture(params=["torch", "native", "triton"])
def impl(request):
    if reason := why_not(request.param, DEVICE, torch.float32):
        pytest.skip(reason)
    return request.param


# A cap rounds what it caps, so with it most of the error is the logits'.
heads = pytest.mark.parametrize(
    ("size", "head"),
    [(1, {}), (1024, {}), (10240, {}), (1024, {"logit_scale": -2.0, "softcap": 16.0 * 1024})],
    ids=["1", "1024", "10240", "1024-scale-softcap"],
)


def make_case(size, dtype=torch.float32):
    """Logits with a standard deviation of about 2 around `size`, -size / 2 and 3 size / 2 (z1, z0, z1 - z0)."""
    rng = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randint(-4, 5, shape, generator=rng) / 4  # noqa: E731
    weight, factual = draw(VOCABULARY, WIDTH), draw(ROWS, WIDTH)
    counterfactual = factual + draw(ROWS, WIDTH)
    weight[:, 0], factual[:, 0], counterfactual[:, 0] = 1, size, -size / 2
    labels = torch.randint(VOCABULARY, (ROWS,), generator=rng)
    labels[::5] = -100
    bias = draw(VOCABULARY)
    streams = (each.to(DEVICE, dtype) for each in (factual, counterfactual))
    return HeadCase(*streams, weight.to(DEVICE), bias.to(DEVICE), labels.to(DEVICE)).leaves()


def measured(case):
    """Gradients without column 0, which holds the size. Its gradient, zero or `size` times the bias's, adds nothing."""
    return {name: grad[:, 1:] if grad.dim() == 2 else grad for name, grad in case.gradients().items()}


def compare(run_ours, run_plain, size, dtype=torch.float32):
    """Run both, and the plain one in float64, and compare values and float32 gradients."""
    ours, plain = make_case(size, dtype), make_case(size, dtype)
    exact = ours.double()
    upstream = torch.rand(3, ROWS, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    values = []
    for run, case in ((run_ours, ours), (run_plain, plain), (run_plain, exact)):
        result = run(case, upstream)
        (result.sum() if result.dim() else result).backward()
        values.append(result.detach())
    assert_rounds_like(*values, VOCABULARY)
    found, others, truth = measured(ours), measured(plain), measured(exact)
    for name in truth:
        if found.get(name, others[name]).dtype == torch.float32 and truth[name].any():
            assert_rounds_like(found[name], others[name], truth[name], VOCABULARY, f"gradient of {name}")


@heads
def test_pair_operator(impl, head, size):
    def run(function, **more):
        def nlls(case, upstream):
            return torch.stack(list(function(*case.pair_args, bias=case.bias, **head, **more))) * upstream

        return nlls

    compare(run(nq.linear_pair_nll, impl=impl), run(reference.linear_pair_nll), size)


@heads
@pytest.mark.parametrize("beta", [0, 0.1, 0.5, 1])
def test_divergence_operator(impl, head, size, beta):
    def run(function, **more):
        def jsd(case, upstream):
            return function(*case.pair_args, bias=case.bias, beta=beta, **head, **more) * upstream[0]

        return jsd

    compare(run(nq.linear_pair_jsd, impl=impl), run(reference.linear_pair_jsd), size)


@heads
def test_single_stream_operator(impl, head, size):
    def run(function, **more):
        def nll(case, upstream):
            return function(case.factual, case.weight, case.labels, bias=case.bias, **head, **more) * upstream[0]

        return nll

    compare(run(nq.linear_token_nll, impl=impl), run(reference.linear_token_nll), size)


def loss_runs(impl, name, autocast=None):
    """The loss and its plain twin with given token weights, as rounding could cross a threshold."""
    options = {"normalize_weights": True, **LOSSES[name]}
    loss_fn = nq.PairLoss(lambda pair: pair.factual, impl=impl, chunk_bytes=CHUNK_BYTES, **options)

    def ours(case, upstream):
        with torch.autocast(DEVICE.type, dtype=autocast, enabled=autocast is not None):
            return loss_fn(*case.pair_args, case.bias, IDS, token_weights=upstream[0])

    def plain(case, upstream):
        weights = upstream[0].to(case.weight.dtype)
        return pair_loss(*case.pair_args, token_weights=weights, sequence_ids=IDS, bias=case.bias, **options)

    return ours, plain


@pytest.mark.covering(2)
@sizes
@pytest.mark.parametrize("name", LOSSES)
def test_losses(impl, name, size):
    compare(*loss_runs(impl, name), size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_inputs(impl, dtype):
    """Under autocast: a float32 head, and half-precision hidden states, whose gradients are too coarse here."""
    if dtype == torch.bfloat16 and DEVICE.type == "cuda":
        pytest.skip("dz enters its products in bfloat16 there, which costs more than the softmax")
    compare(*loss_runs(impl, "both-passes", autocast=dtype), 10240, dtype)


@pytest.mark.parametrize("size", [1, 10240])
def test_divergences(impl, size):
    case = make_case(size)
    results = [
        function(*each.pair_args, bias=each.bias, **more)
        for function, each, more in (
            (nq.linear_pair_stats, case, {"impl": impl}),
            (reference.linear_pair_stats, case, {}),
            (reference.linear_pair_stats, case.double(), {}),
        )
    ]
    for name in ("kl", "entropy"):
        assert_rounds_like(*(getattr(each, name) for each in results), VOCABULARY, name)

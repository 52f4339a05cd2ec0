"""The native Jensen-Shannon kernels against float64, with every instruction set of the machine."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from nextquill.ops import chunk_native
from tests.native.cases import make_pair, needs_native

pytestmark = needs_native
# Every tail of 4, 8 and 16 lanes, and blocks of 1024 columns with and without one.
WIDTHS = [*range(1, 20), 31, 32, 33, 1023, 1024, 1025, 1031, 2048, 3001]
betas = pytest.mark.parametrize("beta", [0, 0.1, 0.5, 1])


def stats_of(z1: Tensor, z0: Tensor, beta: float) -> Tensor:
    out = torch.full((6, len(z1)), math.nan)
    chunk_native.jsd_stats((z1, z0), out, beta)
    return out


def truth(z1: Tensor, z0: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """The statistics [6, n], the gradient of the divergence's sum [n, V] and its terms' size [n, V], float64.

    An exponential is as precise as its argument, which is rounded in proportion to its size.
    """
    z1, z0 = z1.double(), z0.double()
    log_p1, log_p0 = z1.log_softmax(-1), z0.log_softmax(-1)
    if beta == 0:
        log_m = log_p1
    elif beta == 1:
        log_m = log_p0
    else:
        log_m = torch.logaddexp(log_p0 + math.log(beta), log_p1 + math.log(1 - beta))
    kl1, kl0 = ((log_p.exp() * (log_p - log_m)).sum(-1) for log_p in (log_p1, log_p0))
    weight0, weight1 = (beta, 1 - beta) if 0 < beta < 1 else (1 - beta, beta)
    gradient = weight1 * log_p1.exp() * (log_p1 - log_m - kl1[:, None])
    size = log_p1.exp() * (1 - log_p1) * (1 + (log_p1 - log_m).abs() + kl1[:, None])
    if beta == 0:
        gradient = log_p1.exp() - log_p0.exp()
        size = log_p1.exp() * (1 - log_p1) + log_p0.exp() * (1 - log_p0)
    streams = [part for z in (z1, z0) for part in (z.amax(-1), (z - z.amax(-1, keepdim=True)).exp().sum(-1))]
    return torch.stack([*streams, kl1, weight0 * kl0 + weight1 * kl1]), gradient, size


def check(z1: Tensor, z0: Tensor, beta: float) -> None:
    stats, gradient, size = truth(z1, z0, beta)
    out = stats_of(z1, z0, beta)
    assert ((out[:4] - stats[:4]).abs() <= 1e-6 * stats[:4].abs()).all()
    assert ((out[4:] - stats[4:]).abs() <= 1e-6 * stats[4:].abs() + 2e-7).all()
    given = torch.cat([stats[:4].float(), torch.full((2, len(z1)), math.nan)])
    chunk_native.jsd_stats((z1, z0), given, beta, normalised=True)
    assert torch.equal(given[:4], stats[:4].float())
    assert ((given[4:] - stats[4:]).abs() <= 1e-6 * stats[4:].abs() + 2e-7).all()
    own = z1.clone()
    chunk_native.jsd_grad((own, z0), out, torch.ones(len(z1)), own, beta)
    assert ((own - gradient).abs() <= 4e-7 * size + 1e-37).all()


@betas
@pytest.mark.parametrize("vocabulary", WIDTHS)
def test_rows_of_any_width(isa: str, vocabulary: int, beta: float) -> None:
    pair = make_pair(3, vocabulary)
    check(pair.factual, pair.counterfactual, beta)


@betas
@pytest.mark.parametrize("size", [30.0, 1e4])
def test_rising_rows_and_large_logits(isa: str, size: float, beta: float) -> None:
    """The largest logits are at opposite ends, where the other stream's probability underflows."""
    z1 = torch.linspace(-size, size, 3001).repeat(2, 1)
    check(z1, z1.flip(1).contiguous(), beta)
    check(z1, z1 * 0.5, beta)


@betas
def test_long_rows_keep_their_precision(isa: str, beta: float) -> None:
    pair = make_pair(1, 262144)
    check(pair.factual, pair.counterfactual, beta)


@betas
def test_equal_streams_have_no_divergence(isa: str, beta: float) -> None:
    z = make_pair(4, 1031).factual
    out = stats_of(z, z.clone(), beta)
    own = z.clone()
    chunk_native.jsd_grad((own, z), out, torch.ones(4), own, beta)
    # At an end of beta the compiler may fuse a product into p0 - p1.
    limit = 0 if 0 < beta < 1 else 1e-7
    assert out[4:].abs().max() <= limit
    assert own.abs().max() <= limit


def test_the_logarithm_over_its_whole_range(isa: str) -> None:
    """With p1 spread over powers of two and p0 at one of them, each column's gradient is one logarithm."""
    exponents = torch.arange(0, 60.0)
    z1 = (-exponents * math.log(2)).repeat(200, 1) + torch.linspace(0, 1, 200)[:, None] * torch.randn(200, 60)
    check(z1, z1 + 3 * torch.randn(200, 60), 0.5)
    check(z1, z1 + 3 * torch.randn(200, 60), 2.0**-20)


@betas
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_gradients_through_the_cap_to_other_memory(isa: str, beta: float, softcap: float | None) -> None:
    pair = make_pair(5, 301, softcap)
    stats, gradient, _ = truth(pair.factual, pair.counterfactual, beta)
    cap = 1.0 if softcap is None else 1 - (pair.factual.double() / softcap) ** 2
    expected = gradient * pair.grad_factual.double()[:, None] * cap * -1.5
    out = torch.full((5, 301), math.nan), torch.full((5, 301), math.nan, dtype=torch.bfloat16)
    for target in out:
        arguments = stats.float(), pair.grad_factual, target, beta, softcap, -1.5
        chunk_native.jsd_grad((pair.factual.clone(), pair.counterfactual), *arguments)
    assert (out[0] - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert torch.equal(out[1], out[0].bfloat16())


def test_instruction_sets_agree() -> None:
    import nextquill_ext

    pair, before, results = make_pair(3, 1031), nextquill_ext.current_isa(), []
    for name in nextquill_ext.available_isas():
        nextquill_ext.set_isa(name)
        results.append(stats_of(pair.factual, pair.counterfactual, 0.3))
    nextquill_ext.set_isa(before)
    for result in results:
        torch.testing.assert_close(result, results[0], rtol=1e-6, atol=2e-7)


def test_no_rows() -> None:
    empty = torch.empty(0, 7)
    chunk_native.jsd_stats((empty, empty), torch.empty(6, 0), 0.5)
    chunk_native.jsd_grad((empty, empty), torch.empty(6, 0), torch.empty(0), empty, 0.5)


BAD = {
    "logits_student": ({"student": torch.zeros(3, 8).double()}, TypeError, "float32, got float64"),
    "logits_teacher": ({"teacher": torch.zeros(3, 9)}, ValueError, r"\[3, 8\], got \[3, 9\]"),
    "stats": ({"stats": torch.zeros(9, 3)}, ValueError, r"\[6, 3\], got \[9, 3\]"),
    "grad_jsd": ({"grad": torch.ones(4)}, ValueError, r"\[3\], got \[4\]"),
    "beta": ({"beta": 1.5}, ValueError, r"a number in \[0, 1\], got 1\.5"),
    "softcap": ({"softcap": 0.0}, ValueError, "above 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_argument_is_named(name: str) -> None:
    change, error, message = BAD[name]
    given: dict[str, Any] = {
        "student": torch.zeros(3, 8), "teacher": torch.zeros(3, 8), "stats": torch.zeros(6, 3),
        "grad": torch.ones(3), "beta": 0.5, "softcap": None,
    }  # fmt: skip
    student, teacher, stats, grad, beta, softcap = (given | change).values()
    with pytest.raises(error, match=f"^{name}: expected .*{message}"):
        chunk_native.jsd_grad((student, teacher), stats, grad, student, beta, softcap)
    if name in ("logits_student", "logits_teacher", "beta"):
        with pytest.raises(error, match=f"^{name}: expected .*{message}"):
            chunk_native.jsd_stats((student, teacher), torch.zeros(6, 3), beta)

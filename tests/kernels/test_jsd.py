"""The Jensen-Shannon kernels against float64: every option, odd shapes, buffers with gaps, bad arguments.

Under the interpreter, tiles have 128 columns, so that rows of 300 columns have several tiles and a tail.
"""

from __future__ import annotations

import pytest
import torch
from nextquill_kernels import jsd
from nextquill_kernels.launch import RowTile
from torch import Tensor

ON_GPU = torch.cuda.is_available()
# (rows, vocabulary): one tile and less, a tail of one column, a full last tile, several tiles; one row, one column.
SHAPES = [(5, 300), (7, 123), (3, 129), (2, 256), (1, 640), (4, 1), (3, 2)]
shapes = pytest.mark.parametrize(("n", "v"), SHAPES, ids=[f"n{n}-V{v}" for n, v in SHAPES])
betas = pytest.mark.parametrize("beta", [0, 0.1, 0.5, 1])
RELATIVE = 1e-5


@pytest.fixture(autouse=True, params=["small_tiles", "default_tiles"] if ON_GPU else ["small_tiles"])
def _tiles(request, monkeypatch):
    if request.param == "small_tiles":
        for name in ("JSD_STATS", "JSD_GRAD"):
            monkeypatch.setattr(jsd, name, RowTile(block_v=128, threads=128))


def make_logits(n: int, v: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Products of two related streams."""
    rng = torch.Generator().manual_seed(n * 1000 + v)
    x1 = torch.randn(n, v, generator=rng) * 3
    x0 = x1 + torch.randn(n, v, generator=rng)
    return x1.to(device), x0.to(device)


def truth(
    x1: Tensor, x0: Tensor, grad: Tensor, beta: float, bias: Tensor | None, softcap: float | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The statistics [6, n] and the gradient [n, V] in float64, from the definition and autograd.

    Logits before the cap are rounded to float32, as the kernels round them: a logit of 20 is rounded by 1e-6, which is
    more than the kernels add to a divergence.
    """
    leaf = x1.double().requires_grad_()

    def finished(x: Tensor) -> Tensor:
        z = scale * (x if bias is None else x + bias.double())
        rounded = scale * (x.detach().float() if bias is None else x.detach().float() + bias)
        z = z + (rounded.double() - z).detach()
        return z if softcap is None else softcap * torch.tanh(z / softcap)

    z1, z0 = finished(leaf), finished(x0.double())
    log_p1, log_p0 = z1.log_softmax(-1), z0.log_softmax(-1)
    m = beta * log_p0.exp() + (1 - beta) * log_p1.exp()
    kl1, kl0 = ((log_p.exp() * (log_p - m.log())).sum(-1) for log_p in (log_p1, log_p0))
    weight0, weight1 = (beta, 1 - beta) if 0 < beta < 1 else (1 - beta, beta)
    divergence = weight0 * kl0 + weight1 * kl1
    (divergence * grad.double()).sum().backward()
    streams = [part for z in (z1, z0) for part in (z.amax(-1), (z - z.amax(-1, keepdim=True)).exp().sum(-1))]
    return torch.stack([*streams, kl1, divergence]).detach(), leaf.grad


def assert_stats(out: Tensor, expected: Tensor) -> None:
    for actual, true in zip(out, expected, strict=True):
        assert (actual - true).abs().max() <= RELATIVE * max(1.0, true.abs().max())
    # Divergences are small beside 1, and precise to much less than RELATIVE of it.
    assert (out[4:] - expected[4:]).abs().max() <= 1e-6


@pytest.mark.covering(2)
@shapes
@betas
@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (None, -2.0), (5.0, 1.0), (2.0, 1.5)])
@pytest.mark.parametrize("biased", [True, False])
def test_statistics_and_gradient(n, v, beta, softcap, scale, biased, device):
    x1, x0 = make_logits(n, v, device)
    bias, grad = torch.randn(v, device=device) if biased else None, torch.randn(n, device=device)
    stats, dx = truth(x1, x0, grad, beta, bias, softcap, scale)
    out = torch.full((6, n), torch.nan, device=device)
    jsd.jsd_stats((x1, x0), out, beta, bias, softcap, scale)
    assert_stats(out, stats)
    kept, own = x0.clone(), x1.clone()
    others = [torch.full_like(x1, torch.nan, dtype=dtype) for dtype in (torch.float32, torch.float16)]
    for target in (*others, own):
        jsd.jsd_grad((own, x0), out, grad, target, beta, bias, softcap, scale)
    assert torch.equal(x0, kept)
    assert torch.equal(own, others[0])
    assert (own - dx).abs().max() <= RELATIVE * dx.abs().max() + 1e-6
    assert ((others[1] - own).abs() <= 2**-11 * own.abs() + 2**-24).all()


@betas
def test_rows_of_larger_buffers(beta, device):
    """Gaps between rows and before the first column; the surrounding memory is NaN and stays so."""
    x1, x0 = make_logits(5, 300, device)
    grad = torch.randn(5, device=device)
    buffers = [torch.full((7, 300 + extra), torch.nan, device=device) for extra in (64, 7, 32)]
    view1, view0, target = buffers[0][1:-1, 16:316], buffers[1][1:-1, 3:303], buffers[2][1:-1, :300]
    view1.copy_(x1)
    view0.copy_(x0)
    big = torch.full((8, 20), torch.nan, device=device)
    out = big[1:7, 7:12]
    jsd.jsd_stats((view1, view0), out, beta)
    strided = torch.stack([grad, torch.full_like(grad, torch.nan)], 1)[:, 0]
    jsd.jsd_grad((view1, view0), out, strided, target, beta)
    stats, dx = truth(x1, x0, grad, beta, None, None, 1.0)
    assert_stats(out, stats)
    assert (target - dx).abs().max() <= RELATIVE * dx.abs().max() + 1e-6
    assert big.isnan().sum() == 160 - 30
    assert all(buffer.isnan().sum() == buffer.numel() - 1500 for buffer in buffers)


@betas
def test_equal_streams(beta, device):
    x1, _ = make_logits(5, 300, device)
    out, dx = torch.empty(6, 5, device=device), torch.empty_like(x1)
    jsd.jsd_stats((x1, x1.clone()), out, beta)
    jsd.jsd_grad((x1, x1.clone()), out, torch.ones(5, device=device), dx, beta)
    assert not out[4:].any()
    assert not dx.any()


@betas
def test_long_rows_keep_their_precision(beta, device):
    x1, x0 = make_logits(1, 20_000, device)
    out, grad = torch.empty(6, 1, device=device), torch.ones(1, device=device)
    jsd.jsd_stats((x1, x0), out, beta)
    stats, _ = truth(x1, x0, grad, beta, None, None, 1.0)
    assert_stats(out, stats)


@betas
def test_repeated_launches_give_the_same_bits(beta, device):
    x1, x0 = make_logits(3, 700, device)
    results = []
    for _ in range(3):
        out, dx = torch.empty(6, 3, device=device), torch.empty_like(x1)
        jsd.jsd_stats((x1, x0), out, beta)
        jsd.jsd_grad((x1, x0), out, torch.ones(3, device=device), dx, beta)
        results.append((out, dx))
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))


def test_no_rows(device):
    empty = torch.empty(0, 7, device=device)
    jsd.jsd_stats((empty, empty), torch.empty(6, 0, device=device), 0.5)
    jsd.jsd_grad((empty, empty), torch.empty(6, 0, device=device), torch.empty(0, device=device), empty, 0.5)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="the interpreter runs one warp: it cannot show a race")
@pytest.mark.parametrize("v", [151936, 32001, 4096, 5000])
def test_a_gradient_over_its_own_logits_does_not_race(v, device):
    x1 = torch.randn(400, v, device=device) * 3
    x0, grad = x1 + torch.randn_like(x1), torch.randn(400, device=device)
    out, other = torch.empty(6, 400, device=device), torch.empty_like(x1)
    jsd.jsd_stats((x1, x0), out, 0.5, None, 30.0)
    jsd.jsd_grad((x1, x0), out, grad, other, 0.5, None, 30.0)
    for _ in range(20):
        own = x1.clone()
        jsd.jsd_grad((own, x0), out, grad, own, 0.5, None, 30.0)
        assert torch.equal(own, other)


BAD = {
    "student dtype": (
        {"x1": torch.zeros(5, 300).double()},
        TypeError,
        r"logits_student: expected dtype torch\.float32",
    ),
    "teacher shape": (
        {"x0": torch.zeros(5, 299)},
        ValueError,
        r"logits_teacher: expected shape \[5, 300\], got \[5, 299\]",
    ),
    "teacher layout": ({"x0": torch.zeros(5, 600)[:, ::2]}, ValueError, "logits_teacher: expected a last stride of 1"),
    "stats": ({"stats": torch.zeros(9, 5)}, ValueError, r"(out|stats): expected shape \[6, 5\], got \[9, 5\]"),
    "bias": ({"bias": torch.zeros(299)}, ValueError, r"bias: expected shape \[300\], got \[299\]"),
    "beta": ({"beta": 1.5}, ValueError, r"beta: expected a number in \[0, 1\], got 1\.5"),
    "beta nan": ({"beta": float("nan")}, ValueError, r"beta: expected a number in \[0, 1\], got nan"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name, device):
    change, error, message = BAD[name]
    given = {
        "x1": torch.zeros(5, 300),
        "x0": torch.zeros(5, 300),
        "stats": torch.zeros(6, 5),
        "beta": 0.5,
        "bias": None,
    }
    given |= change
    x1, x0, stats, beta, bias = (each.to(device) if isinstance(each, Tensor) else each for each in given.values())
    with pytest.raises(error, match=message):
        jsd.jsd_stats((x1, x0), stats, beta, bias)
    with pytest.raises(error, match=message):
        jsd.jsd_grad((x1, x0), stats, torch.ones(5, device=device), torch.zeros(5, 300, device=device), beta, bias)


def test_bad_targets_of_the_gradient(device):
    x = torch.zeros(5, 300, device=device)
    stats, grad = torch.zeros(6, 5, device=device), torch.ones(5, device=device)
    with pytest.raises(TypeError, match=r"grad_jsd: .*float32, got torch\.float64"):
        jsd.jsd_grad((x, x), stats, grad.double(), x, 0.5)
    with pytest.raises(TypeError, match=r"out: expected dtype torch\.float32, torch\.bfloat16"):
        jsd.jsd_grad((x, x), stats, grad, x.double(), 0.5)
    with pytest.raises(ValueError, match="out: expected a row stride of at least 300"):
        jsd.jsd_grad((x, x), stats, grad, torch.zeros(300, device=device).expand(5, 300), 0.5)

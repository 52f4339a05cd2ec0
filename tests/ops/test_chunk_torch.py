"""The chunk kernels alone, on given logits: statistics, gradients in place, and row blocks of any size."""

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from nextquill.ops import chunk_torch
from tests.helpers import FLOAT32_RELATIVE, assert_close

CAPS = [(None, 1.0), (None, 0.3), (4.0, 1.0), (4.0, -1.5)]
caps = pytest.mark.parametrize(("softcap", "scale"), CAPS, ids=["plain", "scale", "softcap", "softcap-scale"])
shapes = pytest.mark.parametrize(("n", "v"), [(252, 123), (1, 5), (7, 1), (300, 1031)], ids=lambda x: str(x))


@pytest.fixture(params=[1, 2**20], ids=["row-blocks", "large-blocks"], autouse=True)
def _block_bytes(request, monkeypatch):
    monkeypatch.setattr(chunk_torch, "_BLOCK_BYTES_PER_THREAD", request.param)


def raw_logits(n, v):
    """Two streams before scale and cap, float64 leaves, with labels and an upstream gradient per nll."""
    z1, z0 = (torch.randn(n, v, dtype=torch.float64, requires_grad=True) for _ in range(2))
    return z1, z0, torch.randint(v, (n,)), torch.randn(3, n, dtype=torch.float64)


def capped(raw, softcap, scale):
    z = raw * scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def nll(z, y):
    return F.cross_entropy(z, y, reduction="none")


@shapes
def test_stats_are_cross_entropies_and_leave_the_logits(n, v):
    raw1, raw0, y, _ = raw_logits(n, v)
    z1, z0 = raw1.detach().float(), raw0.detach().float()
    kept = z1.clone(), z0.clone()
    assert_close(chunk_torch.token_stats(z1, y), nll(raw1, y))
    assert_close(chunk_torch.effect_stats(z1, z0, y), nll(raw1 - raw0, y))
    assert torch.equal(z1, kept[0])
    assert torch.equal(z0, kept[1])


@shapes
@caps
def test_token_grad_overwrites_the_logits_with_the_gradient(n, v, softcap, scale):
    raw, _, y, (g, _, _) = raw_logits(n, v)
    (nll(capped(raw, softcap, scale), y) * g).sum().backward()
    z = capped(raw.detach(), softcap, scale).float()
    result = chunk_torch.token_grad_(z, y, g.float(), softcap, scale)
    assert result.data_ptr() == z.data_ptr()
    assert_close(z, raw.grad, FLOAT32_RELATIVE)


@shapes
@caps
@pytest.mark.parametrize("with_counterfactual", [True, False], ids=["counterfactual", "no-counterfactual"])
def test_pair_grad_overwrites_both_logits(n, v, softcap, scale, with_counterfactual):
    raw1, raw0, y, (g_f, g_c, g_e) = raw_logits(n, v)
    z1, z0 = capped(raw1, softcap, scale), capped(raw0, softcap, scale)
    objective = (nll(z1, y) * g_f).sum() + (nll(z1 - z0, y) * g_e).sum()
    if with_counterfactual:
        objective = objective + (nll(z0, y) * g_c).sum()
    objective.backward()
    z1, z0 = z1.detach().float(), z0.detach().float()
    chunk_torch.pair_grad_(
        z1, z0, y, g_f.float(), g_c.float() if with_counterfactual else None, g_e.float(), softcap, scale
    )
    assert_close(z1, raw1.grad, FLOAT32_RELATIVE)
    assert_close(z0, raw0.grad, FLOAT32_RELATIVE)


def test_work_stays_inside_the_given_rows():
    """Chunks are views of a larger buffer: rows beyond them must not be touched, nor read when they hold NaN."""
    buffer = torch.full((10, 6), torch.nan)
    buffer[2:7] = torch.randn(5, 6)
    y = torch.randint(6, (5,))
    assert torch.isfinite(chunk_torch.token_stats(buffer[2:7], y)).all()
    chunk_torch.token_grad_(buffer[2:7], y, torch.ones(5), None, 1.0)
    assert torch.isfinite(buffer[2:7]).all()
    assert torch.isnan(buffer[:2]).all()
    assert torch.isnan(buffer[7:]).all()

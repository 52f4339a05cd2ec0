"""The chunk kernels of every implementation alone, on given logits: one interface, one set of expectations.

Details of one implementation (row blocks, instruction sets, tiles) have their own tests.
"""

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from nextquill.ops import chunk_torch
from nextquill.ops.dispatch import resolve_impl, why_not
from tests.helpers import FLOAT32_RELATIVE, assert_close

CAPS = [(None, 1.0), (None, 0.3), (4.0, 1.0), (4.0, -1.5)]
caps = pytest.mark.parametrize(("softcap", "scale"), CAPS, ids=["plain", "scale", "softcap", "softcap-scale"])
shapes = pytest.mark.parametrize(("n", "v"), [(252, 123), (1, 5), (7, 1), (3, 1031)], ids=lambda x: str(x))
FLOAT32 = torch.float32


@pytest.fixture(params=["torch-row-blocks", "torch", "native", "triton"])
def kernels(request, monkeypatch):
    impl, _, small = request.param.partition("-")
    if small:
        monkeypatch.setattr(chunk_torch, "_BLOCK_BYTES_PER_THREAD", 1)
    if reason := why_not(impl, torch.device("cpu"), FLOAT32):
        pytest.skip(reason)
    return resolve_impl(impl, torch.device("cpu"), FLOAT32)


def raw_logits(n, v):
    """Two streams before scale and cap as float64 leaves, with labels and an upstream gradient per NLL."""
    z1, z0 = (torch.randn(n, v, dtype=torch.float64, requires_grad=True) for _ in range(2))
    return z1, z0, torch.randint(v, (n,)), torch.randn(3, n, dtype=torch.float64)


def capped(raw, softcap, scale):
    z = raw * scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def nll(z, y):
    return F.cross_entropy(z, y, reduction="none")


def given(kernels, raw, softcap, scale):
    """The logits that kernels read, float32, and the options that their statistics take."""
    if kernels.finish_logits:
        return raw.detach().float(), {"softcap": softcap, "logit_scale": scale}
    return capped(raw, softcap, scale).detach().float(), {}


def true_stats(z, y):
    """The three statistics [3, n] of float64 logits."""
    largest = z.amax(1)
    return torch.stack([largest, (z - largest[:, None]).exp().sum(1), nll(z, y)]).detach()


def narrow_view(n, rows):
    """`rows` rows of statistics as the engines pass them: a view into columns of a larger buffer filled with NaN."""
    return torch.full((2 * rows, n + 5), torch.nan)[::2, 2 : n + 2]


@pytest.mark.covering(1)
@shapes
def test_stats_are_those_of_the_softmax_and_leave_the_logits(kernels, n, v):
    raw1, raw0, y, _ = raw_logits(n, v)
    z1, z0 = raw1.detach().float(), raw0.detach().float()
    kept = z1.clone(), z0.clone()
    token, pair, full = narrow_view(n, 3), narrow_view(n, 9), narrow_view(n, 11)
    kernels.token_stats(z1, y, token)
    kernels.pair_stats((z1, z0), y, pair)
    kernels.pair_stats((z1, z0), y, full)
    for index, z in enumerate((raw1, raw0, raw1 - raw0)):
        for actual, expected in zip(pair[3 * index :], true_stats(z, y), strict=False):
            assert_close(actual, expected)
    assert_close(token, pair[:3], 1e-6)
    assert_close(full[:9], pair, 1e-6)
    log_p1, log_p0 = raw1.log_softmax(1), raw0.log_softmax(1)
    assert_close(full[9], (log_p1.exp() * (log_p1 - log_p0)).sum(1))
    assert_close(full[10], -(log_p1.exp() * log_p1).sum(1))
    assert torch.equal(z1, kept[0])
    assert torch.equal(z0, kept[1])


@pytest.mark.covering(2)
@shapes
@caps
def test_token_grad_overwrites_the_logits_with_the_gradient(kernels, n, v, softcap, scale):
    raw, _, y, (g, _, _) = raw_logits(n, v)
    own = capped(raw, softcap, scale)
    (nll(own, y) * g).sum().backward()
    z, _ = given(kernels, raw, softcap, scale)
    other = torch.full_like(z, torch.nan)
    for out in (other, z):
        own_z = z if out is z else z.clone()
        kernels.token_grad(own_z, y, true_stats(own, y).float(), g.float(), out, softcap=softcap, logit_scale=scale)
        assert_close(out, raw.grad, FLOAT32_RELATIVE)


@pytest.mark.covering(2)
@shapes
@caps
@pytest.mark.parametrize("mode", ["counterfactual", "no-counterfactual", "detached"])
def test_pair_grad_overwrites_both_logits(kernels, n, v, softcap, scale, mode):
    raw1, raw0, y, (g_f, g_c, g_e) = raw_logits(n, v)
    z1, z0 = capped(raw1, softcap, scale), capped(raw0, softcap, scale)
    stats = torch.cat([true_stats(z, y) for z in (z1, z0, z1 - z0)]).float()
    objective = (nll(z1, y) * g_f).sum() + (nll(z1 - z0, y) * g_e).sum()
    if mode == "counterfactual":
        objective = objective + (nll(z0, y) * g_c).sum()
    objective.backward()
    (z1, _), (z0, _) = (given(kernels, raw, softcap, scale) for raw in (raw1, raw0))
    kept, detached = z0.clone(), mode == "detached"
    g = (g_f.float(), g_c.float() if mode == "counterfactual" else None, g_e.float())
    others = torch.full_like(z1, torch.nan), None if detached else torch.full_like(z0, torch.nan)
    options = {"softcap": softcap, "logit_scale": scale}
    kernels.pair_grad((z1.clone(), z0.clone()), y, stats, g, others, **options)
    kernels.pair_grad((z1, z0), y, stats, g, (z1, None if detached else z0), **options)
    for out in (z1, others[0]):
        assert_close(out, raw1.grad, FLOAT32_RELATIVE)
    if detached:
        assert torch.equal(z0, kept)
    else:
        for out in (z0, others[1]):
            assert_close(out, raw0.grad, FLOAT32_RELATIVE)


@pytest.mark.covering(2)
@caps
@pytest.mark.parametrize("mode", ["counterfactual", "no-counterfactual", "detached"])
@pytest.mark.parametrize("bounds", [(0, 300), (300, 1031)], ids=str)
def test_a_label_that_is_not_among_the_columns(kernels, softcap, scale, mode, bounds):
    """Some columns of a row, as one of several processes has them: statistics without an nll, gradients without onehot.

    Where the label is among these columns, the gradient has its entry. The statistics are those of all columns.
    """
    n, (start, stop) = 24, bounds
    raw1, raw0, y, (g_f, g_c, g_e) = raw_logits(n, 1031)
    z1, z0 = capped(raw1, softcap, scale), capped(raw0, softcap, scale)
    stats = torch.cat([true_stats(z, y) for z in (z1, z0, z1 - z0)]).float()
    objective = (nll(z1, y) * g_f).sum() + (nll(z1 - z0, y) * g_e).sum()
    token_gradient = torch.autograd.grad((nll(z1, y) * g_f).sum(), raw1, retain_graph=True)[0]
    if mode == "counterfactual":
        objective = objective + (nll(z0, y) * g_c).sum()
    objective.backward()
    own = torch.where((y >= start) & (y < stop), y - start, stop - start)
    absent = own == stop - start
    assert 0 < int(absent.sum()) < n
    (x1, options), (x0, _) = (given(kernels, raw[:, start:stop], softcap, scale) for raw in (raw1, raw0))
    found, token = torch.full((11, n), 7.0), torch.full((3, n), 7.0)
    kernels.pair_stats((x1, x0), own, found, **options)
    kernels.token_stats(x1, own, token, **options)
    assert_close(token[:2], found[:2], 1e-6)
    assert torch.equal(token[2].isnan(), absent)
    for index, z in enumerate(each[:, start:stop] for each in (z1, z0, z1 - z0)):
        expected = true_stats(z, own.clamp(max=stop - start - 1))
        assert_close(found[3 * index], expected[0])
        assert_close(found[3 * index + 1], expected[1])
        assert torch.equal(found[3 * index + 2].isnan(), absent)
        assert_close(found[3 * index + 2, ~absent], expected[2, ~absent])
    assert found[9:].isfinite().all()
    g, options = (g_f.float(), g_c.float() if mode == "counterfactual" else None, g_e.float()), {"softcap": softcap}
    options["logit_scale"] = scale
    out = torch.full_like(x1, torch.nan)
    kernels.token_grad(x1.clone(), own, stats[:3], g[0], out, **options)
    assert_close(out, token_gradient[:, start:stop])
    kernels.pair_grad((x1, x0), own, stats, g, (x1, None if mode == "detached" else x0), **options)
    assert_close(x1, raw1.grad[:, start:stop])
    if mode != "detached":
        assert_close(x0, raw0.grad[:, start:stop])


def jsd_of(z1, z0, beta):
    """KL(p1 ‖ m) and the divergence of float64 logits, from probabilities; z0 is a constant."""
    p1, p0 = z1.softmax(1), z0.detach().softmax(1)
    if beta == 0:
        return torch.zeros(len(z1)), (p0 * (p0 / p1).log()).sum(1)
    if beta == 1:
        kl = (p1 * (p1 / p0).log()).sum(1)
        return kl, kl
    m = beta * p0 + (1 - beta) * p1
    kl1, kl0 = ((p * (p / m).log()).sum(1) for p in (p1, p0))
    return kl1, beta * kl0 + (1 - beta) * kl1


@pytest.mark.covering(2)
@shapes
@caps
@pytest.mark.parametrize("beta", [0, 0.1, 0.5, 1])
def test_jsd_and_its_gradient_over_the_logits_or_elsewhere(kernels, n, v, softcap, scale, beta):
    raw1, raw0, _, (g, _, _) = raw_logits(n, v)
    own1, own0 = (capped(raw, softcap, scale) for raw in (raw1, raw0))
    kl1, jsd = jsd_of(own1, own0, beta)
    (jsd * g).sum().backward()
    (z1, options), (z0, _) = (given(kernels, raw, softcap, scale) for raw in (raw1, raw0))
    kept = z1.clone(), z0.clone()
    stats = narrow_view(n, 6)
    kernels.jsd_stats((z1, z0), stats, beta, **options)
    assert all(torch.equal(z, before) for z, before in zip((z1, z0), kept, strict=True))
    for index, z in enumerate((own1, own0)):
        assert_close(stats[2 * index : 2 * index + 2], true_stats(z, torch.zeros(n, dtype=torch.long))[:2])
    for actual, expected in zip(stats[4:], (kl1, jsd), strict=True):
        assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max() + 1e-7
    other, half = torch.full_like(z1, torch.nan), torch.full_like(z1, torch.nan, dtype=torch.float16)
    options = {"softcap": softcap, "logit_scale": scale}
    for out in (other, half, z1):
        kernels.jsd_grad((z1 if out is z1 else z1.clone(), z0), stats, g.float(), out, beta, **options)
    assert torch.equal(z0, kept[1])
    for out in (other, z1):
        assert (out - raw1.grad).abs().max() <= FLOAT32_RELATIVE * raw1.grad.abs().max() + 1e-6
    assert ((half - other).abs() <= 2**-11 * other.abs() + 2**-24).all()


@shapes
@pytest.mark.parametrize("beta", [0, 0.1, 0.5, 1])
def test_columns_add_their_shares_of_jsd_where_the_normalisers_are_given(kernels, n, v, beta):
    """Two parts of the columns, as processes that divide the vocabulary hold them, with statistics of all of them."""
    raw1, raw0, _, (g, _, _) = raw_logits(n, v)
    kl1, jsd = jsd_of(raw1, raw0, beta)
    (jsd * g).sum().backward()
    whole = torch.cat([true_stats(z, torch.zeros(n, dtype=torch.long))[:2] for z in (raw1, raw0)]).float()
    parts = [slice(0, v // 3), slice(v // 3, v)] if v > 2 else [slice(0, v)]
    shares, gradient = torch.zeros(2, n, dtype=torch.float64), torch.full((n, v), torch.nan)
    for part in parts:
        z1, z0 = (raw[:, part].detach().float() for raw in (raw1, raw0))
        stats = narrow_view(n, 6)
        stats[:4] = whole
        kernels.jsd_stats((z1, z0), stats, beta, normalised=True)
        assert torch.equal(stats[:4], whole)
        shares += stats[4:]
        stats[4] = kl1.detach()
        kernels.jsd_grad((z1, z0), stats, g.float(), gradient[:, part], beta)
    for actual, expected in zip(shares, (kl1.detach(), jsd.detach()), strict=True):
        assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max() + 1e-7
    assert (gradient - raw1.grad).abs().max() <= FLOAT32_RELATIVE * raw1.grad.abs().max() + 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_gradient_in_a_half_dtype(kernels, dtype):
    raw1, raw0, y, (g_f, g_c, g_e) = raw_logits(7, 301)
    stats = torch.cat([true_stats(z, y) for z in (raw1, raw0, raw1 - raw0)]).float()
    objective = (nll(raw1, y) * g_f).sum() + (nll(raw0, y) * g_c).sum() + (nll(raw1 - raw0, y) * g_e).sum()
    objective.backward()
    logits = raw1.detach().float(), raw0.detach().float()
    outs = torch.full((2, 7, 301), torch.nan, dtype=dtype)
    kernels.pair_grad(logits, y, stats, (g_f.float(), g_c.float(), g_e.float()), tuple(outs))
    # Triton's interpreter truncates to bfloat16.
    limit = 2**-7 if dtype == torch.bfloat16 else 2**-11
    for out, raw in zip(outs, (raw1, raw0), strict=True):
        assert ((out.double() - raw.grad).abs() <= limit * raw.grad.abs() + 1e-6).all()


@caps
@pytest.mark.parametrize("biased", [True, False])
def test_kernels_that_finish_logits(kernels, softcap, scale, biased):
    """Bias, scale and cap inside the kernels give the statistics and the gradient of finished logits."""
    if not kernels.finish_logits:
        pytest.skip("these kernels read finished logits")
    raw1, raw0, y, (g_f, g_c, g_e) = raw_logits(5, 301)
    bias = torch.randn(301, dtype=torch.float64) if biased else torch.zeros(301, dtype=torch.float64)
    z1, z0 = (capped(raw + bias, softcap, scale) for raw in (raw1, raw0))
    objective = (nll(z1, y) * g_f).sum() + (nll(z0, y) * g_c).sum() + (nll(z1 - z0, y) * g_e).sum()
    objective.backward()
    logits = raw1.detach().float(), raw0.detach().float()
    options = {"bias": bias.float() if biased else None, "softcap": softcap, "logit_scale": scale}
    token, pair, full = narrow_view(5, 3), narrow_view(5, 9), narrow_view(5, 11)
    kernels.token_stats(logits[0], y, token, **options)
    kernels.pair_stats(logits, y, pair, **options)
    kernels.pair_stats(logits, y, full, **options)
    truth = torch.cat([true_stats(z, y) for z in (z1, z0, z1 - z0)])
    assert_close(token, truth[:3], 1e-5)
    assert_close(pair, truth, 1e-5)
    assert_close(full[:9], truth, 1e-5)
    log_p1, log_p0 = z1.detach().log_softmax(1), z0.detach().log_softmax(1)
    assert_close(full[9], (log_p1.exp() * (log_p1 - log_p0)).sum(1), 1e-5)
    outs = torch.full((2, 5, 301), torch.nan)
    kernels.pair_grad(logits, y, pair, (g_f.float(), g_c.float(), g_e.float()), tuple(outs), **options)
    for out, raw in zip(outs, (raw1, raw0), strict=True):
        assert_close(out, raw.grad, 1e-5)
    raw1.grad, stats = None, narrow_view(5, 6)
    kl1, jsd = jsd_of(*(capped(raw + bias, softcap, scale) for raw in (raw1, raw0)), 0.3)
    (jsd * g_f).sum().backward()
    kernels.jsd_stats(logits, stats, 0.3, **options)
    assert_close(stats[:2], truth[:2], 1e-5)
    assert_close(stats[2:4], truth[3:5], 1e-5)
    assert_close(stats[4], kl1, 1e-5)
    assert_close(stats[5], jsd, 1e-5)
    kernels.jsd_grad(logits, stats, g_f.float(), outs[0], 0.3, **options)
    assert_close(outs[0], raw1.grad, 1e-5)


def test_a_masked_label_and_masked_columns(kernels):
    """A column of -inf cannot occur: it has probability 0 and an infinite NLL as a label, and the softmax is finite."""
    z = torch.randn(3, 7)
    z[:, 5] = -torch.inf
    y, out = torch.tensor([5, 1, 2]), torch.empty(3, 3)
    kernels.token_stats(z, y, out)
    assert_close(out[:2], true_stats(z.double(), y)[:2])
    assert out[2, 0] == torch.inf
    assert torch.isfinite(out[2, 1:]).all()
    kernels.token_grad(z, y, out, torch.ones(3), z)
    assert torch.isfinite(z).all()
    assert z[:, 5].tolist() == [-1.0, 0.0, 0.0]


def test_a_masked_column_adds_nothing_to_divergence_and_entropy(kernels):
    """Its probability is 0, and 0 · inf would be NaN. Its counterfactual logit does not matter."""
    z1, z0, y, out = torch.randn(3, 7), torch.randn(3, 7), torch.tensor([0, 1, 2]), torch.empty(11, 3)
    z1[:, 5] = -torch.inf
    kernels.pair_stats((z1, z0), y, out)
    can_occur = torch.arange(7) != 5
    log_p1, log_p0 = (z.double().log_softmax(1)[:, can_occur] for z in (z1, z0))
    assert_close(out[9], (log_p1.exp() * (log_p1 - log_p0)).sum(1))
    assert_close(out[10], -(log_p1.exp() * log_p1).sum(1))


@pytest.mark.parametrize("masked", ["student", "teacher", "both"])
def test_a_masked_column_in_jsd(kernels, masked):
    """Its share of the mixture is the other stream's alone. At an end of beta the divergence is infinite there."""
    z1, z0, out = torch.randn(3, 7), torch.randn(3, 7), torch.empty(6, 3)
    for z in {"student": (z1,), "teacher": (z0,), "both": (z1, z0)}[masked]:
        z[:, 5] = -torch.inf
    p1, p0 = z1.double().softmax(1), z0.double().softmax(1)
    m = 0.3 * p0 + 0.7 * p1
    kl1, kl0 = (torch.special.xlogy(p, p / m).nan_to_num(0.0).sum(1) for p in (p1, p0))
    kernels.jsd_stats((z1, z0), out, 0.3)
    assert_close(out[4], kl1)
    assert_close(out[5], 0.3 * kl0 + 0.7 * kl1)
    dz = torch.empty(3, 7)
    kernels.jsd_grad((z1.clone(), z0), out, torch.ones(3), dz, 0.3)
    log_ratio = torch.where(p1 > 0, (p1 / m).log(), 0.0)
    assert_close(dz, 0.7 * p1 * (log_ratio - kl1[:, None]))
    for beta, infinite in ((0, masked == "student"), (1, masked == "teacher")):
        kernels.jsd_stats((z1, z0), out, beta)
        assert (out[5] > 1e30).all() if infinite else torch.isfinite(out).all()


@pytest.mark.parametrize("beta", [0, 0.3, 1])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("stream", [0, 1], ids=["student", "teacher"])
def test_a_broken_row_of_jsd_is_visible_and_alone(kernels, bad, stream, beta):
    logits, out, dz = torch.randn(2, 4, 9), torch.empty(6, 4), torch.empty(4, 9)
    logits[stream, 2, 7] = bad
    kernels.jsd_stats(tuple(logits), out, beta)
    assert torch.isfinite(out[5]).tolist() == [True, True, False, True]
    kernels.jsd_grad(tuple(logits.clone()), out, torch.ones(4), dz, beta)
    assert torch.isfinite(dz).all(1).tolist() == [True, True, False, True]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=["nan", "inf"])
def test_a_broken_row_is_visible_and_alone(kernels, bad):
    z1, z0, y = torch.randn(4, 9), torch.randn(4, 9), torch.tensor([0, 1, 2, 3])
    z1[2, 7] = bad
    out = torch.empty(9, 4)
    kernels.pair_stats((z1, z0), y, out)
    broken = ~torch.isfinite(out)
    assert broken[2].tolist() == broken[8].tolist() == [False, False, True, False]
    assert not broken[3:6].any()


def test_work_stays_inside_the_given_rows(kernels):
    """Chunks are views of a larger buffer, and memory outside of them is neither written nor read."""
    buffer = torch.full((10, 11), torch.nan)
    buffer[2:7, 3:9] = torch.randn(5, 6)
    view, y, out = buffer[2:7, 3:9], torch.randint(6, (5,)), torch.empty(3, 5)
    kernels.token_stats(view, y, out)
    assert torch.isfinite(out).all()
    kernels.token_grad(view, y, out, torch.ones(5), view)
    stats = torch.empty(6, 5)
    kernels.jsd_stats((view, torch.zeros(5, 6)), stats, 0.5)
    kernels.jsd_stats((torch.zeros(5, 6), view), stats, 0.5)
    kernels.jsd_grad((view, torch.zeros(5, 6)), stats, torch.ones(5), view, 0.5)
    assert torch.isfinite(stats).all()
    assert torch.isfinite(view).all()
    assert torch.isfinite(buffer).sum() == view.numel()


def test_extreme_logits_do_not_overflow(kernels):
    z1, z0 = 1e4 * torch.randn(4, 33), 1e4 * torch.randn(4, 33)
    y, out = torch.randint(33, (4,)), torch.empty(9, 4)
    kernels.pair_stats((z1, z0), y, out)
    for index, z in enumerate((z1.double(), z0.double(), z1.double() - z0.double())):
        assert_close(out[3 * index + 2], nll(z, y))
    kernels.pair_grad((z1, z0), y, out, torch.ones(3, 4), (z1, z0))
    assert torch.isfinite(z1).all()
    assert torch.isfinite(z0).all()

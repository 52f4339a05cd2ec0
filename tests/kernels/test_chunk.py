"""The chunk kernels against float64: every option, odd shapes, buffers poisoned with NaN, infinities, huge logits.

Under the interpreter, tiles have 128 columns, so that rows of 300 columns have several tiles and a tail.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from nextquill_kernels import chunk, chunk_grad, chunk_stats
from nextquill_kernels.launch import RowTile
from torch import Tensor

ON_GPU = torch.cuda.is_available()
# (rows, vocabulary): one tile and less, a tail of one column, a full last tile, several tiles; one row, one column.
SHAPES = [(5, 300), (7, 123), (3, 129), (2, 256), (1, 640), (4, 1), (3, 2)]
SHAPE_IDS = [f"n{n}-V{v}" for n, v in SHAPES]
RELATIVE = 1e-5
# Half a unit in the last place is 2^-9 and 2^-12; the interpreter truncates to bfloat16, which doubles its error.
NARROW_ERROR = {torch.float16: 2**-11, torch.bfloat16: 2**-8 if ON_GPU else 2**-7}


def token_grad(
    logits: Tensor,
    labels: Tensor,
    stats: Tensor,
    grad: Tensor,
    softcap: float | None = None,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The gradient in `dtype`: over the logits in float32, in other memory otherwise."""
    out = logits if dtype == torch.float32 else torch.full_like(logits, torch.nan, dtype=dtype)
    chunk.token_grad(logits, labels, stats, grad, out, None, softcap, scale)
    return out


def pair_grad(
    logits: tuple[Tensor, Tensor],
    labels: Tensor,
    stats: Tensor,
    grads: tuple[Tensor, Tensor | None, Tensor],
    softcap: float | None = None,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    detach: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The gradients of a pair, as `token_grad` gives them."""
    outs = [z if dtype == torch.float32 else torch.full_like(z, torch.nan, dtype=dtype) for z in logits]
    outs = (outs[0], None if detach else outs[1])
    chunk.pair_grad(logits, labels, stats, grads, outs, None, softcap, scale)
    return outs


@pytest.fixture(autouse=True, params=["small_tiles", "default_tiles"] if ON_GPU else ["small_tiles"])
def _tiles(request, monkeypatch):
    if request.param == "small_tiles":
        for module, names in (
            (chunk_stats, "TOKEN_STATS PAIR_STATS PAIR_MOMENTS"),
            (chunk_grad, "TOKEN_GRAD PAIR_GRAD"),
        ):
            for name in names.split():
                monkeypatch.setattr(module, name, RowTile(block_v=128, threads=128))


@dataclass
class Case:
    """Products x of two related streams, labels, and upstream gradients; truth is float64."""

    z1: Tensor
    z0: Tensor
    labels: Tensor
    grads: Tensor  # [3, n]: factual, counterfactual, effect

    @property
    def logits(self) -> tuple[Tensor, Tensor]:
        return self.z1, self.z0

    def stats(self, rows: int = 9, logits: tuple[Tensor, Tensor] | None = None) -> Tensor:
        out = torch.full((rows, self.labels.numel()), torch.nan, device=self.z1.device)
        chunk.pair_stats(logits or self.logits, self.labels, out)
        return out


def make_case(n: int, v: int, device: torch.device, *, spread: float = 3.0) -> Case:
    rng = torch.Generator().manual_seed(n * 1000 + v)
    z1 = torch.randn(n, v, generator=rng) * spread
    z0 = z1 + torch.randn(n, v, generator=rng)
    labels = torch.randint(v, (n,), generator=rng)
    grads = torch.randn(3, n, generator=rng)
    return Case(*(t.to(device) for t in (z1, z0, labels, grads)))


def true_stats(z: Tensor, labels: Tensor) -> Tensor:
    """Max, sum and NLL in float64, [3, n]; 0 for ignored rows."""
    z = z.double()
    largest = z.amax(-1)
    nll = z.logsumexp(-1) - z.gather(1, labels.clamp(min=0)[:, None]).squeeze(1)
    stats = torch.stack([largest, (z - largest[:, None]).exp().sum(-1), nll])
    return stats.masked_fill(labels < 0, 0.0)


def true_pair_stats(case: Case, softcap: float | None = None, scale: float = 1.0, bias: Tensor | None = None) -> Tensor:
    """The statistics of a pair in float64, [11, n]."""
    z1, z0 = (finished(x, softcap, scale, bias) for x in case.logits)
    streams = [true_stats(z, case.labels) for z in (z1, z0, z1 - z0)]
    log_p1, log_p0 = z1.log_softmax(-1), z0.log_softmax(-1)
    kl = (log_p1.exp() * (log_p1 - log_p0)).sum(-1)
    entropy = -(log_p1.exp() * log_p1).sum(-1)
    return torch.cat([*streams, kl[None], entropy[None]])


def true_grad(z: Tensor, labels: Tensor, grad: Tensor) -> Tensor:
    """The gradient g (softmax(z) - onehot), before cap and scale."""
    one_hot = torch.nn.functional.one_hot(labels, z.shape[1])
    return grad.double()[:, None] * (z.double().softmax(-1) - one_hot)


def finished(x: Tensor, softcap: float | None, scale: float, bias: Tensor | None = None) -> Tensor:
    """z = cap(scale (x + b)) in float64."""
    z = scale * (x.double() if bias is None else x.double() + bias.double())
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def through_cap(dz: Tensor, z: Tensor, softcap: float | None, scale: float) -> Tensor:
    return dz * scale * (1.0 if softcap is None else 1 - (z.double() / softcap) ** 2)


def true_pair_grad(case: Case, softcap: float | None, scale: float, *, counterfactual: bool) -> tuple[Tensor, Tensor]:
    z1, z0 = (finished(x, softcap, scale) for x in case.logits)
    effect = true_grad(z1 - z0, case.labels, case.grads[2])
    dz1 = true_grad(z1, case.labels, case.grads[0]) + effect
    dz0 = -effect + (true_grad(z0, case.labels, case.grads[1]) if counterfactual else 0.0)
    return through_cap(dz1, z1, softcap, scale), through_cap(dz0, z0, softcap, scale)


def assert_near(actual: Tensor, truth: Tensor, relative: float = RELATIVE) -> None:
    """Compare the largest error, relative to the tensor's largest true value, with a limit."""
    assert actual.shape == truth.shape
    error = (actual.double() - truth).abs().max().item()
    assert error <= relative * truth.abs().max().item(), f"error {error:.2e} of {truth.abs().max().item():.2e}"


def padded(z: Tensor, *, left: int = 16, right: int = 48) -> tuple[Tensor, Tensor]:
    """A buffer filled with NaN, and a view that holds `z`, with gaps between rows and before the first column."""
    buffer = torch.full((z.shape[0] + 2, left + z.shape[1] + right), torch.nan, device=z.device)
    view = buffer[1:-1, left : left + z.shape[1]]
    view.copy_(z)
    return buffer, view


def same(actual: Tensor, expected: Tensor) -> bool:
    """Equal bits under the interpreter; on a GPU, other strides change the layout and the order of additions."""
    return torch.allclose(actual, expected, rtol=3e-6, atol=1e-6) if ON_GPU else torch.equal(actual, expected)


def bits(*tensors: Tensor) -> list[Tensor]:
    return [t.contiguous().view(torch.uint8) for t in tensors]


@pytest.mark.parametrize(("n", "v"), SHAPES, ids=SHAPE_IDS)
def test_token_stats(n, v, device):
    case = make_case(n, v, device)
    out = torch.full((3, n), torch.nan, device=device)
    chunk.token_stats(case.z1, case.labels, out)
    for actual, truth in zip(out, true_stats(case.z1, case.labels), strict=True):
        assert (actual - truth).abs().max() <= RELATIVE * max(1.0, truth.abs().max())


@pytest.mark.parametrize("rows", [9, 11])
@pytest.mark.parametrize(("n", "v"), SHAPES, ids=SHAPE_IDS)
def test_pair_stats(n, v, rows, device):
    case = make_case(n, v, device)
    for actual, truth in zip(case.stats(rows), true_pair_stats(case), strict=False):
        assert (actual - truth).abs().max() <= RELATIVE * max(1.0, truth.abs().max())


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("softcap", "scale"), [(None, 0.25), (None, -2.0), (5.0, 1.0), (2.0, 1.5)])
@pytest.mark.parametrize(("n", "v"), [(5, 300), (2, 256), (4, 1)])
def test_statistics_finish_the_logits(n, v, softcap, scale, biased, device):
    case = make_case(n, v, device)
    bias = torch.randn(v, device=device) if biased else None
    truth = true_pair_stats(case, softcap, scale, bias)
    out, single = torch.full((11, n), torch.nan, device=device), torch.full((3, n), torch.nan, device=device)
    chunk.pair_stats(case.logits, case.labels, out, bias, softcap, scale)
    chunk.token_stats(case.z1, case.labels, single, bias, softcap, scale)
    for actual, expected in zip((*out, *single), (*truth, *truth[:3]), strict=True):
        assert (actual - expected).abs().max() <= RELATIVE * max(1.0, expected.abs().max())


def test_pair_stats_agree_with_token_stats(device):
    case = make_case(5, 300, device)
    pair = case.stats(11)
    for i, z in enumerate((case.z1, case.z0, case.z1 - case.z0)):
        out = torch.empty(3, 5, device=device)
        chunk.token_stats(z, case.labels, out)
        assert same(out, pair[3 * i : 3 * i + 3])


@pytest.mark.parametrize(("n", "v"), SHAPES, ids=SHAPE_IDS)
@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (None, 0.25), (5.0, 1.0), (2.0, 1.5)])
def test_token_grad(n, v, softcap, scale, device):
    case = make_case(n, v, device)
    z = finished(case.z1, softcap, scale)
    stats = true_stats(z, case.labels).float()
    truth = through_cap(true_grad(z, case.labels, case.grads[0]), z, softcap, scale)
    logits = case.z1.clone()
    dz = token_grad(logits, case.labels, stats, case.grads[0], softcap, scale, torch.float32)
    assert dz.data_ptr() == logits.data_ptr()
    # p - 1 of a label with p near 1 is exact to float32's spacing at 1, not at p - 1.
    floor = scale * case.grads.abs().max().item() * 2e-6
    assert (dz - truth).abs().max() <= RELATIVE * truth.abs().max() + floor


PAIR_OPTIONS = list(itertools.product([None, 4.0], [True, False], [True, False]))


@pytest.mark.parametrize(("n", "v"), [(5, 300), (2, 256), (3, 129), (4, 1)])
@pytest.mark.parametrize(
    ("softcap", "counterfactual", "detach"), PAIR_OPTIONS, ids=lambda value: None if value is None else str(value)
)
def test_pair_grad(n, v, softcap, counterfactual, detach, device):
    case = make_case(n, v, device)
    truth1, truth0 = true_pair_grad(case, softcap, 0.5, counterfactual=counterfactual)
    stats = true_pair_stats(case, softcap, 0.5)[:9].float()
    z1, z0 = case.z1.clone(), case.z0.clone()
    g_f, g_c, g_e = case.grads
    dz1, dz0 = pair_grad(
        (z1, z0), case.labels, stats, (g_f, g_c if counterfactual else None, g_e), softcap, 0.5, torch.float32, detach
    )
    floor = case.grads.abs().max().item() * 2e-6
    assert (dz1 - truth1).abs().max() <= RELATIVE * truth1.abs().max() + floor
    if detach:
        assert dz0 is None
        assert torch.equal(z0, case.z0)
    else:
        assert dz0.data_ptr() == z0.data_ptr()
        assert (dz0 - truth0).abs().max() <= RELATIVE * truth0.abs().max() + floor


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize(("n", "v"), [(5, 300), (3, 1024), (2, 129), (4, 1)])
def test_half_gradients_are_rounded_float32_gradients(n, v, dtype, device):
    case = make_case(n, v, device)
    g_f, g_c, g_e = case.grads
    bias = torch.randn(v, device=device)
    stats = true_pair_stats(case, 6.0, 1.5, bias)[:9].float()
    options = (bias, 6.0, 1.5)
    exact = [torch.full_like(z, torch.nan) for z in case.logits]
    chunk.pair_grad(case.logits, case.labels, stats, (g_f, g_c, g_e), exact, *options)
    gaps = [torch.full((n + 2, v + 32), torch.nan, dtype=dtype, device=device) for _ in range(3)]
    views = [gap[1:-1, 16 : 16 + v] for gap in gaps]
    logits = [z.clone() for z in case.logits]
    chunk.pair_grad(logits, case.labels, stats, (g_f, g_c, g_e), views[:2], *options)
    chunk.token_grad(logits[0], case.labels, stats[:3], g_f, views[2], *options)
    single = torch.full_like(case.z1, torch.nan)
    chunk.token_grad(case.z1, case.labels, stats[:3], g_f, single, *options)
    for z, before in zip(logits, case.logits, strict=True):
        assert torch.equal(z, before)
    for view, gap, float32 in zip(views, gaps, (*exact, single), strict=True):
        error = (view.double() - float32.double()).abs()
        assert (error <= NARROW_ERROR[dtype] * float32.double().abs() + 2**-21).all()
        assert gap.isnan().sum() == gap.numel() - n * v


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="the interpreter runs one warp: it cannot show a race")
@pytest.mark.parametrize("v", [151936, 32001, 4096, 5000])
def test_gradients_over_their_own_logits_do_not_race(v, device):
    z1 = torch.randn(400, v, device=device) * 3
    z0 = z1 + torch.randn_like(z1)
    case = Case(z1, z0, torch.randint(v, (400,), device=device), torch.randn(3, 400, device=device))
    stats = case.stats()
    others = torch.empty_like(z1), torch.empty_like(z0)
    chunk.pair_grad(case.logits, case.labels, stats, case.grads, others, None, 30.0)
    for _ in range(20):
        own = pair_grad((z1.clone(), z0.clone()), case.labels, stats, case.grads, 30.0)
        assert all(torch.equal(a, b) for a, b in zip(own, others, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs 20 GiB of memory on one device")
def test_offsets_beyond_32_bits(device):
    if torch.cuda.mem_get_info(device)[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of free memory on the GPU")
    stride = 2**30 + 64  # rows 2 and 3 begin beyond element 2^31
    case = make_case(4, 300, device)
    far = torch.empty(4 * stride, device=device).as_strided((4, 300), (stride, 1))
    far.copy_(case.z1)
    out, expected = torch.empty(3, 4, device=device), torch.empty(3, 4, device=device)
    chunk.token_stats(far, case.labels, out)
    chunk.token_stats(case.z1, case.labels, expected)
    assert same(out, expected)
    for dtype in (torch.float32, torch.bfloat16):
        far.copy_(case.z1)
        arguments = (case.labels, out, case.grads[0], None, 1.0, dtype)
        results = (token_grad(z, *arguments).float() for z in (far, case.z1.clone()))
        assert torch.allclose(*results, rtol=2**-7, atol=1e-6)


def test_rows_of_larger_buffers(device):
    """Row strides, output strides and labels with gaps; the surrounding memory is NaN and stays so."""
    case = make_case(5, 300, device)
    (buffer1, z1), (buffer0, z0) = padded(case.z1), padded(case.z0, left=3, right=4)
    big = torch.full((13, 20), torch.nan, device=device)
    out = big[1:12, 7:12]
    labels = torch.full((10,), -1, device=device)[::2].copy_(case.labels)
    chunk.pair_stats((z1, z0), labels, out)
    assert same(out, case.stats(11))
    assert big.isnan().sum() == 260 - 55
    grads = case.grads.t().contiguous().t()  # a stride of 3 between rows
    results = pair_grad((z1, z0), labels, out[:9], grads, None, 1.0, torch.float32)
    expected = [z.clone() for z in case.logits]
    pair_grad(expected, case.labels, out[:9].contiguous(), case.grads, None, 1.0, torch.float32)
    for actual, truth, buffer in zip(results, expected, (buffer1, buffer0), strict=True):
        assert same(actual, truth)
        assert buffer.isnan().sum() == buffer.numel() - 1500


def test_expanded_upstream_gradient(device):
    case = make_case(5, 300, device)
    stats = case.stats()[:3]
    one = torch.tensor(0.5, device=device).expand(5)
    actual = token_grad(case.z1.clone(), case.labels, stats, one, None, 1.0, torch.float32)
    expected = token_grad(case.z1.clone(), case.labels, stats, one.clone(), None, 1.0, torch.float32)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_ignored_rows_give_zero_whatever_they_hold(poison, dtype, device):
    case = make_case(5, 300, device)
    reference = case.stats(11)
    case.labels[[1, 4]] = torch.tensor([-100, -1], device=device)
    case.z1[1] = poison
    case.z0[4, 7] = poison
    stats = case.stats(11)
    live = case.labels >= 0
    assert torch.equal(stats[:, ~live], torch.zeros(11, 2, device=device))
    assert torch.equal(stats[:, live], reference[:, live])
    case.grads[:, ~live] = torch.nan
    stats = reference[:9].masked_fill(~live, torch.nan)
    results = pair_grad([z.clone() for z in case.logits], case.labels, stats, case.grads, None, 1.0, dtype)
    for result in results:
        assert torch.equal(result[~live], torch.zeros_like(result[~live]))
        assert result[live].isfinite().all()
        assert (result[live] != 0).any(dim=1).all()
    single = torch.empty(3, 5, device=device)
    chunk.token_stats(case.z1, case.labels, single)
    assert torch.equal(single[:, ~live], torch.zeros(3, 2, device=device))
    dz = token_grad(case.z1.clone(), case.labels, stats[:3], case.grads[0], None, 1.0, dtype)
    assert torch.equal(dz[~live], torch.zeros_like(dz[~live]))


def test_all_rows_ignored(device):
    case = make_case(3, 300, device)
    case.labels.fill_(-100)
    case.z1.fill_(torch.nan)
    assert torch.equal(case.stats(11), torch.zeros(11, 3, device=device))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("column", [0, 127, 128, 299])
def test_non_finite_logits_give_a_non_finite_nll_of_their_row_only(value, column, device):
    case = make_case(5, 300, device)
    case.labels[2] = 5
    clean = case.stats(11)
    for stream in (0, 1):
        logits = tuple(z.clone() for z in case.logits)
        logits[stream][2, column] = value
        stats = case.stats(11, logits)
        others = torch.arange(5) != 2
        assert torch.equal(stats[:, others], clean[:, others])
        assert not stats[3 * stream + 2, 2].isfinite()
        # +inf in z0 alone is -inf in the effect logits: probability 0, as in z1 - z0 computed by anyone else.
        assert not stats[8, 2].isfinite() or (stream == 1 and value == torch.inf)
        other = slice(3 - 3 * stream, 6 - 3 * stream)
        assert torch.equal(stats[other, 2], clean[other, 2])
        out = torch.empty(3, 5, device=device)
        chunk.token_stats(logits[stream], case.labels, out)
        assert not out[2, 2].isfinite()
        assert out[:, others].isfinite().all()


def test_minus_infinity_masks_columns(device):
    """Whole tiles of -inf, first and last, give probability 0 instead of NaN, and a gradient of exactly 0."""
    case = make_case(4, 500, device)
    case.labels.fill_(150)
    z = case.z1.clone()
    z[:, :130] = -torch.inf
    z[:, 260:] = -torch.inf
    out = torch.empty(3, 4, device=device)
    chunk.token_stats(z, case.labels, out)
    assert_near(out, true_stats(z[:, 130:260], case.labels - 130))
    dz = token_grad(z, case.labels, out, case.grads[0], None, 1.0, torch.float32)
    assert (dz[:, :130] == 0).all()
    assert (dz[:, 260:] == 0).all()
    assert dz[:, 130:260].isfinite().all()
    z = case.z1.clone().fill_(-torch.inf)
    chunk.token_stats(z, case.labels, out)
    assert not out[2].isfinite().any()


def test_entropy_of_masked_columns(device):
    case = make_case(3, 300, device)
    case.labels.fill_(3)
    case.z1[:, 100:] = -torch.inf
    entropy = torch.distributions.Categorical(logits=case.z1[:, :100].double()).entropy()
    assert_near(case.stats(11)[10], entropy)


@pytest.mark.parametrize("shift", [1e4, -1e4, 3e4])
def test_huge_logits(shift, device):
    """Statistics and gradients are exact to float32's spacing at 1, not at 1e4."""
    case = make_case(5, 300, device)
    case.z1, case.z0 = case.z1 + shift, case.z0 + shift
    stats, truth = case.stats(11), true_pair_stats(case)
    for actual, expected in zip(stats, truth, strict=True):
        assert_near(actual, expected)
    out = torch.empty(3, 5, device=device)
    chunk.token_stats(case.z1, case.labels, out)
    assert_near(out[2], truth[2])
    dz1, dz0 = pair_grad([z.clone() for z in case.logits], case.labels, stats[:9], case.grads, None, 1.0, torch.float32)
    truth1, truth0 = true_pair_grad(case, None, 1.0, counterfactual=True)
    assert_near(dz1, truth1)
    assert_near(dz0, truth0)
    spread = torch.tensor([[shift, -shift, 0.0]], device=device)
    chunk.token_stats(spread, torch.zeros(1, dtype=torch.long, device=device), out[:, :1])
    assert out[2, 0].item() == (0.0 if shift > 0 else -2 * shift)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_zero_upstream_gradient_gives_exact_zero(dtype, device):
    case = make_case(5, 300, device)
    zeros = torch.zeros(5, device=device)
    results = pair_grad(
        [z.clone() for z in case.logits], case.labels, case.stats(), (zeros, zeros, zeros), 5.0, 2.0, dtype
    )
    assert all((result == 0).all() for result in results)


@pytest.mark.parametrize("label", [300, 301, 2**31, 2**40])
def test_label_beyond_the_vocabulary_is_never_an_address(label, device):
    case = make_case(5, 300, device)
    clean = case.stats()
    case.labels[3] = label
    stats = case.stats()
    assert stats[2::3, 3].isnan().all()
    others = torch.arange(5) != 3
    assert torch.equal(stats[:, others], clean[:, others])
    dz = token_grad(case.z1.clone(), case.labels, stats[:3], case.grads[0], None, 1.0, torch.float32)
    assert dz[others].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_bitwise_repeatable(dtype, device):
    case = make_case(5, 300, device)
    stats = case.stats()

    def run() -> list[Tensor]:
        z1, z0 = (z.clone() for z in case.logits)
        return bits(case.stats(11), *pair_grad((z1, z0), case.labels, stats, case.grads, None, 1.0, dtype))

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_stats_leave_the_logits_alone(device):
    case = make_case(5, 300, device)
    z1, z0 = case.z1.clone(), case.z0.clone()
    case.stats(11)
    assert torch.equal(z1, case.z1)
    assert torch.equal(z0, case.z0)


def test_no_rows(device):
    case = make_case(1, 300, device)
    z, labels, none = case.z1[:0], case.labels[:0], torch.empty(9, 0, device=device)
    chunk.token_stats(z, labels, none[:3])
    chunk.pair_stats((z, z), labels, none)
    assert token_grad(z, labels, none[:3], none[0], None, 1.0, torch.float16).shape == (0, 300)
    dz1, dz0 = pair_grad((z, z), labels, none, (none[0], None, none[0]), None, 1.0, torch.float32)
    assert dz1.shape == dz0.shape == (0, 300)


@pytest.mark.skipif(ON_GPU, reason="on a GPU every test runs with the tuned tiles too")
def test_tuned_tiles(device, monkeypatch):
    monkeypatch.undo()
    assert chunk_stats.PAIR_STATS.block_v >= 1024
    case = make_case(2, chunk_grad.TOKEN_GRAD.block_v + 77, device)
    stats, truth = case.stats(11), true_pair_stats(case)
    for actual, expected in zip(stats, truth, strict=True):
        assert_near(actual, expected)
    dz = token_grad(case.z1.clone(), case.labels, stats[:3], case.grads[0], None, 1.0, torch.float16)
    assert_near(dz, true_grad(case.z1, case.labels, case.grads[0]), 1e-3)


BAD_STATS = {
    "logits dtype": (lambda c, o: (c.z1.double(), c.labels, o), TypeError, r"logits: expected dtype torch\.float32"),
    "logits rank": (lambda c, o: (c.z1[0], c.labels, o), ValueError, r"logits: expected shape \[n, V\].*\[300\]"),
    "no columns": (lambda c, o: (c.z1[:, :0], c.labels, o), ValueError, r"logits: .*V > 0, got \[5, 0\]"),
    "logits layout": (
        lambda c, o: (c.z1[:, ::2], c.labels, o),
        ValueError,
        "logits: expected a last stride of 1, got 2",
    ),
    "labels dtype": (lambda c, o: (c.z1, c.labels.int(), o), TypeError, r"labels: .*torch\.int64, got torch\.int32"),
    "labels shape": (lambda c, o: (c.z1, c.labels[:4], o), ValueError, r"labels: expected shape \[5\], got \[4\]"),
    "out shape": (lambda c, o: (c.z1, c.labels, o[:1]), ValueError, r"out: expected shape \[3, 5\], got \[1, 5\]"),
    "out dtype": (lambda c, o: (c.z1, c.labels, o.double()), TypeError, r"out: expected dtype torch\.float32"),
    "out layout": (
        lambda c, o: (c.z1, c.labels, o.t().contiguous().t()),
        ValueError,
        "out: expected a last stride of 1",
    ),
    "device": (lambda c, o: (c.z1, c.labels.to("meta"), o), ValueError, "labels: expected a tensor on .*, got meta"),
}


@pytest.mark.parametrize("name", BAD_STATS)
def test_bad_arguments_of_stats(name, device):
    arguments, error, message = BAD_STATS[name]
    case, out = make_case(5, 300, device), torch.zeros(3, 5, device=device)
    with pytest.raises(error, match=message):
        chunk.token_stats(*arguments(case, out))
    assert (out == 0).all()


def test_bad_arguments_of_pair_stats(device):
    case = make_case(5, 300, device)
    with pytest.raises(ValueError, match=r"logits_counterfactual: expected shape \[5, 300\], got \[5, 299\]"):
        chunk.pair_stats((case.z1, case.z0[:, :299]), case.labels, torch.empty(9, 5, device=device))
    with pytest.raises(ValueError, match=r"out: expected shape \[9, 5\], got \[7, 5\]"):
        chunk.pair_stats(case.logits, case.labels, torch.empty(7, 5, device=device))


BAD_GRADS = {
    "out dtype": ({"out": torch.zeros(5, 300).double()}, TypeError, r"out: expected dtype torch\.float32, torch\.bf"),
    "out shape": ({"out": torch.zeros(4, 300)}, ValueError, r"out: expected shape \[5, 300\], got \[4, 300\]"),
    "stats": ({"stats": torch.zeros(3, 4)}, ValueError, r"stats: expected shape \[3, 5\], got \[3, 4\]"),
    "grad_nll": ({"grad_nll": torch.zeros(5).double()}, TypeError, r"grad_nll: .*float32, got torch\.float64"),
    "bias": ({"bias": torch.zeros(299)}, ValueError, r"bias: expected shape \[300\], got \[299\]"),
    "bias dtype": ({"bias": torch.zeros(300).bfloat16()}, TypeError, r"bias: expected dtype torch\.float32, got"),
    "overlap": (
        {"out": torch.zeros(300).expand(5, 300)},
        ValueError,
        "out: expected a row stride of at least 300",
    ),
}


@pytest.mark.parametrize("name", BAD_GRADS)
def test_bad_arguments_of_grad(name, device):
    change, error, message = BAD_GRADS[name]
    case = make_case(5, 300, device)
    arguments = {
        "logits": case.z1,
        "labels": case.labels,
        "stats": torch.zeros(3, 5, device=device),
        "grad_nll": case.grads[0],
        "out": case.z1,
    }
    arguments |= {key: value.to(device) for key, value in change.items()}
    before = case.z1.clone()
    with pytest.raises(error, match=message):
        chunk.token_grad(**arguments)
    assert torch.equal(case.z1, before)


def test_other_devices_are_refused():
    z = torch.empty(5, 300, device="meta")
    labels = torch.empty(5, dtype=torch.long, device="meta")
    with pytest.raises(RuntimeError, match="logits: got a tensor on meta, expected a CUDA or ROCm device"):
        chunk.token_stats(z, labels, torch.empty(2, 5, device="meta"))

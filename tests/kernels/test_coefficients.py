"""The coefficient kernel against `PairObjective.coefficients`, in float64 as truth and in float32."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from nextquill_kernels import coefficients
from nextquill_kernels.coefficients import row_coefficients
from torch import Tensor

from nextquill.ops.objective import PairObjective, RowCoefficients
from nextquill.ops.row_groups import RowGroup, RowPlan
from nextquill.outputs import PairNLL
from nextquill.weighting import ClipWeighting, ExpClipWeighting, ThresholdWeighting, UniformWeighting, Weighting

# Sequences of one row, of exactly a block, of several blocks and a tail; BLOCK_N is 16 in these tests.
LENGTHS = [(5, 1, 16, 3, 40), (1,), (17,), (2, 2, 2)]


@dataclass(frozen=True)
class Scheme:
    """One weighting, and its arguments for the kernel."""

    name: str
    weighting: Weighting
    low: float = 0.0
    high: float = 1.0
    threshold: float = 0.0


SCHEMES = [
    Scheme("uniform", UniformWeighting()),
    Scheme("threshold", ThresholdWeighting(), low=0.1, high=0.9, threshold=0.05),
    Scheme("clip", ClipWeighting(), low=0.8, high=5.0),
    Scheme("exp_clip", ExpClipWeighting(), high=5.0),
]
by_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=[scheme.name for scheme in SCHEMES])


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(coefficients, "BLOCK_N", 16)


def make_nll(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(n)
    nll0 = 0.1 + torch.rand(n, generator=rng) * 4
    nll1 = nll0 * (0.2 + 1.2 * torch.rand(n, generator=rng))
    return nll1.to(device), nll0.to(device)


def kernel(
    scheme: Scheme,
    nll1: Tensor,
    nll0: Tensor | None,
    lengths: tuple[int, ...],
    *,
    normalize: bool = True,
    per_token: bool = False,
    num_items: float | Tensor = 3.0,
    first: int = 0,
) -> RowCoefficients:
    """Run the kernel on offsets that begin at `first`, into a slice of a buffer of NaN."""
    n = nll1.numel()
    offsets = torch.tensor([first, *itertools.accumulate(lengths, initial=first)][1:], device=nll1.device)
    buffer = torch.full((5, n + 7), torch.nan, device=nll1.device)
    row_coefficients(
        nll1,
        nll0,
        offsets,
        scheme=scheme.name,
        low=scheme.low,
        high=scheme.high,
        threshold=scheme.threshold,
        normalize=normalize,
        per_token=per_token,
        num_items=num_items,
        out=buffer[1:4, 2 : 2 + n],
    )
    result = buffer[1:4, 2 : 2 + n].clone()
    buffer[1:4, 2 : 2 + n] = torch.nan
    assert buffer.isnan().all()
    return RowCoefficients(*result)


def twin(
    scheme: Scheme,
    nll1: Tensor,
    nll0: Tensor | None,
    lengths: tuple[int, ...],
    *,
    normalize: bool = True,
    per_token: bool = False,
    num_items: float = 3.0,
    fused: Callable[..., None] | None = None,
) -> RowCoefficients:
    """The same by the losses' elementwise operations, or by `fused` as the losses call it."""
    n = nll1.numel()
    objective = PairObjective(
        scheme.weighting, normalize_weights=normalize, reduction="token" if per_token else "sequence"
    )
    rows = torch.arange(n, device=nll1.device)
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], device=nll1.device)
    plan = RowPlan(rows=rows, labels=rows, offsets=offsets, lengths=lengths)
    group = RowGroup(plan=plan, rows=slice(0, n), sequences=slice(0, len(lengths)), chunks=(slice(0, n),))
    return objective.coefficients(PairNLL(nll1, nll0, None), group, num_items, fused)


@by_scheme
@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "counted"])
@pytest.mark.parametrize("per_token", [True, False], ids=["token", "sequence"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_agrees_with_the_objective(scheme, normalize, per_token, lengths, device):
    nll1, nll0 = make_nll(sum(lengths), device)
    options = {"normalize": normalize, "per_token": per_token}
    actual = kernel(scheme, nll1, nll0, lengths, **options)
    truth = twin(scheme, nll1.double(), nll0.double(), lengths, **options)
    float32 = twin(scheme, nll1, nll0, lengths, **options)
    for got, exact, single in zip(actual, truth, float32, strict=True):
        assert torch.allclose(got.double(), exact, rtol=2e-6, atol=0)
        assert torch.allclose(got, single, rtol=2e-6, atol=0)


@by_scheme
def test_as_called_by_the_objective(scheme, device):
    nll1, nll0 = make_nll(20, device)
    actual = twin(scheme, nll1, nll0, (13, 7), fused=row_coefficients)
    expected = kernel(scheme, nll1, nll0, (13, 7))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@by_scheme
def test_offsets_may_begin_anywhere(scheme, device):
    nll1, nll0 = make_nll(20, device)
    expected = kernel(scheme, nll1, nll0, (13, 7))
    actual = kernel(scheme, nll1, nll0, (13, 7), first=2**33)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_empty_sequences_between_others(device):
    nll1, nll0 = make_nll(20, device)
    expected = kernel(SCHEMES[2], nll1, nll0, (13, 7))
    actual = kernel(SCHEMES[2], nll1, nll0, (0, 13, 0, 0, 7, 0))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
@pytest.mark.parametrize("per_token", [True, False])
def test_items_may_stay_on_the_device(dtype, per_token, device):
    nll1, nll0 = make_nll(20, device)
    items = torch.tensor(6, dtype=dtype, device=device)
    actual = kernel(SCHEMES[1], nll1, nll0, (13, 7), num_items=items, per_token=per_token)
    expected = kernel(SCHEMES[1], nll1, nll0, (13, 7), num_items=6, per_token=per_token)
    assert all(torch.allclose(a, b, rtol=1e-6, atol=0) for a, b in zip(actual, expected, strict=True))


def test_uniform_needs_no_counterfactual(device):
    nll1, _ = make_nll(20, device)
    weights, weighted, uniform = kernel(SCHEMES[0], nll1, None, (13, 7))
    assert (weights == 1).all()
    assert torch.allclose(weighted, uniform, rtol=1e-6, atol=0)
    assert torch.allclose(uniform[[0, 13]], torch.tensor([1 / 39, 1 / 21], device=device))


def test_weights_of_zero_are_divided_by_one(device):
    scheme = Scheme("clip", ClipWeighting(0.0, 5.0), low=0.0, high=5.0)
    nll0 = torch.tensor([1.0, 1.0, 3.0, 1.0], device=device)
    nll1 = torch.full_like(nll0, 2.0)
    actual, expected = (function(scheme, nll1, nll0, (2, 2)) for function in (kernel, twin))
    assert actual.weighted.tolist() == pytest.approx([0, 0, 1 / 3, 0], rel=1e-6)
    assert all(torch.allclose(a, b) for a, b in zip(actual, expected, strict=True))


@by_scheme
@pytest.mark.parametrize("values", [(torch.nan, 1.0), (1.0, torch.nan), (torch.inf, torch.inf)], ids=str)
def test_nan_spoils_its_own_sequence_only(scheme, values, device):
    nll1, nll0 = make_nll(20, device)
    nll1[15], nll0[15] = values
    actual, expected = (function(scheme, nll1, nll0, (13, 7)) for function in (kernel, twin))
    for got, wanted in zip(actual, expected, strict=True):
        assert torch.allclose(got, wanted, rtol=2e-6, equal_nan=True)
    if scheme.name in ("clip", "exp_clip"):
        assert actual.weights[15].isnan()
        assert actual.weighted[13:].isnan().all()
    assert actual.weighted[:13].isfinite().all()


def test_broken_forward_pass_is_not_taken_for_low_effect(device):
    nll1, nll0 = make_nll(3, device)
    nll0[1] = torch.nan
    assert kernel(SCHEMES[1], nll1, nll0, (3,)).weights.isnan().tolist() == [False, True, False]


@by_scheme
def test_large_differences_do_not_overflow(scheme, device):
    nll1 = torch.tensor([0.0, 1e4, 0.0, torch.inf, 0.0], device=device)
    nll0 = torch.tensor([1e4, 0.0, 200.0, 1.0, torch.inf], device=device)
    actual, expected = (function(scheme, nll1, nll0, (5,)) for function in (kernel, twin))
    for got, wanted in zip(actual, expected, strict=True):
        assert torch.allclose(got, wanted, rtol=2e-6)
        assert got.isfinite().all()


def test_long_sequence_and_bitwise_repeatability(device, monkeypatch):
    monkeypatch.setattr(coefficients, "BLOCK_N", 1024)
    nll1, nll0 = make_nll(100_000, device)
    lengths = (99_000, 1, 999)
    first, second = (kernel(SCHEMES[3], nll1, nll0, lengths) for _ in range(2))
    truth = twin(SCHEMES[3], nll1.double(), nll0.double(), lengths)
    for got, again, exact in zip(first, second, truth, strict=True):
        assert torch.equal(got, again)
        assert torch.allclose(got.double(), exact, rtol=3e-6, atol=0)


def test_no_rows(device):
    nothing = torch.empty(0, device=device)
    assert kernel(SCHEMES[1], nothing, nothing, ()).weights.shape == (0,)
    assert kernel(SCHEMES[1], nothing, nothing, (0, 0)).weights.shape == (0,)


BAD = {
    "scheme": ({"scheme": "pir"}, ValueError, "scheme: expected one of uniform, threshold, clip, exp_clip, got 'pir'"),
    "counterfactual": ({"nll_counterfactual": None}, ValueError, "nll_counterfactual: .*scheme 'clip', got None"),
    "shape": ({"nll_counterfactual": torch.zeros(3)}, ValueError, r"nll_counterfactual: .*\[4\], got \[3\]"),
    "dtype": ({"nll_factual": torch.zeros(4).double()}, TypeError, r"nll_factual: .*float32, got torch\.float64"),
    "offsets": ({"offsets": torch.tensor([0, 4]).int()}, TypeError, r"offsets: expected dtype torch\.int64"),
    "rank": ({"offsets": torch.zeros(1, 2).long()}, ValueError, r"offsets: expected shapes \[n\] and \[S \+ 1\]"),
    "items": ({"num_items": torch.ones(2)}, ValueError, r"num_items: expected one number, got shape \[2\]"),
    "out": ({"out": torch.zeros(2, 4)}, ValueError, r"out: expected shape \[3, 4\], got \[2, 4\]"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name, device):
    change, error, message = BAD[name]
    arguments = {
        "nll_factual": torch.zeros(4),
        "nll_counterfactual": torch.zeros(4),
        "offsets": torch.tensor([0, 4]),
        "scheme": "clip",
        "low": 0.8,
        "high": 5.0,
        "threshold": 0.0,
        "normalize": True,
        "per_token": False,
        "num_items": 1.0,
        "out": torch.zeros(3, 4),
    } | change
    moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in arguments.items()}
    with pytest.raises(error, match=message):
        row_coefficients(**moved)

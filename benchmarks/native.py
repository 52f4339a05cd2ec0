"""Suite `native`: the C++ extension against its plain PyTorch twin. The results justify the choice of `impl="auto"`.

First the chunk kernels run on given logits, for a pair and for one stream. The twin also works in place and in row
blocks of the cache's size, so the comparison is about passes over memory and exponentials. Then whole losses run with
their matrix products, over a grid of sizes. A ratio above 1 would be a reason for "auto" to choose the twin there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import nextquill as nq
from benchmarks.measure import GateError, Options, Row, make_row, ratios, time_in_turns
from nextquill.ops import huge_pages
from nextquill.ops.dispatch import ChunkKernels, resolve_impl, why_not

CPU = torch.device("cpu")
IMPLEMENTATIONS = ("native", "torch")
BASELINE = "torch"
#: N and V of the chunk kernels alone; the first pair is a requirement of the project.
CHUNKS = ((512, 32768), (4096, 1031), (1024, 8192), (110, 151936))
#: N, D and V of whole losses.
GRID = tuple((n, d, v) for v in (1031, 8192, 32768) for d in (64, 256, 896) for n in (16, 512))
LOSSES: dict[str, Callable[..., nq.PairLoss]] = {
    "NextQuill": nq.NextQuillLoss,
    "PerCE": nq.PerCELoss,
    "SFT": nq.SFTLoss,
}


@dataclass(frozen=True)
class Case:
    """A case: its labels, and one callable per implementation."""

    name: str
    loss: str
    mode: str
    providers: dict[str, Callable[[], object]]


def run(options: Options) -> list[Row]:
    """Time every case on one thread and on all threads."""
    if reason := why_not("native", CPU, torch.float32):
        raise GateError(f"native: {reason}")
    rows: list[Row] = []
    before = torch.get_num_threads()
    counts = sorted({1, before})
    cases = list(_cases(options.quick))
    budget = None if options.budget is None else options.budget / (len(counts) * len(cases))
    try:
        for threads in counts:
            torch.set_num_threads(threads)
            for case in cases:
                _gate(case)
                seconds = time_in_turns(case.providers, options.rounds, budget=budget)
                values = ratios(seconds, BASELINE)["native"]
                labels: dict[str, Any] = {"loss": case.loss, "mode": case.mode, "head": "trainable", "dtype": "float32"}
                rows.append(
                    make_row("native", case.name, "native", "time", "x", values, BASELINE, device="cpu", **labels)
                )
            options.save(rows)
    finally:
        torch.set_num_threads(before)
    return rows


def _cases(quick: bool) -> Iterator[Case]:
    for n, v in ((16, 300),) if quick else CHUNKS:
        for name, streams in (("pair", 2), ("one stream", 1)):
            providers = {
                impl: _chunk_call(resolve_impl(impl, CPU, torch.float32), streams, n, v) for impl in IMPLEMENTATIONS
            }
            yield Case(f"N={n}, V={v}", name, "chunk kernels", providers)
    for n, d, v in ((16, 8, 300),) if quick else GRID:
        for name, make in LOSSES.items():
            providers = {impl: _loss_call(make(impl=impl), n, d, v) for impl in IMPLEMENTATIONS}
            yield Case(f"N={n}, D={d}, V={v}", name, "forward+backward", providers)


def _chunk_call(kernels: ChunkKernels, streams: int, n: int, v: int) -> Callable[[], Tensor]:
    """Compute statistics, then the gradient in place, which overwrites the logits of the call before."""
    generator = torch.Generator().manual_seed(0)
    logits = [torch.empty(n, v) for _ in range(streams)]
    for each in logits:
        huge_pages.advise(each)  # as the engine does
        each.normal_(0.0, 2.0, generator=generator)
    labels, ones = torch.randint(v, (n,), generator=generator), torch.ones(n)
    stats = torch.empty(3 * (2 * streams - 1), n)

    def pair() -> Tensor:
        kernels.pair_stats(logits, labels, stats)
        kernels.pair_grad(logits, labels, stats, (ones, None, ones), logits)
        return logits[0]

    def token() -> Tensor:
        kernels.token_stats(*logits, labels, stats)
        kernels.token_grad(*logits, labels, stats, ones, *logits)
        return logits[0]

    return pair if streams == 2 else token


def _loss_call(loss_fn: nq.PairLoss, n: int, d: int, v: int) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(0)
    h1 = torch.randn(n, d, generator=generator)
    h0 = h1 + 0.5 * torch.randn(n, d, generator=generator)
    weight = (2 / d**0.5) * torch.randn(v, d, generator=generator)
    labels, ids = torch.randint(v, (n,), generator=generator), torch.arange(n) * 8 // n
    leaves = [tensor.requires_grad_() for tensor in (h1, h0, weight)]

    def step() -> Tensor:
        loss = loss_fn(h1, None if isinstance(loss_fn, nq.SFTLoss) else h0, weight, labels, sequence_ids=ids)
        return torch.autograd.grad(loss, leaves, allow_unused=True)[0]

    return step


def _gate(case: Case) -> None:
    """Raise GateError if the two implementations differ."""
    native, twin = (case.providers[impl]() for impl in IMPLEMENTATIONS)
    assert isinstance(native, Tensor)
    assert isinstance(twin, Tensor)
    error = float((native - twin).norm() / twin.norm().clamp(min=1e-30))
    if not error < 1e-4:
        raise GateError(f"native: {case.name}, {case.loss}: differs from its twin by {error:.1e}; not timed")

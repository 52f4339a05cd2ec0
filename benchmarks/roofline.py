"""What a pair loss should take on a GPU, from the work that the engine itself hands out.

The real engine runs on tensors without memory (device "meta"), and every product and kernel reports its size. So
groups, chunks, buffers and products are the code's own. A product of [M, K] and [K, N] takes its floating-point
operations at the GPU's rate, in whole waves of 128 x 256 tiles over the multiprocessors; every other kernel takes its
bytes at the GPU's bandwidth. Of the bytes that a product reads and writes, `exposed` says which share is not hidden
behind its arithmetic: 0 gives a lower bound.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import nextquill as nq
from nextquill.losses import PairLoss
from nextquill.ops.chunks import ChunkedHead
from nextquill.ops.dispatch import ChunkKernels
from nextquill.ops.fused_loss import PairLossEngine
from nextquill.ops.gradients import Needs
from nextquill.ops.row_groups import RowPlan


@dataclass(frozen=True)
class Hardware:
    """A GPU. The rates are what large products and copies are reported to reach, not those of the data sheet."""

    name: str
    flops: float
    bandwidth: float
    multiprocessors: int


H100 = Hardware("H100", 790e12, 3.0e12, 132)

#: The share of a product's bytes that its arithmetic does not hide: a guess until a GPU says otherwise. With it the
#: engine's former plan (products of 1,024 rows) takes 108 ms at the table's shape, which is what a review of that plan
#: expected.
EXPOSED = 0.44


@dataclass
class Work:
    """What a call hands out.

    Attributes:
        products: (kind, M, K, N, bytes) of each product.
        kernels: (kind, bytes) of every other kernel.
        peak_bytes: memory of logits and gradient.
    """

    products: list[tuple[str, int, int, int, int]] = field(default_factory=list)
    kernels: list[tuple[str, int]] = field(default_factory=list)
    peak_bytes: int = 0

    def flops(self) -> float:
        """Floating-point operations of all products."""
        return sum(2.0 * m * k * n for _, m, k, n, _ in self.products)

    def units(self, rows: int, hidden: int, vocabulary: int) -> float:
        """The products in units of one product of `rows` x `hidden` x `vocabulary`."""
        return self.flops() / (2.0 * rows * hidden * vocabulary)

    def floor(self, gpu: Hardware) -> float:
        """Seconds of the products' arithmetic alone."""
        return self.flops() / gpu.flops

    def seconds(self, gpu: Hardware, exposed: float = EXPOSED) -> dict[str, float]:
        """Modelled seconds by kind of product or kernel."""
        found: dict[str, float] = {}
        for kind, m, k, n, size in self.products:
            tiles = math.ceil(m / 128) * math.ceil(n / 256)
            waves = math.ceil(tiles / gpu.multiprocessors)
            arithmetic = waves * gpu.multiprocessors * (2.0 * 128 * 256 * k) / gpu.flops
            moved = size / gpu.bandwidth
            time = max(arithmetic + exposed * moved, moved)
            found[kind] = found.get(kind, 0.0) + time
        for kind, size in self.kernels:
            found[kind] = found.get(kind, 0.0) + size / gpu.bandwidth
        return found


#: The losses of the table; the target shape is that of public comparisons of fused losses.
LOSSES = {
    "NextQuill": nq.NextQuillLoss,
    "NextQuill detached": lambda: nq.NextQuillLoss(detach_counterfactual=True),
    "PerCE": nq.PerCELoss,
    "SFT": nq.SFTLoss,
}
ROWS, HIDDEN, VOCABULARY = 8192, 4096, 151936
RESPONSES = (300, 512, 1024)


def table(gpu: Hardware = H100) -> str:
    """The model at the target shape, as a Markdown table."""
    kinds = ("logits", "statistics", "gradient", "dh", "dW")
    columns = ["loss", "head", "response", "products", "floor, ms", "model, ms", "model / floor", "its bounds", *kinds]
    columns.append("memory, GiB")
    lines = ["| " + " | ".join(columns) + " |", "|---" * 2 + "|--:" * (len(columns) - 2) + "|"]
    for (name, make), trainable, length in itertools.product(LOSSES.items(), (True, False), RESPONSES):
        lengths = [length] * (ROWS // length)
        work = count(make(), lengths, HIDDEN, VOCABULARY, trainable=trainable)
        seconds, floor = work.seconds(gpu), work.floor(gpu)
        total = sum(seconds.values())
        cells = [name, "trainable" if trainable else "frozen", str(length)]
        cells += [f"{work.units(sum(lengths), HIDDEN, VOCABULARY):.3g}U", f"{1e3 * floor:.1f}", f"{1e3 * total:.1f}"]
        bounds = (sum(work.seconds(gpu, exposed).values()) / floor for exposed in (0.0, 1.0))
        cells += [f"{total / floor:.2f}", "–".join(f"{bound:.2f}" for bound in bounds)]
        cells += [f"{1e3 * seconds.get(kind, 0.0):.1f}" for kind in kinds]
        lines.append("| " + " | ".join([*cells, f"{work.peak_bytes / 2**30:.2f}"]) + " |")
    return "\n".join(lines)


def count(loss: PairLoss, lengths: Sequence[int], hidden: int, vocabulary: int, *, trainable: bool) -> Work:
    """Count the work of a loss in bfloat16 on a GPU.

    Args:
        loss: one of the package's losses.
        lengths: supervised tokens of each response.
        hidden: D.
        vocabulary: V.
        trainable: whether the head gets a gradient.
    """
    work = Work()
    rows = sum(lengths)
    head = _head(work, vocabulary, hidden, loss.chunk_bytes)
    states = torch.empty(rows, hidden, dtype=torch.bfloat16, device="meta")
    index = torch.empty(rows, dtype=torch.long, device="meta")
    offsets = torch.empty(len(lengths) + 1, dtype=torch.long, device="meta")
    plan = RowPlan(index, index, offsets, tuple(lengths))
    objective = loss.objective
    paired = loss.needs_counterfactual
    engine = PairLossEngine(
        states,
        states if paired else None,
        head,
        objective,
        plan,
        num_items=1.0,
        needs=Needs(True, paired, trainable, False),
        effect=objective.computes_effect(paired=paired, asked=False),
    )
    work.peak_bytes = engine.buffer.nbytes + engine.gradient_buffer.nbytes
    engine.run()
    return work


class _CountingHead(ChunkedHead):
    """A head on a GPU whose products only report their size."""

    @property
    def grad_dtype(self) -> torch.dtype:
        return self.weight.dtype

    def _count(self, kind: str, m: int, k: int, n: int, size: int) -> None:
        self.kernels.work.products.append((kind, m, k, n, size))  # type: ignore[attr-defined]

    def products(self, hidden: Tensor, out: Tensor) -> Tensor:
        self._count("logits", *hidden.shape, len(self.weight), hidden.nbytes + self.weight.nbytes + out.nbytes)
        return out

    def hidden_grad(self, grad_logits: Tensor) -> Tensor:
        result = grad_logits.new_empty(len(grad_logits), self.weight.shape[1], dtype=self.dtype)
        size = grad_logits.nbytes + self.weight.nbytes + result.nbytes
        self._count("dh", *grad_logits.shape, self.weight.shape[1], size)
        return result

    def add_weight_grad(
        self, accumulator: Tensor, grad_logits: Tensor, hidden: Tensor, *, overwrite: bool = False
    ) -> None:
        size = grad_logits.nbytes + hidden.nbytes + accumulator.nbytes * (1 if overwrite else 2)
        self._count("dW", grad_logits.shape[1], len(grad_logits), hidden.shape[1], size)


@dataclass(frozen=True)
class _CountingKernels(ChunkKernels):
    work: Work = field(default_factory=Work)


def _head(work: Work, vocabulary: int, hidden: int, chunk_bytes: int | None) -> ChunkedHead:
    def statistics(logits: Any, *_: Any, **__: Any) -> None:
        streams = logits if isinstance(logits, tuple) else (logits,)
        work.kernels.append(("statistics", sum(each.nbytes for each in streams)))

    def gradient(logits: Any, labels: Any, stats: Any, grads: Any, outs: Any, **_: Any) -> None:
        tensors = [logits, outs] if isinstance(logits, Tensor) else [*logits, *outs]
        work.kernels.append(("gradient", sum(each.nbytes for each in tensors if each is not None)))

    def unused(*_: Any, **__: Any) -> None:
        raise AssertionError("a pair loss needs no divergence")

    kernels = _CountingKernels(
        name="counting",
        token_stats=statistics,
        pair_stats=statistics,
        token_grad=gradient,
        pair_grad=gradient,
        jsd_stats=unused,
        jsd_grad=unused,
        finish_logits=True,
        row_coefficients=lambda *_, **__: None,
        work=work,
    )
    weight = torch.empty(vocabulary, hidden, dtype=torch.bfloat16, device="meta")
    return _CountingHead(weight, kernels=kernels, chunk_bytes=chunk_bytes)

"""A chunk of rows: the products of one or two streams in one buffer, their statistics, and the gradient.

Where dz is multiplied in the logits' dtype it overwrites them, and every chunk has products of its own. An accelerator
multiplies bfloat16: there dz goes to a second buffer of several chunks. The chunks' logits in float32 are small, and
the products for dh and dW still take thousands of rows: each product for dW reads and writes all of dW in float32,
which takes as long as the multiplication of a thousand rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nextquill.errors import ArgumentError
from nextquill.ops import huge_pages
from nextquill.ops.dispatch import PAIR_STATS, ChunkKernels
from nextquill.ops.gradients import HeadGradients
from nextquill.ops.head import LinearHead, infinite_to_nan
from nextquill.ops.row_groups import RowPlan, split_rows

# The products of each chunk read all of W (and all of dW, in float32): a CPU reaches full speed with a hundred rows.
_DEFAULT_BYTES = 2**27
# At V = 151,936 and D = 4,096 these are 1,024 rows of logits (622 MB) and 4,224 rows of bfloat16 dz.
_DEFAULT_BYTES_ACCELERATOR = 15 * 2**27
# Rows of dz for each row of logits, and the most of the memory that the logits of a long sequence may take.
_GRADIENT_ROWS = 4
_LONGEST_SHARE = 0.75
# A GPU's product computes this many rows or a multiple; the last, partial tile takes as long as a whole one.
_TILE_ROWS = 128


@dataclass(frozen=True, kw_only=True)
class ChunkedHead(LinearHead):
    """A head whose logits exist a chunk at a time.

    Attributes:
        kernels: the functions that read a chunk's logits and compute their gradient.
        chunk_bytes: bound on the memory for logits, their gradient and its products, in bytes; None for the device's
            default.
    """

    kernels: ChunkKernels
    chunk_bytes: int | None = None

    @functools.cached_property
    def finishing(self) -> dict[str, Any]:
        """Arguments of the kernels that make logits of products; none if `LogitsBuffer` does it."""
        if not self.kernels.finish_logits:
            return {}
        return {"bias": self.wide_bias, "softcap": self.softcap, "logit_scale": self.logit_scale}

    def memory(self, rows: int, streams: int, gradients: int, longest: int = 0) -> ChunkMemory:
        """Divide `chunk_bytes` between logits and their gradient.

        Args:
            rows: rows that are supervised.
            streams: streams of logits, 1 or 2.
            gradients: streams that get a gradient, 0 to 2.
            longest: rows of the longest sequence, if rows of a sequence depend on one another; the logits may then
                take memory from the gradient, because logits of rows that do not fit are computed twice.

        Raises:
            ArgumentError: `chunk_bytes` does not hold one row.
        """
        # Processes that divide a vocabulary take the same chunks: they meet once in each.
        stride = _row_stride(self.vocabulary if self.shard is None else self.shard.largest)
        of_row, of_gradient = streams * stride * self.dtype.itemsize, 0
        if gradients and self.grad_dtype != self.dtype:
            hidden = self.weight.shape[1] * (self.weight.dtype.itemsize + self.dtype.itemsize)
            of_gradient = stride * self.grad_dtype.itemsize + hidden
        budget = self.chunk_bytes
        if budget is None:
            default = _DEFAULT_BYTES if self.weight.device.type == "cpu" else _DEFAULT_BYTES_ACCELERATOR
            budget = max(default, of_row + gradients * of_gradient)
        if budget < of_row + gradients * of_gradient:
            raise ArgumentError(
                f"chunk_bytes: expected at least {of_row + gradients * of_gradient}, which one row of {streams} "
                f"stream{'s' * (streams > 1)} takes, got {budget}"
            )
        fitting = budget // (of_row + streams * _GRADIENT_ROWS * of_gradient)
        if of_gradient:
            most = min(budget - gradients * of_gradient, int(_LONGEST_SHARE * budget)) // of_row
            fitting = max(1, _whole_tiles(fitting, _TILE_ROWS // streams), min(longest, most))
        fitting = min(fitting, max(1, rows))
        if not of_gradient:
            return ChunkMemory(fitting, 0)
        gradient_rows = _whole_tiles((budget - fitting * of_row) // of_gradient, _TILE_ROWS)
        return ChunkMemory(fitting, min(gradient_rows, gradients * rows))


@dataclass(frozen=True)
class ChunkMemory:
    """Sizes of the buffers of a call.

    Attributes:
        rows: rows of the plan whose logits are held at once.
        gradient_rows: rows of dz held at once, counted in each stream; 0 if dz overwrites the logits.
    """

    rows: int
    gradient_rows: int


@dataclass(frozen=True)
class Chunk:
    """n rows of a plan in one or two streams, stacked: stream s has rows [s·n, (s + 1)·n) of `hidden` and `logits`.

    Attributes:
        head: the output head.
        rows: which n rows of the plan.
        indices: [n], int64, positions of these rows in the batch.
        labels: [n], int64, as columns of `logits`; V where another process holds the label.
        hidden: [streams·n, D], dtype of the weight.
        logits: [streams·n, V], float32 (float64); a view of the buffer. Products h Wᵀ if the kernels finish them.
    """

    head: ChunkedHead
    rows: slice
    indices: Tensor
    labels: Tensor
    hidden: Tensor
    logits: Tensor

    @property
    def streams(self) -> tuple[Tensor, ...]:
        """The logits [n, V] of each stream."""
        return torch.split(self.logits, self.indices.numel())

    def statistics(self, out: Tensor) -> None:
        """Write statistics as `chunk_torch` defines them: `out` is [3, n], or [9, n] or [11, n] for two streams.

        They are those of this process's part of the vocabulary; `OpenShard.combine_` completes them.
        """
        kernels = self.head.kernels
        if len(out) >= PAIR_STATS:
            kernels.pair_stats(self.streams, self.labels, out, **self.head.finishing)
        else:
            kernels.token_stats(self.logits, self.labels, out, **self.head.finishing)

    def own_statistics(self, out: Tensor) -> None:
        """Write the statistics of each stream alone: `out` is [3, n] for each of them, stacked."""
        for logits, rows in zip(self.streams, out.split(3), strict=True):
            self.head.kernels.token_stats(logits, self.labels, rows, **self.head.finishing)

    def jsd_statistics(self, beta: float, out: Tensor, *, normalised: bool = False) -> None:
        """Write the statistics of `chunk_torch.jsd_stats` into `out` [6, n]; z1 is the student, z0 the teacher."""
        self.head.kernels.jsd_stats(self.streams, out, beta, normalised=normalised, **self.head.finishing)

    def jsd_nlls(self, stats: Tensor) -> Tensor:
        """Return the NLLs of both streams, [2, n] in nats, from `stats` [6, n] that `jsd_statistics` wrote."""
        own = torch.stack([logits.gather(1, self.labels[:, None]).squeeze(1) for logits in self.streams])
        if self.head.kernels.finish_logits:
            self.head.finish_(own, self.labels)
        return (stats[:4:2] - own) + stats[1:4:2].log()

    def gradient(
        self, stats: Tensor, grad_nlls: Sequence[Tensor | None], rows: slice, outs: tuple[Tensor, ...]
    ) -> None:
        """Write dz of some rows; may overwrite their logits.

        Args:
            stats: [3, n], or [9, n] for two streams; written by `statistics`, of the whole vocabulary.
            grad_nlls: g_f, g_c and g_e, each [n], per nat; None means zero.
            rows: which rows of the chunk.
            outs: for each stream that gets a gradient, [rows, V] in `head.grad_dtype` or `head.dtype`.
        """
        kernels, labels, stats = self.head.kernels, self.labels[rows], stats[:, rows]
        options, logits = self._gradient_options, [stream[rows] for stream in self.streams]
        g = [None if each is None else each[rows] for each in grad_nlls]
        if g[2] is not None:
            kernels.pair_grad(logits, labels, stats, g, (*outs, None)[:2], **options)
            return
        for index, out in enumerate(outs):
            kernels.token_grad(logits[index], labels, stats[3 * index : 3 * index + 3], g[index], out, **options)

    def jsd_gradient(self, beta: float, stats: Tensor, grad_jsd: Tensor, rows: slice, outs: tuple[Tensor, ...]) -> None:
        """Write dz1 of some rows; may overwrite their logits.

        Args:
            beta, stats: as `jsd_statistics` took and wrote them.
            grad_jsd: [n], per nat.
            rows, outs: as in `gradient`; one stream gets a gradient.
        """
        logits, options = [stream[rows] for stream in self.streams], self._gradient_options
        self.head.kernels.jsd_grad(logits, stats[:, rows], grad_jsd[rows], *outs, beta, **options)

    @property
    def _gradient_options(self) -> dict[str, Any]:
        return {"softcap": self.head.softcap, "logit_scale": self.head.logit_scale, **self.head.finishing}


class LogitsBuffer:
    """The largest allocation of an engine: logits [streams·rows, V], float32 (float64); `nbytes` of memory."""

    def __init__(self, head: ChunkedHead, streams: int, plan: RowPlan, rows: int) -> None:
        self.head, self.plan, self.rows = head, plan, rows
        self._labels = plan.labels if head.shard is None else head.shard.own_labels(plan.labels)
        padded = head.weight.new_empty(streams * rows, _row_stride(head.vocabulary), dtype=head.dtype)
        huge_pages.advise(padded)
        self.nbytes = padded.nbytes
        self._memory = padded[:, : head.vocabulary]

    def fill(self, streams: Sequence[Tensor], rows: slice) -> Chunk:
        """Compute the logits of some rows of the plan; overwrites the previous chunk.

        Args:
            streams: hidden states [N, D] of each stream, any floating dtype.
            rows: which rows of the plan.
        """
        head, indices = self.head, self.plan.rows[rows]
        hidden = torch.cat([stream.index_select(0, indices).to(head.weight.dtype) for stream in streams])
        if head.softcap is not None:
            hidden = infinite_to_nan(hidden)
        logits = head.products(hidden, self._memory[: hidden.shape[0]])
        if not head.kernels.finish_logits:
            head.finish_(logits)
        return Chunk(head, rows, indices, self._labels[rows], hidden, logits)

    def chunks(self, streams: Sequence[Tensor]) -> Iterator[Chunk]:
        """Yield all rows of the plan; each chunk overwrites the previous one, and `streams` is as in `fill`."""
        for rows in split_rows(0, self.plan.num_rows, self.rows):
            yield self.fill(streams, rows)


class GradientBuffer:
    """Takes dz of chunk after chunk, and multiplies it for dh and dW: at once, or when its memory is full.

    Args:
        gradients: where the products are added.
        streams: the streams that get a gradient, (0,) or (0, 1).
        rows: `ChunkMemory.gradient_rows`.

    Attributes:
        nbytes: bytes of memory, for dz and its hidden states.
    """

    def __init__(self, gradients: HeadGradients, streams: tuple[int, ...], rows: int) -> None:
        self.gradients, self.streams = gradients, streams
        head = gradients.head
        self._rows, self._filled, self.nbytes = rows, 0, 0
        self._blocks: list[tuple[int, Tensor]] = []
        if rows:
            padded = head.weight.new_empty(rows, _row_stride(head.vocabulary), dtype=head.grad_dtype)
            self._dz = padded[:, : head.vocabulary]
            self._hidden = head.weight.new_empty(rows, head.weight.shape[1])
            self.nbytes = padded.nbytes + self._hidden.nbytes

    def add(self, chunk: Chunk, write: Callable[[slice, tuple[Tensor, ...]], None]) -> None:
        """Compute the gradient by a chunk's logits, which it may overwrite.

        Args:
            chunk: the chunk.
            write: writes dz of some rows, with the last two arguments of `Chunk.gradient`.
        """
        n, count = chunk.indices.numel(), len(self.streams)
        if not self._rows:
            write(slice(0, n), chunk.streams[:count])
            blocks = [(stream, chunk.indices) for stream in self.streams]
            self.gradients.add(blocks, chunk.logits[: count * n], chunk.hidden[: count * n])
            return
        start = 0
        while start < n:
            size = min(n - start, (self._rows - self._filled) // count)
            if size == 0:
                self.flush()
                continue
            rows = slice(start, start + size)
            places = [slice(self._filled + i * size, self._filled + (i + 1) * size) for i in range(count)]
            write(rows, tuple(self._dz[place] for place in places))
            for stream, place in zip(self.streams, places, strict=True):
                self._hidden[place] = chunk.hidden[stream * n + start : stream * n + start + size]
                self._blocks.append((stream, chunk.indices[rows]))
            self._filled += count * size
            start += size

    def flush(self) -> None:
        """Multiply what has been taken since the last time."""
        self._multiply(last=False)

    def finish(self) -> None:
        """Multiply the rest, and complete the gradients."""
        self._multiply(last=True)
        self.gradients.finish()

    def _multiply(self, last: bool) -> None:
        if self._blocks:
            self.gradients.add(self._blocks, self._dz[: self._filled], self._hidden[: self._filled], last=last)
        self._filled, self._blocks = 0, []


def _whole_tiles(rows: int, tile: int) -> int:
    """Round down to a multiple of `tile`, if there is one."""
    return rows - rows % tile if rows >= tile else rows


def _row_stride(vocabulary: int) -> int:
    """Round V up so that every row starts at a multiple of 64 bytes: kernels then read and write whole vectors."""
    return -(-vocabulary // 16) * 16

"""A chunk of rows: the logits of one or two streams in one buffer, filled by one product and overwritten by their
gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nextquill.ops import huge_pages
from nextquill.ops.dispatch import ChunkKernels
from nextquill.ops.gradients import HeadGradients
from nextquill.ops.head import LinearHead, infinite_to_nan
from nextquill.ops.row_groups import RowPlan

_DEFAULT_BYTES = 2**27
# The products of each chunk read all of W (and all of dW, in float32): on an accelerator they reach full speed with a
# thousand rows or more, on a CPU with a hundred.
_DEFAULT_BYTES_ACCELERATOR = 3 * 2**28


@dataclass(frozen=True, kw_only=True)
class ChunkedHead(LinearHead):
    """A head whose logits exist a chunk at a time.

    Attributes:
        kernels: the functions that read a chunk's logits and overwrite them with their gradient.
        chunk_bytes: bound on the logits held at once, in bytes; None for the device's default.
    """

    kernels: ChunkKernels
    chunk_bytes: int | None = None

    def max_rows(self, streams: int) -> int:
        """Return how many rows fit the budget with the logits of `streams` streams; at least one."""
        budget = self.chunk_bytes
        if budget is None:
            budget = _DEFAULT_BYTES if self.weight.device.type == "cpu" else _DEFAULT_BYTES_ACCELERATOR
        return max(1, budget // (streams * _row_stride(self.vocabulary) * self.dtype.itemsize))


@dataclass(frozen=True)
class Chunk:
    """n rows of a plan in one or two streams, stacked: stream s has rows [s·n, (s + 1)·n) of `hidden` and `logits`.

    Attributes:
        rows: which n rows of the plan.
        indices: [n], int64, positions of these rows in the batch.
        labels: [n], int64.
        hidden: [streams·n, D], dtype of the weight.
        logits: [streams·n, V], float32 (float64); a view of the buffer.
    """

    rows: slice
    indices: Tensor
    labels: Tensor
    hidden: Tensor
    logits: Tensor

    @property
    def streams(self) -> tuple[Tensor, ...]:
        """The logits [n, V] of each stream."""
        return torch.split(self.logits, self.indices.numel())

    def add_gradient(self, into: HeadGradients, dtype: torch.dtype, streams: Sequence[int]) -> None:
        """Add this chunk's share to the gradients of the inputs of `streams`.

        The logits have been overwritten with their gradient, which is of `dtype`.
        """
        gradient = self.logits
        if dtype != gradient.dtype:
            gradient = gradient.view(dtype)[:, : gradient.shape[1]]
        count = self.indices.numel()
        used = slice(streams[0] * count, (streams[-1] + 1) * count)
        into.add(self.indices, gradient[used], self.hidden[used], streams)


class LogitsBuffer:
    """The one large allocation of an engine: logits [streams·max_rows, V], float32 (float64)."""

    def __init__(self, head: ChunkedHead, streams: int, plan: RowPlan) -> None:
        self.head, self.plan = head, plan
        self.max_rows = min(head.max_rows(streams), max(1, plan.num_rows))
        padded = head.weight.new_empty(streams * self.max_rows, _row_stride(head.vocabulary), dtype=head.dtype)
        huge_pages.advise(padded)
        self._memory = padded[:, : head.vocabulary]

    def fill(self, streams: Sequence[Tensor], rows: slice) -> Chunk:
        """Compute the logits of some rows of the plan; overwrites the previous chunk.

        Args:
            streams: hidden states [N, D] of each stream, any floating dtype.
            rows: which rows of the plan.
        """
        dtype, indices = self.head.weight.dtype, self.plan.rows[rows]
        hidden = torch.cat([stream.index_select(0, indices).to(dtype) for stream in streams])
        if self.head.softcap is not None:
            hidden = infinite_to_nan(hidden)
        logits = self.head.logits(hidden, self._memory[: hidden.shape[0]])
        return Chunk(rows, indices, self.plan.labels[rows], hidden, logits)


def _row_stride(vocabulary: int) -> int:
    """Round V up so that every row starts at a multiple of 64 bytes: kernels then read and write whole vectors."""
    return -(-vocabulary // 16) * 16

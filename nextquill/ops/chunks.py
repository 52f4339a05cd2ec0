"""A chunk of rows: both streams' logits in one buffer, filled by one product and overwritten by their gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nextquill.ops import huge_pages
from nextquill.ops.dispatch import ChunkKernels
from nextquill.ops.gradients import HeadGradients
from nextquill.ops.head import LinearHead

_DEFAULT_BYTES = 2**27
# A chunk's products stream all of W (and of dW, in float32) through the chip: on an accelerator they reach their rate
# with a thousand rows or more, on a CPU with a hundred.
_DEFAULT_BYTES_ACCELERATOR = 3 * 2**28


@dataclass(frozen=True)
class HeadCall:
    """Everything of one call that is no tensor."""

    kernels: ChunkKernels
    softcap: float | None = None
    logit_scale: float = 1.0
    chunk_bytes: int | None = None

    def head(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> LinearHead:
        """The head with its weight in `dtype`."""
        return LinearHead(weight.to(dtype), None if bias is None else bias.to(dtype), self.softcap, self.logit_scale)

    def max_rows(self, head: LinearHead, streams: int) -> int:
        """Rows whose logits of `streams` streams fit the budget; at least one."""
        budget = self.chunk_bytes
        if budget is None:
            budget = _DEFAULT_BYTES if head.weight.device.type == "cpu" else _DEFAULT_BYTES_ACCELERATOR
        return max(1, budget // (streams * _row_stride(head.vocabulary) * head.dtype.itemsize))


@dataclass(frozen=True)
class Chunk:
    """Rows of one or two streams, stacked: stream s has rows [s·n, (s + 1)·n).

    Attributes:
        rows: [n] their indices in the batch.
        hidden: [streams·n, D], in the weight's dtype.
        logits: [streams·n, V] in the compute dtype; a view of the buffer.
    """

    rows: Tensor
    hidden: Tensor
    logits: Tensor

    def stream(self, index: int) -> Tensor:
        """One stream's logits [n, V]."""
        count = self.rows.numel()
        return self.logits[index * count : (index + 1) * count]

    def add_gradient(self, into: HeadGradients, dtype: torch.dtype, streams: Sequence[int]) -> None:
        """Add what the logits' gradient, now in the logits' place in `dtype`, gives to the inputs of `streams`."""
        gradient = self.logits
        if dtype != gradient.dtype:
            gradient = gradient.view(dtype)[:, : gradient.shape[1]]
        count = self.rows.numel()
        used = slice(streams[0] * count, (streams[-1] + 1) * count)
        into.add(self.rows, gradient[used], self.hidden[used], streams)


class LogitsBuffer:
    """The one large allocation of an engine."""

    def __init__(self, head: LinearHead, streams: int, max_rows: int) -> None:
        self.head = head
        padded = head.weight.new_empty(streams * max_rows, _row_stride(head.vocabulary), dtype=head.dtype)
        huge_pages.advise(padded)
        self._memory = padded[:, : head.vocabulary]

    def fill(self, streams: Sequence[Tensor], rows: Tensor) -> Chunk:
        """Compute the logits of `rows` [n] of each stream [N, D]; overwrites the chunk before."""
        dtype = self.head.weight.dtype
        hidden = torch.cat([stream.index_select(0, rows).to(dtype) for stream in streams])
        if self.head.softcap is not None:
            hidden = infinite_to_nan(hidden)
        return Chunk(rows, hidden, self.head.logits(hidden, self._memory[: hidden.shape[0]]))


def infinite_to_nan(hidden: Tensor) -> Tensor:
    """NaN for ±inf: a cap would turn the logits of a broken hidden state into ±softcap, and its nll finite."""
    return torch.nan_to_num(hidden, nan=torch.nan, posinf=torch.nan, neginf=torch.nan)


def _row_stride(vocabulary: int) -> int:
    """V rounded up so that every row begins at a multiple of 64 bytes: kernels then read and write whole vectors."""
    return -(-vocabulary // 16) * 16

"""Accumulators for the gradients of the head's inputs, filled chunk by chunk."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from nextquill.errors import GradientError
from nextquill.ops.head import LinearHead
from nextquill.ops.shard_exchange import OpenShard


class Needs(NamedTuple):
    """Says which inputs need a gradient."""

    factual: bool
    counterfactual: bool
    weight: bool
    bias: bool


class HeadGradients:
    """The gradients dh1, dh0 [N, D], dW [V, D] and db [V]; `None` where not needed.

    dW and db are summed in float32 (float64), because summing them in bfloat16 is known to harm training. dh1 and dh0
    have the dtype of `rows_dtype`. Rows that are never added stay exactly 0.

    If processes divide the vocabulary, dW and db are those of this process's part, and `finish` adds up the processes'
    shares of dh. It does so once, for all rows: a sum for each chunk would be cut into other pieces for another chunk
    size, and collectives add the processes of each piece in an order of its own. The shares are in float32 (float64).

    Args:
        head: the output head.
        factual, counterfactual: hidden states [N, D], any floating dtype; the second may be None.
        needs: which gradients are wanted.
    """

    def __init__(self, head: LinearHead, factual: Tensor, counterfactual: Tensor | None, needs: Needs) -> None:
        self.head = head
        streams = [factual if needs.factual else None, counterfactual if needs.counterfactual else None]
        self._sum: SumOfProcesses | None = None
        if head.shard is None:
            self.factual, self.counterfactual = (None if each is None else _rows_like(each) for each in streams)
        else:
            self._sum = SumOfProcesses(head.shard, streams, head.dtype)
            self.factual, self.counterfactual = self._sum.shares
        # Not empty_like: it would copy the strides of a transposed weight, which the operators' fake results do not.
        self._weight = head.weight.new_empty(head.weight.shape, dtype=head.dtype) if needs.weight else None
        self._weight_begun = False
        bias_needed = needs.bias and head.bias is not None
        self.bias = head.weight.new_zeros(head.vocabulary, dtype=head.dtype) if bias_needed else None

    @property
    def weight(self) -> Tensor | None:
        """The gradient dW [V, D]."""
        if self._weight is not None and not self._weight_begun:
            self._weight.zero_()
            self._weight_begun = True
        return self._weight

    def add(
        self, blocks: Sequence[tuple[int, Tensor]], grad_logits: Tensor, hidden: Tensor, *, last: bool = False
    ) -> None:
        """Add the share of some rows of both streams, with one product each for dh and dW.

        Args:
            blocks: for successive rows of the other arguments, their stream (0 for factual, 1 for counterfactual) and
                their positions in the batch [n], int64.
            grad_logits: dz [m, V] of all blocks, dtype `head.grad_dtype` or `head.dtype`.
            hidden: [m, D], any floating dtype, the hidden states behind `grad_logits`.
            last: no more rows follow, so that dh may be on its way between processes during the product for dW.
        """
        sizes = [rows.numel() for _, rows in blocks]
        self._add_hidden(blocks, grad_logits, sizes)
        if last and self._sum is not None:
            self._sum.start()
        if self._weight is not None:
            self.head.add_weight_grad(self._weight, grad_logits, hidden, overwrite=not self._weight_begun)
            self._weight_begun = True
        if self.bias is not None:
            # Block by block: the effect term adds opposite numbers to dz1 and dz0, and their sums cancel exactly.
            for piece in grad_logits.split(sizes):
                self.bias.add_(piece.sum(0, dtype=self.bias.dtype))

    def finish(self) -> None:
        """Add up the shares of dh, if processes divide the vocabulary; every process must call it."""
        if self._sum is not None:
            self.factual, self.counterfactual = self._sum.finish()

    def _add_hidden(self, blocks: Sequence[tuple[int, Tensor]], grad_logits: Tensor, sizes: list[int]) -> None:
        targets = [(self.factual, self.counterfactual)[stream] for stream, _ in blocks]
        at_once = all(target is not None for target in targets)
        pieces = (self.head.hidden_grad(grad_logits) if at_once else grad_logits).split(sizes)
        for (_, rows), target, piece in zip(blocks, targets, pieces, strict=True):
            if target is not None:
                dh = piece if at_once else self.head.hidden_grad(piece)
                target.index_copy_(0, rows, dh.to(target.dtype))


class SumOfProcesses:
    """The sum of dh1 and dh0 over the processes that divide a vocabulary, in one exchange.

    Args:
        shard: the part of the vocabulary.
        streams: hidden states [N, D], any floating dtype; None for one without gradient.
        dtype: of the shares, float32 (float64).

    Attributes:
        shares: this process's share of each gradient [N, D], to be filled; None for one that is not wanted.
    """

    def __init__(self, shard: OpenShard, streams: Sequence[Tensor | None], dtype: torch.dtype) -> None:
        self.shard, self._dtypes = shard, [None if each is None else rows_dtype(each) for each in streams]
        wanted = [each for each in streams if each is not None]
        self._memory = torch.stack([torch.zeros_like(each, dtype=dtype) for each in wanted]) if wanted else None
        rows = iter(() if self._memory is None else self._memory)
        self.shares = [None if each is None else next(rows) for each in streams]
        self._work: dist.Work | None = None

    def start(self) -> None:
        """Start the exchange; the shares must be complete."""
        if self._memory is not None and self._work is None:
            self._work = self.shard.sum_(self._memory)

    def finish(self) -> list[Tensor | None]:
        """Return the sums [N, D], each in memory of its own and the dtype of `rows_dtype`; None as in `shares`."""
        self.start()
        if self._work is not None:
            self._work.wait()
        return [
            None if share is None else share.to(dtype, copy=True)
            for share, dtype in zip(self.shares, self._dtypes, strict=True)
        ]


def rows_dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype of dh for hidden states of any shape: float32 for float16, else the dtype of `hidden`.

    In float16 the gradients of a mean underflow before a loss scaler can enlarge them.
    """
    return torch.float32 if hidden.dtype == torch.float16 else hidden.dtype


def _rows_like(hidden: Tensor) -> Tensor:
    return torch.zeros(hidden.shape, dtype=rows_dtype(hidden), device=hidden.device)


def first_order_only(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., tuple[Tensor | None, ...]]:
    """Refuse second derivatives, and a backward for several upstream gradients at once.

    torch's `once_differentiable` notices only upstream gradients that require grad. With a gradient penalty on a loss
    there are none, and training would silently treat the penalty as a constant.
    """

    @functools.wraps(backward)
    def refusing(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise GradientError(
                "nextquill's operators have a first derivative only: expected a backward without create_graph=True; "
                "for second derivatives use the plain PyTorch twins in nextquill.reference"
            )
        if not torch.compiler.is_compiling() and any(g is not None and _is_batched(g) for g in grad_outputs):
            raise GradientError(
                "is_grads_batched: nextquill's operators take one upstream gradient at a time, got a batch of them; "
                "expected one call of torch.autograd.grad for each (in torch.autograd.functional, vectorize=False)"
            )
        return backward(ctx, *grad_outputs)

    return refusing


def _is_batched(gradient: Tensor) -> bool:
    """Whether `gradient` is batched by `torch.vmap`, or by the older function that `is_grads_batched` still uses."""
    functorch = torch._C._functorch
    return bool(functorch.is_batchedtensor(gradient) or functorch.is_legacy_batchedtensor(gradient))

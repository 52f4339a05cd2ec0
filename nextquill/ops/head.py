"""The output head as three matrix products, each with float32 (float64) results whatever the inputs' dtype.

U in this project's cost figures is one call of one of these methods over all rows. All matrix products are in this
file, so products are counted here.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from nextquill.ops.mixed_precision_mm import addmm_into, has_wide_mm, mm_into, tf32_products
from nextquill.ops.precision import compute_dtype
from nextquill.ops.shard_exchange import OpenShard

# A half-precision weight is cast to float32 in slices of this size, so that no full float32 copy exists. On an
# accelerator small slices would make many small products.
_CAST_BYTES = 8 * 2**20
_CAST_BYTES_ACCELERATOR = 128 * 2**20


@dataclass(frozen=True)
class LinearHead:
    """The output head: z = cap(scale * (h Wᵀ + b)).

    Attributes:
        weight: W [V, D], any floating dtype.
        bias: b [V], any floating dtype, or None.
        softcap: c > 0 of cap(x) = c·tanh(x / c), or None.
        logit_scale: the scale.
        shard: which part of the vocabulary `weight` and `bias` are, if processes divide it; V is then the part's size.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0
    shard: OpenShard | None = None

    @property
    def vocabulary(self) -> int:
        """The vocabulary size V, in tokens."""
        return self.weight.shape[0]

    @property
    def num_labels(self) -> int:
        """The number of labels that are allowed: the vocabulary size, over all processes."""
        return self.vocabulary if self.shard is None else self.shard.vocabulary

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of logits and of accumulated gradients."""
        return compute_dtype(self.weight.dtype)

    @property
    def grad_dtype(self) -> torch.dtype:
        """The dtype in which dz enters its products.

        bfloat16 if the weight has it and the device multiplies it into float32 results. Never float16, in which the
        gradients of unlikely tokens underflow: those products run in float32, and with a float16 weight in TF32 where
        the device has it.
        """
        narrow = self.weight.dtype == torch.bfloat16 and has_wide_mm(self.weight.device, self.weight.dtype)
        return self.weight.dtype if narrow else self.dtype

    @functools.cached_property
    def wide_bias(self) -> Tensor | None:
        """The bias [V] in `dtype`."""
        return None if self.bias is None else self.bias.to(self.dtype)

    def products(self, hidden: Tensor, out: Tensor) -> Tensor:
        """Write h Wᵀ [n, V] into `out`, which has `dtype`, and return it; `hidden` [n, D] has any floating dtype."""
        if hidden.dtype == self.weight.dtype and has_wide_mm(self.weight.device, self.weight.dtype):
            return mm_into(out, hidden, self.weight.T)
        wide = hidden.to(self.dtype)
        # float32 inputs follow `torch.set_float32_matmul_precision`, as `nn.Linear` does: with TF32 allowed, the
        # difference of two close logits is mostly rounding.
        for rows, block in self._weight_blocks():
            torch.mm(wide, block.T, out=out[:, rows])
        return out

    def finish_(self, products: Tensor, columns: Tensor | None = None) -> Tensor:
        """Overwrite products [n, V] in `dtype` with z, and return it.

        With `columns` [n], int64, products are [..., n], of one token of the vocabulary each.
        """
        if self.wide_bias is not None:
            products.add_(self.wide_bias if columns is None else self.wide_bias[columns])
        if self.logit_scale != 1.0:
            products.mul_(self.logit_scale)
        if self.softcap is not None:
            products.div_(self.softcap).tanh_().mul_(self.softcap)
        return products

    def hidden_grad(self, grad_logits: Tensor) -> Tensor:
        """Return dh = dz W [n, D] in `dtype`; `grad_logits` is dz [n, V], in `grad_dtype` or `dtype`."""
        size = (grad_logits.shape[0], self.weight.shape[1])
        if self.grad_dtype != self.dtype:
            result = grad_logits.new_empty(size, dtype=self.dtype)
            return mm_into(result, grad_logits.to(self.grad_dtype), self.weight)
        result = grad_logits.new_zeros(size)
        with self._gradient_products():
            for rows, block in self._weight_blocks():
                result.addmm_(grad_logits[:, rows], block)
        return result

    def add_weight_grad(
        self, accumulator: Tensor, grad_logits: Tensor, hidden: Tensor, *, overwrite: bool = False
    ) -> None:
        """Add dzᵀ h to `accumulator`.

        Args:
            accumulator: [V, D], in `dtype`.
            grad_logits: dz [n, V], in `grad_dtype` or `dtype`.
            hidden: h [n, D], any floating dtype.
            overwrite: replace what is in `accumulator`, which is not read.
        """
        left, right = grad_logits.to(self.grad_dtype).T, hidden.to(self.grad_dtype)
        if self.grad_dtype != self.dtype:
            (mm_into if overwrite else addmm_into)(accumulator, left, right)
            return
        with self._gradient_products():
            if overwrite:
                torch.mm(left, right, out=accumulator)
            else:
                accumulator.addmm_(left, right)

    def _gradient_products(self) -> AbstractContextManager[None]:
        if self.weight.dtype == torch.float16 and self.weight.device.type == "cuda":
            return tf32_products()
        return nullcontext()

    def _weight_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        if self.weight.dtype == self.dtype:
            yield slice(0, self.vocabulary), self.weight
            return
        slice_bytes = _CAST_BYTES if self.weight.device.type == "cpu" else _CAST_BYTES_ACCELERATOR
        rows = max(1, slice_bytes // (4 * self.weight.shape[1]))
        for start in range(0, self.vocabulary, rows):
            stop = min(start + rows, self.vocabulary)
            yield slice(start, stop), self.weight[start:stop].to(self.dtype)


def infinite_to_nan(hidden: Tensor) -> Tensor:
    """Replace ±inf by NaN in `hidden`, of any shape and floating dtype.

    A cap would turn the infinite logits of a broken hidden state into ±softcap, and its nll would look normal.
    """
    return torch.nan_to_num(hidden, nan=torch.nan, posinf=torch.nan, neginf=torch.nan)

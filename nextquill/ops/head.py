"""The output head as three matrix products, each with float32 (float64) results whatever the inputs' dtype.

U in this project's cost figures is one call of one of these methods over all rows. All matrix products are in this
file, so products are counted here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nextquill.ops.mixed_precision_mm import addmm_into, has_wide_mm, mm_into
from nextquill.ops.precision import compute_dtype

# On the CPU a half-precision weight is cast to float32 in slices of this size, so that no full float32 copy exists.
_CAST_BYTES = 8 * 2**20


@dataclass(frozen=True)
class LinearHead:
    """The output head: z = cap(scale * (h Wᵀ + b)).

    Attributes:
        weight: W [V, D], any floating dtype.
        bias: b [V], any floating dtype, or None.
        softcap: c > 0 of cap(x) = c·tanh(x / c), or None.
        logit_scale: the scale.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0

    @property
    def vocabulary(self) -> int:
        """The vocabulary size V, in tokens."""
        return self.weight.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of logits and of accumulated gradients."""
        return compute_dtype(self.weight.dtype)

    @property
    def grad_dtype(self) -> torch.dtype:
        """The dtype in which dz enters its products.

        bfloat16 if the weight has it and the device multiplies it into float32 results. Never float16, in which the
        gradients of unlikely tokens underflow: those products run in float32.
        """
        narrow = self.weight.dtype == torch.bfloat16 and has_wide_mm(self.weight.device, self.weight.dtype)
        return self.weight.dtype if narrow else self.dtype

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        """Write z [n, V] into `out`, which has `dtype`, and return it; `hidden` [n, D] has any floating dtype."""
        if hidden.dtype == self.weight.dtype and has_wide_mm(self.weight.device, self.weight.dtype):
            mm_into(out, hidden, self.weight.T)
        else:
            wide = hidden.to(self.dtype)
            # float32 inputs follow `torch.set_float32_matmul_precision`, as `nn.Linear` does: with TF32 allowed, the
            # difference of two close logits is mostly rounding.
            for rows, block in self._weight_blocks():
                torch.mm(wide, block.T, out=out[:, rows])
        if self.bias is not None:
            out.add_(self.bias.to(self.dtype))
        if self.logit_scale != 1.0:
            out.mul_(self.logit_scale)
        if self.softcap is not None:
            out.div_(self.softcap).tanh_().mul_(self.softcap)
        return out

    def hidden_grad(self, grad_logits: Tensor) -> Tensor:
        """Return dh = dz W [n, D] in `dtype`; `grad_logits` is dz [n, V], in `grad_dtype` or `dtype`."""
        size = (grad_logits.shape[0], self.weight.shape[1])
        if self.grad_dtype != self.dtype:
            result = grad_logits.new_empty(size, dtype=self.dtype)
            return mm_into(result, grad_logits.to(self.grad_dtype), self.weight)
        result = grad_logits.new_zeros(size)
        for rows, block in self._weight_blocks():
            result.addmm_(grad_logits[:, rows], block)
        return result

    def add_weight_grad(self, accumulator: Tensor, grad_logits: Tensor, hidden: Tensor) -> None:
        """Add dzᵀ h to `accumulator`.

        Args:
            accumulator: [V, D], in `dtype`.
            grad_logits: dz [n, V], in `grad_dtype` or `dtype`.
            hidden: h [n, D], any floating dtype.
        """
        if self.grad_dtype != self.dtype:
            addmm_into(accumulator, grad_logits.to(self.grad_dtype).T, hidden.to(self.grad_dtype))
        else:
            accumulator.addmm_(grad_logits.T, hidden.to(self.dtype))

    def _weight_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        if self.weight.dtype == self.dtype:
            yield slice(0, self.vocabulary), self.weight
            return
        rows = max(1, _CAST_BYTES // (4 * self.weight.shape[1]))
        for start in range(0, self.vocabulary, rows):
            stop = min(start + rows, self.vocabulary)
            yield slice(start, stop), self.weight[start:stop].to(self.dtype)


def infinite_to_nan(hidden: Tensor) -> Tensor:
    """Replace ±inf by NaN in `hidden`, of any shape and floating dtype.

    A cap would turn the infinite logits of a broken hidden state into ±softcap, and its nll would look normal.
    """
    return torch.nan_to_num(hidden, nan=torch.nan, posinf=torch.nan, neginf=torch.nan)

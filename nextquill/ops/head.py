"""The output head as three matrix products, each with float32 (float64) results whatever the inputs' dtype.

U in this project's cost figures is one call of one of these methods over all rows, so this file is where products are
made and the only place to count them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nextquill.reference.linear import compute_dtype

# A half-precision weight is cast to float32 on the CPU in slices of this size, so the cast never exists as a whole.
_CAST_BYTES = 8 * 2**20


@dataclass(frozen=True)
class LinearHead:
    """W [V, D], optional bias [V], and what the architecture does after them: z = cap(scale * (h Wᵀ + b))."""

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0

    @property
    def vocabulary(self) -> int:
        return self.weight.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of logits and of accumulated gradients."""
        return compute_dtype(self.weight.dtype)

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        """Write z for hidden [n, D] into `out` [n, V]."""
        if _has_wide_mm(hidden, self.weight):
            out.copy_(torch.mm(hidden, self.weight.T, out_dtype=self.dtype))
        else:
            wide = hidden.to(self.dtype)
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
        """dh = dz W; [n, D] in the compute dtype."""
        if _has_wide_mm(grad_logits, self.weight, gradient=True):
            return torch.mm(grad_logits.to(self.weight.dtype), self.weight, out_dtype=self.dtype)
        result = grad_logits.new_zeros(grad_logits.shape[0], self.weight.shape[1])
        for rows, block in self._weight_blocks():
            result.addmm_(grad_logits[:, rows], block)
        return result

    def add_weight_grad(self, accumulator: Tensor, grad_logits: Tensor, hidden: Tensor) -> None:
        """accumulator [V, D] += dzᵀ h, in the compute dtype."""
        if _has_wide_mm(grad_logits, hidden, gradient=True):
            product = torch.mm(grad_logits.T.to(hidden.dtype), hidden, out_dtype=self.dtype)
            accumulator.add_(product)
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


def _has_wide_mm(left: Tensor, right: Tensor, *, gradient: bool = False) -> bool:
    """Whether torch.mm can multiply half-precision inputs into a float32 result here (CUDA and ROCm, torch >= 2.8).

    A `gradient` on the left is float32 and is rounded to the right's dtype first; but not to float16, in which the
    gradients of unlikely tokens underflow.
    """
    half = (torch.bfloat16,) if gradient else (torch.float16, torch.bfloat16)
    return right.is_cuda and right.dtype in half and (gradient or left.dtype == right.dtype)

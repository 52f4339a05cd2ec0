"""The Triton kernels of `nextquill_kernels`, under the names the engines call.

Imported only where Triton is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nextquill_kernels import stream
from nextquill_kernels.chunk import pair_grad_, pair_stats, token_grad_, token_stats
from nextquill_kernels.coefficients import row_coefficients
from torch import Tensor

from nextquill.ops.head import LinearHead, infinite_to_nan

__all__ = ["pair_grad_", "pair_stats", "row_coefficients", "stream_nll", "token_grad_", "token_stats"]


def stream_nll(streams: tuple[Tensor, ...], head: LinearHead, labels: Tensor) -> Tensor:
    """Compute the NLLs of whole streams without logits in memory.

    Args:
        streams: one or two tensors of hidden states [N, D], any floating dtype.
        head: the output head.
        labels: [N], int64; rows with a label below 0 are ignored.

    Returns:
        [1 or 3, N], float32, in nats: the nll of each stream and, for two, of their difference; 0 in ignored rows.
    """
    options: dict[str, Any] = {"bias": head.bias, "softcap": head.softcap, "logit_scale": head.logit_scale}
    wide = tuple(each.to(head.weight.dtype) for each in streams)
    if head.softcap is not None:
        wide = tuple(infinite_to_nan(each) for each in wide)
    kernel: Callable[..., Tensor] = stream.token_stats if len(wide) == 1 else stream.pair_stats
    stats = kernel(*wide, head.weight, labels, **options)
    return stats[len(stats) // 2 :]

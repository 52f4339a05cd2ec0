"""The Triton kernels of `nextquill_kernels`, under the names the engines call.

Imported only where Triton is installed.
"""

from __future__ import annotations

from nextquill_kernels.chunk import pair_grad, pair_stats, token_grad, token_stats
from nextquill_kernels.coefficients import row_coefficients
from nextquill_kernels.jsd import jsd_grad, jsd_stats
from nextquill_kernels.stream import label_stats
from torch import Tensor

from nextquill.ops.head import LinearHead, infinite_to_nan

__all__ = [
    "jsd_grad",
    "jsd_stats",
    "pair_grad",
    "pair_stats",
    "row_coefficients",
    "stream_nll",
    "token_grad",
    "token_stats",
]


def stream_nll(streams: tuple[Tensor, ...], head: LinearHead, labels: Tensor) -> Tensor:
    """Compute the NLLs of whole streams without logits in memory.

    Args:
        streams: one or two tensors of hidden states [N, D], any floating dtype.
        head: the output head.
        labels: [N], int64; rows with a label below 0 are ignored.

    Returns:
        [1 or 3, N], float32, in nats: the nll of each stream and, for two, of their difference; 0 in ignored rows.
    """
    hiddens = tuple(each.to(head.weight.dtype) for each in streams)
    if head.softcap is not None:
        hiddens = tuple(infinite_to_nan(each) for each in hiddens)
    stats = label_stats(
        hiddens, head.weight, labels, bias=head.bias, softcap=head.softcap, logit_scale=head.logit_scale
    )
    return stats[len(stats) // 2 :]

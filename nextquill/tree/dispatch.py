"""Choice of the kernel that attends over a row of trees.

    pieces     any device: whole dense pieces of the visible entries; used on CPUs
    varlen     CUDA, half precision: one call for all segments over gathered keys; its results are checked first
    flex       CUDA, head size at least 16, any precision: FlexAttention with a block mask

"varlen" and "flex" have not run on a GPU yet.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor

from nextquill.errors import ArgumentError
from nextquill.tree import TREE_KERNELS
from nextquill.tree.attention import tree_attention
from nextquill.tree.operators import check_arguments
from nextquill.tree.segments import TreeLayout, row_depths, row_ends


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TreeLayout,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    kernel: str = "auto",
) -> Tensor:
    """Attention of every row over the rows on its path to the root, by a named kernel or the best for the device.

    Args:
        query, key, value, layout, scale, window, softcap, sinks: as in `tree_attention`.
        kernel: "auto" or one of `TREE_KERNELS`.

    Returns:
        [1, H, T, D], in the dtype of `query`.

    Raises:
        ArgumentError, ArgumentTypeError: an argument does not fit.
        BackendUnavailableError: the named kernel cannot run here.
    """
    if kernel == "auto":
        on_cuda = query.device.type == "cuda"
        kernel = _on_cuda(query.dtype, query.device, query.shape[3], softcap) if on_cuda else "pieces"
    if kernel == "pieces":
        return tree_attention(query, key, value, layout, scale=scale, window=window, softcap=softcap, sinks=sinks)
    if kernel == "varlen":
        from nextquill.tree.varlen import varlen_tree_attention

        return varlen_tree_attention(
            query, key, value, layout, scale=scale, window=window, softcap=softcap, sinks=sinks
        )
    if kernel == "flex":
        # This import takes as long as all others together.
        from nextquill.tree.flex import flex_tree_attention

        scale, window = check_arguments(query, key, value, layout, scale, window, softcap, sinks)
        mask = _block_mask(layout, window, query.device)
        return flex_tree_attention(query, key, value, mask, scale=scale, softcap=softcap, sinks=sinks)
    raise ArgumentError(f"kernel: expected auto or one of {', '.join(TREE_KERNELS)}, got {kernel!r}")


@functools.cache
def _on_cuda(dtype: torch.dtype, device: torch.device, head_size: int, softcap: float | None) -> str:
    from nextquill.tree.varlen_kernels import why_auto_fails, why_not

    other = "flex" if head_size >= 16 else "pieces"  # the smallest head that FlexAttention takes
    if why_not(dtype, device, head_size=head_size, softcap=softcap) is not None:
        return other
    problem = why_auto_fails(dtype, device, head_size=head_size, softcap=softcap)
    if problem is None:
        return "varlen"
    _warn(problem)
    return other


@functools.cache
def _warn(problem: str) -> None:
    """Say once that the fastest kernel is not used."""
    warnings.warn(
        f"attention: varlen fails its check here, so 'auto' uses FlexAttention, which is slower: {problem}",
        RuntimeWarning,
        stacklevel=2,
    )


def _block_mask(layout: TreeLayout, window: int | None, device: torch.device) -> Any:
    """Return a layout's block mask, made once for all layers."""
    plan = ("flex", window, device)
    if plan not in layout.plans:
        from nextquill.tree.flex import tree_block_mask

        depth, end = row_depths(layout.segments), row_ends(layout.segments)
        layout.plans[plan] = tree_block_mask(depth, end, device, window=window)
    return layout.plans[plan]

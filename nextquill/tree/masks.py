"""A tree's mask written out, for any attention that takes a mask; tests compare the kernels with it."""

from __future__ import annotations

import torch
from torch import Tensor


def visibility_mask(position_ids: Tensor, subtree_end: Tensor, window: int | None = None) -> Tensor:
    """Return which keys each query sees.

    visible[i, j]  iff  j <= i < subtree_end[j]  and  depth[i] - depth[j] < window

    Args:
        position_ids, subtree_end: integers [T] or [B, T]; the subtree_end of a padding row is at most its own index, so
            that the row sees only itself.
        window: keys a query sees along its path, itself included; by depth, not by row. None for all.

    Returns:
        bool [T, T] or [B, T, T].
    """
    rows = torch.arange(position_ids.shape[-1], device=position_ids.device)
    query, key = rows[:, None], rows[None, :]
    visible = (key <= query) & (query < subtree_end[..., None, :])
    if window is not None:
        visible = visible & (position_ids[..., :, None] - position_ids[..., None, :] < window)
    return visible | (query == key)


def additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 0 where visible and the dtype's least finite number elsewhere, to be added to the scores.

    Args:
        visible: bool [T, T] or [B, T, T], result of `visibility_mask`.
        dtype: dtype of the result, floating.

    Returns:
        The mask, in the shape of `visible`.
    """
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, torch.finfo(dtype).min)

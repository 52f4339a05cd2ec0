"""Attention over a row of trees by FlexAttention: any device, soft caps and windows, nothing gathered.

A tile is a square of `block_size` queries [m0, m1) and keys [n0, n1). Where the keys come before the queries, visible
is what a key's subtree reaches, so two numbers per tile of keys decide:

    skipped   iff  max(subtree_end) <= m0        whole   iff  min(subtree_end) >= m1        partial otherwise

A window takes whole tiles to partial and partial ones to skipped where the depths in both tiles prove it. Partial
tiles, with those on the diagonal, are masked entry by entry. Cost: two comparisons per tile, and no mask is made.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from nextquill.errors import ArgumentError, BackendUnavailableError


def tree_block_mask(
    position_ids: Tensor,
    subtree_end: Tensor,
    device: torch.device | str,
    *,
    window: int | None = None,
    block_size: int = 128,
) -> BlockMask:
    """The block mask of `visibility_mask(position_ids, subtree_end, window)`.

    Args:
        position_ids, subtree_end: integers [T]; a padding row has subtree_end at most its own index, and then sees only
            itself.
        device: where attention runs.
        window: keys a query sees along its path, itself included; None for all.
        block_size: rows of a tile; a multiple of 128 on GPUs.

    Returns:
        A mask for one row and all heads, of T queries and T keys.

    Raises:
        ArgumentError: shapes, window or block size cannot be used.
    """
    if position_ids.dim() != 1 or position_ids.shape != subtree_end.shape or not position_ids.numel():
        raise ArgumentError(
            f"position_ids, subtree_end: expected [T], got {list(position_ids.shape)} and {list(subtree_end.shape)}"
        )
    for name, number in (("window", window), ("block_size", block_size)):
        if number is not None and number < 1:
            raise ArgumentError(f"{name}: expected a positive number, got {number}")
    depth, end = (_filled(each.to(device, torch.int32), block_size) for each in (position_ids, subtree_end))
    partial, whole = _tiles(depth, end, window, block_size)
    return BlockMask.from_kv_blocks(
        *_ordered(partial),
        *_ordered(whole),
        BLOCK_SIZE=block_size,
        mask_mod=_mask_mod(depth, end, window),
        seq_lengths=(len(position_ids), len(position_ids)),
    )


def flex_tree_attention(
    query: Tensor, key: Tensor, value: Tensor, block_mask: BlockMask, scale: float, softcap: float | None = None
) -> Tensor:
    """Attention under a tree's block mask, compiled on first use.

        out_i = Σ_j softmax_j(cap(scale · q_i · k_j)) v_j      over the visible j

    On GPUs two compilations serve all lengths and masks; on a CPU, every length takes one, of about 9 s. Dtypes,
    scales, soft caps, a window's presence and what needs a gradient each compile anew. When PyTorch's limit of
    compilations (`torch._dynamo.config.recompile_limit`) is reached it raises rather than write the scores out.

    Args:
        query: [1, H, T, D].
        key, value: [1, H_kv, T, D]; H a multiple of H_kv.
        block_mask: of `tree_block_mask`.
        scale: of the scores.
        softcap: c of c · tanh(x / c) on the scores, or None.

    Returns:
        [1, H, T, D], in query's dtype, differentiable on GPUs.

    Raises:
        BackendUnavailableError: a gradient is wanted on a CPU, where FlexAttention has none.
    """
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    if needs_grad and query.device.type == "cpu":
        raise BackendUnavailableError("kernel 'flex' has no gradient on a CPU: use another, or torch.no_grad()")
    if not needs_grad:  # it also refuses leaves that need none here
        query, key, value = query.detach(), key.detach(), value.detach()
    if torch.compiler.is_compiling():  # part of the model's own graph
        return _flex(query, key, value, block_mask, scale, softcap)
    # With dynamic lengths, numbers become symbols too, which FlexAttention's score functions cannot hold.
    with torch._dynamo.config.patch(specialize_float=True):
        return _compiled(query.device.type != "cpu")(query, key, value, block_mask, scale, softcap)


def _flex(
    query: Tensor, key: Tensor, value: Tensor, block_mask: BlockMask, scale: float, softcap: float | None
) -> Tensor:
    out = flex_attention(
        query,
        key,
        value,
        score_mod=None if softcap is None else _score_mod(softcap),
        block_mask=block_mask,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, Tensor)
    return out


@functools.cache
def _compiled(dynamic: bool) -> Callable[..., Tensor]:
    # Reaching the recompile limit falls back to eager, which writes all scores out; with fullgraph it raises instead.
    # For CPUs, PyTorch 2.13 makes C++ of dynamic lengths that no compiler takes.
    return torch.compile(_flex, dynamic=dynamic, fullgraph=True)


def _score_mod(softcap: float) -> Callable[..., Tensor]:
    def cap(score: Tensor, *_: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return cap


def _mask_mod(depth: Tensor, end: Tensor, window: int | None) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    def visible(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return ((k <= q) & (q < end[k])) | (k == q)

    if window is None:
        return visible
    horizon = depth + window  # one capture, a tensor, where the window itself would become a symbol

    def visible_in_window(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return ((k <= q) & (q < end[k]) & (depth[q] < horizon[k])) | (k == q)

    return visible_in_window


def _tiles(depth: Tensor, end: Tensor, window: int | None, block_size: int) -> tuple[Tensor, Tensor]:
    """Which tiles are partial and which whole, bool [M, N] by tiles of queries and of keys."""
    first = torch.arange(0, len(end), block_size, device=end.device)
    least, most = end.view(-1, block_size).aminmax(dim=1)
    # No key reaches the end of a last tile that rows do not fill, so as queries it is never whole.
    below = first[:, None] > first
    whole = below & (least >= first[:, None] + block_size)
    seen = below & (most > first[:, None])
    if window is not None:
        shallowest, deepest = depth.view(-1, block_size).aminmax(dim=1)
        whole &= deepest[:, None] - shallowest < window
        seen &= shallowest[:, None] - deepest < window
    return (seen & ~whole) | (first[:, None] == first), whole


def _filled(values: Tensor, block_size: int) -> Tensor:
    """The last value repeated to fill the last tile, which kernels may read."""
    return torch.cat([values, values[-1:].expand(-len(values) % block_size)])


def _ordered(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Per tile of queries, how many tiles of keys are set, int32 [1, 1, M], and which, first, int32 [1, 1, M, N]."""
    order = tiles.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return tiles.sum(-1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None].contiguous()

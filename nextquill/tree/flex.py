"""Attention over a row of trees by FlexAttention: any device, soft caps and windows, nothing gathered.

A tile is a square of `block_size` queries [m0, m1) and keys [n0, n1). If the keys come before the queries, a query sees
a key exactly if it lies in the key's subtree, so two numbers per tile of keys decide:

    skipped   iff  max(subtree_end) <= m0        whole   iff  min(subtree_end) >= m1        partial otherwise

With a window, the depths of a tile's queries and keys may turn a whole tile into a partial one, and a partial one into
a skipped one. Partial tiles and those on the diagonal are masked entry by entry. Cost: two comparisons per tile; no
mask is written out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex_module
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from nextquill.devices import send
from nextquill.errors import BackendUnavailableError


def tree_block_mask(
    position_ids: Tensor,
    subtree_end: Tensor,
    device: torch.device | str,
    *,
    window: int | None = None,
    block_size: int = 128,
) -> BlockMask:
    """Return `visibility_mask(position_ids, subtree_end, window)` as a block mask.

    Args:
        position_ids, subtree_end: integers [T]; the subtree_end of a padding row is at most its own index, so that the
            row sees only itself.
        device: where attention runs.
        window: keys a query sees along its path, itself included; None for all.
        block_size: rows of a tile; a multiple of 128 on GPUs.

    Returns:
        A mask for one row and all heads, of T queries and T keys.
    """
    depth, end = (_filled(send(each.to(torch.int32), device), block_size) for each in (position_ids, subtree_end))
    partial, whole = _tiles(depth, end, window, block_size)
    return BlockMask.from_kv_blocks(
        *_ordered(partial),
        *_ordered(whole),
        BLOCK_SIZE=block_size,
        mask_mod=_mask_mod(depth, end, window),
        seq_lengths=(len(position_ids), len(position_ids)),
    )


def flex_tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention under a tree's block mask, compiled on first use.

        out_i = Σ_j softmax_j(cap(scale · q_i · k_j)) v_j      over the visible j

    On GPUs two compilations serve all lengths and masks; on a CPU each length needs its own, of about 9 s. Another
    dtype, scale or soft cap, a window or none, sinks or none, and another set of tensors with gradient each need a
    compilation. At PyTorch's limit of compilations (`torch._dynamo.config.recompile_limit`) it raises an error:
    PyTorch would otherwise hold all scores in memory.

    Args:
        query, key, value, scale, softcap, sinks: as in `tree_attention`.
        block_mask: result of `tree_block_mask`.

    Returns:
        [1, H, T, D], in query's dtype, differentiable on GPUs.

    Raises:
        BackendUnavailableError: a gradient is wanted on a CPU, where FlexAttention has none.
    """
    needs_grad = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (query, key, value, sinks)
    )
    if needs_grad and query.device.type == "cpu":
        raise BackendUnavailableError("kernel 'flex' has no gradient on a CPU: use another, or torch.no_grad()")
    if not needs_grad:  # FlexAttention refuses inputs that require grad even where no gradient is needed
        query, key, value = query.detach(), key.detach(), value.detach()
        sinks = None if sinks is None else sinks.detach()
    if torch.compiler.is_compiling():  # part of the model's own graph
        return _flex(query, key, value, block_mask, scale, softcap, sinks)
    # With dynamic lengths, numbers become symbols too, and FlexAttention's score functions cannot hold symbols.
    with torch._dynamo.config.patch(specialize_float=True):
        return _compiled(query.device.type != "cpu")(query, key, value, block_mask, scale, softcap, sinks)


def _flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None = None,
) -> Tensor:
    out: Any = flex_attention(
        query,
        key,
        value,
        score_mod=None if softcap is None else _score_mod(softcap),
        block_mask=block_mask,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
        **({} if sinks is None else _WITH_LOGSUMEXP),
    )
    if sinks is None:
        return out  # type: ignore[no-any-return]
    out, logsumexp = out
    logsumexp = logsumexp if isinstance(logsumexp, Tensor) else logsumexp.lse
    share = (logsumexp - sinks.to(logsumexp)[:, None]).sigmoid()[..., None]  # of the keys that are not the sink
    result: Tensor = (out * share).to(query.dtype)
    return result


_AUX: Any = getattr(flex_module, "AuxRequest", None)  # since PyTorch 2.9
_WITH_LOGSUMEXP: dict[str, Any] = {"return_lse": True} if _AUX is None else {"return_aux": _AUX(lse=True)}


@functools.cache
def _compiled(dynamic: bool) -> Callable[..., Tensor]:
    # At the recompile limit PyTorch falls back to eager, which writes all scores out; with fullgraph it raises instead.
    # With dynamic lengths on CPUs, PyTorch 2.13 generates C++ that does not compile.
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
    horizon = depth + window  # captured as a tensor: the window itself would become a symbol

    def visible_in_window(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return ((k <= q) & (q < end[k]) & (depth[q] < horizon[k])) | (k == q)

    return visible_in_window


def _tiles(depth: Tensor, end: Tensor, window: int | None, block_size: int) -> tuple[Tensor, Tensor]:
    """Return which tiles are partial and which are whole, each bool [M, N] for M tiles of queries and N of keys."""
    first = torch.arange(0, len(end), block_size, device=end.device)
    least, most = end.view(-1, block_size).aminmax(dim=1)
    # No key's subtree reaches the end of a last tile that rows do not fill, so its queries never form a whole tile.
    below = first[:, None] > first
    whole = below & (least >= first[:, None] + block_size)
    seen = below & (most > first[:, None])
    if window is not None:
        shallowest, deepest = depth.view(-1, block_size).aminmax(dim=1)
        whole &= deepest[:, None] - shallowest < window
        seen &= shallowest[:, None] - deepest < window
    return (seen & ~whole) | (first[:, None] == first), whole


def _filled(values: Tensor, block_size: int) -> Tensor:
    """Repeat the last value to fill the last tile, because kernels may read all of it."""
    return torch.cat([values, values[-1:].expand(-len(values) % block_size)])


def _ordered(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Return, per tile of queries, the number of set tiles of keys and their indices, set ones first.

    int32 [1, 1, M] and [1, 1, M, N].
    """
    order = tiles.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return tiles.sum(-1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None].contiguous()

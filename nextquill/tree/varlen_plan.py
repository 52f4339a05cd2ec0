"""Segments as sequences of different lengths: gathering the key rows of their paths, and summing the copies' gradients.

    rows        a b | c d | e            queries      a b     c d       e
    segments    0     1     2            keys         a b     a b c d   a b e

With a sliding window (by depth), only the part of a path that the window reaches is gathered.
"""

from __future__ import annotations

import ctypes
import functools
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from nextquill.devices import send
from nextquill.tree.segments import START, STOP


class VarlenPlan(NamedTuple):
    """Segments as sequences, and the order in which copies of key rows are summed.

    Attributes:
        window: keys a query sees along its path, itself included; None for all.
        rows: int64 [N] on the device, the key rows to gather.
        cu_queries, cu_keys: int32 [S + 1] on the device, where each segment's queries and keys begin.
        max_queries, max_keys: at least the largest number of queries and of keys of a segment.
        spans: per segment, the bounds of its queries and of its keys, on the host.
        copies: int64 [N] on the device, the positions in `rows` of row 0, then of row 1, and so on, each in order.
        first_copy: int64 [T] on the device, where the positions of each row begin in `copies`.
    """

    window: int | None
    rows: Tensor
    cu_queries: Tensor
    cu_keys: Tensor
    max_queries: int
    max_keys: int
    spans: tuple[tuple[int, int, int, int], ...]
    copies: Tensor
    first_copy: Tensor


def varlen_plan(segments: Tensor, window: int | None, device: torch.device) -> VarlenPlan:
    """Return the plan of `TreeLayout.segments` (`segments`, int64 [S, 5]), made once for all layers.

    Plans are cached by the content of `segments`, some kilobytes: a tensor's identity does not survive a compiled
    backward.
    """
    segments = segments.contiguous()
    return _plan_of(ctypes.string_at(segments.data_ptr(), segments.nbytes), window, device)


@functools.lru_cache(maxsize=16)  # rows in flight, times the model's windows
def _plan_of(segments: bytes, window: int | None, device: torch.device) -> VarlenPlan:
    paths, keys = list[Tensor](), list[Tensor]()
    table = torch.frombuffer(bytearray(segments), dtype=torch.long).view(-1, 5).tolist()
    for start, stop, _, depth, parent in table:
        own = torch.arange(start, stop)
        paths.append(own if parent < 0 else torch.cat([paths[parent], own]))
        keys.append(paths[-1] if window is None else paths[-1][max(0, depth - window + 1) :])
    rows = torch.cat(keys)
    query_ends = [0, *(segment[STOP] for segment in table)]
    key_ends = [0, *accumulate(map(len, keys))]
    counts = rows.bincount(minlength=query_ends[-1])
    return VarlenPlan(
        window,
        send(rows, device),
        send(torch.tensor(query_ends, dtype=torch.int32), device),
        send(torch.tensor(key_ends, dtype=torch.int32), device),
        # For 1 query, kernels take another path, for decoding, with other logsumexps. An upper bound may be larger.
        max(2, max(segment[STOP] - segment[START] for segment in table)),
        max(map(len, keys)),
        tuple(zip(query_ends, query_ends[1:], key_ends, key_ends[1:], strict=False)),
        send(rows.argsort(stable=True), device),
        send(counts.cumsum(0) - counts, device),
    )


def gather(tensor: Tensor, plan: VarlenPlan) -> Tensor:
    """Return the plan's rows of `tensor`, [1, H_kv, T, D] of any dtype, as [N, H_kv, D]."""
    return tensor[0].transpose(0, 1).index_select(0, plan.rows)


def sum_copies(grads: Tensor, plan: VarlenPlan) -> Tensor:
    """Sum `grads` [N, H_kv, D] of copies to [T, H_kv, D], in one launch without atomics; half dtypes sum in float32."""
    total: Tensor = F.embedding_bag(plan.copies, grads.flatten(1), plan.first_copy, mode="sum")
    return total.view(-1, *grads.shape[1:])

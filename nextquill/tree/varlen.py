"""Attention over a row of trees by kernels for sequences of different lengths: one sequence per segment.

The queries of a segment are its rows; its keys are the rows on the path from the root to its end. Causal attention that
aligns the last query with the last key (bottom-right aligned) therefore gives each row exactly the keys it sees. A
row's depth is its index on the path, so the kernel's own sliding window is a window by depth.

One call serves all segments, but every key row is gathered once per segment below it. The copies are not kept for the
backward, which gathers again. The key gradient of a row is the sum of its copies' gradients, read in a fixed order and
summed in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nextquill.devices import reads_on_host
from nextquill.errors import ArgumentError
from nextquill.tree.kernels import ScoreRule
from nextquill.tree.operators import add_sinks, check_arguments, register_gradient
from nextquill.tree.segments import TreeLayout
from nextquill.tree.varlen_kernels import VARLEN_KERNELS, choose_kernel
from nextquill.tree.varlen_plan import gather, sum_copies, varlen_plan


def varlen_tree_attention(
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
    """Attention of every row over the rows on its path to the root, as `tree_attention` computes it.

    The kernels' gradient of `query` repeats bit for bit under `torch.use_deterministic_algorithms(True)` only; those of
    `key` and `value` always do.

    Args:
        query, key, value: as in `tree_attention`, but float16 or bfloat16 for all kernels except "emulated".
        layout, scale, window, softcap, sinks: as in `tree_attention`; "torch" has no softcap.
        kernel: "torch", "flash_attn", "emulated", or "auto" for "torch" if it can run, else "flash_attn".

    Returns:
        [1, H, T, D], in query's dtype, differentiable in query, key, value and sinks.

    Raises:
        ArgumentError, ArgumentTypeError: shapes or dtypes do not fit each other, the layout or the kernel.
        BackendUnavailableError: the kernel cannot run here (`why_not`), or its results are wrong, for example because
            it aligns the first query with the first key.
    """
    scale, window = check_arguments(query, key, value, layout, scale, window, softcap, sinks)
    if kernel not in VARLEN_KERNELS:
        raise ArgumentError(f"kernel: expected one of {', '.join(VARLEN_KERNELS)}, got {kernel!r}")
    out: Tensor = _forward(query, key, value, layout.segments, sinks, scale, window, softcap, kernel)[0]
    return out


# ---- the operator ------------------------------------------------------------------------------------


@torch.library.custom_op("nextquill::varlen_tree_attention", mutates_args=(), **reads_on_host())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    """Return out [1, H, T, D], heads innermost in memory, and the logsumexps [1, H, T] in float32 (float64)."""
    chosen = choose_kernel(kernel, query, softcap)
    plan = varlen_plan(segments, window, query.device)
    with torch.autocast(query.device.type, enabled=False):
        rule = ScoreRule(scale, softcap)
        out, lse = chosen.forward(_rows_first(query), gather(key, plan), gather(value, plan), plan, rule)
    lse = lse[None]
    return add_sinks(_as_given(out, query.dtype), lse, sinks), lse


@torch.library.custom_op("nextquill::varlen_tree_attention_backward", mutates_args=(), **reads_on_host())
def _backward(
    grad: Tensor, saved: Sequence[Tensor], scale: float, window: int | None, softcap: float | None, kernel: str
) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value, out, logsumexp, segments = saved
    chosen = choose_kernel(kernel, query, softcap)
    plan = varlen_plan(segments, window, query.device)
    with torch.autocast(query.device.type, enabled=False):
        dq, dk, dv = chosen.backward(
            _rows_first(grad), _rows_first(query), gather(key, plan), gather(value, plan), _rows_first(out),
            logsumexp[0], plan, ScoreRule(scale, softcap),
        )  # fmt: skip
    dk, dv = sum_copies(dk, plan), sum_copies(dv, plan)
    return _as_given(dq, query.dtype), _as_given(dk, key.dtype), _as_given(dv, value.dtype)


def _rows_first(tensor: Tensor) -> Tensor:
    """Return [1, H, T, D] as a contiguous [T, H, D]; no copy for the tensors of most models."""
    return tensor[0].transpose(0, 1).contiguous()


def _as_given(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return [T, H, D] as [1, H, T, D], heads innermost in memory."""
    return tensor.to(dtype).contiguous()[None].transpose(1, 2)


register_gradient(_forward, _backward)

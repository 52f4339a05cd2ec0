"""Chooses the implementation of the kernels: `impl` is an ordinary argument, resolved once per call.

"auto" means Triton on an accelerator and the native extension on a CPU, if it is installed and supports the dtype, and
plain PyTorch otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from nextquill.errors import ArgumentError, BackendUnavailableError
from nextquill.ops import chunk_native, chunk_torch

# Number of statistics per row, see `nextquill.ops.chunk_torch`.
TOKEN_STATS = 3  # max, sum, nll
PAIR_STATS = 9  # of z1, of z0, of z1 - z0
PAIR_STATS_DIVERGENCE = 11  # and KL(p1 ‖ p0), entropy of p1
JSD_STATS = 6  # max and sum of z1 and of z0, KL(p1 ‖ m), jsd

IMPLEMENTATIONS = ("auto", "triton", "native", "torch")
# The implementation that "auto" tries before plain PyTorch, by device type.
_PREFERRED = {"cpu": "native", "cuda": "triton"}


@dataclass(frozen=True)
class ChunkKernels:
    """The functions an implementation offers; `nextquill.ops.chunk_torch` documents the first six.

    Attributes:
        finish_logits: the first six read products h Wᵀ and take `bias` (in float32), `softcap` and `logit_scale` by
            keyword; otherwise they read finished logits, and only the gradients take `softcap` and `logit_scale`.
        stream_nll: (streams, head, labels) -> NLLs [1 or 3, N] without logits in memory; rows with a label below 0 are
            ignored. None if the implementation has no such kernel.
        row_coefficients: computes a weighting's coefficients in one kernel, see `PairObjective.coefficients`; None if
            elementwise operations of torch compute them.
    """

    name: str
    token_stats: Callable[..., None]
    pair_stats: Callable[..., None]
    token_grad: Callable[..., None]
    pair_grad: Callable[..., None]
    jsd_stats: Callable[..., None]
    jsd_grad: Callable[..., None]
    finish_logits: bool = False
    stream_nll: Callable[..., Tensor] | None = None
    row_coefficients: Callable[..., Any] | None = None


def check_impl(impl: str) -> str:
    """Return `impl` if it is one of the known names."""
    if impl not in IMPLEMENTATIONS:
        raise ArgumentError(f"impl: expected one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
    return impl


def resolve_impl(impl: str, device: torch.device, dtype: torch.dtype) -> ChunkKernels:
    """Return the kernels for `impl` on `device`, for logits of `dtype`.

    Raises:
        ArgumentError: not a known name.
        BackendUnavailableError: the implementation cannot run here; the message says why.
    """
    check_impl(impl)
    if impl == "auto":
        preferred = _PREFERRED.get(device.type, "torch")
        impl = preferred if why_not(preferred, device, dtype) is None else "torch"
    elif (reason := why_not(impl, device, dtype)) is not None:
        raise BackendUnavailableError(f"impl: {impl!r} cannot run on {device}: {reason}; use 'auto' or 'torch'")
    return _kernels(impl)


def why_not(impl: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `impl` cannot run on `device` with logits of `dtype`, or None if it can."""
    if impl == "torch":
        return None
    if dtype != torch.float32:
        return f"its kernels compute in float32, and these inputs need {dtype}"
    return (_why_not_triton if impl == "triton" else _why_not_native)(device)


@cache
def _kernels(impl: str) -> ChunkKernels:
    if impl != "triton":
        return _from_module(impl, chunk_torch if impl == "torch" else chunk_native)
    from nextquill.ops import chunk_triton

    return _from_module(
        impl,
        chunk_triton,
        finish_logits=True,
        stream_nll=chunk_triton.stream_nll,
        row_coefficients=chunk_triton.row_coefficients,
    )


def _from_module(name: str, module: ModuleType, **more: Any) -> ChunkKernels:
    kernels = (module.token_stats, module.pair_stats, module.token_grad, module.pair_grad)
    return ChunkKernels(name, *kernels, module.jsd_stats, module.jsd_grad, **more)


def _why_not_triton(device: torch.device) -> str | None:
    try:
        from nextquill_kernels import launch
    except ImportError as error:
        return f"Triton is not installed ({error}); pip install 'nextquill[triton]'"
    if device.type == "cpu":
        return None if launch.INTERPRETED else "Triton needs a GPU (or, for tests, TRITON_INTERPRET=1)"
    if device.type != "cuda":
        return "its kernels are built for CUDA and ROCm devices"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "its kernels need an NVIDIA GPU of compute capability 8.0 or newer"
    return None


def _why_not_native(device: torch.device) -> str | None:
    return chunk_native.why_not() if device.type == "cpu" else "the native extension runs on CPUs only"

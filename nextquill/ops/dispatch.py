"""Which implementation of the chunk kernels runs: `impl` as an ordinary argument, resolved once per call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from nextquill.errors import ArgumentError, BackendUnavailableError
from nextquill.ops import chunk_torch

IMPLEMENTATIONS = ("auto", "triton", "native", "torch")


class ChunkKernels(Protocol):
    """The functions an implementation offers; `nextquill.ops.chunk_torch` documents each."""

    token_stats: Callable[[Tensor, Tensor], Tensor]
    effect_stats: Callable[[Tensor, Tensor, Tensor], Tensor]
    token_grad_: Callable[[Tensor, Tensor, Tensor, float | None, float], Tensor]
    pair_grad_: Callable[
        [Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor, float | None, float], tuple[Tensor, Tensor]
    ]


def check_impl(impl: str) -> str:
    """Return `impl` if it is one of the known names."""
    if impl not in IMPLEMENTATIONS:
        raise ArgumentError(f"impl: expected one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
    return impl


def resolve_impl(impl: str, device: torch.device) -> ChunkKernels:
    """Return the chunk kernels for `impl` on `device`.

    Raises:
        BackendUnavailableError: the implementation is not part of this version.
    """
    check_impl(impl)
    if impl in ("triton", "native"):
        raise BackendUnavailableError(
            f"impl: {impl!r} is not part of this version, so it cannot run on {device}; use 'auto' or 'torch'"
        )
    return chunk_torch  # type: ignore[return-value]

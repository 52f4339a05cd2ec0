"""torch.nn.functional.linear_cross_entropy (torch 2.13 and later) in chunks, whose size it chooses itself."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.compose import compose, mean_gradients, unsupported
from benchmarks.provider import Provider


def _missing(device: torch.device) -> str | None:
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return None
    return f"torch {torch.__version__} has no chunked linear_cross_entropy"


def _fused(
    hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None, reduction: str, **options: Any
) -> Tensor:
    chunks = torch.nn.LinearCrossEntropyOptions(**options)
    return torch.nn.functional.linear_cross_entropy(hidden, weight, labels, reduction=reduction, options=chunks)


PROVIDER = Provider(
    "torch linear_cross_entropy",
    compose(_fused),
    _missing,
    partial(unsupported, softcap=False),
    forward_gradients=partial(mean_gradients, 2),
)

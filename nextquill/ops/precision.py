"""The dtype an operator computes in, and autocast: inputs are cast once, and nothing inside is autocast again."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of logits, results and summed gradients: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_off(device: torch.device) -> AbstractContextManager[None]:
    """Suspend autocast, which would round the logits by casting the results of matrix products."""
    return torch.autocast(device.type, enabled=False)


def autocast_product_dtype(device: str, factors: Sequence[Tensor]) -> torch.dtype:
    """Return the dtype to multiply hidden states and weight in under autocast: the one `nn.Linear` would use.

    On the CPU half-precision products are not faster here, so the result is the widest dtype of the `factors` (of any
    shape).
    """
    if device == "cpu":
        return functools.reduce(torch.promote_types, (factor.dtype for factor in factors))
    return torch.get_autocast_dtype(device)

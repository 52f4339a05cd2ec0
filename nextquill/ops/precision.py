"""The dtype an operator computes in, and autocast: inputs are cast once, and nothing inside is autocast again."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits, results and accumulated gradients: float64 stays float64, everything else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_off(device: torch.device) -> AbstractContextManager[None]:
    """Suspend autocast, whose cast of a matrix product's result would round the logits."""
    return torch.autocast(device.type, enabled=False)


def autocast_product_dtype(device: str, factors: Sequence[Tensor]) -> torch.dtype:
    """The dtype in which hidden states and weight meet under autocast: what `nn.Linear` would use on this device.

    On the CPU half-precision products bring no speed here, so autocast keeps the widest of the factors' dtypes.
    """
    if device == "cpu":
        return functools.reduce(torch.promote_types, (factor.dtype for factor in factors))
    return torch.get_autocast_dtype(device)

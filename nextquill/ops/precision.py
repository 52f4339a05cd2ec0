"""How operators behave under autocast: inputs are cast once, and nothing inside is autocast again."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor


def autocast_off(device: torch.device) -> AbstractContextManager[None]:
    """Suspend autocast, whose cast of a matrix product's result would round the logits."""
    return torch.autocast(device.type, enabled=False)


def product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype in which h and W meet: their own, or under autocast what `nn.Linear` would use on this device.

    On the CPU half-precision products bring no speed here, so autocast keeps the wider of the two dtypes.
    """
    device = hidden.device.type
    if not torch.is_autocast_enabled(device):
        return hidden.dtype
    if device == "cpu":
        return torch.promote_types(hidden.dtype, weight.dtype)
    return torch.get_autocast_dtype(device)

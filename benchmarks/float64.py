"""A model of transformers in float64 throughout, where its layers ask for float32 whatever the model's dtype."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn


class _Float64:
    """`torch` for a modeling file, with float64 in place of float32."""

    def __getattr__(self, name: str) -> Any:
        return torch.float64 if name in ("float", "float32") else getattr(torch, name)


@contextmanager
def all_in_float64(model: nn.Module) -> Iterator[nn.Module]:
    """The model, made float64; inside the block its own code computes nothing in float32."""
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # type: ignore[operator]  # the others take no float64
    file = sys.modules[type(model).__module__]
    with mock.patch.object(file, "torch", _Float64()), mock.patch.object(Tensor, "float", Tensor.double):
        yield model.double()

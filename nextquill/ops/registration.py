"""How an operator is made known to PyTorch: schema, fake shapes, autograd, and autocast as one argument.

Every operator ends with the same five options of the output head. The last, `product_dtype`, is the dtype in which
hidden states and weight meet: None for their own. Under autocast the registered kernel fills it in and leaves the
inputs as they are, so that the gradient of a float32 master weight is never rounded to half precision on its way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nextquill.ops.chunks import HeadCall
from nextquill.ops.dispatch import resolve_impl
from nextquill.ops.precision import autocast_off, product_dtype
from nextquill.reference.linear import compute_dtype

_OPTIONS = "float? softcap, float logit_scale, str impl, SymInt? chunk_bytes, ScalarType? product_dtype"
_AUTOCAST_DEVICES = {"AutocastCPU": "cpu", "AutocastCUDA": "cuda"}
_library = torch.library.Library("nextquill", "FRAGMENT")


class HeadOptions(NamedTuple):
    """The last five arguments of every operator, in the schema's order."""

    softcap: float | None
    logit_scale: float
    impl: str
    chunk_bytes: int | None = None
    product_dtype: torch.dtype | None = None

    def dtype(self, hidden: Tensor) -> torch.dtype:
        """The dtype in which `hidden` meets the weight."""
        return self.product_dtype or hidden.dtype

    def call(self, hidden: Tensor) -> HeadCall:
        """The kernels and head options for `hidden`'s device and dtype."""
        kernels = resolve_impl(self.impl, hidden.device, compute_dtype(self.dtype(hidden)))
        return HeadCall(kernels, self.softcap, self.logit_scale, self.chunk_bytes)


def define(
    name: str, function: Callable[..., Any], arguments: str, returns: str, *, product: tuple[int, ...] = ()
) -> Any:
    """Define `nextquill::name` with the head's options appended to `arguments`.

    `product` gives the positions of the streams and, last, of the weight; with it the operator follows autocast.
    """
    operator = torch.library.custom_op(
        f"nextquill::{name}", function, mutates_args=(), schema=f"({arguments}, {_OPTIONS}) -> {returns}"
    )
    if product:
        for key, device in _AUTOCAST_DEVICES.items():
            _library.impl(name, _autocast_kernel(operator, torch.device(device), product), key)
    return operator


def nothing(like: Tensor) -> Tensor:
    """What stands for a tensor that was not asked for: a schema cannot return None."""
    return like.new_empty(0)


def _autocast_kernel(operator: Any, device: torch.device, product: tuple[int, ...]) -> Callable[..., Any]:
    def kernel(*arguments: Any) -> Any:
        *others, dtype = arguments
        factors = [arguments[index] for index in product if arguments[index] is not None]
        dtype = dtype or product_dtype(device.type, factors)
        with autocast_off(device):
            return operator(*others, dtype)

    return kernel

"""How an operator is made known to PyTorch: schema, fake shapes, autograd, and autocast as one argument.

Every operator ends with the same five options of the output head, which `open_head` names. The last, `product_dtype`,
is the dtype in which hidden states and weight meet: None for their own. Under autocast the registered kernel fills it
in and leaves the inputs as they are, so that the gradient of a float32 master weight is never rounded to half precision
on its way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nextquill.ops.chunks import ChunkedHead
from nextquill.ops.dispatch import resolve_impl
from nextquill.ops.precision import autocast_off, autocast_product_dtype, compute_dtype

_OPTIONS = "float? softcap, float logit_scale, str impl, SymInt? chunk_bytes, ScalarType? product_dtype"
_AUTOCAST_DEVICES = {"AutocastCPU": "cpu", "AutocastCUDA": "cuda"}
_library = torch.library.Library("nextquill", "FRAGMENT")


def open_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    impl: str,
    chunk_bytes: int | None,
    product_dtype: torch.dtype | None,
) -> ChunkedHead:
    """The head that an operator computes with: weight [V, D] and bias [V] in the dtype in which `hidden` meets them.

    Raises:
        BackendUnavailableError: `impl` cannot run on `hidden`'s device, or not in its dtype.
    """
    dtype = product_dtype or hidden.dtype
    kernels = resolve_impl(impl, hidden.device, compute_dtype(dtype))
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    return ChunkedHead(weight, bias, softcap, logit_scale, kernels=kernels, chunk_bytes=chunk_bytes)


def results_dtype(hidden: Tensor, options: Sequence[Any]) -> torch.dtype:
    """The dtype of an operator's results, `ChunkedHead.dtype`, from its last five arguments."""
    return compute_dtype(options[-1] or hidden.dtype)


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
        dtype = dtype or autocast_product_dtype(device.type, factors)
        with autocast_off(device):
            return operator(*others, dtype)

    return kernel

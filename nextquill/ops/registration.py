"""Registers an operator with PyTorch: schema, fake shapes, autograd, and autocast as one argument.

The last six arguments of every operator are the options of the output head, which `open_head` names. The last one,
`product_dtype`, is the dtype in which hidden states and weight are multiplied; None keeps their own. Under autocast the
registered kernel sets it and does not cast the inputs, so that the gradient of a float32 master weight is never rounded
to half precision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nextquill.devices import reads_on_host
from nextquill.ops.chunks import ChunkedHead
from nextquill.ops.dispatch import resolve_impl
from nextquill.ops.precision import autocast_off, autocast_product_dtype, compute_dtype
from nextquill.ops.shard_exchange import join

_OPTIONS = (
    "float? softcap, float logit_scale, str impl, SymInt? chunk_bytes, str? vocabulary_shard, ScalarType? product_dtype"
)
_AUTOCAST_DEVICES = {"AutocastCPU": "cpu", "AutocastCUDA": "cuda"}
_library = torch.library.Library("nextquill", "FRAGMENT")


def open_head(
    streams: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    softcap: float | None,
    logit_scale: float,
    impl: str,
    chunk_bytes: int | None,
    vocabulary_shard: str | None,
    product_dtype: torch.dtype | None,
) -> ChunkedHead:
    """Return the head that an operator computes with.

    Args:
        streams: one or two tensors of hidden states [N, D], any floating dtype.
        weight, bias: [V, D] and [V] or None, any floating dtype; one part of them if the vocabulary is divided.
        labels: [N], int64; read only if the vocabulary is divided.
        softcap, logit_scale, impl, chunk_bytes: as in `PairLoss`.
        vocabulary_shard: which part of the vocabulary the weight is, as `VocabularyShard.describe` says; None for all.
        product_dtype: dtype in which hidden states and weight are multiplied; None for their own.

    Raises:
        BackendUnavailableError: `impl` cannot run on the device or in the dtype of the hidden states.
        ArgumentError: the parts of the vocabulary, or what their processes got, do not fit together.
    """
    dtype = product_dtype or streams[0].dtype
    kernels = resolve_impl(impl, streams[0].device, compute_dtype(dtype))
    shard = None if vocabulary_shard is None else join(vocabulary_shard, weight, streams, labels)
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    return ChunkedHead(weight, bias, softcap, logit_scale, kernels=kernels, chunk_bytes=chunk_bytes, shard=shard)


def results_dtype(hidden: Tensor, options: Sequence[Any]) -> torch.dtype:
    """Return the dtype of an operator's results, from its hidden states [N, D] and its last six arguments."""
    return compute_dtype(options[-1] or hidden.dtype)


def define(
    name: str, function: Callable[..., Any], arguments: str, returns: str, *, product: tuple[int, ...] = ()
) -> Any:
    """Define `nextquill::name` with the head's options appended to `arguments`.

    `product` gives the positions of the streams and, last, of the weight; if given, the operator follows autocast.
    """
    operator = torch.library.custom_op(
        f"nextquill::{name}",
        function,
        mutates_args=(),
        schema=f"({arguments}, {_OPTIONS}) -> {returns}",
        **reads_on_host(),  # labels
    )
    if product:
        for key, device in _AUTOCAST_DEVICES.items():
            _library.impl(name, _autocast_kernel(operator, torch.device(device), product), key)
    return operator


def nothing(like: Tensor) -> Tensor:
    """Return the empty tensor, of shape [0] and the dtype of `like`, that replaces a result that is not wanted.

    A schema cannot return None. `like` may have any shape.
    """
    return like.new_empty(0)


def _autocast_kernel(operator: Any, device: torch.device, product: tuple[int, ...]) -> Callable[..., Any]:
    def kernel(*arguments: Any) -> Any:
        *others, dtype = arguments
        factors = [arguments[index] for index in product if arguments[index] is not None]
        dtype = dtype or autocast_product_dtype(device.type, factors)
        with autocast_off(device):
            return operator(*others, dtype)

    return kernel

"""Liger-Kernel's fused linear cross-entropy, composed as its users do, with dW accumulated in float32.

`reduction="none"` keeps no gradients. It recomputes the logits in its backward, when the per-token gradients are
known. `"mean"` finishes the gradients in its forward. `chunk_mem_const` limits the transient logits to a multiple of
the hidden states' size. With 1, a vocabulary of 151936 at D = 4096 needs 32 chunks of 256 rows, so larger values are
tried too, and the fastest is used.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.compose import compose, mean_gradients, unsupported
from benchmarks.provider import Provider, not_installed

CHUNK_MEM_CONSTS = (1, 4, 16)


def _missing(device: torch.device) -> str | None:
    return "needs a GPU" if device.type != "cuda" else not_installed("liger_kernel", "liger-kernel")


def _fused(
    hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None, reduction: str, **options: Any
) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    loss: Tensor = liger_fused_linear_cross_entropy(
        hidden, weight, labels, reduction=reduction, softcap=softcap, accum_dtype=torch.float32, **options
    )
    return loss


def _variants() -> tuple[dict[str, Any], ...]:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    if "chunk_mem_const" not in inspect.signature(liger_fused_linear_cross_entropy).parameters:
        return ({},)  # before 0.8.5
    return tuple({"chunk_mem_const": value} for value in CHUNK_MEM_CONSTS)


PROVIDER = Provider(
    "Liger", compose(_fused), _missing, unsupported, _variants, forward_gradients=partial(mean_gradients, 4)
)

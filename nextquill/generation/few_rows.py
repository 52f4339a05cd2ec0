"""A step of decoding on a CPU: linear layers take their product as (W xᵀ)ᵀ, and keys are not repeated for each head.

MKL computes x Wᵀ for one to eight rows x in float32 much more slowly than its transpose: for 2 rows of a model of 135M
parameters on an AMD EPYC (Zen 4, 2 threads, torch 2.13) 87 ms against 22 ms, for 8 rows 65 ms against 45 ms. One row
alone goes to its matrix-vector product, 51 ms; two equal rows take 22 ms. Other CPUs were not measured.

With a mask, sdpa of transformers repeats the keys and values that heads share, for all tokens at every step: a quarter
of a guided token of that model after a history of 1500 tokens. PyTorch's kernel for CPUs reads them in place.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from nextquill.models.probe import replaced_forward

#: With more rows the ordinary product is as fast.
_MOST_ROWS = 8
#: Read by transformers at every call of its sdpa; a release that does not know it repeats keys as before.
_SHARED_KEYS = "TRANSFORMERS_SDPA_FORCE_GQA"


@contextmanager
def faster_few_rows(model: nn.Module) -> Iterator[None]:
    """Compute a model's linear layers that way inside the block, where it is on a CPU in float32."""
    with ExitStack() as stack:
        for module in model.modules():
            if _is_plain(module):
                stack.enter_context(replaced_forward(module, partial(_linear, cast(nn.Linear, module))))
        yield


@contextmanager
def keys_in_place(device: torch.device) -> Iterator[None]:
    """Keep sdpa from repeating shared keys inside the block on a CPU; elsewhere it would lose its fused kernel."""
    if device.type != "cpu" or _SHARED_KEYS in os.environ:
        yield
        return
    os.environ[_SHARED_KEYS] = "1"
    try:
        yield
    finally:
        os.environ.pop(_SHARED_KEYS, None)  # another thread may have been here


def _is_plain(module: nn.Module) -> bool:
    """Whether this is a float32 layer on a CPU; one with a forward of its own has weights elsewhere until it runs."""
    if type(module) is not nn.Linear or "forward" in vars(module):
        return False
    return module.weight.device.type == "cpu" and module.weight.dtype == torch.float32


def _linear(module: nn.Linear, x: Tensor) -> Tensor:
    rows = x.numel() // max(1, x.shape[-1])
    if not 0 < rows <= _MOST_ROWS or x.dtype != torch.float32:
        return nn.functional.linear(x, module.weight, module.bias)
    flat = x.reshape(rows, -1)
    columns = (flat if rows > 1 else flat.expand(2, -1).contiguous()).t()
    # Contiguous: for queries of another layout sdpa leaves its fused kernel, which doubles the time of a guided token.
    product = (module.weight @ columns)[:, :rows].t().contiguous().view(*x.shape[:-1], -1)
    return product if module.bias is None else product + module.bias

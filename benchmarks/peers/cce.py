"""Apple's cut-cross-entropy with its gradient filter off.

The filter drops small soft-max entries. The effect's soft-max, of z1 - z0, is close to uniform, so all its entries are
small, and dropping them gives a wrong gradient. Versions switch it off in different ways.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import TRAINING, Inputs, Task
from benchmarks.peers.compose import compose, unsupported
from benchmarks.provider import Provider, not_installed


def _missing(device: torch.device) -> str | None:
    return "needs a GPU" if device.type != "cuda" else not_installed("cut_cross_entropy", "cut-cross-entropy")


def _unsupported(task: Task, inputs: Inputs) -> str | None:
    if task.mode == TRAINING and inputs.h1.dtype not in (torch.float16, torch.bfloat16):
        return "its backward takes float16 and bfloat16 only"
    return unsupported(task, inputs)


def _fused(
    hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None, reduction: str, **options: Any
) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    exact = _exact(inspect.signature(linear_cross_entropy).parameters)
    loss: Tensor = linear_cross_entropy(hidden, weight, labels, softcap=softcap, reduction=reduction, **exact)
    return loss


def _exact(parameters: Any) -> dict[str, Any]:
    """Options without filter: a threshold in 25.1.1, a preset in later versions, which refuse a threshold with it."""
    return {"impl": "cce_exact"} if "accum_e_fp32" in parameters else {"impl": "cce", "filter_eps": None}


PROVIDER = Provider("CCE", compose(_fused), _missing, _unsupported)

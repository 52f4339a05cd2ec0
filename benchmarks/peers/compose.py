"""Composes the papers' losses from a fused cross-entropy for one stream.

There are three calls: the per-token NLLs of both streams, the second without gradient because it only enters the
weights, and the mean NLL of the effect on h1 - h0. The last one works because (h1 - h0) Wᵀ = z1 - z0. That identity
fails for a soft-capped head. It also fails for a detached counterfactual with a trainable head: W's gradient through
the effect is then dzᵀ h1, but a call on h1 - h0 gives dzᵀ (h1 - h0).

For per-token NLLs, the peers recompute logits in their backward: 8U instead of 6U for NextQuill, 5U instead of 4U for
PerCE.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.cases import TRAINABLE, TRAINING, Inputs, Task
from benchmarks.peers.plain import nextquill_objective, perce_objective
from benchmarks.provider import Loss

_WITH_MEAN = ("NextQuill", "NextQuill detached", "SFT")
_WITH_EFFECT = ("NextQuill", "NextQuill detached", "pair nll")


class FusedCrossEntropy(Protocol):
    """Cross-entropy of a linear head: per token [N] for reduction "none", else a scalar."""

    def __call__(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None, reduction: str, **options: Any
    ) -> Tensor: ...


def compose(fused: FusedCrossEntropy) -> dict[str, Loss]:
    """All losses from one peer's cross-entropy."""

    def constant_nll(hidden: Tensor, x: Inputs, **options: Any) -> Tensor:
        with torch.no_grad():
            return fused(hidden.detach(), x.weight.detach(), x.labels, x.softcap, "none", **options).float()

    def token_nll(hidden: Tensor, x: Inputs, **options: Any) -> Tensor:
        return fused(hidden, x.weight, x.labels, x.softcap, "none", **options).float()

    def nextquill(x: Inputs, **options: Any) -> Tensor:
        nll_c = constant_nll(x.h0, x, **options)
        # The mean over all tokens equals the mean over sequences, as they are equally long.
        effect = fused(x.h1 - x.h0, x.weight, x.labels, None, "mean", **options).float()
        return nextquill_objective(token_nll(x.h1, x, **options), nll_c, effect, x.ids)

    def perce(x: Inputs, **options: Any) -> Tensor:
        nll_c = constant_nll(x.h0, x, **options)
        return perce_objective(token_nll(x.h1, x, **options), nll_c, x.ids)

    def sft(x: Inputs, **options: Any) -> Tensor:
        return fused(x.h1, x.weight, x.labels, x.softcap, "mean", **options).float()

    def pair_nll(x: Inputs, **options: Any) -> tuple[Tensor, ...]:
        return tuple(token_nll(hidden, x, **options) for hidden in (x.h1, x.h0, x.h1 - x.h0))

    return {
        "NextQuill": nextquill,
        "NextQuill detached": nextquill,
        "PerCE": perce,
        "SFT": sft,
        "pair nll": pair_nll,
        "token nll": lambda x, **options: (token_nll(x.h1, x, **options),),
    }


def mean_gradients(least_weight_bytes: int, task: Task, inputs: Inputs) -> dict[str, int]:
    """The gradients that the forward of a peer keeps, if it finishes them for "mean" only.

    These are the gradient of one stream, or of the effect, in its dtype, and dW in W's dtype or in one with
    `least_weight_bytes`, whichever is wider.
    """
    if task.mode != TRAINING or task.loss not in _WITH_MEAN:
        return {}
    kept = {"d hidden": inputs.h1.numel() * inputs.h1.element_size()}
    if task.head == TRAINABLE:
        kept["d weight"] = inputs.weight.numel() * max(least_weight_bytes, inputs.weight.element_size())
    return kept


def unsupported(task: Task, inputs: Inputs, softcap: bool = True) -> str | None:
    """Why a composition cannot express a task, or None; `softcap` says whether the peer supports one."""
    if inputs.softcap is not None and not softcap:
        return "has no softcap"
    if inputs.softcap is not None and task.loss in _WITH_EFFECT:
        return "a difference of soft-capped logits is not a head on h1 - h0"
    if task.loss == "NextQuill detached" and task.head == TRAINABLE:
        return "a head on h1 - h0 cannot treat z0 as constant for a trainable W"
    return None

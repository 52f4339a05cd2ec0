"""From the rewards of a group of summaries to the weights of their log-probabilities.

Summaries s_1 … s_K of one user are drawn from φ, and each has a reward R_k. The gradient of E[R] is estimated by

    g = 1/K Σ_k A_k ∇ log φ(s_k | d)

    reinforce   A_k = R_k                                       unbiased
    rloo        A_k = R_k - mean_{j≠k} R_j                      unbiased, of less variance       (arXiv 2402.14740)
    grpo        A_k = (R_k - mean R) / (std R + ε)              biased by its scale              (arXiv 2402.03300)

Leave-one-out is unbiased because the baseline of s_k is made of the others, which are independent of it. GRPO's mean
contains R_k, which shrinks the gradient by (K-1)/K, and dividing by the group's own deviation makes groups in which
summaries hardly differ count as much as those where they do. Log-probabilities are sums over tokens, not means, which
would make another objective of it (arXiv 2503.20783).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nextquill.errors import ArgumentError

ESTIMATORS = ("rloo", "grpo", "reinforce")
_EPSILON = 1e-4


class Advantages(NamedTuple):
    """What a group's log-probabilities are weighted with, and what was wrong with its rewards.

    Attributes:
        values: float64 [groups, K]; 0 where the reward is no number.
        not_finite: how many rewards are NaN or infinite.
        equal: how many groups have no two different rewards, and so teach nothing; `reinforce` needs no difference.
    """

    values: Tensor
    not_finite: int
    equal: int


def advantages(rewards: Tensor, estimator: str = "rloo") -> Advantages:
    """The weights A_k of each group.

    A reward that is no finite number takes no part: its weight is 0, and the others' baselines are made without it.

    Args:
        rewards: floating [groups, K], of any unit.
        estimator: "rloo", "grpo" or "reinforce".

    Returns:
        The weights, float64 [groups, K] in the unit of the rewards (without a unit for "grpo"), and what was wrong.

    Raises:
        ArgumentError: another estimator, or groups of one where a baseline is made of the others.
    """
    if estimator not in ESTIMATORS:
        raise ArgumentError(f"estimator: expected one of {', '.join(ESTIMATORS)}, got {estimator!r}")
    if rewards.dim() != 2:
        raise ArgumentError(f"rewards: expected [groups, K], got shape {list(rewards.shape)}")
    if estimator != "reinforce" and rewards.shape[1] < 2:
        raise ArgumentError(f"group_size: expected at least 2 for {estimator}, got {rewards.shape[1]}")
    finite = rewards.isfinite()
    values = torch.where(finite, rewards.double(), 0.0)
    count = finite.sum(1, keepdim=True)
    total = values.sum(1, keepdim=True)
    highest = torch.where(finite, values, -torch.inf).amax(1)
    lowest = torch.where(finite, values, torch.inf).amin(1)
    equal = highest <= lowest  # also where no reward is left
    if estimator == "reinforce":
        found = values
    elif estimator == "rloo":
        found = values - (total - values) / (count - 1).clamp(min=1)
    else:
        centred = torch.where(finite, values - total / count.clamp(min=1), 0.0)
        deviation = (centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
        found = centred / (deviation + _EPSILON)
    if estimator != "reinforce":
        # What rounding leaves of equal rewards is no signal, and GRPO would make one of it.
        found = torch.where(equal[:, None] | (count < 2), 0.0, found)
    return Advantages(torch.where(finite, found, 0.0), int((~finite).sum()), int(equal.sum()))

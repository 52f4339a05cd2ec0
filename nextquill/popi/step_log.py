"""What a step has measured: losses user by user, and the sums that its logs are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nextquill.popi.objective import PairLosses, PreferenceLoss, generator_error, informativeness
from nextquill.popi.prompts import tidy_summary
from nextquill.popi.rollouts import Sample
from nextquill.popi.users import Draw


class LossesByUser(NamedTuple):
    """Per user the losses of its pairs, summary by summary, and those under another user's summary or None."""

    losses: list[PairLosses]
    swapped: list[PairLosses | None]


def split_by_user(
    losses: PairLosses, draws: Sequence[Draw], groups: Sequence[Sequence[object]], others: Sequence[int | None]
) -> LossesByUser:
    """Losses in the order of users, each with its own summaries and then another's, user by user."""
    own, swapped, start = list[PairLosses](), list[PairLosses | None](), 0
    for each, group, other in zip(draws, groups, others, strict=True):
        stop = start + len(group) * len(each.pairs)
        own.append(PairLosses(*(values[start:stop] for values in losses)))
        start = stop
        if other is None:
            swapped.append(None)
            continue
        stop = start + len(each.pairs)
        swapped.append(PairLosses(*(values[start:stop] for values in losses)))
        start = stop
    return LossesByUser(own, swapped)


def sums_of(
    loss: PreferenceLoss,
    draws: Sequence[Draw],
    groups: Sequence[Sequence[Sample]],
    scored: LossesByUser,
    rewards: Tensor,
    kl: Tensor | None,
    equal: int,
    *,
    too_long: int,
    without_signals: int,
    warm: bool,
) -> dict[str, tuple[float, float]]:
    """Sums over a step and how many were added, by the name that their mean is logged under.

    Args:
        loss: the preference loss.
        draws, groups, scored, rewards, kl: of each user; KL in nats, float64 [users, K] as the rewards.
        equal: how many groups have equal rewards.
        too_long, without_signals: summaries that had no room, and prompts that no signal fitted into.
        warm: it is a step of the warm start.
    """
    margins = torch.cat([losses.margin for losses in scored.losses])
    values = torch.cat([losses.loss for losses in scored.losses])
    samples = [sample for group in groups for sample in group]
    finite = rewards.isfinite()
    sums = {
        "preference_loss": sum_of_finite(values),
        "preference_margin": sum_of_finite(margins),
        "preference_accuracy": sum_of_finite((margins > 0).double() + 0.5 * (margins == 0)),
        "generator_error": sum_of_finite(generator_error(loss.log_choice(margins))),
        "reward": sum_of_finite(rewards),
        "reward_nan": (float((~finite).sum()), 1.0),
        "summary_tokens": (float(sum(len(sample.ids) for sample in samples)), len(samples)),
        "summaries_empty": (float(sum(not tidy_summary(sample.text) for sample in samples)), len(samples)),
        "summaries_unfinished": (float(sum(not sample.ended for sample in samples)), len(samples)),
        "summaries_too_long": (float(too_long), len(samples)),
        "prompts_without_signals": (float(without_signals), len(draws)),
    }
    if rewards.shape[1] > 1:
        sums["reward_std"] = sum_of_finite(rewards.std(1))
        sums["groups_equal"] = (float(equal), len(groups))
    if kl is not None:
        sums["kl"] = sum_of_finite(kl)
    for each, losses, swapped in zip(draws, scored.losses, scored.swapped, strict=True):
        if swapped is not None:  # each summary of the group against the one of another user
            own = loss.log_choice(losses.margin).view(-1, len(each.pairs))
            other = loss.log_choice(swapped.margin)[None].expand_as(own)
            total, count = sums.get("informativeness", (0.0, 0.0))
            estimate = float(informativeness(own.flatten(), other.flatten()[:, None]))
            if estimate == estimate:
                sums["informativeness"] = (total + estimate, count + 1)
    if warm:
        sums["warm_start"] = (1.0, 1.0)
    return sums


def sum_of_finite(values: Tensor) -> tuple[float, float]:
    """The sum of the finite `values` (floating, any shape), and how many there are."""
    finite = values[values.isfinite()]
    return float(finite.sum()), float(finite.numel())


def mean_of_finite(values: Tensor) -> float:
    """The mean of the finite `values` (floating, any shape); 0 where there are none."""
    total, count = sum_of_finite(values)
    return total / max(1.0, count)

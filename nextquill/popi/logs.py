"""Logs of training: every sampled summary in a file, and sums over a step from which the logged means are made."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nextquill.popi.objective import PairLosses, PreferenceLoss, generator_error, informativeness
from nextquill.popi.prompts import tidy_summary
from nextquill.popi.rollouts import Sample
from nextquill.popi.users import Draw
from nextquill.storage.atomic_files import write_whole

SAMPLES_FILE = "sampled_summaries.jsonl"
_STEM, _SUFFIX = Path(SAMPLES_FILE).stem, Path(SAMPLES_FILE).suffix


# ---- sampled summaries ------------------------------------------------------------------------------


class SampleLog:
    """The file `sampled_summaries.jsonl` in a run's folder. Each further process has a file of its own beside it.

    Args:
        folder: the run's folder.
        rank: the number of this process.
        processes: how many processes there are.
    """

    def __init__(self, folder: Path, rank: int = 0, processes: int = 1) -> None:
        self._folder, self._rank, self._processes = folder, rank, processes
        self.path = folder / _name(rank)

    def append(self, lines: Iterable[Mapping[str, object]]) -> None:
        """Add lines, each with its `step`."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)

    def restart(self, step: int) -> None:
        """Keep only the lines of the steps before this one, as a resumed run writes the others again."""
        paths = [self.path]
        if self._rank == 0:  # also the files of processes that this run no longer has
            known = {_name(rank) for rank in range(self._processes)}
            paths += [path for path in self._folder.glob(_name("*")) if path.name not in known]
        for path in paths:
            if path.is_file():
                # Not `splitlines`: JSON leaves other line breaks as they are, and a summary may hold some.
                lines = path.read_text(encoding="utf-8").split("\n")
                kept = [line for line in lines if _fields(line).get("step", math.inf) < step]
                write_whole(path, "".join(f"{line}\n" for line in kept))


def trained_users(folder: str | Path) -> set[str]:
    """Return the ids of the users whose summaries a run has sampled, as far as its log is there.

    Args:
        folder: the run's folder, or a checkpoint in it.
    """
    run = Path(folder).resolve()
    places = [run, run.parent] if run.name.startswith("checkpoint-") else [run]
    found: set[str] = set()
    for log in (log for place in places for log in place.glob(f"{_STEM}*{_SUFFIX}")):
        with log.open(encoding="utf-8", errors="replace") as lines:
            found.update(str(fields["user_id"]) for line in lines if "user_id" in (fields := _fields(line)))
    return found


def _name(rank: int | str) -> str:
    return SAMPLES_FILE if rank == 0 else f"{_STEM}.rank{rank}{_SUFFIX}"


def _fields(line: str) -> dict[str, Any]:
    """The fields of a logged line; a line that was cut short has none."""
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


# ---- sums over a step -------------------------------------------------------------------------------

#: The names of the sums, in the order in which they are reduced over ranks.
METRICS = (
    "preference_loss", "preference_margin", "preference_accuracy", "informativeness", "generator_error", "reward",
    "reward_std", "reward_nan", "kl", "summary_tokens", "summaries_empty", "summaries_unfinished", "groups_equal",
    "summaries_too_long", "prompts_without_signals", "warm_start",
)  # fmt: skip


class LossesByUser(NamedTuple):
    """For each user the losses of its pairs, summary by summary; `swapped` are those under another user's summary."""

    losses: list[PairLosses]
    swapped: list[PairLosses | None]


def split_by_user(
    losses: PairLosses, draws: Sequence[Draw], groups: Sequence[Sequence[object]], others: Sequence[int | None]
) -> LossesByUser:
    """Split losses by user. Each user's losses come together: under its own summaries, then under another user's."""
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
    """Return a step's sums as (sum, count), by the name that their mean is logged under.

    Args:
        loss: the preference loss.
        draws, groups, scored: one for each user.
        rewards, kl: float64 [users, K]; the KL in nats.
        equal: the number of groups with equal rewards.
        too_long: the number of summaries that did not fit into a prompt.
        without_signals: the number of prompts into which no signal fitted.
        warm: whether the step belongs to the warm start.
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
        if swapped is not None:  # each summary of the group against one of another user
            own = loss.log_choice(losses.margin).view(-1, len(each.pairs))
            other = loss.log_choice(swapped.margin)[None].expand_as(own)
            total, count = sums.get("informativeness", (0.0, 0.0))
            estimate = float(informativeness(own.flatten(), other.flatten()[:, None]))
            if not math.isnan(estimate):
                sums["informativeness"] = (total + estimate, count + 1)
    if warm:
        sums["warm_start"] = (1.0, 1.0)
    return sums


def sum_of_finite(values: Tensor) -> tuple[float, float]:
    """Return the sum of the finite `values` (floating, any shape), and their number."""
    finite = values[values.isfinite()]
    return float(finite.sum()), float(finite.numel())


def mean_of_finite(values: Tensor) -> float:
    """Return the mean of the finite `values` (floating, any shape), or 0 if there are none."""
    total, count = sum_of_finite(values)
    return total / max(1.0, count)

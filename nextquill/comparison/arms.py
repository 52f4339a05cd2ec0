"""The arms of a comparison: every loss as its source has it, and SFT with its controls.

A loss may beat SFT at SFT's own learning rate and number of steps only because it takes larger steps, or more time.
`sft_2lr` and `sft_time` are the controls for that; papers leave them out.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nextquill.errors import ArgumentError
from nextquill.losses import LongCELoss, NextQuillLoss, PairLoss, PerCELoss, SFTLoss

#: The row of the model as it was before any training; its folder has this name too.
BASE = "base"
BASE_LABEL = "no training"
#: The arm whose training time `sft_time` gets by default.
DEFAULT_TIME_REFERENCE = "nextquill_detached"


@dataclass(frozen=True)
class Arm:
    """One way of training, with its name on the command line and its label in tables.

    Args:
        arguments: the loss's arguments, without its defaults.
        learning_rate_factor: multiplies the learning rate of the comparison.
        matches_time: train for as long as a reference arm took, rather than for as many steps.
    """

    name: str
    label: str
    kind: type[PairLoss]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    learning_rate_factor: float = 1.0
    matches_time: bool = False

    @property
    def is_sft(self) -> bool:
        """Whether this is plain fine-tuning: the baseline and its controls."""
        return self.kind is SFTLoss

    def loss(self, **options: Any) -> PairLoss:
        """A new loss of this arm; `options` are those of every `PairLoss`, such as `reduction`."""
        return self.kind(**self.arguments, **options)


ARMS: Mapping[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("sft", "SFT", SFTLoss),
        Arm("sft_2lr", "SFT, 2× LR", SFTLoss, learning_rate_factor=2.0),
        Arm("sft_time", "SFT, equal time", SFTLoss, matches_time=True),
        Arm("nextquill", "NextQuill (official)", NextQuillLoss),
        Arm("nextquill_paper", "NextQuill (paper)", NextQuillLoss, {"weighted_effect": True}),
        Arm("nextquill_detached", "NextQuill (detached)", NextQuillLoss, {"detach_counterfactual": True}),
        Arm("perce", "PerCE", PerCELoss),
        Arm("longce", "LongCE", LongCELoss),
    )
}


def choose_arms(names: Sequence[str], baseline: str, time_reference: str) -> list[Arm]:
    """The named arms, in the order given; the others are compared with `baseline`, which is one of them.

    ArgumentError if a name is unknown or given twice, the baseline is not among them, or an arm that matches another's
    time lacks an arm that it needs for that.
    """
    if not names:
        raise ArgumentError("names: expected at least one, got none")
    for name in names:
        if name not in ARMS:
            raise ArgumentError(f"names: no arm {name!r}; {_hint(name)}")
        if names.count(name) > 1:
            raise ArgumentError(f"names: {name} is given twice")
    if baseline not in names:
        raise ArgumentError(f"baseline: expected one of the arms ({', '.join(names)}), got {baseline!r}")
    arms = [ARMS[name] for name in names]
    for arm in arms:
        if arm.matches_time:
            _check_time_reference(arm, names, time_reference)
    return arms


def in_running_order(arms: Sequence[Arm]) -> list[Arm]:
    """The arms, with those last whose number of steps depends on another's time."""
    return sorted(arms, key=lambda arm: arm.matches_time)


def own_pace(arm: Arm) -> Arm:
    """The arm that differs from one with `matches_time` only in the number of steps."""
    return next(
        other
        for other in ARMS.values()
        if not other.matches_time
        and (other.kind, other.arguments, other.learning_rate_factor)
        == (arm.kind, arm.arguments, arm.learning_rate_factor)
    )


def _check_time_reference(arm: Arm, names: Sequence[str], reference: str) -> None:
    if reference not in ARMS or ARMS[reference].matches_time:
        possible = [name for name, other in ARMS.items() if not other.matches_time]
        raise ArgumentError(f"time_reference: expected one of {', '.join(possible)}, got {reference!r}")
    pace = own_pace(arm).name
    for needed, reason in (
        (reference, "whose time it gets (time_reference)"),
        (pace, "which says how long its step takes"),
    ):
        if needed not in names:
            raise ArgumentError(f"names: {arm.name} expects {needed} among them, {reason}")


def _hint(name: str) -> str:
    close = difflib.get_close_matches(name.lower().replace("-", "_"), ARMS, n=1)
    return f"did you mean {close[0]}?" if close else f"expected some of {', '.join(ARMS)}"

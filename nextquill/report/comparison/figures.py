"""The figures of a comparison, as values: means over seeds, paired differences, and each arm's costs.

A difference is paired: the same records under two arms, and with several seeds the same seeds. Its interval and its
test are over users, and over seeds if there are several. With one seed they are about these trained models and say
nothing of the methods. p-values are Holm's, over the arms that are compared with one reference in one measure. A
measure that is not a mean over examples, such as BLEU, has its values by seed and no test.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nextquill.report.headline import OWN_HISTORY


@dataclass(frozen=True)
class Measure:
    """A measure's name and what tables say of it; see `MetricValue`."""

    name: str
    label: str
    unit: str = ""
    higher_is_better: bool | None = None

    @property
    def short_label(self) -> str:
        """The label without the ending that the labels of all measures of generated texts share."""
        return self.label.removesuffix(OWN_HISTORY)


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, its interval over users and seeds if there is one, and the value of each seed."""

    value: float
    low: float | None
    high: float | None
    by_seed: Sequence[float]


@dataclass(frozen=True)
class Difference:
    """An arm's mean minus a reference's on the same examples.

    Args:
        value: the difference.
        low, high: its interval, for this difference alone.
        p_value: of no difference: over users and seeds, or with one seed over users.
        p_adjusted: Holm's, over the arms compared with this reference in this measure.
        p_runs: Holm's too, over users alone: of no difference between these runs, whatever other seeds would give.
    """

    value: float
    low: float
    high: float
    p_value: float
    p_adjusted: float
    p_runs: float

    def is_clear(self, level: float) -> bool:
        """Whether the interval excludes 0 and the adjusted p-value is below 1 - level."""
        return (self.low > 0 or self.high < 0) and self.p_adjusted < 1 - level


@dataclass(frozen=True)
class Cost:
    """The costs of an arm's training: means over seeds, but the largest peak memory.

    Args:
        learning_rate: the highest learning rate.
        steps, seconds: optimiser steps, and seconds of training.
        seconds_per_step, examples_per_second: over all steps of all seeds.
        peak_memory: bytes.
        reference_seconds: the time that the arm was to match, if any.
    """

    learning_rate: float
    steps: float
    seconds: float
    seconds_per_step: float
    examples_per_second: float
    peak_memory: int | None = None
    reference_seconds: float | None = None


@dataclass(frozen=True)
class ArmFigures:
    """One row: an arm's figures, and its differences by reference and measure."""

    name: str
    label: str
    is_sft: bool
    estimates: Mapping[str, Estimate]
    against: Mapping[str, Mapping[str, Difference]] = field(default_factory=dict)
    cost: Cost | None = None


@dataclass(frozen=True)
class Comparison:
    """All figures of a comparison.

    Args:
        model: the trained model.
        baseline: the arm that the tables compare with.
        seeds: the runs' seeds.
        arms: the base first, then the arms in the order given.
        measures: by name, in the order shown.
        records: digest of the evaluated records.
        num_examples, num_users: the number of evaluated records, and of their users.
        num_train_examples: the number of records trained on.
        num_new_users: the number of those users who were never trained on; None if it is not known.
        level: confidence level of the intervals.
        machines: the machines of the runs; times compare within one.
        resumed: the runs that were interrupted, whose times are sums of parts.
        processes: the most processes that made the runs at the same time.
        starts: digest of the weights by seed.
        counterfactual: what stands for no history in the prompts; see `PromptTemplate`.
    """

    model: str
    baseline: str
    seeds: Sequence[int]
    arms: Sequence[ArmFigures]
    measures: Mapping[str, Measure]
    records: str
    num_examples: int
    num_users: int
    num_train_examples: int
    num_new_users: int | None = None
    level: float = 0.95
    machines: Sequence[Mapping[str, Any]] = ()
    resumed: Sequence[str] = ()
    processes: int = 1
    starts: Mapping[str, str] = field(default_factory=dict)
    counterfactual: str = "none"

    def arm(self, name: str) -> ArmFigures:
        """The figures of an arm."""
        return next(arm for arm in self.arms if arm.name == name)

    def differences(self, measure: str, reference: str | None = None) -> list[tuple[ArmFigures, Difference]]:
        """The arms with a difference to the reference, by default the baseline, in a measure; each with its own."""
        found = [(arm, arm.against.get(reference or self.baseline, {}).get(measure)) for arm in self.arms]
        return [(arm, difference) for arm, difference in found if difference is not None]

    def to_json(self) -> str:
        """Return the text of the comparison's file of figures."""
        return json.dumps(_without_nan(dataclasses.asdict(self)), indent=2, ensure_ascii=False) + "\n"


def _without_nan(value: Any) -> Any:
    """The value with None for numbers that are not finite, which JSON does not have."""
    if isinstance(value, dict):
        return {name: _without_nan(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

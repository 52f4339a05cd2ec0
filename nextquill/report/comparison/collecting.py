"""Reads the finished runs of a comparison and computes its figures."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nextquill.comparison.arms import BASE, BASE_LABEL, Arm
from nextquill.comparison.folder import EVALUATION_FOLDER, RunRecord, read_record, run_folder
from nextquill.errors import CheckpointError
from nextquill.evaluation.bootstrap import SeedsResult, paired_over_seeds
from nextquill.evaluation.metrics import MetricScores
from nextquill.evaluation.permutation import holm
from nextquill.evaluation.results import EvaluatedExample, Evaluation, read_evaluation, read_examples
from nextquill.report.comparison.figures import ArmFigures, Comparison, Cost, Difference, Estimate, Measure

#: What the name of a mean over examples ends in where the measure without it weighs examples by their tokens.
PER_EXAMPLE = "_per_example"


@dataclass(frozen=True)
class _Run:
    """One arm from one seed, as its folder has it."""

    record: RunRecord
    evaluation: Evaluation
    examples: Sequence[EvaluatedExample]


@dataclass(frozen=True)
class _Scores:
    """Scores [seeds][members], how much each member weighs, and which examples they are."""

    rows: Sequence[Sequence[float]]
    weights: Sequence[float]
    members: Sequence[int]

    def minus(self, other: _Scores) -> _Scores:
        """The differences; both are of the same examples, whose weights are therefore the same."""
        rows = [
            [a - b for a, b in zip(own, theirs, strict=True)] for own, theirs in zip(self.rows, other.rows, strict=True)
        ]
        return _Scores(rows, self.weights, self.members)


def collect(
    folder: Path,
    arms: Sequence[Arm],
    seeds: Sequence[int],
    *,
    baseline: str,
    model: str,
    num_train_examples: int,
    level: float = 0.95,
    resamples: int = 2000,
) -> Comparison:
    """Read the finished runs in `folder` and compare them.

    Args:
        folder: the comparison's.
        arms, seeds: all of which are finished, and the base of at least the first seed; where another seed has none, it
            stands for that one too.
        baseline: name of an arm.
        model: its name as given.
        num_train_examples: trained on.
        level: of the intervals.
        resamples: of every bootstrap and permutation test.

    Raises:
        CheckpointError: a run is missing, or was evaluated on other records.
    """
    runs = {arm.name: [_read(folder, arm.name, seed) for seed in seeds] for arm in arms}
    has_base = [read_record(run_folder(folder, BASE, seed)) is not None for seed in seeds]
    runs[BASE] = [_read(folder, BASE, seed if has else seeds[0]) for seed, has in zip(seeds, has_base, strict=True)]
    _check_records(runs, folder)
    evaluation = runs[BASE][0].evaluation
    users = [example.user_id for example in runs[BASE][0].examples]
    table = _Table(runs, users, level, resamples)
    names = [arm.name for arm in arms]
    references = [baseline, *(arm.name for arm in arms if arm.is_sft and arm.name != baseline), BASE]
    against = {reference: table.differences(names, reference) for reference in references}
    labels = {BASE: BASE_LABEL, **{arm.name: arm.label for arm in arms}}
    records = [run.record for each in runs.values() for run in each]
    return Comparison(
        model=model,
        baseline=baseline,
        seeds=list(seeds),
        arms=[
            ArmFigures(
                name=name,
                label=labels[name],
                is_sft=any(arm.name == name and arm.is_sft for arm in arms),
                estimates={measure: table.estimate(name, measure) for measure in table.measures},
                against={reference: found[name] for reference, found in against.items() if name in found},
                cost=None if name == BASE else _cost([run.record for run in runs[name]]),
            )
            for name in (BASE, *names)
        ],
        measures=table.measures,
        records=evaluation.records,
        num_examples=evaluation.num_examples,
        num_users=len(set(users)),
        num_train_examples=num_train_examples,
        level=level,
        machines=_different([record.machine for record in records]),
        resumed=[f"{record.arm}/seed-{record.seed}" for record in records if record.sessions > 1],
        starts={str(run.record.seed): run.record.start for run in runs[baseline]},
        counterfactual=(evaluation.settings.get("template") or {}).get("counterfactual", "none"),
    )


class _Table:
    """Every example's scores by arm, measure and seed."""

    def __init__(self, runs: Mapping[str, Sequence[_Run]], users: Sequence[str], level: float, resamples: int) -> None:
        self._runs, self._users = runs, users
        self._options: dict[str, Any] = {"level": level, "resamples": resamples}
        everywhere = [run.evaluation.metrics for each in runs.values() for run in each]
        self.measures = {
            name: Measure(name, value.label, value.unit, value.higher_is_better)
            for name, value in everywhere[0].items()
            if value.low is not None or value.higher_is_better is not None  # neither: a count
            if name.removesuffix(PER_EXAMPLE) == name or name.removesuffix(PER_EXAMPLE) not in everywhere[0]
            if all(name in metrics for metrics in everywhere)
        }

    def estimate(self, arm: str, measure: str) -> Estimate:
        """The mean over seeds, with an interval where the measure is a mean over examples or their tokens."""
        values = [run.evaluation.metrics[measure].value for run in self._runs[arm]]
        scores = self._scores(arm, measure)
        if scores is None:
            return Estimate(statistics.mean(values), None, None, values)
        found, kind = self._from_zero(scores), self.measures[measure]
        low, high = found.low, found.high
        if not kind.unit and kind.higher_is_better is not None:  # a share or an error, which cannot be below 0
            low = max(low, 0.0)
            high = min(high, 1.0) if kind.higher_is_better else high
        return Estimate(statistics.mean(values), low, high, values)

    def differences(self, arms: Sequence[str], reference: str) -> dict[str, dict[str, Difference]]:
        """Of each arm to the reference, by measure, with Holm's p-values over the arms."""
        found: dict[str, dict[str, Difference]] = {arm: {} for arm in arms if arm != reference}
        for measure in self.measures:
            theirs = self._scores(reference, measure)
            pairs = {}
            for arm in found:
                own = self._scores(arm, measure)
                if own is not None and theirs is not None:
                    pairs[arm] = self._from_zero(own.minus(theirs))
            adjusted = holm([pair.p_value for pair in pairs.values()])
            of_runs = holm([pair.p_users for pair in pairs.values()])
            for (arm, pair), p_adjusted, p_runs in zip(pairs.items(), adjusted, of_runs, strict=True):
                found[arm][measure] = Difference(pair.difference, pair.low, pair.high, pair.p_value, p_adjusted, p_runs)
        return found

    def _from_zero(self, scores: _Scores) -> SeedsResult:
        """The mean of scores or of their differences, with the interval and the test that it is 0.

        Runs of one seed began alike and saw the same, so they are paired by subtracting them example by example: what a
        seed did to both arms is in neither the interval nor the test.
        """
        weighted = [
            MetricScores.ratio_of(
                [value * weight for value, weight in zip(row, scores.weights, strict=True)], scores.weights
            )
            for row in scores.rows
        ]
        nothing = MetricScores.ratio_of([0.0] * len(scores.weights), scores.weights)
        users = [self._users[index] for index in scores.members]
        return paired_over_seeds(weighted, [nothing], users, **self._options)

    def _scores(self, arm: str, measure: str) -> _Scores | None:
        """An arm's scores, or None where the measure is no mean."""
        name = self._runs[arm][0].evaluation.metrics[measure].per_example
        over_tokens = name is None and f"{measure}{PER_EXAMPLE}" in self._runs[arm][0].evaluation.metrics
        name = measure if over_tokens else name
        examples = self._runs[arm][0].examples
        members = [index for index, example in enumerate(examples) if name in example.scores]
        if name is None or not members:
            return None
        weights = [examples[index].scores["tokens"] if over_tokens else 1.0 for index in members]
        return _Scores(
            [[run.examples[index].scores[name] for index in members] for run in self._runs[arm]], weights, members
        )


def _read(folder: Path, arm: str, seed: int) -> _Run:
    place = run_folder(folder, arm, seed)
    record = read_record(place)
    if record is None:
        raise CheckpointError(f"{place}: expected a finished run of {arm} with seed {seed}")
    evaluation = place / EVALUATION_FOLDER
    return _Run(record, read_evaluation(evaluation), read_examples(evaluation))


def _check_records(runs: Mapping[str, Sequence[_Run]], folder: Path) -> None:
    """Raise CheckpointError unless all were evaluated on the same records in the same order."""
    first = runs[BASE][0]
    for name, each in runs.items():
        for run in each:
            if run.evaluation.records != first.evaluation.records or len(run.examples) != len(first.examples):
                place = run_folder(folder, name, run.record.seed)
                raise CheckpointError(
                    f"{place}: evaluated on other records than {run_folder(folder, BASE, first.record.seed)}"
                )


def _cost(records: Sequence[RunRecord]) -> Cost:
    peaks = [record.peak_memory for record in records if record.peak_memory is not None]
    wanted = [record.matched["seconds"] for record in records if record.matched is not None]
    seconds = [record.seconds for record in records]
    return Cost(
        learning_rate=max(record.learning_rate or 0.0 for record in records),
        steps=statistics.mean(record.steps for record in records),
        seconds=statistics.mean(seconds),
        seconds_per_step=sum(seconds) / max(1, sum(record.steps for record in records)),
        examples_per_second=sum(record.examples for record in records) / max(1e-9, sum(seconds)),
        peak_memory=max(peaks, default=None),
        reference_seconds=statistics.mean(wanted) if wanted else None,
    )


def _different(machines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    found: list[Mapping[str, Any]] = []
    for machine in machines:
        if machine not in found:
            found.append(machine)
    return found

"""Computes the figures of a comparison from its finished runs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nextquill.comparison.arms import BASE, BASE_LABEL, Arm
from nextquill.comparison.folder import RunRecord, read_record, run_folder
from nextquill.errors import CheckpointError
from nextquill.evaluation.bootstrap import paired_over_seeds
from nextquill.evaluation.compare import paired_scores
from nextquill.evaluation.measures import COUNTS, NEW_USERS, PER_EXAMPLE, is_of_corpus
from nextquill.evaluation.metrics import OF_ONE, MetricScores
from nextquill.evaluation.permutation import holm
from nextquill.evaluation.results import EVALUATION_FOLDER, EvaluatedExample, Evaluation, read_evaluation, read_examples
from nextquill.report.comparison.figures import ArmFigures, Comparison, Cost, Difference, Estimate, Measure


@dataclass(frozen=True)
class _Run:
    """One arm from one seed, read from its folder."""

    folder: Path
    record: RunRecord
    evaluation: Evaluation
    examples: Sequence[EvaluatedExample]


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
    """Read the finished runs in `folder`, a comparison's, and compare them; see `Comparison`.

    Every arm is finished with every seed, and so is the base of the first seed. That base stands for every seed without
    one of its own. `resamples` is the number of draws of every interval and test.

    Raises:
        CheckpointError: a run is missing, or was evaluated on other records.
    """
    runs = {arm.name: [_read(folder, arm.name, seed) for seed in seeds] for arm in arms}
    has_base = [read_record(run_folder(folder, BASE, seed)) is not None for seed in seeds]
    runs[BASE] = [_read(folder, BASE, seed if has else seeds[0]) for seed, has in zip(seeds, has_base, strict=True)]
    first, every = runs[BASE][0], [run for each in runs.values() for run in each]
    for run in every:
        if run.evaluation.records != first.evaluation.records or len(run.examples) != len(first.examples):
            raise CheckpointError(f"{run.folder}: evaluated on other records than {first.folder}")
    table = _Table(runs, level, resamples)
    names = [arm.name for arm in arms]
    references = [baseline, *(arm.name for arm in arms if arm.is_sft and arm.name != baseline), BASE]
    against = {reference: table.differences(names, reference) for reference in references}
    labels = {BASE: BASE_LABEL, **{arm.name: arm.label for arm in arms}}
    machines = [run.record.machine for run in every]
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
        records=first.evaluation.records,
        num_examples=first.evaluation.num_examples,
        num_users=len({example.user_id for example in first.examples}),
        num_train_examples=num_train_examples,
        num_new_users=_new_users(runs[baseline][0].evaluation),
        level=level,
        machines=[machine for at, machine in enumerate(machines) if machine not in machines[:at]],
        resumed=[f"{run.record.arm}/seed-{run.record.seed}" for run in every if run.record.sessions > 1],
        processes=max(run.record.processes for run in every),
        starts={str(run.record.seed): run.record.start for run in runs[baseline]},
        counterfactual=first.evaluation.template.get("counterfactual", "none"),
    )


class _Table:
    """The scores of every example by arm, measure and seed."""

    def __init__(self, runs: Mapping[str, Sequence[_Run]], level: float, resamples: int) -> None:
        self._runs, self._evaluation = runs, runs[BASE][0].evaluation
        self._options: dict[str, Any] = {"level": level, "resamples": resamples}
        everywhere = [run.evaluation.metrics for each in runs.values() for run in each]
        self.measures = {
            name: Measure(name, value.label, value.unit, value.higher_is_better)
            for name, value in everywhere[0].items()
            if name not in COUNTS and not name.endswith(PER_EXAMPLE)
            if all(name in metrics for metrics in everywhere)
        }

    def estimate(self, arm: str, measure: str) -> Estimate:
        """The mean over seeds, with an interval if the measure is a mean over examples or their tokens."""
        values = [run.evaluation.metrics[measure].value for run in self._runs[arm]]
        found = self._scores(measure, arm)
        if found is None:
            return Estimate(statistics.mean(values), None, None, values)
        (scores,), users = found
        # Its measure is 0, so the difference to it is the measure itself.
        nothing = MetricScores(0 * scores[0].statistics, scores[0].from_sums)
        interval, kind = paired_over_seeds(scores, [nothing], users, **self._options), self.measures[measure]
        low, high = interval.low, interval.high
        # A share or an error cannot be below 0.
        if kind.unit in ("", OF_ONE) and kind.higher_is_better is not None:
            low = max(low, 0.0)
            high = min(high, 1.0) if kind.higher_is_better else high
        return Estimate(statistics.mean(values), low, high, values)

    def differences(self, arms: Sequence[str], reference: str) -> dict[str, dict[str, Difference]]:
        """Each arm minus the reference, by measure, with Holm's p-values over the arms.

        Runs of one seed started alike and saw the same examples in the same order, so they are matched: what a seed did
        to both arms is in neither the interval nor the test.
        """
        found: dict[str, dict[str, Difference]] = {arm: {} for arm in arms if arm != reference}
        for measure in self.measures:
            pairs = {}
            for arm in found:
                scores = self._scores(measure, arm, reference)
                if scores is not None:
                    (own, theirs), users = scores
                    pairs[arm] = paired_over_seeds(own, theirs, users, matched=True, **self._options)
            adjusted = holm([pair.p_value for pair in pairs.values()])
            of_runs = holm([pair.p_users for pair in pairs.values()])
            for (arm, pair), p_adjusted, p_runs in zip(pairs.items(), adjusted, of_runs, strict=True):
                found[arm][measure] = Difference(pair.difference, pair.low, pair.high, pair.p_value, p_adjusted, p_runs)
        return found

    def _scores(self, measure: str, *arms: str) -> tuple[list[list[MetricScores]], list[str]] | None:
        """The scores of each arm's seeds and the examples' users; None for a measure that is not a mean of scores."""
        runs = [run.examples for arm in arms for run in self._runs[arm]]
        found = None if is_of_corpus(measure) else paired_scores(measure, self._evaluation, runs)
        if found is None:
            return None
        scores, seeds = found[0], len(runs) // len(arms)
        return [scores[start : start + seeds] for start in range(0, len(scores), seeds)], found[1]


def _new_users(evaluation: Evaluation) -> int | None:
    return int(evaluation.metrics[NEW_USERS].value) if NEW_USERS in evaluation.metrics else None


def _read(folder: Path, arm: str, seed: int) -> _Run:
    place = run_folder(folder, arm, seed)
    record = read_record(place)
    if record is None:
        raise CheckpointError(f"{place}: expected a finished run of {arm} with seed {seed}")
    evaluation = place / EVALUATION_FOLDER
    return _Run(place, record, read_evaluation(evaluation), read_examples(evaluation))


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

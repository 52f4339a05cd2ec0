"""The rows of a demo run, their summary over seeds, and their CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nextquill.demo.recipe import Recipe

if TYPE_CHECKING:
    from nextquill.demo.evaluation import Metrics

BASE = "Base"


@dataclass(frozen=True)
class Timing:
    """What a step of phase C costs.

    `seconds_per_step` is the median over the steps without the first, which also pays for the optimizer's state.
    `time_vs_sft` is the median of the ratios to SFT's step *on the same batch*: a busy machine disturbs it much less.
    """

    seconds_per_step: float
    time_vs_sft: float

    @classmethod
    def of(cls, seconds: Sequence[float], sft_seconds: Sequence[float]) -> Timing:
        ratios = [own / sft for own, sft in zip(seconds, sft_seconds, strict=True)]
        skip = min(1, len(ratios) - 1)
        return cls(statistics.median(seconds[skip:]), statistics.median(ratios[skip:]))


@dataclass(frozen=True)
class DemoRow:
    """One method at one checkpoint of one seed: `Metrics`, `Timing` (none for the base) and what they belong to."""

    seed: int
    method: str
    learning_rate: float | None
    step: int
    personal_nll: float
    generic_nll: float
    personal_nll_other: float
    generic_nll_other: float
    personal_nll_none: float
    generic_nll_none: float
    f1: float
    exact_match: float
    seconds_per_step: float | None = None
    time_vs_sft: float | None = None

    @classmethod
    def of(
        cls,
        metrics: Metrics,
        *,
        seed: int,
        method: str,
        learning_rate: float | None,
        step: int,
        timing: Timing | None = None,
    ) -> DemoRow:
        times = {} if timing is None else asdict(timing)
        return cls(seed=seed, method=method, learning_rate=learning_rate, step=step, **asdict(metrics), **times)

    @property
    def generic_effect(self) -> float:
        """Effect of the history on generic tokens, in nats. Their words do not depend on the user: the truth is 0."""
        return self.generic_nll_none - self.generic_nll

    @property
    def generic_effect_placebo(self) -> float:
        """The same with another user's history in place of none."""
        return self.generic_nll_other - self.generic_nll


@dataclass(frozen=True)
class SeedRun:
    """What happened before phase C in one seed."""

    seed: int
    reading_steps: int
    reading_accuracy: float


@dataclass(frozen=True)
class Spread:
    """Mean, lowest and highest value over the seeds."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.fmean(values), min(values), max(values))


@dataclass(frozen=True)
class Finding:
    """A heading and the figures it follows from."""

    heading: str
    text: str


@dataclass(frozen=True)
class DemoResult:
    """Everything a run measured, what follows from it, and where it was written."""

    recipe: Recipe
    seed_runs: tuple[SeedRun, ...]
    rows: tuple[DemoRow, ...]
    findings: tuple[Finding, ...]
    timing: str
    versions: dict[str, str]
    seconds: float
    paths: dict[str, Path]

    def to_json(self) -> str:
        record: dict[str, Any] = {
            "recipe": asdict(self.recipe),
            "seed_runs": [asdict(run) for run in self.seed_runs],
            "findings": [asdict(finding) for finding in self.findings],
            "rows": [asdict(row) for row in self.rows],
            "timing": self.timing,
            "versions": self.versions,
            "seconds": self.seconds,
        }
        return json.dumps(record, indent=2, ensure_ascii=False) + "\n"

    def to_csv(self) -> str:
        """One line for each method, seed and checkpoint."""
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, [column.name for column in fields(DemoRow)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in self.rows)
        return buffer.getvalue()


class RowTable:
    """Look-up of a run's rows: one value for each seed, in the order of the seeds."""

    def __init__(self, rows: Sequence[DemoRow]) -> None:
        self._rows: dict[tuple[str, int], list[DemoRow]] = {}
        for row in rows:
            self._rows.setdefault((row.method, row.step), []).append(row)
        self.methods = list(dict.fromkeys(row.method for row in rows if row.method != BASE))

    def rows(self, method: str, step: int) -> list[DemoRow]:
        return self._rows[method, step]

    def values(self, method: str, step: int, metric: str) -> list[float]:
        return [getattr(row, metric) for row in self.rows(method, step)]

    def spread(self, method: str, step: int, metric: str) -> Spread:
        return Spread.of(self.values(method, step, metric))

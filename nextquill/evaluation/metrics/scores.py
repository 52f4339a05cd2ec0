"""The input and the output of a metric: texts, and every example's scores as sums that can be resampled.

Every metric here is a function of sums over examples: value = f(Σᵢ sᵢ), with a row of statistics sᵢ for each example.
A mean has sᵢ = (xᵢ, 1) and f = a / b; BLEU sums its counts of n-grams. So a bootstrap or a permutation only adds up
rows again and never reads a text twice.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nextquill.errors import ArgumentError, ArgumentTypeError, BackendUnavailableError
from nextquill.evaluation.metrics.authors import Authors

Floats = NDArray[np.float64]
#: One right text, or several.
Reference = str | Sequence[str]


@dataclass(frozen=True, eq=False)
class MetricScores:
    """One metric over some examples.

    Args:
        statistics: [examples, columns], a row an example.
        from_sums: [..., columns] -> [...], the metric as a function of summed rows.
        per_example: [examples], each example's own score if the metric is their mean, else None; NaN where an example
            has none, which the mean leaves out.
        signature: how it was computed, if the library says so (sacreBLEU).
    """

    statistics: Floats
    from_sums: Callable[[Floats], Floats]
    per_example: Floats | None = None
    signature: str = ""

    @property
    def value(self) -> float:
        """The metric over all examples."""
        return float(self.from_sums(self.statistics.sum(axis=0)))

    def __len__(self) -> int:
        return len(self.statistics)

    @classmethod
    def mean_of(cls, values: Sequence[float] | Floats, name: str = "values") -> MetricScores:
        """The mean of the examples' scores.

        Args:
            values: finite numbers, one an example.
            name: their name in an error.

        Raises:
            ArgumentError: there are none, or one is not finite.
        """
        scores = finite_numbers(name, values)
        return cls(np.stack([scores, np.ones_like(scores)], axis=1), ratio, per_example=scores)

    @classmethod
    def mean_of_defined(cls, values: Sequence[float]) -> MetricScores:
        """The mean of the scores that are not NaN; 0 if all are."""
        scores = np.asarray(values, dtype=np.float64)
        defined = ~np.isnan(scores)
        return cls(np.stack([np.where(defined, scores, 0.0), defined], axis=1), ratio, per_example=scores)

    def defined(self) -> list[int] | None:
        """The positions of the examples that have a score of their own; None where the metric is not their mean."""
        return None if self.per_example is None else np.flatnonzero(~np.isnan(self.per_example)).tolist()

    @classmethod
    def ratio_of(cls, sums: Sequence[float] | Floats, counts: Sequence[float] | Floats) -> MetricScores:
        """Σ sums / Σ counts, such as a mean over tokens, in which examples weigh as much as they have tokens.

        Args:
            sums: each example's sum.
            counts: the number of terms of each sum; none negative, and not all 0.

        Raises:
            ArgumentError: a number is not finite, a count is negative, all are 0, or `sums` and `counts` differ in
                length.
        """
        totals, weights = finite_numbers("sums", sums), finite_numbers("counts", counts)
        if len(totals) != len(weights):
            raise ArgumentError(f"counts: expected {len(totals)}, one for each of sums, got {len(weights)}")
        if (weights < 0).any() or not weights.any():
            raise ArgumentError("counts: expected none below 0 and one above it")
        return cls(np.stack([totals, weights], axis=1), ratio)


def ratio(sums: Floats) -> Floats:
    """[..., 2] -> [...], the first column by the second; 0 where both are 0."""
    return np.divide(sums[..., 0], sums[..., 1], out=np.zeros(sums.shape[:-1]), where=sums[..., 1] != 0)


def finite_numbers(name: str, values: Sequence[float] | Floats) -> Floats:
    """The values as an array.

    Raises:
        ArgumentTypeError: they are not numbers.
        ArgumentError: there are none, or one is not finite.
    """
    try:
        numbers = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ArgumentTypeError(f"{name}: expected numbers, got {values!r:.80}") from error
    if numbers.ndim != 1 or not len(numbers):
        raise ArgumentError(f"{name}: expected at least one number in a row, got shape {list(numbers.shape)}")
    bad = np.flatnonzero(~np.isfinite(numbers))
    if len(bad):
        raise ArgumentError(f"{name}[{bad[0]}]: expected a finite number, got {numbers[bad[0]]}")
    return numbers


@dataclass(frozen=True)
class Texts:
    """Input of a metric of texts: an example has one or more references, the right answers, and one prediction.

    `labels` are all possible answers, if the task has a list of them; `authors` are the examples' users and histories,
    if a metric needs them.
    """

    references: tuple[tuple[str, ...], ...]
    predictions: tuple[str, ...]
    labels: tuple[str, ...] | None = None
    authors: Authors | None = None

    @classmethod
    def checked(
        cls,
        references: Sequence[Reference],
        predictions: Sequence[str],
        labels: Sequence[str] | None = None,
        authors: Authors | None = None,
    ) -> Texts:
        """The input, checked.

        Raises:
            ArgumentTypeError: something is not a string.
            ArgumentError: there are no examples, different numbers of both, or an example without a reference.
        """
        for name, values in (("references", references), ("predictions", predictions), ("labels", labels)):
            if isinstance(values, str):
                raise ArgumentTypeError(f"{name}: expected a sequence of texts, got a single one")
        if len(references) != len(predictions):
            raise ArgumentError(
                f"predictions: expected {len(references)}, as many as references, got {len(predictions)}"
            )
        if authors is not None and len(authors.users) != len(predictions):
            raise ArgumentError(f"authors: expected those of {len(predictions)} examples, got {len(authors.users)}")
        several = tuple(
            (each,) if isinstance(each, str) else _texts(f"references[{i}]", each) for i, each in enumerate(references)
        )
        known = None if labels is None else _texts("labels", labels)
        return cls(several, _texts("predictions", predictions), known, authors)

    def single_references(self, metric: str) -> list[str]:
        """The one reference of each example; ArgumentError where one has several, for which `metric` is not defined."""
        for i, each in enumerate(self.references):
            if len(each) > 1:
                raise ArgumentError(f"references[{i}]: {metric} takes one reference an example, got {len(each)}")
        return [each[0] for each in self.references]

    def known_authors(self, metric: str) -> Authors:
        """The examples' users and histories; ArgumentError where `metric` is computed without them."""
        if self.authors is None:
            raise ArgumentError(f"authors: {metric} needs the examples' users and histories, got None")
        return self.authors


def _texts(name: str, values: object) -> tuple[str, ...]:
    if not isinstance(values, Sequence):
        raise ArgumentTypeError(f"{name}: expected a text or several, got {type(values).__name__}")
    if not values:
        raise ArgumentError(f"{name}: expected at least one text, got none")
    for i, each in enumerate(values):
        if not isinstance(each, str):
            raise ArgumentTypeError(f"{name}[{i}]: expected a string, got {type(each).__name__}")
    return tuple(values)


def required(module: str, package: str) -> Any:
    """A module of an optional package; BackendUnavailableError says what to install if it is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise BackendUnavailableError(
            f"metrics: {package} is not installed ({error}); pip install 'nextquill[cli]'"
        ) from error

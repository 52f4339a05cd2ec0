"""Ratings from 1 to 5, written as text: their mean absolute error and root mean square error.

    MAE = mean |ŷ − y|      RMSE = √ mean (ŷ − y)²

A prediction that is not a number counts as the rating farthest from the right one, 1 or 5, as in LaMP's evaluation
(github.com/LaMP-Benchmark/LaMP, eval/evaluation.py). So do "nan" and "inf", for which LaMP's evaluation has no score. A
number beyond the scale is taken as it is, as in LaMP's evaluation.
"""

from __future__ import annotations

import math

import numpy as np

from nextquill.errors import ArgumentError
from nextquill.evaluation.metrics.scores import Floats, MetricScores, Texts, ratio

LOWEST, HIGHEST = 1.0, 5.0


def mae(texts: Texts) -> MetricScores:
    """The mean absolute error.

    Raises:
        ArgumentError: a reference is not a number, or an example has several references.
    """
    return MetricScores.mean_of(_errors(texts))


def rmse(texts: Texts) -> MetricScores:
    """The root mean square error; raises as `mae`."""
    errors = np.array(_errors(texts))
    return MetricScores(np.stack([errors**2, np.ones_like(errors)], axis=1), _root_of_ratio)


def read_rating(text: str) -> float | None:
    """The number that a text spells, or None."""
    try:
        rating = float(text)
    except ValueError:
        return None
    return rating if math.isfinite(rating) else None


def _errors(texts: Texts) -> list[float]:
    """How far each prediction is from its reference, in rating points."""
    errors = []
    references = texts.single_references("a rating's error")
    for i, (reference, prediction) in enumerate(zip(references, texts.predictions, strict=True)):
        truth = read_rating(reference)
        if truth is None:
            raise ArgumentError(f"references[{i}]: expected a rating such as '4', got {reference!r:.80}")
        rating = read_rating(prediction)
        farthest = max(abs(LOWEST - truth), abs(HIGHEST - truth))
        errors.append(farthest if rating is None else abs(rating - truth))
    return errors


def _root_of_ratio(sums: Floats) -> Floats:
    return np.sqrt(ratio(sums))

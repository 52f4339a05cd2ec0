"""Answers that are right or wrong, or off by some points: labels, exact texts and ratings.

    accuracy = mean [ŷ = y]      MAE = mean |ŷ − y|      RMSE = √ mean (ŷ − y)²

Labels and ratings are scored as in LaMP's evaluation (github.com/LaMP-Benchmark/LaMP, eval/evaluation.py). Labels are
compared without the white space around them, and otherwise letter by letter. An answer that is not a label of the task
is wrong. A rating that is not a number counts as the one farthest from the right one, 1 or 5. So do "nan" and "inf",
for which LaMP's evaluation has no score. A number beyond the scale is taken as it is.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable

import numpy as np

from nextquill.errors import ArgumentError
from nextquill.evaluation.metrics.scores import Floats, MetricScores, Texts, ratio

LOWEST, HIGHEST = 1.0, 5.0


def exact_match(texts: Texts) -> MetricScores:
    """The share of predictions that equal a reference, up to white space and the Unicode form (NFC) of letters."""
    return _share_equal(texts, _plain)


def accuracy(texts: Texts) -> MetricScores:
    """The share of predictions that equal a reference."""
    _check_labels(texts)
    return _share_equal(texts, str.strip)


def f1_macro(texts: Texts) -> MetricScores:
    """The mean over labels of F1 = 2 tp / (predicted + true), which is 0 for a label that does not occur.

    As in LaMP, the mean is over every label of the task. Without a list of labels it is over those of the references; a
    resample keeps them all.
    """
    _check_labels(texts)
    truth = [each.strip() for each in texts.single_references("f1_macro")]
    answers = [each.strip() for each in texts.predictions]
    known = texts.labels if texts.labels is not None else sorted(set(truth))
    column = {label: k for k, label in enumerate(known)}
    counts = np.zeros((len(truth), 2, len(column)))  # [examples, (hits, predicted + true), labels]
    for i, (right, answer) in enumerate(zip(truth, answers, strict=True)):
        counts[i, 1, column[right]] += 1
        if answer in column:
            counts[i, 1, column[answer]] += 1
            counts[i, 0, column[answer]] += answer == right
    return MetricScores(counts.reshape(len(truth), -1), _macro_f1_from_sums)


def mae(texts: Texts) -> MetricScores:
    """The mean absolute error."""
    return MetricScores.mean_of(_errors(texts))


def rmse(texts: Texts) -> MetricScores:
    """The root mean square error."""
    errors = np.array(_errors(texts))
    return MetricScores(np.stack([errors**2, np.ones_like(errors)], axis=1), lambda sums: np.sqrt(ratio(sums)))


def read_rating(text: str) -> float | None:
    """The number that a text spells, or None."""
    try:
        rating = float(text)
    except ValueError:
        return None
    return rating if math.isfinite(rating) else None


def _check_labels(texts: Texts) -> None:
    if texts.labels is None:
        return
    for i, references in enumerate(texts.references):
        for each in references:
            if each.strip() not in texts.labels:
                raise ArgumentError(f"references[{i}]: expected one of {', '.join(texts.labels)}, got {each!r:.80}")


def _share_equal(texts: Texts, form: Callable[[str], str]) -> MetricScores:
    """The share of predictions that equal a reference in this form of both."""
    pairs = zip(texts.references, texts.predictions, strict=True)
    return MetricScores.mean_of([float(form(given) in map(form, right)) for right, given in pairs])


def _macro_f1_from_sums(sums: Floats) -> Floats:
    hits, both = np.split(sums, 2, axis=-1)
    mean: Floats = ratio(np.stack([2 * hits, both], axis=-1)).mean(axis=-1)
    return mean


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def _errors(texts: Texts) -> list[float]:
    """The distance of each prediction from its reference, in rating points."""
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

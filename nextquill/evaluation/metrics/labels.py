"""Answers that are right or wrong: accuracy and macro-F1 of labels, and exact match of texts.

Labels are compared as LaMP's evaluation does (github.com/LaMP-Benchmark/LaMP, eval/evaluation.py): without the white
space around them, and otherwise letter by letter. An answer that is not a label of the task is wrong.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable

import numpy as np

from nextquill.errors import ArgumentError
from nextquill.evaluation.metrics.scores import Floats, MetricScores, Texts


def exact_match(texts: Texts) -> MetricScores:
    """The share of predictions that equal a reference, up to white space and the Unicode form (NFC) of letters."""
    return _share_equal(texts, _plain)


def accuracy(texts: Texts) -> MetricScores:
    """The share of predictions that equal a reference.

    Raises:
        ArgumentError: a reference is not among the task's labels.
    """
    _check_labels(texts)
    return _share_equal(texts, str.strip)


def f1_macro(texts: Texts) -> MetricScores:
    """The mean over labels of F1 = 2 tp / (predicted + true), which is 0 for a label that does not occur.

    As in LaMP, the mean is over every label of the task. Without a list of labels it is over those of the references; a
    resample keeps them all.

    Raises:
        ArgumentError: a reference is not among the task's labels, or an example has several.
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


def _check_labels(texts: Texts) -> None:
    for i, references in enumerate(texts.references if texts.labels is not None else ()):
        for each in references:
            if each.strip() not in texts.labels:
                raise ArgumentError(f"references[{i}]: expected one of {', '.join(texts.labels)}, got {each!r:.80}")


def _share_equal(texts: Texts, form: Callable[[str], str]) -> MetricScores:
    """The share of predictions that equal a reference in this form of both."""
    pairs = zip(texts.references, texts.predictions, strict=True)
    return MetricScores.mean_of([float(form(given) in map(form, right)) for right, given in pairs])


def _macro_f1_from_sums(sums: Floats) -> Floats:
    hits, both = np.split(sums, 2, axis=-1)
    f1: Floats = np.divide(2 * hits, both, out=np.zeros_like(hits), where=both != 0)
    mean: Floats = f1.mean(axis=-1)
    return mean


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())

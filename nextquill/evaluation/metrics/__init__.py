"""The metrics, by name, and `compute`, which scores texts in any of them.

    scores = compute(["rouge_l", "bleu"], references, predictions)
    scores["rouge_l"].value, scores["rouge_l"].per_example

Empty texts are scored, not refused: they share nothing with any text, so every metric of overlap gives them 0, also
against each other. Only `exact_match` and `accuracy` call two empty texts equal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from nextquill.errors import ArgumentError
from nextquill.evaluation.metrics.labels import exact_match, labels
from nextquill.evaluation.metrics.meteor import meteor, resolve
from nextquill.evaluation.metrics.preferences import preference_accuracy
from nextquill.evaluation.metrics.ratings import ratings
from nextquill.evaluation.metrics.rouge import rouge
from nextquill.evaluation.metrics.sacre import sacre
from nextquill.evaluation.metrics.scores import MetricScores, Reference, Texts

__all__ = ["METRICS", "Metric", "MetricScores", "compute", "metric_named", "preference_accuracy", "resolve"]

Scorer = Callable[[Sequence[str], Texts], dict[str, MetricScores]]


@dataclass(frozen=True)
class Metric:
    """A metric.

    Args:
        name: its key in `METRICS` and in results.
        label: its name in tables.
        score: computes the scores of several metrics of one kind from texts; None for a metric that reads no texts.
        unit: empty for shares and F1, which lie between 0 and 1.
        higher_is_better: which way is better.
        per_example: whether it is the mean of the examples' scores.
    """

    name: str
    label: str
    score: Scorer | None
    unit: str = ""
    higher_is_better: bool = True
    per_example: bool = True


_METRICS = (
    Metric("rouge_1", "ROUGE-1", rouge),
    Metric("rouge_2", "ROUGE-2", rouge),
    Metric("rouge_l", "ROUGE-L", rouge),
    Metric("rouge_1_stem", "ROUGE-1 (stemmed)", rouge),
    Metric("rouge_2_stem", "ROUGE-2 (stemmed)", rouge),
    Metric("rouge_l_stem", "ROUGE-L (stemmed)", rouge),
    Metric("meteor", "METEOR", meteor),
    Metric("meteor_exact_stem", "METEOR (exact + stem)", meteor),
    Metric("bleu", "BLEU", sacre, unit="of 100", per_example=False),
    Metric("chrf", "chrF", sacre, unit="of 100", per_example=False),
    Metric("accuracy", "Accuracy", labels),
    Metric("f1_macro", "Macro-F1", labels, per_example=False),
    Metric("exact_match", "Exact match", exact_match),
    Metric("mae", "MAE", ratings, unit="rating points", higher_is_better=False),
    Metric("rmse", "RMSE", ratings, unit="rating points", higher_is_better=False, per_example=False),
    Metric("preference_accuracy", "Preference accuracy", None),
)
METRICS: Mapping[str, Metric] = MappingProxyType({metric.name: metric for metric in _METRICS})


def compute(
    names: Sequence[str],
    references: Sequence[Reference],
    predictions: Sequence[str],
    *,
    labels: Sequence[str] | None = None,
) -> dict[str, MetricScores]:
    """Score every prediction against its reference.

    Args:
        names: names of metrics, in the order of the result.
        references: the right text of each example, or several of them.
        predictions: one text an example.
        labels: every possible answer, for the metrics of labels.

    Returns:
        The scores by name. METEOR's name says what could be computed here: "meteor" becomes "meteor_exact_stem" if nltk
        has no WordNet.

    Raises:
        ArgumentError: a metric is unknown or reads no texts; there are no examples, or different numbers of references
            and predictions; or a reference is not a label or not a rating where a metric needs one.
        ArgumentTypeError: a text is not a string.
        BackendUnavailableError: the library that computes a metric is not installed.
    """
    scorers = {name: _scorer(name) for name in names}  # before anything is scored
    texts = Texts.checked(references, predictions, labels)
    wanted = {resolve(name): scorer for name, scorer in scorers.items()}
    scores: dict[str, MetricScores] = {}
    for scorer in dict.fromkeys(wanted.values()):
        scores |= scorer([name for name, its in wanted.items() if its is scorer], texts)
    return {name: scores[name] for name in wanted}


def metric_named(name: str) -> Metric:
    """The metric of that name.

    Raises:
        ArgumentError: there is none.
    """
    if name not in METRICS:
        raise ArgumentError(f"metrics: expected some of {', '.join(METRICS)}, got {name!r}")
    return METRICS[name]


def _scorer(name: str) -> Scorer:
    scorer = metric_named(name).score
    if scorer is None:
        raise ArgumentError(f"metrics: {name} is computed from the scores of pairs, not from texts")
    return scorer

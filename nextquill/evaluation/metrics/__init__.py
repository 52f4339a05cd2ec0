"""The metrics, by name, and `compute`, which scores texts in any of them.

    scores = compute(["rouge_l", "bleu"], references, predictions)
    scores["rouge_l"].value, scores["rouge_l"].per_example

Empty texts are scored, not refused: they share nothing with any text, so every metric of overlap gives them 0, also
against each other. Only `exact_match` and `accuracy` call two empty texts equal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

from nextquill.errors import ArgumentError
from nextquill.evaluation.metrics.answers import accuracy, exact_match, f1_macro, mae, rmse
from nextquill.evaluation.metrics.authors import Authors
from nextquill.evaluation.metrics.meteor import meteor, meteor_exact_stem, resolve
from nextquill.evaluation.metrics.person import copied, distinct, length_ratio, right_person, right_person_uncopied
from nextquill.evaluation.metrics.rouge import rouge
from nextquill.evaluation.metrics.sacre import bleu, chrf
from nextquill.evaluation.metrics.scores import MetricScores, Reference, Texts

__all__ = ["METRICS", "Authors", "Metric", "MetricScores", "compute", "resolve"]

#: The unit of scores between 0 and 1.
OF_ONE = "of 1"

Scorer = Callable[[Texts], MetricScores]


@dataclass(frozen=True)
class Metric:
    """A metric.

    Args:
        name: its key in `METRICS` and in results.
        label: its name in tables.
        score: computes it from texts; None for a metric that reads no texts.
        unit: "of 1" for scores between 0 and 1.
        higher_is_better: which way is better; None where neither is.
        per_example: whether it is the mean of the examples' scores.
        needs_authors: whether it reads the examples' users and histories.
    """

    name: str
    label: str
    score: Scorer | None
    unit: str = OF_ONE
    higher_is_better: bool | None = True
    per_example: bool = True
    needs_authors: bool = False


_METRICS = (
    Metric("rouge_1", "ROUGE-1", partial(rouge, kind="rouge1")),
    Metric("rouge_2", "ROUGE-2", partial(rouge, kind="rouge2")),
    Metric("rouge_l", "ROUGE-L", partial(rouge, kind="rougeL")),
    Metric("rouge_1_stem", "ROUGE-1 (stemmed)", partial(rouge, kind="rouge1", stem=True)),
    Metric("rouge_2_stem", "ROUGE-2 (stemmed)", partial(rouge, kind="rouge2", stem=True)),
    Metric("rouge_l_stem", "ROUGE-L (stemmed)", partial(rouge, kind="rougeL", stem=True)),
    Metric("meteor", "METEOR", meteor),
    Metric("meteor_exact_stem", "METEOR (exact + stem)", meteor_exact_stem),
    Metric("bleu", "BLEU", bleu, unit="of 100", per_example=False),
    Metric("chrf", "chrF", chrf, unit="of 100", per_example=False),
    Metric("right_person", "Right person", right_person, needs_authors=True),
    Metric("right_person_uncopied", "Right person uncopied", right_person_uncopied, needs_authors=True),
    Metric("copied", "Copied from history", copied, higher_is_better=None, needs_authors=True),
    Metric("distinct", "Distinct texts", distinct, higher_is_better=None),
    Metric("length_ratio", "Length", length_ratio, unit="of the person's", higher_is_better=None, per_example=False),
    Metric("accuracy", "Accuracy", accuracy),
    Metric("f1_macro", "Macro-F1", f1_macro, per_example=False),
    Metric("exact_match", "Exact match", exact_match),
    Metric("mae", "MAE", mae, unit="rating points", higher_is_better=False),
    Metric("rmse", "RMSE", rmse, unit="rating points", higher_is_better=False, per_example=False),
    Metric("preference_accuracy", "Preference accuracy", None),
)
METRICS: Mapping[str, Metric] = MappingProxyType({metric.name: metric for metric in _METRICS})


def compute(
    names: Sequence[str],
    references: Sequence[Reference],
    predictions: Sequence[str],
    *,
    labels: Sequence[str] | None = None,
    authors: Authors | None = None,
) -> dict[str, MetricScores]:
    """Score every prediction against its reference.

    Args:
        names: names of metrics, in the order of the result.
        references: the right text of each example, or several of them.
        predictions: one text an example.
        labels: every possible answer, for the metrics of labels.
        authors: the examples' users and histories, for the metrics that need them.

    Returns:
        The scores by name. METEOR's name says what could be computed here: "meteor" becomes "meteor_exact_stem" if nltk
        has no WordNet.

    Raises:
        ArgumentError: a metric is unknown or reads no texts; there are no examples, or different numbers of references
            and predictions; a metric lacks the authors or the histories it needs; or a reference is not a label or a
            rating, or an example has several, where a metric needs one.
        ArgumentTypeError: a text is not a string.
        BackendUnavailableError: the library that computes a metric is not installed.
    """
    scorers = {name: _scorer(name) for name in map(resolve, names)}  # before anything is scored
    texts = Texts.checked(references, predictions, labels, authors)
    return {name: score(texts) for name, score in scorers.items()}


def _scorer(name: str) -> Scorer:
    if name not in METRICS:
        raise ArgumentError(f"metrics: expected some of {', '.join(METRICS)}, got {name!r}")
    scorer = METRICS[name].score
    if scorer is None:
        raise ArgumentError(f"metrics: {name} is computed from the scores of pairs, not from texts")
    return scorer

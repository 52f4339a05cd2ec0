"""Two evaluations of the same records, compared example by example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from nextquill.errors import ArgumentError
from nextquill.evaluation.bootstrap import PairedResult, paired_difference
from nextquill.evaluation.metrics import METRICS, MetricScores, compute
from nextquill.evaluation.results import (
    EvaluatedExample,
    Evaluation,
    finite,
    read_evaluation,
    read_examples,
)
from nextquill.evaluation.tasks import TASKS

#: The example's score that counts its response's tokens.
TOKENS = "tokens"
_BRANCHES = ("factual", "counterfactual", "placebo")


def compare_evaluations(
    a: Path,
    b: Path,
    names: Sequence[str] | None = None,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, PairedResult]:
    """What the evaluation in folder `a` has more than that in `b`, in each measure, paired by example and by user.

    A mean over examples, or over their tokens, is taken over the examples that both have a score for; BLEU and the like
    are computed again from the texts that both generated. So a difference may be one of fewer examples than either
    evaluation's own value.

    Args:
        a, b: folders of two evaluations of the same records.
        names: of measures; None for all that both have and that can be paired.
        level, resamples, seed: as in `paired_difference`; users are drawn and exchanged as a whole.

    Raises:
        RecordError: an evaluation is missing or damaged.
        ArgumentError: they are of different records; or a named measure is missing in one, or cannot be paired.
    """
    first, second = read_evaluation(a), read_evaluation(b)
    if first.records != second.records:
        raise ArgumentError(
            f"{a} and {b}: evaluations of different records ({first.records} and {second.records}) cannot be paired"
        )
    examples = [{example.index: example for example in read_examples(folder)} for folder in (a, b)]
    results: dict[str, PairedResult] = {}
    # The number of tokens is that of the same records.
    shared = [name for name in first.metrics if name in second.metrics and name != TOKENS]
    for name in shared if names is None else names:
        for folder, evaluation in ((a, first), (b, second)):
            if name not in evaluation.metrics:
                raise ArgumentError(f"metrics: {folder} has no {name!r}; it has {', '.join(evaluation.metrics)}")
        paired = _paired_scores(name, first, examples[0], examples[1])
        if paired is not None:
            scores_a, scores_b, users = paired
            results[name] = paired_difference(scores_a, scores_b, users, level=level, resamples=resamples, seed=seed)
        elif names is not None:
            raise ArgumentError(f"metrics: {name!r} cannot be paired: no example has its score in both {a} and {b}")
    return results


_Examples = Mapping[int, EvaluatedExample]


def _paired_scores(
    name: str, evaluation: Evaluation, a: _Examples, b: _Examples
) -> tuple[MetricScores, MetricScores, list[str]] | None:
    """Scores of the examples that have one in both, and their users; None where no example has."""
    common = sorted(a.keys() & b.keys())
    metric, branch = _of_texts(name)
    if metric is not None:
        indices = [i for i in common if branch in a[i].generated and branch in b[i].generated]
        if not indices:
            return None
        references, labels = [a[i].response for i in indices], _labels(evaluation)
        texts = [[each[i].generated[branch] for i in indices] for each in (a, b)]
        sides = [compute([metric], references, predictions, labels=labels)[metric] for predictions in texts]
    else:
        own = evaluation.metrics[name].per_example
        key, weight = (name, TOKENS) if own is None else (own, None)
        indices = [i for i in common if all(_has(each[i], key) and _has(each[i], weight) for each in (a, b))]
        if not indices:
            return None
        sides = [_weighted([each[i] for i in indices], key, weight) for each in (a, b)]
    return sides[0], sides[1], [a[i].user_id for i in indices]


def _weighted(examples: Sequence[EvaluatedExample], key: str, weight: str | None) -> MetricScores:
    if weight is None:
        return MetricScores.mean_of([example.scores[key] for example in examples], key)
    weights = [example.scores[weight] for example in examples]
    sums = [example.scores[key] * count for example, count in zip(examples, weights, strict=True)]
    return MetricScores.ratio_of(sums, weights)


def _has(example: EvaluatedExample, key: str | None) -> bool:
    return key is None or finite(example.scores.get(key)) is not None


def _labels(evaluation: Evaluation) -> tuple[str, ...] | None:
    task = TASKS.get(evaluation.task or "")
    return task.labels if task else None


def _of_texts(name: str) -> tuple[str | None, str]:
    """The measure of a corpus of texts that a name such as `bleu` or `bleu_counterfactual` is, and its branch."""
    branch = next((each for each in _BRANCHES if name.endswith(f"_{each}")), "factual")
    metric = METRICS.get(name.removesuffix(f"_{branch}"))
    return (metric.name if metric and metric.score and not metric.per_example else None), branch

"""Evaluations of the same records, compared example by example."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nextquill.errors import ArgumentError
from nextquill.evaluation.bootstrap import PairedResult, paired_difference
from nextquill.evaluation.measures import NLL_PROSE, TOKENS, is_of_corpus, kind_and_branch
from nextquill.evaluation.metrics import MetricScores, compute
from nextquill.evaluation.results import (
    PROSE_FILE,
    EvaluatedExample,
    Evaluation,
    finite,
    read_evaluation,
    read_examples,
)
from nextquill.evaluation.tasks import TASKS
from nextquill.evaluation.text_measures import REFERENCE
from nextquill.evaluation.token_measures import SUM_MEASURES
from nextquill.storage.json_files import json_objects


def compare_evaluations(
    a: Path,
    b: Path,
    names: Sequence[str] | None = None,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, PairedResult]:
    """Each measure of the evaluation in folder `a` minus that in folder `b`, paired by example and by user.

    A mean over examples, or over their tokens, is taken over the examples that have a score in both evaluations; so are
    measures of `token_measures`, from rows of statistics. BLEU
    and other measures of a whole corpus are computed again from the texts that both generated. So a difference may rest
    on fewer examples than either evaluation's own value.

    Args:
        a, b: folders of two evaluations of the same records.
        names: names of measures; None for all that both have and that can be paired.
        level, resamples, seed: as in `paired_difference`; users are drawn and exchanged as a whole.

    Raises:
        RecordError: an evaluation is missing or damaged.
        ArgumentError: the evaluations are of different records; or a named measure is missing in one of them, or cannot
            be paired.
    """
    first, second = read_evaluation(a), read_evaluation(b)
    if first.records != second.records:
        raise ArgumentError(
            f"{a} and {b}: evaluations of different records ({first.records} and {second.records}) cannot be paired"
        )
    examples = [read_examples(folder) for folder in (a, b)]
    results: dict[str, PairedResult] = {}
    # The number of tokens and the people's own texts are the same in both, as the records are.
    shared = [
        name
        for name in first.metrics
        if name in second.metrics and name != TOKENS and kind_and_branch(name)[1] != REFERENCE
    ]
    for name in shared if names is None else names:
        for folder, evaluation in ((a, first), (b, second)):
            if name not in evaluation.metrics:
                raise ArgumentError(f"metrics: {folder} has no {name!r}; it has {', '.join(evaluation.metrics)}")
        paired = _paired_prose(a, b, first, second) if name == NLL_PROSE else paired_scores(name, first, examples)
        if paired is not None:
            (scores_a, scores_b), users = paired
            results[name] = paired_difference(scores_a, scores_b, users, level=level, resamples=resamples, seed=seed)
        elif names is not None:
            raise ArgumentError(f"metrics: {name!r} cannot be paired: no example has its score in both {a} and {b}")
    return results


def _paired_prose(
    a: Path, b: Path, first: Evaluation, second: Evaluation
) -> tuple[list[MetricScores], list[str]] | None:
    """Both nlls of general prose, and the windows as groups; None where text or tokens differ."""
    windows = [[line for _, line in json_objects(folder / PROSE_FILE)] for folder in (a, b)]
    sizes = [[line["tokens"] for line in lines] for lines in windows]
    texts = [each.settings.get("content of prose_file") for each in (first, second)]
    if sizes[0] != sizes[1] or texts[0] != texts[1]:
        return None
    scores = [MetricScores.ratio_of([line["nll"] for line in lines], sizes[0]) for lines in windows]
    return scores, [str(index) for index in range(len(sizes[0]))]


def paired_scores(
    name: str, evaluation: Evaluation, runs: Sequence[Sequence[EvaluatedExample]]
) -> tuple[list[MetricScores], list[str]] | None:
    """One measure's scores in each of several evaluations, on the examples that have a score in all of them.

    Args:
        name: the name of a measure.
        evaluation: one of the evaluations; it says which scores the measure is a mean of, and names the task.
        runs: the examples of each evaluation, all of the same records.

    Returns:
        The scores, one for each of `runs`, and the user of each example; None where no example has a score in all.
    """
    if is_of_corpus(name):
        kind, branch = kind_and_branch(name)
        task = TASKS.get(evaluation.task or "")

        def usable(example: EvaluatedExample) -> bool:
            return branch in example.generated

        def scored(examples: Sequence[EvaluatedExample]) -> MetricScores:
            texts = [example.generated[branch] for example in examples]
            references = [example.response for example in examples]
            return compute([kind], references, texts, labels=task.labels if task else None)[kind]

    elif name in SUM_MEASURES:

        def usable(example: EvaluatedExample) -> bool:
            return name in example.statistics

        def scored(examples: Sequence[EvaluatedExample]) -> MetricScores:
            return SUM_MEASURES[name].scores([example.statistics[name] for example in examples])

    else:
        own = evaluation.metrics[name].per_example
        # Without a score that it is the mean of, it is a mean over tokens: of the examples' means, weighted by tokens.
        needed = (name, TOKENS) if own is None else (own,)

        def usable(example: EvaluatedExample) -> bool:
            return all(finite(example.scores.get(each)) is not None for each in needed)

        def scored(examples: Sequence[EvaluatedExample]) -> MetricScores:
            values = [example.scores[needed[0]] for example in examples]
            if own is not None:
                return MetricScores.mean_of(values, own)
            weights = [example.scores[TOKENS] for example in examples]
            sums = [value * weight for value, weight in zip(values, weights, strict=True)]
            return MetricScores.ratio_of(sums, weights)

    held = [{example.index: example for example in run if usable(example)} for run in runs]
    indices = sorted(set.intersection(*map(set, held)))
    if not indices:
        return None
    scores = [scored([run[index] for index in indices]) for run in held]
    return scores, [held[0][index].user_id for index in indices]

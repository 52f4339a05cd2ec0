"""Measures over all examples, with intervals, from the scores of each example.

NLLs and effects are given twice: as a mean over all response tokens, in which a long response weighs more, as training
reports them; and as a mean over examples of each example's own mean. Intervals resample users, not examples, because
the examples of one user are not independent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nextquill.data.templates import BRANCHES
from nextquill.defaults import DEFAULT_THRESHOLD
from nextquill.evaluation.bootstrap import bootstrap_interval
from nextquill.evaluation.measure_names import PER_EXAMPLE, PREFERENCE_KINDS, PROMPTS, TOKEN_KINDS, TOKENS, measure_name
from nextquill.evaluation.metrics import METRICS, MetricScores, compute
from nextquill.evaluation.results import MetricValue, finite

if TYPE_CHECKING:
    from nextquill.evaluation.options import EvaluationOptions


@dataclass(frozen=True)
class LabelledScores:
    """A measure before its interval is computed.

    Args:
        label, unit, higher_is_better, per_example: as in `MetricValue`.
        scores: the scores of some examples.
        members: the positions of those examples.
    """

    label: str
    scores: MetricScores
    members: Sequence[int]
    unit: str = ""
    higher_is_better: bool | None = None
    per_example: str | None = None

    def with_interval(self, users: Sequence[str], options: EvaluationOptions) -> MetricValue:
        """The measure with its bootstrap interval over users.

        Args:
            users: the user of every example.
            options: the interval's `level`, `resamples` and `seed`.
        """
        groups = [users[index] for index in self.members]
        value, *bounds = bootstrap_interval(
            self.scores, groups, level=options.level, resamples=options.resamples, seed=options.seed
        )
        low, high = map(finite, bounds)
        return MetricValue(self.label, value, low, high, self.unit, self.higher_is_better, self.per_example)


def token_values(line: Mapping[str, Any]) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
    """Every measure of a response's tokens, [tokens] each, from its line of `effects.jsonl`."""
    nll = {
        name: np.asarray(line[f"nll_{name}"], dtype=np.float64)
        for name in BRANCHES
        if line.get(f"nll_{name}") is not None
    }
    factual, counterfactual = nll["factual"], nll["counterfactual"]
    effect_prob = np.exp(-factual) - np.exp(-counterfactual)
    values = {f"nll_{name}": value for name, value in nll.items()}
    values["effect_logprob"] = counterfactual - factual
    if "placebo" in nll:
        values["effect_placebo"] = nll["placebo"] - factual
    values["effect_prob"] = effect_prob
    values["share_above_threshold"] = (effect_prob > DEFAULT_THRESHOLD).astype(np.float64)
    return values


def effect_measures(lines: Sequence[Mapping[str, Any]]) -> tuple[dict[str, LabelledScores], list[dict[str, float]]]:
    """NLLs and effects over all tokens and over examples, and every example's own means.

    Args:
        lines: a line of `effect_line` for each example.

    Returns:
        The measures by name; and for each example its scores by name, with its number of `tokens`.
    """
    values = [token_values(line) for line in lines]
    sizes = [len(line["token_ids"]) for line in lines]
    scores = [
        {TOKENS: float(size), **{name: float(tokens.mean()) for name, tokens in each.items()}}
        for size, each in zip(sizes, values, strict=True)
    ]
    members, measures, means = range(len(lines)), dict[str, LabelledScores](), dict[str, LabelledScores]()
    for name, (label, unit, better, _) in TOKEN_KINDS.items():
        if all(name in each for each in values):
            over_tokens = MetricScores.ratio_of([float(each[name].sum()) for each in values], sizes)
            measures[name] = LabelledScores(label, over_tokens, members, unit, better)
            over_examples = MetricScores.mean_of([each[name] for each in scores], name)
            mean_label = f"{label}, mean of examples"
            means[f"{name}{PER_EXAMPLE}"] = LabelledScores(mean_label, over_examples, members, unit, better, name)
    return {**measures, **means}, scores


def preference_measures(scores: Mapping[int, Mapping[str, float]]) -> dict[str, LabelledScores]:
    """Means over the examples that hold a pair of responses.

    Args:
        scores: the examples' `preference_scores`, by the example's position.
    """
    members, measures = sorted(scores), dict[str, LabelledScores]()
    for branch, prompt in PROMPTS.items():
        for kind, (label, unit, better, _) in PREFERENCE_KINDS.items():
            name = measure_name(kind, branch)
            held = [index for index in members if name in scores[index]]
            if held:
                mean = MetricScores.mean_of([scores[index][name] for index in held], name)
                own = better if branch == "factual" else None
                measures[name] = LabelledScores(f"{label}, {prompt}", mean, held, unit, own, name)
    return measures


def text_measures(
    names: Sequence[str],
    branches: Sequence[str],
    references: Sequence[str],
    generated: Sequence[Mapping[str, str]],
    labels: Sequence[str] | None = None,
) -> dict[str, LabelledScores]:
    """Measures of the generated texts, branch by branch.

    Args:
        names: the names of metrics of texts.
        branches: the branches whose prompts texts were generated from.
        references: the right text of each example that texts were generated for.
        generated: the texts of every example, by branch.
        labels: every possible answer, if the task has a list of them.
    """
    measures = dict[str, LabelledScores]()
    for branch in branches:
        members = [index for index, texts in enumerate(generated) if branch in texts]
        right, texts = [references[index] for index in members], [generated[index][branch] for index in members]
        for kind, scores in compute(names, right, texts, labels=labels).items():
            metric, name = METRICS[kind], measure_name(kind, branch)
            label = f"{metric.label}, generated {PROMPTS[branch]}"
            better = metric.higher_is_better if branch == "factual" else None
            own = None if scores.per_example is None else name
            measures[name] = LabelledScores(label, scores, members, metric.unit, better, own)
    return measures

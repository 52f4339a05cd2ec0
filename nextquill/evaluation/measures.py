"""From what an evaluation has measured of each example to the measures over all, with intervals.

Effects and nll's are given twice: a mean over all response tokens, in which a long response weighs more, as training
reports them; and a mean over examples of each one's own mean. Intervals resample users, not examples: those of one user
are no independent evidence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from nextquill.evaluation.bootstrap import bootstrap_interval
from nextquill.evaluation.metrics import METRICS, MetricScores, compute
from nextquill.evaluation.options import EvaluationOptions
from nextquill.evaluation.results import MetricValue, finite
from nextquill.losses import DEFAULT_THRESHOLD

PER_EXAMPLE = "_per_example"
_NATS = "nats per token"
# Name, label, unit and which way is better, of what is a number a token.
_TOKEN_MEASURES: tuple[tuple[str, str, str, bool | None], ...] = (
    ("nll_factual", "nll with history", _NATS, False),
    ("nll_counterfactual", "nll without history", _NATS, None),
    ("nll_placebo", "nll with another's history", _NATS, None),
    ("effect_logprob", "effect of the history", _NATS, None),
    ("effect_placebo", "effect against the placebo", _NATS, None),
    ("effect_prob", "mean probability effect", "", None),
    ("share_above_threshold", f"tokens with effect > {DEFAULT_THRESHOLD}", "", None),
)
_PROMPTS = {
    "factual": "with history",
    "counterfactual": "without history",
    "placebo": "with another's history",
}
# Headings of columns in tables of 80 characters.
_COLUMNS = {"factual": "with history", "counterfactual": "without", "placebo": "another's"}
# Label, heading of its row, unit and which way is better.
_PREFERENCES: dict[str, tuple[str, str, str, bool | None]] = {
    "preference_accuracy": ("prefers the chosen", "prefers", "", True),
    "preference_accuracy_per_token": ("prefers the chosen per token", "prefers/token", "", True),
    "preference_margin": ("margin of the chosen", "margin", "nats", None),
    "preference_margin_per_token": ("margin of the chosen per token", "margin/token", _NATS, None),
}


@dataclass(frozen=True)
class LabelledScores:
    """A measure before its interval is computed.

    Args:
        label, unit, higher_is_better, per_example: as in `MetricValue`.
        scores: of the examples.
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
            options: its `level`, `resamples` and `seed`.
        """
        groups = [users[index] for index in self.members]
        value, *bounds = bootstrap_interval(
            self.scores, groups, level=options.level, resamples=options.resamples, seed=options.seed
        )
        low, high = map(finite, bounds)
        return MetricValue(self.label, value, low, high, self.unit, self.higher_is_better, self.per_example)


def branch_suffix(branch: str) -> str:
    """What names of measures under a prompt end in: nothing for the user's own history."""
    return "" if branch == "factual" else f"_{branch}"


class Place(NamedTuple):
    """Where a measure stands in tables: "responses", "pairs" or "texts", and the headings of its row and column."""

    table: str
    row: str
    column: str


def place_of(name: str) -> Place | None:
    """The place of the measure of that name, or None of what is no measure, such as a count."""
    over_tokens = {row[0]: row[1] for row in _TOKEN_MEASURES}
    base = name.removesuffix(PER_EXAMPLE)
    if base in over_tokens:
        return Place("responses", over_tokens[base], "per token" if base == name else "mean of examples")
    branch = next((each for each in _PROMPTS if name.endswith(f"_{each}")), "factual")
    kind = name.removesuffix(branch_suffix(branch))
    if kind in _PREFERENCES:
        return Place("pairs", _PREFERENCES[kind][1], _COLUMNS[branch])
    return Place("texts", METRICS[kind].label, _COLUMNS[branch]) if kind in METRICS else None


def token_values(line: Mapping[str, Any]) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
    """Every measure of a response's tokens, [tokens] each, from the line of its nll's."""
    nll = {
        name: np.asarray(line[f"nll_{name}"], dtype=np.float64)
        for name in _PROMPTS
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
    """The nll's and effects over all tokens and over examples, and every example's own means.

    Args:
        lines: of `effect_line`, one an example.

    Returns:
        The measures by name, and for each example its scores by name, with `tokens`, their number.
    """
    values = [token_values(line) for line in lines]
    sizes = [len(line["token_ids"]) for line in lines]
    scores = [
        {"tokens": float(size), **{name: float(tokens.mean()) for name, tokens in each.items()}}
        for size, each in zip(sizes, values, strict=True)
    ]
    members = range(len(lines))
    shown = [row for row in _TOKEN_MEASURES if all(row[0] in each for each in values)]
    measures = dict[str, LabelledScores]()
    for name, label, unit, better in shown:
        over_tokens = MetricScores.ratio_of([float(each[name].sum()) for each in values], sizes)
        measures[name] = LabelledScores(label, over_tokens, members, unit, better)
    for name, label, unit, better in shown:
        over_examples = MetricScores.mean_of([each[name] for each in scores], name)
        measures[f"{name}{PER_EXAMPLE}"] = LabelledScores(
            f"{label}, mean of examples", over_examples, members, unit, better, name
        )
    return measures, scores


def preference_measures(scores: Mapping[int, Mapping[str, float]]) -> dict[str, LabelledScores]:
    """Means over the examples that hold a pair.

    Args:
        scores: by the example's position, of `preference_scores`.
    """
    members, measures = sorted(scores), dict[str, LabelledScores]()
    for branch, how in _PROMPTS.items():
        for kind, (label, _, unit, better) in _PREFERENCES.items():
            name = f"{kind}{branch_suffix(branch)}"
            held = [index for index in members if name in scores[index]]
            if held:
                mean = MetricScores.mean_of([scores[index][name] for index in held], name)
                own = better if branch == "factual" else None
                measures[name] = LabelledScores(f"{label}, {how}", mean, held, unit, own, name)
    return measures


def text_measures(
    names: Sequence[str],
    branch: str,
    references: Sequence[str],
    texts: Mapping[int, str],
    labels: Sequence[str] | None = None,
) -> dict[str, LabelledScores]:
    """Measures of the texts generated from one prompt of each example.

    Args:
        names: of measures that read texts.
        branch: whose prompt it was.
        references: the right texts, by the example's position.
        texts: what was generated, by the example's position; not every example need have one.
        labels: every answer there is, where the task has a list of them.
    """
    members, measures = sorted(texts), dict[str, LabelledScores]()
    found = compute(names, [references[index] for index in members], [texts[index] for index in members], labels=labels)
    for kind, scores in found.items():
        metric, name = METRICS[kind], f"{kind}{branch_suffix(branch)}"
        label = f"{metric.label}, generated {_PROMPTS[branch]}"
        better = metric.higher_is_better if branch == "factual" else None
        own = None if scores.per_example is None else name
        measures[name] = LabelledScores(label, scores, members, metric.unit, better, own)
    return measures

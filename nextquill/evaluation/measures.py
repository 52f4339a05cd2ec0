"""Measures over all examples: their names, what tables call them, and their values with intervals.

NLLs and effects are given twice: as a mean over all response tokens, in which a long response weighs more, as training
reports them; and as a mean over examples of each example's own mean. Intervals resample users, not examples, because
the examples of one user are not independent. A measure's name is its kind and the prompt it was measured under:

    rouge_l                   of texts generated with the user's history
    rouge_l_counterfactual    of texts generated without history
    rouge_l_placebo           of texts generated with another user's history
    right_person_reference    of the people's own texts, for the measures that look for the person
    nll_factual               over all response tokens; such kinds name their prompt themselves
    nll_factual_per_example   the same as a mean over examples of each example's own mean
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nextquill.data.templates import BRANCHES
from nextquill.defaults import DEFAULT_THRESHOLD
from nextquill.evaluation.bootstrap import bootstrap_interval
from nextquill.evaluation.metrics import METRICS, OF_ONE, Metric, MetricScores
from nextquill.evaluation.metrics.scores import Floats
from nextquill.evaluation.results import MetricValue, finite
from nextquill.evaluation.text_measures import REFERENCE
from nextquill.evaluation.token_measures import SUM_MEASURES, Bools, Row, token_statistics

if TYPE_CHECKING:
    from nextquill.evaluation.options import EvaluationOptions

PER_EXAMPLE = "_per_example"
#: The number of response tokens: a count of an evaluation, and among the scores of every example.
TOKENS = "tokens"
#: The users who were in no training data, where that is known: a count of an evaluation.
NEW_USERS = "new_users"
#: The pairs of a chosen and a rejected response, if there are any.
PAIRS = "pairs"
#: The counts among an evaluation's measures.
COUNTS = ("examples", "users", TOKENS, NEW_USERS, PAIRS)
#: The prompts in words, by branch.
PROMPTS = dict(zip(BRANCHES, ("with history", "without history", "with another's history"), strict=True))
# Headings of columns in tables of 80 characters.
_COLUMNS = dict(zip((*BRANCHES, REFERENCE), ("with history", "without", "another's", "the person's own"), strict=True))
_NATS = "nats per token"


class Kind(NamedTuple):
    """A kind of measure: its label, its unit, which way is better if either is, and the heading of its table row."""

    label: str
    unit: str
    higher_is_better: bool | None
    row: str = ""


#: Measures that have a value for every response token.
TOKEN_KINDS = {
    "nll_factual": Kind("nll with history", _NATS, False),
    "nll_counterfactual": Kind("nll without history", _NATS, None),
    "nll_placebo": Kind("nll with another's history", _NATS, None),
    "effect_logprob": Kind("effect of the history", _NATS, None),
    "effect_placebo": Kind("effect against the placebo", _NATS, None),
    "effect_prob": Kind("mean probability effect", "", None),
    "share_above_threshold": Kind(f"tokens with effect > {DEFAULT_THRESHOLD}", "", None),
    "top1": Kind("tokens predicted first", "", True),
}
#: Measures of a chosen against a rejected response.
PREFERENCE_KINDS = {
    "preference_accuracy": Kind("prefers the chosen", "", True, "prefers"),
    "preference_accuracy_per_token": Kind("prefers the chosen per token", "", True, "prefers/token"),
    "preference_margin": Kind("margin of the chosen", "nats", None, "margin"),
    "preference_margin_per_token": Kind("margin of the chosen per token", _NATS, None, "margin/token"),
}
#: Measures of texts by a judge that is a language model, and of general prose.
RIGHT_PERSON_LM, JUDGE = "right_person_lm", Kind("Right person, by LM", OF_ONE, True)
NLL_PROSE, PROSE = "nll_prose", Kind("nll of general prose", _NATS, False)


class Place(NamedTuple):
    """Where a measure stands: the table, such as "responses" or "texts", and the headings of its row and column."""

    table: str
    row: str
    column: str


def measure_name(kind: str, branch: str) -> str:
    """The name of a kind of measure under the prompt of a branch."""
    return kind if branch == "factual" else f"{kind}_{branch}"


def kind_and_branch(name: str) -> tuple[str, str]:
    """The two parts that `measure_name` joins."""
    branch = next((each for each in (*BRANCHES, REFERENCE) if name.endswith(f"_{each}")), "factual")
    return name.removesuffix(f"_{branch}"), branch


def text_metric(name: str) -> Metric | None:
    """The metric of generated texts that a measure is, or None where it is another measure."""
    metric = METRICS.get(kind_and_branch(name)[0])
    return metric if metric is not None and metric.score is not None else None


def is_of_corpus(name: str) -> bool:
    """Whether a measure is computed from all texts together, as BLEU is, and so is not a mean of examples' scores."""
    metric = text_metric(name)
    return metric is not None and not metric.per_example


def place_of(name: str) -> Place | None:
    """The measure's place in tables, or None for a count and for an unknown name."""
    over_tokens = name.removesuffix(PER_EXAMPLE)
    if over_tokens in TOKEN_KINDS:
        column = "per token" if over_tokens == name else "mean of examples"
        return Place("responses", TOKEN_KINDS[over_tokens].label, column)
    if name in SUM_MEASURES:
        return Place(*SUM_MEASURES[name].place)
    kind, branch = kind_and_branch(name)
    if kind == NLL_PROSE:
        return Place("prose", PROSE.label, "per token")
    if kind == RIGHT_PERSON_LM:
        return Place("texts", JUDGE.label, _COLUMNS[branch])
    if kind in PREFERENCE_KINDS:
        return Place("pairs", PREFERENCE_KINDS[kind].row, _COLUMNS[branch])
    return Place("texts", METRICS[kind].label, _COLUMNS[branch]) if kind in METRICS else None


@dataclass(frozen=True)
class LabelledScores:
    """A measure before its interval is computed.

    Args:
        label, unit, higher_is_better, per_example: as in `MetricValue`.
        scores: the scores of some examples.
        members: the positions of those examples.
        groups: what is drawn for the interval, for each score; by default those examples' users.
    """

    label: str
    scores: MetricScores
    members: Sequence[int]
    unit: str = ""
    higher_is_better: bool | None = None
    per_example: str | None = None
    groups: Sequence[str] | None = None

    def with_interval(self, users: Sequence[str], options: EvaluationOptions) -> MetricValue:
        """The measure with its bootstrap interval; `users` are those of all examples."""
        groups = self.groups or [users[index] for index in self.members]
        value, *bounds = bootstrap_interval(
            self.scores, groups, level=options.level, resamples=options.resamples, seed=options.seed
        )
        low, high = map(finite, bounds)
        return MetricValue(self.label, value, low, high, self.unit, self.higher_is_better, self.per_example)


def token_values(line: Mapping[str, Any]) -> dict[str, Floats]:
    """Every measure of a response's tokens, [tokens] each, from its line of `effects.jsonl`."""
    names = (f"nll_{branch}" for branch in BRANCHES)
    values = {name: np.asarray(line[name], dtype=np.float64) for name in names if line.get(name) is not None}
    factual, counterfactual = values["nll_factual"], values["nll_counterfactual"]
    values["effect_logprob"] = counterfactual - factual
    if "nll_placebo" in values:
        values["effect_placebo"] = values["nll_placebo"] - factual
    values["effect_prob"] = np.exp(-factual) - np.exp(-counterfactual)
    values["share_above_threshold"] = (values["effect_prob"] > DEFAULT_THRESHOLD).astype(np.float64)
    if "top1" in line:  # as `score` and earlier versions do not write it
        values["top1"] = np.asarray(line["top1"], dtype=np.float64)
    return values


def effect_measures(lines: Sequence[Mapping[str, Any]]) -> tuple[dict[str, LabelledScores], list[dict[str, float]]]:
    """NLLs and effects over all tokens and over examples, by name, from the examples' lines of `effects.jsonl`.

    The second result holds every example's own means by name, with its number of `tokens`.
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


def sum_measures(
    lines: Sequence[Mapping[str, Any]],
    temperature: float | None = None,
    marked: Sequence[Bools | None] | None = None,
    known: Sequence[Bools | None] | None = None,
) -> tuple[dict[str, LabelledScores], list[dict[str, Row]]]:
    """The measures of `token_measures` by name, and every example's rows of statistics that they follow from.

    A measure is left out where nothing is counted, as where no token is personal.
    """
    nothing = [None] * len(lines)
    rows = [
        token_statistics(line, token_values(line), temperature, *own)
        for line, *own in zip(lines, marked or nothing, known or nothing, strict=True)
    ]
    measures = dict[str, LabelledScores]()
    for name, kind in SUM_MEASURES.items():
        members = [index for index, own in enumerate(rows) if name in own]
        scores = kind.scores([rows[index][name] for index in members])
        if kind.is_defined(scores.statistics.sum(axis=0)):
            is_fixed = name == "nll_at_temperature" and temperature is not None
            label = f"nll at temperature {temperature:g}" if is_fixed else kind.label
            measures[name] = LabelledScores(label, scores, members, kind.unit, kind.higher_is_better)
    return measures, rows


def preference_measures(scores: Mapping[int, Mapping[str, float]]) -> dict[str, LabelledScores]:
    """Means over the examples that hold a pair of responses, from their `preference_scores` by position."""
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


def text_measure(
    name: str, label: str, scores: MetricScores, unit: str = OF_ONE, higher_is_better: bool | None = None
) -> dict[str, LabelledScores]:
    """A measure of texts by its name, over the examples that have a score; nothing if none has."""
    defined = scores.defined()
    if defined is None or scores.per_example is None:
        return {name: LabelledScores(label, scores, range(len(scores)), unit, higher_is_better)}
    if not defined:
        return {}
    mean = MetricScores.mean_of(scores.per_example[defined], name)
    return {name: LabelledScores(label, mean, defined, unit, higher_is_better, name)}

"""Names of measures, and what tables call them. A measure's name is its kind and the prompt it was measured under.

rouge_l                   of texts generated with the user's history
rouge_l_counterfactual    of texts generated without history
rouge_l_placebo           of texts generated with another user's history
nll_factual               over all response tokens; such kinds name their prompt themselves
nll_factual_per_example   the same as a mean over examples of each example's own mean
"""

from __future__ import annotations

from typing import NamedTuple

from nextquill.data.templates import BRANCHES
from nextquill.defaults import DEFAULT_THRESHOLD
from nextquill.evaluation.metrics import METRICS, Metric

PER_EXAMPLE = "_per_example"
#: The number of response tokens: a count of an evaluation, and among the scores of every example.
TOKENS = "tokens"
#: The counts among an evaluation's measures.
COUNTS = ("examples", "users", TOKENS)
#: The prompts in words, by branch.
PROMPTS = dict(zip(BRANCHES, ("with history", "without history", "with another's history"), strict=True))
# Headings of columns in tables of 80 characters.
_COLUMNS = dict(zip(BRANCHES, ("with history", "without", "another's"), strict=True))
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
}
#: Measures of a chosen against a rejected response.
PREFERENCE_KINDS = {
    "preference_accuracy": Kind("prefers the chosen", "", True, "prefers"),
    "preference_accuracy_per_token": Kind("prefers the chosen per token", "", True, "prefers/token"),
    "preference_margin": Kind("margin of the chosen", "nats", None, "margin"),
    "preference_margin_per_token": Kind("margin of the chosen per token", _NATS, None, "margin/token"),
}


class Place(NamedTuple):
    """Where a measure stands: the table ("responses", "pairs" or "texts"), and the headings of its row and column."""

    table: str
    row: str
    column: str


def measure_name(kind: str, branch: str) -> str:
    """The name of a kind of measure under the prompt of a branch."""
    return kind if branch == "factual" else f"{kind}_{branch}"


def kind_and_branch(name: str) -> tuple[str, str]:
    """The two parts that `measure_name` joins."""
    branch = next((each for each in BRANCHES if name.endswith(f"_{each}")), "factual")
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
    kind, branch = kind_and_branch(name)
    if kind in PREFERENCE_KINDS:
        return Place("pairs", PREFERENCE_KINDS[kind].row, _COLUMNS[branch])
    return Place("texts", METRICS[kind].label, _COLUMNS[branch]) if kind in METRICS else None

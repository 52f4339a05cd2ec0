"""The beginning of a report: a sentence on each subject, and the measures that matter as a forest plot.

A subject is a run or an arm of a comparison. A sentence claims a difference only if its interval excludes 0 and, where
it is paired, its test agrees. Everything else is called "no clear change", which does not mean that there is no change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from nextquill.evaluation.measures import TOKEN_KINDS, kind_and_branch, text_metric
from nextquill.evaluation.permutation import holm
from nextquill.evaluation.results import MetricValue
from nextquill.report.data import ForestMeasure, ForestRow
from nextquill.report.numbers import counted, in_words, rounded

#: Below this number of people a page warns.
FEW_PEOPLE = 20
MOST_MEASURES = 4
#: The ending that the labels of all measures of generated texts share.
OWN_HISTORY = ", generated with history"
# What is worth something, and what it is compared with; the placebo first, because any history changes a prompt.
_WORTH = {
    "summary_minus_placebo": ("own summary", "another person's"),
    "summary_minus_none": ("own summary", "none"),
    "summary_minus_signals": ("own summary", "the raw signals"),
    "effect_placebo": ("own history", "another person's"),
    "effect_logprob": ("own history", "none"),
}
_LEVELS = {
    "accuracy_summary": "accuracy",
    "nll_factual": "nll",
    "preference_accuracy": "share of pairs in which it prefers the chosen",
}
_TITLES = {
    "effect_placebo": ("Own history against another person's", "nll with another's − nll with the own"),
    "effect_logprob": ("Own history against none", "nll without history − nll with it; not all of it is personal"),
}


@dataclass(frozen=True)
class Change:
    """A paired difference to the baseline, and whether it is clear."""

    value: float
    low: float
    high: float
    p_value: float
    is_clear: bool


@dataclass(frozen=True)
class Subject:
    """A run or an arm.

    Args:
        label: its name.
        metrics: its measures by name.
        changes: its differences to the baseline by name, as far as they can be paired.
        on: what it was measured on, as "48 responses of 24 people".
        texts: the number of texts generated with the history.
        place: its colour's place in the palette.
    """

    label: str
    metrics: Mapping[str, MetricValue]
    changes: Mapping[str, Change] = field(default_factory=dict)
    on: str = ""
    texts: int = 0
    place: int = 0


def text_measures(metrics: Mapping[str, MetricValue]) -> list[str]:
    """The names of the measures of texts generated with the history, ROUGE-L first if it is there."""
    found = [
        name
        for name, metric in metrics.items()
        if text_metric(name) and kind_and_branch(name)[1] == "factual" and metric.higher_is_better is not None
    ]
    return sorted(found, key=lambda name: name != "rouge_l")


def forest(subjects: Sequence[Subject], baseline: str | None) -> list[ForestMeasure]:
    """The four measures that matter, as far as they were measured, each with the subjects' figures."""
    known = {name: metric for subject in reversed(subjects) for name, metric in subject.metrics.items()}
    names = [name for name in (*_WORTH, *_LEVELS) if name in known] + text_measures(known)[:1]
    return [_measure(name, known[name], subjects, baseline) for name in names[:MOST_MEASURES]]


def _measure(name: str, metric: MetricValue, subjects: Sequence[Subject], baseline: str | None) -> ForestMeasure:
    title, meaning = _TITLES.get(name, (metric.label, ""))
    way = {True: "higher is better", False: "lower is better", None: ""}[metric.higher_is_better]
    texts = {subject.texts for subject in subjects if name in subject.metrics} if text_metric(name) else set()
    count = f"of {' or '.join(map(str, sorted(texts)))} texts" if texts and texts != {0} else ""
    rows = [
        ForestRow(
            subject.label, its.value, its.low, its.high, _note(subject.changes.get(name), baseline), subject.place
        )
        for subject in subjects
        if (its := subject.metrics.get(name)) is not None
    ]
    return ForestMeasure(
        title, "; ".join(filter(None, (metric.unit, count, meaning, way))), rows, with_zero=name in _WORTH
    )


def _note(change: Change | None, baseline: str | None) -> str:
    if change is None:
        return ""
    difference = in_words(change.value, change.low, change.high, sign="+")
    return f"{difference} against {baseline}, {'clear' if change.is_clear else 'not clear'}"


def verdict(subject: Subject, baseline: Subject | None, level: float) -> str:
    """One sentence on a subject, beside the baseline if there is one to compare it with."""
    clauses = []
    worth = next((name for name in _WORTH if name in subject.metrics), None)
    if worth is not None:
        clauses.append(_worth(worth, subject, baseline))
    for name, short in _LEVELS.items():
        if name in subject.metrics:
            clauses.append(f"{short} {_beside(name, subject, baseline)}")
    texts = text_measures(subject.metrics)
    if baseline is not None and any(name in subject.changes for name in texts):
        clauses.append(f"texts: {_texts(subject, texts, level)}")
    elif texts:
        metric = subject.metrics[texts[0]]
        clauses.append(f"{_short(metric)} of {subject.texts} texts {in_words(metric.value, metric.low, metric.high)}")
    sentence = "; ".join(clauses) or f"{subject.label} has no measure that a sentence could rest on"
    return f"{f'On {subject.on}, ' if subject.on else ''}{sentence}."


def comparison_verdict(subjects: Sequence[Subject], baseline: str, on: str) -> str:
    """One sentence on which subjects differ clearly from the baseline in the measures that matter."""
    known = {name: metric for subject in subjects for name, metric in subject.metrics.items()}
    names = [name for name in _WORTH if name in known][:1] + [name for name in _LEVELS if name in known]
    clauses = []
    for name in names + text_measures(known)[:1]:
        title = _TITLES[name][0] if name in _TITLES else _short(known[name])
        clear = [
            f"{subject.label} {_word(subject, name)}"
            for subject in subjects
            if (change := subject.changes.get(name)) is not None and change.is_clear
        ]
        clauses.append(f"{title}: {', '.join(clear) or 'no clear change'}")
    return f"On {on}, compared with {baseline}. {'; '.join(clauses)}."


def _worth(name: str, subject: Subject, baseline: Subject | None) -> str:
    what, other = _WORTH[name]
    metric = subject.metrics[name]
    if metric.low is None or metric.high is None:
        said = f"is worth {in_words(metric.value, unit=metric.unit)} more than {other}, without an interval"
    elif metric.low > 0:
        said = f"is worth {in_words(metric.value, metric.low, metric.high, metric.unit)} more than {other}"
    elif metric.high < 0:
        said = f"is worth {in_words(-metric.value, -metric.high, -metric.low, metric.unit)} less than {other}"
    else:
        said = f"is not clearly worth more than {other}: {in_words(metric.value, metric.low, metric.high, metric.unit)}"
    if other == "none":
        said += " (another person's was not tried, so it need not be personal)"
    if baseline is not None and name in baseline.metrics:
        theirs = rounded(baseline.metrics[name].value)[0]
        said += f", against {theirs} in {baseline.label} ({_changed(subject, name, rounded(metric.value)[0], theirs)})"
    return f"{subject.label}'s {what} {said}"


def _beside(name: str, subject: Subject, baseline: Subject | None) -> str:
    own = subject.metrics[name]
    if baseline is None or name not in baseline.metrics:
        return in_words(own.value, own.low, own.high)
    figure, theirs = rounded(own.value)[0], rounded(baseline.metrics[name].value)[0]
    return f"{figure} against {theirs} ({_changed(subject, name, figure, theirs)})"


def _changed(subject: Subject, name: str, figure: str, theirs: str) -> str:
    """The change in words; a clear one that the figures do not show is too small to be claimed."""
    said = _word(subject, name)
    return "the same to these digits" if figure == theirs and said.startswith("clearly") else said


def _word(subject: Subject, name: str) -> str:
    change = subject.changes.get(name)
    if change is None:
        return "not tested"
    way = "higher" if change.value > 0 else "lower"
    return f"clearly {way}, by {rounded(abs(change.value))[0]}" if change.is_clear else "no clear change"


def _texts(subject: Subject, names: Sequence[str], level: float) -> str:
    """The texts' measures that changed clearly, corrected for their number, because they all judge the same texts."""
    tested = [name for name in names if name in subject.changes]
    adjusted = holm([subject.changes[name].p_value for name in tested])
    found: dict[str, list[str]] = {"better": [], "worse": []}
    for name, p_value in zip(tested, adjusted, strict=True):
        change, metric = subject.changes[name], subject.metrics[name]
        if change.is_clear and p_value < 1 - level:
            found["better" if (change.value > 0) == metric.higher_is_better else "worse"].append(_short(metric))
    parts = [f"clearly {word} in {', '.join(labels)}" for word, labels in found.items() if labels]
    return f"{'; '.join(parts) or 'no clear change'} ({subject.texts} generated)"


def _short(metric: MetricValue) -> str:
    return metric.label.removesuffix(OWN_HISTORY)


def of_people(what: str, users: int | None, new: int | None) -> str:
    """`what` of so many people; `new` of them were never trained on, which is left out if it is not known."""
    if not users:
        return what
    known = {None: "", users: " never trained on", 0: ", all of them trained on"}
    return f"{what} of {counted(users, 'person', 'people')}{known.get(new, f', {new} of them never trained on')}"


def few_people(users: float) -> list[str]:
    """A warning where figures rest on few people."""
    if users == 1:
        return ["Only 1 person: no intervals and no tests, because one person says nothing about others."]
    hints = f"Below {FEW_PEOPLE}, intervals are too narrow and only large differences are found: take figures as hints."
    return [f"Only {users:.0f} people. {hints}"] if users < FEW_PEOPLE else []


def trainer_metrics(final: Mapping[str, float]) -> dict[str, MetricValue]:
    """The measures of a trainer's last evaluation, without intervals, by the names that an evaluation gives them."""
    known = ((name, kind, final.get(f"eval_{name}")) for name, kind in TOKEN_KINDS.items())
    return {
        name: MetricValue(kind.label, value, unit=kind.unit, higher_is_better=kind.higher_is_better)
        for name, kind, value in known
        if value is not None
    }

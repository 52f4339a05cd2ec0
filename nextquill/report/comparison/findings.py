"""The sentences that follow from a comparison's figures.

Nothing is concluded in advance: each sentence is chosen by figures and carries them. An arm differs from another where
Holm's p-value is below 1 − level and the interval excludes 0; anything else is no clear difference, and not equality.
Both are over users and seeds. One seed tells trained models apart, not methods, and every such sentence says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nextquill.comparison.arms import BASE
from nextquill.report.comparison.figures import Comparison, Difference, Measure

FACTUAL, COUNTERFACTUAL = "nll_factual", "nll_counterfactual"
EFFECT, EFFECT_PLACEBO = "effect_logprob", "effect_placebo"
#: Where the times that were to be equal differ by more than this share, it is said.
TIME_TOLERANCE = 0.1
#: Nats per token by which an effect has to be larger to be worth a warning.
LEAST_EFFECT = 0.01
_IN_WORDS = {"better": "lower than", "worse": "higher than", "unclear": "not clearly different from"}


@dataclass(frozen=True)
class Finding:
    """A heading that says what was found, and the figures it rests on."""

    heading: str
    text: str
    is_warning: bool = False


def find(comparison: Comparison) -> list[Finding]:
    """All findings, in reading order."""
    judged = [measure for measure in comparison.measures.values() if _is_judged(comparison, measure)]
    findings = _one_seed(comparison)
    findings += _against_baseline(comparison, judged)
    findings += _controls(comparison)
    findings += _counterfactual(comparison)
    findings += _unsupported_effects(comparison)
    findings += _times(comparison)
    return [*findings, _reach(comparison)]


def number(value: float) -> str:
    """Three digits after the point with a true minus; more for what would read as 0 and is not."""
    text = f"{value:.3f}"
    if float(text) == 0:
        text = f"{value:.0e}" if value else "0"
    return text.replace("-", "−")


def signed(value: float) -> str:
    """The same with a sign."""
    return f"+{number(value)}" if value > 0 else number(value)


def interval(difference: Difference) -> str:
    """A difference with its interval and p-value."""
    low, high = signed(difference.low), signed(difference.high)
    return f"{signed(difference.value)} [{low}, {high}], {p_text(difference.p_adjusted)}"


def p_text(value: float) -> str:
    """A p-value in three digits."""
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def is_clear(comparison: Comparison, difference: Difference | None) -> bool:
    """Whether a difference is there beyond chance: by its test, and its interval excludes 0."""
    if difference is None or difference.low <= 0 <= difference.high:
        return False
    return difference.p_adjusted < 1 - comparison.level


def _is_judged(comparison: Comparison, measure: Measure) -> bool:
    """Whether a measure was tested and one can say of it which is better."""
    tested = any(measure.name in arm.against.get(comparison.baseline, {}) for arm in comparison.arms)
    return measure.higher_is_better is not None and tested


def _one_seed(comparison: Comparison) -> list[Finding]:
    if len(comparison.seeds) > 1:
        return []
    return [
        Finding(
            "One seed: these trained models are compared, not the methods",
            f"Intervals and tests are over users alone and take the runs of seed {comparison.seeds[0]} as they are. "
            "Two runs of one and the same method, from different seeds, may differ as clearly. Several --seeds tell "
            "what the methods do.",
            is_warning=True,
        )
    ]


def _of_runs(comparison: Comparison) -> str:
    """What a heading that tells arms apart ends in where only their runs can be told apart."""
    return " (these models, one seed)" if len(comparison.seeds) == 1 else ""


def _against_baseline(comparison: Comparison, measures: Sequence[Measure]) -> list[Finding]:
    """One finding for the nll and for each measure with a clear difference, and one for all that have none."""
    baseline = comparison.arm(comparison.baseline).label
    findings, alike = [], []
    for measure in measures:
        found = _differing(comparison, measure)
        if found is None and measure.name != FACTUAL:
            alike.append(measure.short_label)
        else:
            findings.append(
                Finding(
                    found or f"{measure.short_label}: no clear difference from {baseline}",
                    _figures(comparison, measure),
                )
            )
    if alike:
        text = f"{join(alike)}: no arm is clearly better or worse than {baseline}."
        findings.append(Finding("No clear difference in the other measures", text))
    return findings


def _differing(comparison: Comparison, measure: Measure) -> str | None:
    """Which arms are better and which worse than the baseline; None where none is."""
    groups: dict[str, list[str]] = {"better": [], "worse": [], "unclear": []}
    for arm in comparison.arms:
        difference = arm.against.get(comparison.baseline, {}).get(measure.name)
        if difference is not None:
            groups[_verdict(comparison, measure, difference)].append(arm.label)
    parts = [f"{join(groups[word])} {word}" for word in ("better", "worse") if groups[word]]
    baseline = comparison.arm(comparison.baseline).label
    return f"{measure.short_label}: {', '.join(parts)} than {baseline}{_of_runs(comparison)}" if parts else None


def _figures(comparison: Comparison, measure: Measure) -> str:
    baseline = comparison.arm(comparison.baseline)
    unit = f" {measure.unit}" if measure.unit else ""
    named = [
        f"{arm.label} {interval(arm.against[baseline.name][measure.name])}"
        for arm in comparison.arms
        if measure.name in arm.against.get(baseline.name, {})
    ]
    value = number(baseline.estimates[measure.name].value)
    return f"{baseline.label} {value}{unit}; differences from it: {'; '.join(named)}."


def _controls(comparison: Comparison) -> list[Finding]:
    """Whether what beats the baseline also beats SFT as it should be run."""
    measure = comparison.measures.get(FACTUAL)
    controls = [arm for arm in comparison.arms if arm.is_sft and arm.name != comparison.baseline]
    if measure is None or not controls:
        return []
    findings = []
    for arm in comparison.arms:
        first = arm.against.get(comparison.baseline, {}).get(FACTUAL)
        if arm.is_sft or first is None or _verdict(comparison, measure, first) != "better":
            continue
        parts, unbeaten = [], []
        for control in controls:
            difference = arm.against.get(control.name, {}).get(FACTUAL)
            if difference is None:
                continue
            verdict = _verdict(comparison, measure, difference)
            if verdict != "better":
                unbeaten.append(control.label)
            parts.append(f"{_IN_WORDS[verdict]} {control.label}'s: {interval(difference)}")
        if parts:
            rest = f"but not clearly {join(unbeaten)}" if unbeaten else f"and {join([each.label for each in controls])}"
            heading = f"{arm.label} beats {comparison.arm(comparison.baseline).label}, {rest}{_of_runs(comparison)}"
            findings.append(Finding(heading, f"{measure.label} is {'; '.join(parts)}."))
    return findings


def _counterfactual(comparison: Comparison) -> list[Finding]:
    """Where training made the model worse without a history."""
    risen = []
    for arm in comparison.arms:
        difference = arm.against.get(BASE, {}).get(COUNTERFACTUAL)
        if difference is not None and _has_risen(comparison, difference):
            before = comparison.arm(BASE).estimates[COUNTERFACTUAL].value
            risen.append(
                f"{arm.label} {before:.2f} → {arm.estimates[COUNTERFACTUAL].value:.2f} ({_of_these(difference)})"
            )
    if not risen:
        return []
    return [
        Finding(
            "Without a history the model got worse than it was before training",
            f"Nll without history, nats per token: {'; '.join(risen)}. Effects against no history overstate what the "
            "history does for these; read those against another user's history.",
            is_warning=True,
        )
    ]


def _unsupported_effects(comparison: Comparison) -> list[Finding]:
    """Where the history seems to do more than under the baseline, and another user's history says it does not."""
    named = []
    for arm in comparison.arms:
        against = arm.against.get(comparison.baseline, {})
        effect, placebo = against.get(EFFECT), against.get(EFFECT_PLACEBO)
        if effect is None or placebo is None:
            continue
        if effect.value >= LEAST_EFFECT and _has_risen(comparison, effect) and not _has_risen(comparison, placebo):
            named.append(
                f"{arm.label}: {_of_these(effect)} against no history, {_of_these(placebo)} against another user's"
            )
    if not named:
        return []
    baseline = comparison.arm(comparison.baseline).label
    return [
        Finding(
            "A larger effect of the history that the placebo does not support",
            f"Effect, compared with {baseline}'s, nats per token: {'; '.join(named)}. What another user's history does "
            "not confirm comes from the pass without history, not from the use of the user's own.",
            is_warning=True,
        )
    ]


def _has_risen(comparison: Comparison, difference: Difference) -> bool:
    """Whether it did in these very runs: what is wrong with them must be said, whatever other seeds would give."""
    return difference.value > 0 and difference.p_runs < 1 - comparison.level


def _of_these(difference: Difference) -> str:
    return f"{signed(difference.value)}, {p_text(difference.p_runs)} over users"


def _times(comparison: Comparison) -> list[Finding]:
    """Whether the times that were to be equal are."""
    off = []
    for arm in comparison.arms:
        wanted = None if arm.cost is None else arm.cost.reference_seconds
        if arm.cost is not None and wanted and abs(arm.cost.seconds / wanted - 1) > TIME_TOLERANCE:
            off.append(f"{arm.label} trained for {arm.cost.seconds:.3g} s, its reference for {wanted:.3g} s")
    if not off:
        return []
    text = f"{'; '.join(off)}. Something else ran on the machine, or the runs are so short that starting up counts."
    return [Finding("The times that were to be equal are not", text, is_warning=True)]


def _reach(comparison: Comparison) -> Finding:
    seeds, users = len(comparison.seeds), comparison.num_users
    least = min(1.0, 2.0 ** (1 - users) * (len(comparison.arms) - 2))
    few = (
        f" With {users} of them no test could give less than p = {least:.2g}, so nothing could have been clear."
        if least >= 1 - comparison.level and len(comparison.arms) > 2
        else ""
    )
    records = f"{comparison.num_examples} records of {users} {'user' if users == 1 else 'users'}"
    if seeds == 1:
        draws = f"One seed ({comparison.seeds[0]}): intervals and tests are over users alone"
    else:
        draws = f"Seeds {', '.join(map(str, comparison.seeds))}: intervals and tests are over users and seeds"
    return Finding(
        "How far it reaches",
        f"{draws}. {records}, {comparison.num_train_examples} trained on.{few} All arms began from the same weights "
        "and saw the same examples in the same order; none but the learning rates and steps named was "
        "tuned. That a difference is not clear does not mean that there is none.",
    )


def _verdict(comparison: Comparison, measure: Measure, difference: Difference) -> str:
    if not is_clear(comparison, difference):
        return "unclear"
    return "better" if (difference.value > 0) == measure.higher_is_better else "worse"


def join(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"

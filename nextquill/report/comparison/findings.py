"""The sentences that follow from a comparison's figures.

The figures choose each sentence, and the sentence carries them. An arm differs clearly from another if Holm's p-value
is below 1 - level and the interval excludes 0. Anything else is not a clear difference, which does not mean that the
arms are equal. Both tests are over users and seeds. One seed tells trained models apart, not methods, and every such
sentence says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nextquill.comparison.arms import BASE
from nextquill.report.comparison.figures import Comparison, Difference, Measure
from nextquill.report.numbers import counted, in_words, p_text, rounded

FACTUAL, COUNTERFACTUAL = "nll_factual", "nll_counterfactual"
EFFECT, EFFECT_PLACEBO = "effect_logprob", "effect_placebo"
#: Times that should be equal and differ by more than this share are a finding.
TIME_TOLERANCE = 0.1
#: A warning needs an effect that is larger by at least this, in nats per token.
LEAST_EFFECT = 0.01
_IN_WORDS = {"better": "lower than", "worse": "higher than", "unclear": "not clearly different from"}


@dataclass(frozen=True)
class Finding:
    """What was found, as a heading, and the figures behind it."""

    heading: str
    text: str
    is_warning: bool = False


def find(comparison: Comparison) -> list[Finding]:
    """All findings, in reading order."""
    return [
        *_one_seed(comparison),
        *_against_baseline(comparison),
        *_controls(comparison),
        *_counterfactual(comparison),
        *_unsupported_effects(comparison),
        *_times(comparison),
        _reach(comparison),
    ]


def _one_seed(comparison: Comparison) -> list[Finding]:
    text = (
        f"Intervals and tests are over users alone and take the runs of seed {comparison.seeds[0]} as they are. Two "
        "runs of the same method from different seeds may differ as clearly. Several --seeds compare the methods."
    )
    heading = "One seed: these trained models are compared, not the methods"
    return [Finding(heading, text, is_warning=True)] if len(comparison.seeds) == 1 else []


def _of_runs(comparison: Comparison) -> str:
    """The end of a heading about a difference that holds for these runs only."""
    return " (these models, one seed)" if len(comparison.seeds) == 1 else ""


def _against_baseline(comparison: Comparison) -> list[Finding]:
    """One finding for the nll and for each measure with a clear difference, and one for all that have none."""
    baseline = comparison.arm(comparison.baseline).label
    findings, alike = [], []
    for measure in comparison.measures.values():
        tested = comparison.differences(measure.name)
        if measure.higher_is_better is None or not tested:
            continue
        groups: dict[str, list[str]] = {"better": [], "worse": [], "unclear": []}
        for arm, difference in tested:
            groups[_verdict(comparison, measure, difference)].append(arm.label)
        parts = [f"{join(groups[word])} {word}" for word in ("better", "worse") if groups[word]]
        if not parts and measure.name != FACTUAL:
            alike.append(measure.short_label)
            continue
        differs = f"{', '.join(parts)} than {baseline}{_of_runs(comparison)}"
        found = differs if parts else f"no clear difference from {baseline}"
        findings.append(Finding(f"{measure.short_label}: {found}", _figures(comparison, measure)))
    if alike:
        text = f"{join(alike)}: no arm is clearly better or worse than {baseline}."
        findings.append(Finding("No clear difference in the other measures", text))
    return findings


def _figures(comparison: Comparison, measure: Measure) -> str:
    baseline = comparison.arm(comparison.baseline)
    named = [f"{arm.label} {_in_full(difference)}" for arm, difference in comparison.differences(measure.name)]
    value = in_words(baseline.estimates[measure.name].value, unit=measure.unit)
    return f"{baseline.label} {value}; differences from it: {'; '.join(named)}."


def _controls(comparison: Comparison) -> list[Finding]:
    """Whether an arm that beats the baseline also beats the other forms of SFT."""
    controls = [arm for arm in comparison.arms if arm.is_sft and arm.name != comparison.baseline]
    measure, findings = comparison.measures[FACTUAL], []
    for arm, difference in comparison.differences(FACTUAL):
        tested = [each for each in controls if FACTUAL in arm.against.get(each.name, {})]
        found = [(each.label, arm.against[each.name][FACTUAL]) for each in tested]
        if arm.is_sft or not found or _verdict(comparison, measure, difference) != "better":
            continue
        verdicts = {label: _verdict(comparison, measure, each) for label, each in found}
        unbeaten = [label for label, verdict in verdicts.items() if verdict != "better"]
        rest = f"but not clearly {join(unbeaten)}" if unbeaten else f"and {join(list(verdicts))}"
        heading = f"{arm.label} beats {comparison.arm(comparison.baseline).label}, {rest}{_of_runs(comparison)}"
        parts = [f"{_IN_WORDS[verdicts[label]]} {label}'s: {_in_full(each)}" for label, each in found]
        findings.append(Finding(heading, f"{measure.label} is {'; '.join(parts)}."))
    return findings


def _counterfactual(comparison: Comparison) -> list[Finding]:
    """Names the arms whose training made the model worse without a history."""
    base = comparison.arm(BASE).estimates
    risen = [
        f"{arm.label} {base[COUNTERFACTUAL].value:.2f} → {arm.estimates[COUNTERFACTUAL].value:.2f} ({_of_these(found)})"
        for arm, found in comparison.differences(COUNTERFACTUAL, BASE)
        if _has_risen(comparison, found)
    ]
    text = (
        f"Nll without history, nats per token: {'; '.join(risen)}. For these arms, effects against no history "
        "overstate what the history does; read the effects against another user's history."
    )
    return _warning("Without a history the model got worse than it was before training", text, risen)


def _unsupported_effects(comparison: Comparison) -> list[Finding]:
    """Names the arms whose larger effect of the history is not confirmed by the placebo."""
    placebos = {arm.name: difference for arm, difference in comparison.differences(EFFECT_PLACEBO)}
    named = [
        f"{arm.label}: {_of_these(effect)} against no history, {_of_these(placebos[arm.name])} against another user's"
        for arm, effect in comparison.differences(EFFECT)
        if arm.name in placebos and effect.value >= LEAST_EFFECT
        if _has_risen(comparison, effect) and not _has_risen(comparison, placebos[arm.name])
    ]
    text = (
        f"Effect, compared with {comparison.arm(comparison.baseline).label}'s, nats per token: {'; '.join(named)}. The "
        "part that another user's history does not confirm comes from the pass without history, not from the user's "
        "own history."
    )
    return _warning("A larger effect of the history that the placebo does not support", text, named)


def _has_risen(comparison: Comparison, difference: Difference) -> bool:
    """Whether a value has risen in these runs: a warning about them does not wait for other seeds to agree."""
    return difference.value > 0 and difference.p_runs < 1 - comparison.level


def _of_these(difference: Difference) -> str:
    return f"{rounded(difference.value, sign='+')[0]}, {p_text(difference.p_runs)} over users"


def _times(comparison: Comparison) -> list[Finding]:
    """Names the arms whose training time should equal another's and does not."""
    off = [
        f"{arm.label} trained for {arm.cost.seconds:.3g} s, its reference for {wanted:.3g} s"
        for arm in comparison.arms
        if arm.cost is not None and (wanted := arm.cost.reference_seconds)
        if abs(arm.cost.seconds / wanted - 1) > TIME_TOLERANCE
    ]
    text = f"{'; '.join(off)}. Something else ran on the machine, or the runs are so short that starting up counts."
    return _warning("The times that should be equal are not", text, off)


def _reach(comparison: Comparison) -> Finding:
    seeds, users = len(comparison.seeds), comparison.num_users
    least = min(1.0, 2.0 ** (1 - users) * (len(comparison.arms) - 2))
    few = (
        f" With {users} users no test could give less than p = {least:.2g}, so no difference could have been clear."
        if least >= 1 - comparison.level and len(comparison.arms) > 2
        else ""
    )
    records = f"{counted(comparison.num_examples, 'record')} of {counted(users, 'user')}"
    if seeds == 1:
        draws = f"One seed ({comparison.seeds[0]}): intervals and tests are over users alone"
    else:
        draws = f"Seeds {', '.join(map(str, comparison.seeds))}: intervals and tests are over users and seeds"
    return Finding(
        "How far it reaches",
        f"{draws}. {records}, {comparison.num_train_examples} trained on.{few} All arms started from the same weights "
        "and saw the same examples in the same order. Nothing was tuned but the learning rates and steps named. A "
        "difference that is not clear does not mean that there is none.",
    )


def _warning(heading: str, text: str, named: Sequence[str]) -> list[Finding]:
    """A warning about the named arms; none without them."""
    return [Finding(heading, text, is_warning=True)] if named else []


def _in_full(difference: Difference) -> str:
    """A difference with its interval and p-value."""
    return f"{in_words(difference.value, difference.low, difference.high, sign='+')}, {p_text(difference.p_adjusted)}"


def _verdict(comparison: Comparison, measure: Measure, difference: Difference) -> str:
    if not difference.is_clear(comparison.level):
        return "unclear"
    return "better" if (difference.value > 0) == measure.higher_is_better else "worse"


def join(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"

"""The sentences that follow from a run's figures.

Every claim is decided here by comparing figures; nothing is concluded in advance. One context is called better than
another only if it is so in every seed *and* the interval of their difference over all users leaves out 0; anything else
is "no clear difference".
"""

from __future__ import annotations

from collections.abc import Sequence

from demos.popi.measuring import BEFORE, NONE, PLACEBO, SIGNALS, SUMMARY, TRUTH, UNUSED, PopiFigures, Share
from demos.popi.recipe import PopiRecipe
from nextquill.evaluation.bootstrap import PairedResult
from nextquill.report.comparison.findings import Finding, join

BETTER, WORSE, UNCLEAR = "better", "worse", "unclear"
#: The base's generator is taken to read summaries where it judges so many pairs rightly by the true preferences.
READS = 0.8


def verdict(own: Sequence[float], other: Sequence[float], difference: PairedResult) -> str:
    """`better`, `worse` or `unclear`: a difference counts if it has one sign in every seed and excludes 0."""
    way = 1 if difference.difference > 0 else -1
    if not difference.excludes_zero or any(way * (a - b) <= 0 for a, b in zip(own, other, strict=True)):
        return UNCLEAR
    return BETTER if way > 0 else WORSE


def find(measured: PopiFigures, recipe: PopiRecipe) -> tuple[Finding, ...]:
    """All findings of a run, in reading order. A generator that reads no summary leaves only that to be said."""
    if recipe.quick:
        return (Finding("This run compares nothing", "It is the quick run, a smoke test of the machinery."),)
    truth = min(measured.contexts[TRUTH].accuracy.by_seed)
    if truth < READS:
        text = (
            f"Given the true preferences, it judges {truth:.2f} of the pairs rightly in its worst seed. What summaries "
            "are worth cannot be told from a generator that does not follow them. Try another seed."
        )
        return (Finding("The generator did not learn to read summaries, so this run compares nothing", text), _scope())
    return (_stated(measured), _told(measured), _raw(measured), _lost(measured), _scope())


def _stated(measured: PopiFigures) -> Finding:
    before, after, other = (measured.stated[name] for name in (BEFORE, SUMMARY, PLACEBO))
    heading = {
        BETTER: "Training on preferences alone makes summaries state what the user prefers",
        WORSE: "After training, summaries state less of what the user prefers",
        UNCLEAR: "Summaries state no clearly different share of the preferences after training",
    }[verdict(after.by_seed, before.by_seed, measured.stated_gain)]
    text = (
        f"Share of an unseen user's two hidden preferences that the summary states: {shown(before)} before, "
        f"{shown(after)} after; by seed {_each(before.by_seed)} before and {_each(after.by_seed)} after. "
        f"Another user's summary states {shown(other)}. No training data of this phase hold a summary."
    )
    return Finding(heading, text)


def _told(measured: PopiFigures) -> Finding:
    verdicts = {name: _verdict(measured, name) for name in (NONE, PLACEBO, BEFORE)}
    ahead = [name for name, found in verdicts.items() if found == BETTER]
    if len(ahead) == len(verdicts):
        heading = "A summary tells the generator what the user would choose, and another user's does not"
    elif ahead:
        heading = f"A summary is ahead of {join(ahead)} only"
    else:
        heading = "A summary is clearly ahead of nothing else that costs as little"
    others = "; ".join(f"with {name} {_right(measured, name)} ({_difference(measured, name)})" for name in verdicts)
    text = f"Pairs judged rightly with the user's summary: {_right(measured, SUMMARY)}; {others}."
    return Finding(heading, text)


def _raw(measured: PopiFigures) -> Finding:
    summary, raw = measured.contexts[SUMMARY], measured.contexts[SIGNALS]
    heading = {
        BETTER: "With summaries more pairs are judged rightly than with raw signals",
        WORSE: "With raw signals more pairs are judged rightly than with summaries",
        UNCLEAR: "Raw signals are not clearly better or worse than summaries",
    }[_verdict(measured, SIGNALS)]
    ratio = raw.context_tokens / summary.context_tokens if summary.context_tokens else 0.0
    cost = f": {ratio:.0f} times as many" if ratio else ""
    if ratio > 1:
        heading += f", and the signals take {ratio:.0f} times the tokens"
    text = (
        f"A generator trained on the raw signals, on as many users and pairs, judges "
        f"{_right(measured, SIGNALS)} rightly ({_difference(measured, SIGNALS)}); POPI's own, which was trained on "
        f"summaries alone, {_right(measured, UNUSED)} when given the signals. They add {raw.context_tokens:.0f} tokens "
        f"to a prompt, the summary {summary.context_tokens:.0f}{cost}."
    )
    return Finding(heading, text)


def _lost(measured: PopiFigures) -> Finding:
    heading = {
        WORSE: "Better summaries would bring more: the generator follows the true preferences when it reads them",
        BETTER: "Summaries serve better than the true preferences in the same words",
        UNCLEAR: "There is no clear room for better summaries",
    }[_verdict(measured, TRUTH)]
    text = (
        f"Given the true preferences in a summary's words, the same generator judges "
        f"{_right(measured, TRUTH)} of the pairs rightly ({_difference(measured, TRUTH)})."
    )
    return Finding(heading, text)


def _scope() -> Finding:
    return Finding(
        "What this does not show",
        "The base model was made for this demo: it can write bland summaries, fitting ones and ones of what the user "
        "turned down, and training has to find out which pays. That is a choice among things it can already say, in "
        "words made for it. Nothing here says how well summaries of real people do.",
    )


def shown(share: Share) -> str:
    """`0.87 [0.83, 0.90]`."""
    return f"{share.value:.2f} [{share.low:.2f}, {share.high:.2f}]"


def _right(measured: PopiFigures, name: str) -> str:
    return shown(measured.contexts[name].accuracy)


def _verdict(measured: PopiFigures, name: str) -> str:
    own, other = measured.contexts[SUMMARY].accuracy.by_seed, measured.contexts[name].accuracy.by_seed
    return verdict(own, other, measured.summary_minus[name])


def _difference(measured: PopiFigures, name: str) -> str:
    found = measured.summary_minus[name]
    clear = "" if _verdict(measured, name) != UNCLEAR else ", no clear difference"
    return f"the summary's lead {found.difference:+.2f} [{found.low:+.2f}, {found.high:+.2f}]{clear}"


def _each(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)

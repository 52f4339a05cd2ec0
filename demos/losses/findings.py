"""The sentences that follow from a run's figures.

Every claim is decided here by comparing figures; nothing is concluded in advance. A method is called lower (or higher)
than another only if it is so by more than 5% in *every* seed; anything else is "no clear difference". If the published
form does not harm its counterfactual in some run, or SFT wins everywhere, these sentences say so.
"""

from __future__ import annotations

from collections.abc import Sequence

from demos.losses.measuring import BASE, LossRun, RowTable
from demos.losses.recipe import LossRecipe
from demos.losses.training import ANCHORED, CAUSAL, DETACHED, OFFICIAL, SFT, SFT_FAST
from nextquill.report.comparison.findings import Finding, join

MARGIN = 0.05
# Generic tokens are the same for every user: the history's true effect on them is 0. This much, in nats, is not noise.
FALSE_EFFECT = 0.1
_IN_WORDS = {"lower": "better", "higher": "worse", "unclear": "not clearly different"}


def compare(values: Sequence[float], reference: Sequence[float]) -> str:
    """`lower`, `higher` or `unclear`: a difference counts if it is more than 5% and has one sign in every seed."""
    pairs = list(zip(values, reference, strict=True))
    if all(value < (1 - MARGIN) * other for value, other in pairs):
        return "lower"
    if all(value > (1 + MARGIN) * other for value, other in pairs):
        return "higher"
    return "unclear"


def find(table: RowTable, recipe: LossRecipe, runs: Sequence[LossRun]) -> tuple[Finding, ...]:
    """All findings of a run, in reading order. A base that cannot read histories leaves only that to be said."""
    if any(run.reading_accuracy < recipe.reading_target for run in runs):
        return (_unread(recipe, runs), _scope(recipe))
    return (
        _sooner(table, recipe),
        _price(table, recipe),
        _counterfactual(table, recipe),
        _better_tuned_sft(table, recipe),
        _scope(recipe),
    )


def _unread(recipe: LossRecipe, runs: Sequence[LossRun]) -> Finding:
    reached = min(run.reading_accuracy for run in runs)
    advice = "This is the quick run, a smoke test of the machinery." if recipe.quick else "Try another seed."
    return Finding(
        "The base did not learn to read histories, so this run compares nothing",
        f"Its accuracy on personal tokens of dev users reached {reached:.2f}; the recipe asks for "
        f"{recipe.reading_target}. {advice}",
    )


def _against_sft(table: RowTable, metric: str, step: int) -> tuple[dict[str, list[str]], str]:
    """The causal losses by how they compare with SFT, each as `name figure`; and the same as half a sentence."""
    groups: dict[str, list[str]] = {"lower": [], "higher": [], "unclear": []}
    for method in CAUSAL:
        verdict = compare(table.values(method, step, metric), table.values(SFT, step, metric))
        groups[verdict].append(f"{method} {table.spread(method, step, metric).mean:.3f}")
    words = {"lower": "lower with", "higher": "higher with", "unclear": "no clear difference for"}
    causal = "; ".join(f"{words[verdict]} {join(names)}" for verdict, names in groups.items() if names)
    return groups, f"{table.spread(SFT, step, metric).mean:.3f} with SFT, {causal}."


def _sooner(table: RowTable, recipe: LossRecipe) -> Finding:
    groups, figures = _against_sft(table, "personal_nll", recipe.steps)
    if len(groups["lower"]) == len(CAUSAL):
        found = "the causal losses move personal tokens sooner"
    elif groups["lower"]:
        found = "some of the causal losses move personal tokens sooner"
    else:
        found = "no causal loss moves personal tokens sooner in this run"
    text = (
        f"Nll of personal tokens under the user's own history: {table.spread(BASE, 0, 'personal_nll').mean:.2f} before "
        f"phase C; after {recipe.steps} steps {figures} Learning rate {recipe.learning_rate:g} for all of these."
    )
    return Finding(f"At equal steps and learning rate, {found}", text)


def _price(table: RowTable, recipe: LossRecipe) -> Finding:
    groups, figures = _against_sft(table, "generic_nll", recipe.steps)
    if len(groups["higher"]) == len(CAUSAL):
        heading = "They pay for it with generic tokens"
    elif groups["higher"]:
        heading = "Some of them pay with generic tokens"
    else:
        heading = "Generic tokens are not clearly worse with any of them"
    text = f"Nll of generic tokens (template and facts of the new items) after {recipe.steps} steps: {figures}"
    return Finding(heading, text)


def _counterfactual(table: RowTable, recipe: LossRecipe) -> Finding:
    step = recipe.long_steps
    is_ruined = {
        method: all(value > FALSE_EFFECT for value in table.values(method, step, "generic_effect"))
        for method in (OFFICIAL, DETACHED, ANCHORED)
    }
    heading = {
        (True, False): "The published second term ruins its own counterfactual; the detached form does not",
        (True, True): "Both the published and the detached form ruin their counterfactual in this run",
        (False, True): "The detached form ruins its counterfactual in this run, the published one does not",
        (False, False): f"No clear harm to the counterfactual after {step} steps in this run",
    }[is_ruined[OFFICIAL], is_ruined[DETACHED]]
    methods = (SFT, *is_ruined)
    first, last = ([_signed(table, each, at, "generic_effect") for each in methods] for at in (recipe.steps, step))
    effects = join([f"{method} {a} → {b}" for method, a, b in zip(methods, first, last, strict=True)])
    scores = join([f"{table.spread(method, step, 'f1').mean:.2f} for {method}" for method in methods])
    text = (
        "A history has no true effect on generic tokens. Measured as the nll that removing it adds to them, in nats "
        f"after {recipe.steps} → {step} steps: {effects}. With another user's history in place of none it is "
        f"{_signed(table, OFFICIAL, step, 'generic_effect_placebo')} for {OFFICIAL} after {step}. "
        f"F1 of effect > 0.05 against the true personal tokens after {step} steps: {scores}."
    )
    if is_ruined[OFFICIAL] and is_ruined[ANCHORED]:
        text += " Anchoring does not prevent it."
    return Finding(heading, text)


def _signed(table: RowTable, method: str, step: int, metric: str) -> str:
    """A mean with two digits and a sign, a true minus, and no minus before zero."""
    rounded = round(table.spread(method, step, metric).mean, 2)
    return "0.00" if rounded == 0 else f"{rounded:+.2f}".replace("-", "−")


def _better_tuned_sft(table: RowTable, recipe: LossRecipe) -> Finding:
    step, metrics = recipe.steps, ("personal_nll", "generic_nll")
    best = min(CAUSAL, key=lambda method: table.spread(method, step, "personal_nll").mean)
    on_personal, on_generic = (
        compare(table.values(SFT_FAST, step, metric), table.values(best, step, metric)) for metric in metrics
    )
    heading = {
        "lower": "What it does not show: that SFT could not do the same. A better-tuned SFT does",
        "unclear": "What it does not show: that SFT could not do the same. A better-tuned SFT matches them",
        "higher": "SFT at twice the learning rate does not match them on personal tokens in this run",
    }[on_personal]
    fast, causal = (
        "/".join(f"{table.spread(method, step, metric).mean:.3f}" for metric in metrics) for method in (SFT_FAST, best)
    )
    text = (
        f"SFT at learning rate {2 * recipe.learning_rate:g} reaches {fast} (personal/generic nll) after {step} steps; "
        f"the causal loss with the lowest personal nll, {best}, {causal} at {recipe.learning_rate:g}. "
        f"That SFT is {_IN_WORDS[on_personal]} on personal tokens and {_IN_WORDS[on_generic]} on generic ones."
    )
    return Finding(heading, text)


def _scope(recipe: LossRecipe) -> Finding:
    seeds = ", ".join(map(str, recipe.seed_values))
    if recipe.seeds == 1:
        draws = f"One seed ({seeds}) is one draw: another may rank the losses differently."
    else:
        draws = f"Seeds {seeds}, all of them shown; {recipe.seeds} draws are few."
    return Finding(
        "How far it reaches",
        f"{draws} A model of 250 thousand parameters on an artificial world: a picture of what the losses do, no "
        "evidence about large models. Each loss was run at one learning rate, SFT at two.",
    )


def timing_note(table: RowTable, recipe: LossRecipe) -> str:
    """Cost of a step as a multiple of SFT's. The only sentence that differs between two runs of a seed."""
    parts = [f"{method} {table.spread(method, recipe.long_steps, 'time_vs_sft').mean:.2f}×" for method in CAUSAL]
    milliseconds = 1000 * table.spread(SFT, recipe.long_steps, "seconds_per_step").mean
    return (
        f"A step of SFT took {milliseconds:.0f} ms; as multiples of it on the same batches: {join(parts)}. "
        "At this size the passes through the model are most of a step and the loss is little of it."
    )

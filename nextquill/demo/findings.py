"""The sentences that follow from a run's figures.

Every claim is decided here by comparing figures; nothing is concluded in advance. A method is called lower (or higher)
than another only if it is so by more than 5% in *every* seed; anything else is "no clear difference". If the published
form does not harm its counterfactual in some run, or SFT wins everywhere, these sentences say so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nextquill.demo.recipe import Recipe
from nextquill.demo.results import BASE, Finding, RowTable, SeedRun

SFT, SFT_FAST = "SFT", "SFT, 2× LR"
OFFICIAL, DETACHED, ANCHORED = "NextQuill (official)", "NextQuill (detached)", "NextQuill (anchored)"
CAUSAL = ("PerCE", OFFICIAL, DETACHED, ANCHORED)

MARGIN = 0.05
# Generic tokens are the same for every user: the history's true effect on them is 0. This much, in nats, is not noise.
FALSE_EFFECT = 0.1


@dataclass(frozen=True)
class Verdicts:
    """The causal losses by how they compare with a reference, each as `name figure`."""

    lower: list[str]
    higher: list[str]
    unclear: list[str]

    def sentence(self) -> str:
        groups = (("lower with", self.lower), ("higher with", self.higher), ("no clear difference for", self.unclear))
        return "; ".join(f"{word} {join(names)}" for word, names in groups if names)


def compare(values: Sequence[float], reference: Sequence[float]) -> str:
    """`lower`, `higher` or `unclear`: a difference counts if it is more than 5% and has one sign in every seed."""
    pairs = list(zip(values, reference, strict=True))
    if all(value < (1 - MARGIN) * other for value, other in pairs):
        return "lower"
    if all(value > (1 + MARGIN) * other for value, other in pairs):
        return "higher"
    return "unclear"


def verdicts(table: RowTable, metric: str, step: int, reference: str = SFT) -> Verdicts:
    """Sort the causal losses by how they compare with `reference` in one metric at one checkpoint."""
    groups: dict[str, list[str]] = {"lower": [], "higher": [], "unclear": []}
    base = table.values(reference, step, metric)
    for method in CAUSAL:
        verdict = compare(table.values(method, step, metric), base)
        groups[verdict].append(f"{method} {table.spread(method, step, metric).mean:.3f}")
    return Verdicts(**groups)


def join(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def find(table: RowTable, recipe: Recipe, seed_runs: Sequence[SeedRun]) -> tuple[Finding, ...]:
    """All findings of a run, in reading order. A base that cannot read histories leaves only that to be said."""
    if any(run.reading_accuracy < recipe.reading_target for run in seed_runs):
        return (_unread(recipe, seed_runs), _scope(recipe))
    return (
        _sooner(table, recipe),
        _price(table, recipe),
        _counterfactual(table, recipe),
        _better_tuned_sft(table, recipe),
        _scope(recipe),
    )


def _unread(recipe: Recipe, seed_runs: Sequence[SeedRun]) -> Finding:
    reached = min(run.reading_accuracy for run in seed_runs)
    return Finding(
        "The base did not learn to read histories, so this run compares nothing",
        f"Its accuracy on personal tokens of dev users reached {reached:.2f}; the recipe asks for "
        f"{recipe.reading_target}. "
        + ("This is the quick run, a smoke test of the machinery." if recipe.quick else "Try another seed."),
    )


def _sooner(table: RowTable, recipe: Recipe) -> Finding:
    groups = verdicts(table, "personal_nll", recipe.steps, SFT)
    if len(groups.lower) == len(CAUSAL):
        heading = "At equal steps and learning rate, the causal losses move personal tokens sooner"
    elif groups.lower:
        heading = "At equal steps and learning rate, some of the causal losses move personal tokens sooner"
    else:
        heading = "At equal steps and learning rate, no causal loss moves personal tokens sooner in this run"
    base = table.spread(BASE, 0, "personal_nll").mean
    sft = table.spread(SFT, recipe.steps, "personal_nll").mean
    text = (
        f"Nll of personal tokens under the user's own history: {base:.2f} before phase C; after {recipe.steps} steps "
        f"{sft:.3f} with SFT, {groups.sentence()}. Learning rate {recipe.learning_rate:g} for all of these."
    )
    return Finding(heading, text)


def _price(table: RowTable, recipe: Recipe) -> Finding:
    groups = verdicts(table, "generic_nll", recipe.steps, SFT)
    if len(groups.higher) == len(CAUSAL):
        heading = "They pay for it with generic tokens"
    elif groups.higher:
        heading = "Some of them pay with generic tokens"
    else:
        heading = "Generic tokens are not clearly worse with any of them"
    sft = table.spread(SFT, recipe.steps, "generic_nll").mean
    text = (
        f"Nll of generic tokens (template and facts of the new items) after {recipe.steps} steps: {sft:.3f} with SFT, "
        f"{groups.sentence()}."
    )
    return Finding(heading, text)


def _counterfactual(table: RowTable, recipe: Recipe) -> Finding:
    step = recipe.long_steps
    is_ruined = {method: _has_false_effect(table, method, step) for method in (OFFICIAL, DETACHED, ANCHORED)}
    if is_ruined[OFFICIAL] and not is_ruined[DETACHED]:
        heading = "The published second term ruins its own counterfactual; the detached form does not"
    elif is_ruined[OFFICIAL]:
        heading = "Both the published and the detached form ruin their counterfactual in this run"
    elif is_ruined[DETACHED]:
        heading = "The detached form ruins its counterfactual in this run, the published one does not"
    else:
        heading = f"No clear harm to the counterfactual after {step} steps in this run"
    effects = join([_false_effects(table, recipe, method) for method in (SFT, OFFICIAL, DETACHED, ANCHORED)])
    scores = join([f"{table.spread(method, step, 'f1').mean:.2f} for {method}" for method in (SFT, *is_ruined)])
    text = (
        "A history has no true effect on generic tokens. Measured as the nll that removing it adds to them, in nats "
        f"after {recipe.steps} → {step} steps: {effects}. With another user's history in place of none it is "
        f"{_signed(table.spread(OFFICIAL, step, 'generic_effect_placebo').mean)} for {OFFICIAL} after {step}. "
        f"F1 of effect > 0.05 against the true personal tokens after {step} steps: {scores}."
    )
    if is_ruined[OFFICIAL] and is_ruined[ANCHORED]:
        text += " Anchoring does not prevent it."
    return Finding(heading, text)


def _has_false_effect(table: RowTable, method: str, step: int) -> bool:
    return all(value > FALSE_EFFECT for value in table.values(method, step, "generic_effect"))


def _false_effects(table: RowTable, recipe: Recipe, method: str) -> str:
    first, last = (table.spread(method, step, "generic_effect").mean for step in (recipe.steps, recipe.long_steps))
    return f"{method} {_signed(first)} → {_signed(last)}"


def _signed(value: float) -> str:
    """Two digits with a sign, a true minus, and no minus before zero."""
    rounded = round(value, 2)
    return "0.00" if rounded == 0 else f"{rounded:+.2f}".replace("-", "−")


def _better_tuned_sft(table: RowTable, recipe: Recipe) -> Finding:
    step = recipe.steps
    best = min(CAUSAL, key=lambda method: table.spread(method, step, "personal_nll").mean)
    on_personal = compare(table.values(SFT_FAST, step, "personal_nll"), table.values(best, step, "personal_nll"))
    on_generic = compare(table.values(SFT_FAST, step, "generic_nll"), table.values(best, step, "generic_nll"))
    if on_personal == "lower":
        heading = "What it does not show: that SFT could not do the same. A better-tuned SFT does"
    elif on_personal == "unclear":
        heading = "What it does not show: that SFT could not do the same. A better-tuned SFT matches them"
    else:
        heading = "SFT at twice the learning rate does not match them on personal tokens in this run"
    fast, causal = (
        "/".join(f"{table.spread(method, step, metric).mean:.3f}" for metric in ("personal_nll", "generic_nll"))
        for method in (SFT_FAST, best)
    )
    text = (
        f"SFT at learning rate {2 * recipe.learning_rate:g} reaches {fast} (personal/generic nll) after {step} steps; "
        f"the causal loss with the lowest personal nll, {best}, {causal} at {recipe.learning_rate:g}. "
        f"That SFT is {_in_words(on_personal)} on personal tokens and {_in_words(on_generic)} on generic ones."
    )
    return Finding(heading, text)


def _in_words(verdict: str) -> str:
    return {"lower": "better", "higher": "worse", "unclear": "not clearly different"}[verdict]


def _scope(recipe: Recipe) -> Finding:
    seeds = list(recipe.seed_values)
    if len(seeds) == 1:
        draws = f"One seed ({seeds[0]}) is one draw: another may rank the losses differently."
    else:
        named = ", ".join(map(str, seeds))
        draws = f"Seeds {named}, all of them shown; {len(seeds)} draws are few."
    return Finding(
        "How far it reaches",
        f"{draws} A model of 250 thousand parameters on an artificial world: a picture of what the losses do, no "
        "evidence about large models. Each loss was run at one learning rate, SFT at two.",
    )


def timing_note(table: RowTable, recipe: Recipe) -> str:
    """Cost of a step as a multiple of SFT's. The only sentence that differs between two runs of a seed."""
    parts = [f"{method} {table.spread(method, recipe.long_steps, 'time_vs_sft').mean:.2f}×" for method in CAUSAL]
    milliseconds = 1000 * table.spread(SFT, recipe.long_steps, "seconds_per_step").mean
    return (
        f"A step of SFT took {milliseconds:.0f} ms; as multiples of it on the same batches: {join(parts)}. "
        "At this size the passes through the model are most of a step and the loss is little of it."
    )

"""The page of some runs, side by side: a verdict, the measures that matter, chosen examples, curves, all measures.

runs = [read_run(folder) for folder in folders]
write_whole(Path("report.html"), render_page(runs_page(runs)))
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

from nextquill.errors import ArgumentError
from nextquill.evaluation.bootstrap import PairedResult
from nextquill.evaluation.measures import NEW_USERS
from nextquill.evaluation.results import is_number, unlike_settings
from nextquill.report.data import Charts, Page, Panel, ResponseView, Series
from nextquill.report.examples import MIX, example_views
from nextquill.report.headline import (
    FEW_PEOPLE,
    Change,
    Subject,
    few_people,
    forest,
    of_people,
    trainer_metrics,
    verdict,
)
from nextquill.report.numbers import counted
from nextquill.report.run_tables import Pairing, evaluated, generated, level_of, measures_tables, same_records
from nextquill.report.runs import Run

DEFAULT_EXAMPLES = 9
# Heading, unit or meaning and which way is good, the trainer's name for it, and whether it is a distance from 0.
_PANELS = (
    ("Loss", "the training objective", "loss", False),
    ("nll with the user's history", "nats per token, lower is better", "nll_factual", False),
    ("nll without history", "nats per token; should not rise", "nll_counterfactual", False),
    ("Effect against the placebo", "nll under another user's history − own, higher is better", "effect_placebo", True),
    ("Share of tokens above the threshold", "of the effect in probability", "share_above_threshold", True),
    ("Accuracy", "share of pairs in which the user's choice is preferred", "preference_accuracy", False),
    ("Margin", "nats, chosen − rejected, against the reference", "preference_margin", True),
    ("Learning rate", "as scheduled", "learning_rate", True),
)
_READING = {
    "An effect is the model's own": (
        "A token's effect is the difference of two probabilities of one model: with the user's history in the prompt "
        "and without it. It shows how the model uses the history, not why the user wrote the token, and it is only as "
        "good as the model."
    ),
    "The placebo": (
        "Any history changes a prompt. The same response under another user's history shows how large an effect any "
        "history would have had; the rest is due to this user's. A model whose nll without history rises in training "
        "shows large effects that are no gain. Then only the effect against the placebo can be trusted."
    ),
    "An interval is about users": (
        "Users are drawn again and again, with replacement, and the measure is computed for each draw; the interval "
        "holds that share of the results. It shows what other users like these might have given. It does not cover "
        "another training seed, and with few users it is too narrow. n is the number of examples behind a figure."
    ),
    "A dot before a figure": (
        "Among the measures, the best run is marked only if its paired difference to every other run is clear: its "
        "interval excludes 0, and its p-value, from exchanging the two runs within users, is below 0.05 at a level of "
        "95%. Among the differences, the clear ones are marked, and clearly worse ones say so. Only the verdict on "
        "texts is corrected for the number of its measures: at 95%, one in twenty others would be marked by chance."
    ),
    "An item's effect": (
        "It is the effect of leaving out one item of the history while all others stay. Two items that say the same "
        "each seem to matter little, and the items' effects do not add up to the effect of the history."
    ),
}


def runs_page(
    runs: Sequence[Run],
    *,
    title: str | None = None,
    baseline: Run | None = None,
    examples: int = DEFAULT_EXAMPLES,
    indices: Sequence[int] | None = None,
) -> Page:
    """The results of some runs, on one page.

    Args:
        runs: at least one, with labels of their own.
        title: the page's title; the runs' labels by default.
        baseline: the run that the others are compared with; the first evaluated one by default.
        examples: the number of examples to show of each set of records.
        indices: these examples instead.

    Raises:
        ArgumentError: there are no runs, the baseline is not one of them, `examples` is negative, or no run has an
            index.
        RecordError: a file of an evaluation is damaged.
    """
    if not runs:
        raise ArgumentError("runs: expected at least one, got none")
    if baseline is not None and baseline not in runs:
        raise ArgumentError(f"baseline: expected one of {', '.join(run.label for run in runs)}, got {baseline.label}")
    if examples < 0:
        raise ArgumentError(f"examples: expected 0 or more, got {examples}")
    measured = evaluated(runs)
    baseline = baseline or (measured[0] if len(measured) > 1 else None)
    pairing = Pairing(baseline)
    subjects = _subjects(runs, baseline, pairing)
    views = example_views(runs, examples, indices)
    return Page(
        title=title or f"nextquill: {', '.join(run.label for run in runs)}",
        lead=_lead(runs),
        verdict=_verdicts(measured, baseline, subjects),
        notices=[
            *few_people(
                min((run.metrics["users"].value for run in measured if "users" in run.metrics), default=math.inf)
            ),
            *_few_writers(measured),
            *_mixed_records(measured, baseline),
            *_other_settings(measured, baseline),
            *(f"{', '.join(names)}: {text}." for text, names in _missing(runs).items()),
        ],
        measures=forest(list(subjects.values()), baseline.label if baseline is not None else None),
        measures_lead=_measures_lead(measured),
        charts=training_charts(runs),
        folded=measures_tables(runs, baseline, pairing),
        responses=views,
        responses_lead=_examples_lead(views, measured, indices) if views else "",
        reading=tuple(_READING.items()),
        footer="; ".join(_source(run) for run in runs),
    )


def _subjects(runs: Sequence[Run], baseline: Run | None, pairing: Pairing) -> dict[str, Subject]:
    """The evaluated runs by label, or, if there are none, the trainers' own measures."""
    measured = evaluated(runs)
    found = {}
    for place, run in enumerate(runs):
        if run.evaluation is not None:
            changes = pairing(run, baseline) if baseline is not None and run is not baseline else {}
            tested = {name: _change(result, level_of(run)) for name, result in changes.items()}
            found[run.label] = Subject(run.label, run.metrics, tested, _on(run), generated(run), place)
        elif not measured and run.final:
            found[run.label] = Subject(run.label, trainer_metrics(run.final), place=place)
    return found


def _change(result: PairedResult, level: float) -> Change:
    return Change(result.difference, result.low, result.high, result.p_value, result.is_clear(level))


def _on(run: Run) -> str:
    assert run.evaluation is not None
    users, new = (int(run.metrics[name].value) if name in run.metrics else None for name in ("users", NEW_USERS))
    return of_people(counted(run.evaluation.num_examples, "pair" if run.is_popi else "response"), users, new)


def _verdicts(measured: Sequence[Run], baseline: Run | None, subjects: Mapping[str, Subject]) -> list[str]:
    """A sentence on each run but the baseline, which the others are compared with."""
    if not measured:
        ends = [verdict(subject, None, 0.95) for subject in subjects.values()]
        return [
            "No run has been evaluated, so there is no verdict.",
            *(f"At the end of training: {end}" for end in ends),
        ]
    said, on = list[str](), ""
    for run in measured:
        if run is baseline and len(measured) > 1:
            continue
        subject = subjects[run.label]
        if said and on == subject.on:
            subject = dataclasses.replace(subject, on="")
        on = subjects[run.label].on
        against = baseline if baseline is not None and same_records(run, baseline) and not run.is_popi else None
        said.append(verdict(subject, subjects[against.label] if against else None, level_of(run)))
    return said


def _measures_lead(measured: Sequence[Run]) -> str:
    levels = " and ".join(f"{100 * level:g}%" for level in sorted({level_of(run) for run in measured}))
    swapped = any(run.evaluation and run.evaluation.template.get("counterfactual") == "placebo" for run in measured)
    none = " None: another person's history, which these prompts put in its place." if swapped else ""
    return f"Dots with {levels} intervals over people.{none}" if measured else "Without intervals, by the trainers."


def _other_settings(measured: Sequence[Run], baseline: Run | None) -> list[str]:
    """Names the settings of prompts and generation that differ from the baseline's and add to differences."""
    if baseline is None or baseline.evaluation is None:
        return []
    return [
        f"{run.label} was evaluated otherwise than {baseline.label}, which adds to differences: {unlike}."
        for run in measured
        if run.evaluation is not None and same_records(run, baseline)
        if (unlike := unlike_settings(run.evaluation, baseline.evaluation))
    ]


def _missing(runs: Sequence[Run]) -> dict[str, list[str]]:
    """The things that runs lack, and the names of the runs that lack each."""
    found: dict[str, list[str]] = {}
    for run in runs:
        for text in run.missing:
            found.setdefault(text, []).append(run.label)
    return found


def _few_writers(measured: Sequence[Run]) -> list[str]:
    """Warns where texts were generated for few of many people, whom the warning of few people does not cover."""
    said = []
    for run in measured:
        people = len({example.user_id for example in run.examples if "factual" in example.generated})
        if 0 < people < FEW_PEOPLE <= len({example.user_id for example in run.examples}):
            said.append(
                f"{run.label}: texts of only {people} people, so the intervals of their measures are too narrow."
            )
    return said


def training_charts(runs: Sequence[Run]) -> Charts | None:
    """The curves of all runs that have any; None if no run has."""
    trained = [(place, run) for place, run in enumerate(runs) if run.training is not None]
    panels = [
        Panel(title, hint, series, with_zero=with_zero)
        for title, hint, name, with_zero in _PANELS
        if (series := [each for place, run in trained for each in _series(run, name, place, alone=len(trained) == 1)])
    ]
    if not panels:
        return None
    has_dots = any(series.dots for panel in panels for series in panel.series)
    dots = ", dots evaluations on the records of --eval_file" if has_dots else ""
    return Charts(
        panels,
        "steps",
        [(run.label, place) for place, run in trained],
        f"Lines are means over the training batches since the last log{dots}. "
        "Losses of different objectives are not comparable; NLLs are.",
    )


def _series(run: Run, name: str, place: int, *, alone: bool) -> Iterator[Series]:
    """The curves of a quantity in training and in its evaluations, as far as they were logged."""
    # POPI's evaluations leave out the first word.
    for key, what in ((name, "training"), (f"eval_{name.removeprefix('preference_')}", "evaluation")):
        log = run.training.log if run.training is not None else ()
        # If a step has several entries, as after a resume, the last one counts.
        points = {entry["step"]: entry[key] for entry in log if is_number(entry.get(key))}
        if len(points) > 1:  # one point is not a curve
            x, label, is_eval = sorted(points), what if alone else f"{run.label}, {what}", what == "evaluation"
            yield Series(label, x, [points[step] for step in x], dashed=is_eval, colour=place, dots=is_eval)


def _lead(runs: Sequence[Run]) -> str:
    trained = sum(run.training is not None for run in runs)
    measured = len(evaluated(runs))
    return f"{counted(len(runs), 'run')}, {trained} with a training log, {measured} evaluated."


def _mixed_records(measured: Sequence[Run], baseline: Run | None) -> list[str]:
    if baseline is None:
        return []
    if baseline.evaluation is None:
        return [f"{baseline.label} has no evaluation, so nothing is compared with it."]
    others = ", ".join(run.label for run in measured if not same_records(run, baseline))
    text = "figures stand side by side, but no difference can be tested."
    return [f"{others}: evaluated on other records than {baseline.label}; {text}"] if others else []


def _examples_lead(views: Sequence[ResponseView], measured: Sequence[Run], indices: Sequence[int] | None) -> str:
    how = "as asked for" if indices is not None else f"chosen by their mean effect in the first run: {MIX}"
    return (
        f"{len(views)} examples, {how}. A blue token was more likely with the user's history than without, an orange, "
        "dotted one less. Hover, tap or use Tab and the arrow keys for the probabilities."
        f"{_generation_note(views, measured)}"
    )


def _generation_note(views: Sequence[ResponseView], measured: Sequence[Run]) -> str:
    """The limit of generated texts, because a text that was cut off does not show it."""
    bounds = {run.evaluation.settings.get("max_new_tokens") for run in measured if run.evaluation is not None}
    known = sorted(bound for bound in bounds if isinstance(bound, int))
    if not known or all(len(view.texts) < 2 for view in views):
        return ""
    return f" Generated texts end at {' or '.join(map(str, known))} tokens, finished or not."


def _source(run: Run) -> str:
    if run.evaluation is None:
        return f"{run.label}: {run.folder}"
    return f"{run.label}: {run.folder}, model {run.evaluation.model}, records {run.evaluation.records}"

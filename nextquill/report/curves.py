"""The curves of trainings: a panel for each quantity, a colour for each run."""

from __future__ import annotations

from collections.abc import Sequence

from nextquill.report.data import Charts, Panel, Series
from nextquill.report.runs import Run, Training

_EVAL = "eval_"
# Heading, unit or meaning and which way is good, and the trainer's name for it.
_PANELS = (
    ("Loss", "the training objective", "loss"),
    ("nll with the user's history", "nats per token, lower is better", "nll_factual"),
    ("nll without history", "nats per token; should not rise", "nll_counterfactual"),
    ("Effect against the placebo", "nll under another user's history − own, higher is better", "effect_placebo"),
    ("Share of tokens above the threshold", "of the effect in probability", "share_above_threshold"),
    ("Learning rate", "as scheduled", "learning_rate"),
)
# Effects and rates are read as distances from 0.
_FROM_ZERO = ("effect_placebo", "share_above_threshold", "learning_rate")


def training_charts(runs: Sequence[Run]) -> Charts | None:
    """The curves of all runs that have any; None if no run has."""
    trained = [(place, run) for place, run in enumerate(runs) if run.training is not None]
    panels = [
        Panel(title, hint, series, with_zero=name in _FROM_ZERO)
        for title, hint, name in _PANELS
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


def _series(run: Run, name: str, place: int, *, alone: bool) -> list[Series]:
    assert run.training is not None
    label = "" if alone else f"{run.label}, "
    found = []
    for key, what in ((name, "training"), (_EVAL + name, "evaluation")):
        x, y = _points(run.training, key)
        if y:
            found.append(
                Series(f"{label}{what}", x, y, dashed=what != "training", colour=place, dots=what != "training")
            )
    return found


def _points(training: Training, key: str) -> tuple[list[float], list[float]]:
    """Steps and values; if a step has several entries, as after a resume, the last one counts."""
    points = {
        float(entry["step"]): float(entry[key]) for entry in training.log if isinstance(entry.get(key), (int, float))
    }
    return list(map(float, sorted(points))), [points[step] for step in sorted(points)]

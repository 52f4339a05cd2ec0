"""How often a model prefers what the user preferred."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nextquill.errors import ArgumentError
from nextquill.evaluation.metrics.scores import Floats, MetricScores


def preference_accuracy(chosen: Sequence[float] | Floats, rejected: Sequence[float] | Floats) -> MetricScores:
    """The share of pairs whose chosen response scores above the rejected one; a tie counts half.

    Args:
        chosen, rejected: the model's score of each pair's two responses, such as log-probabilities in nats; −inf is
            allowed.

    Raises:
        ArgumentError: there are no pairs, different numbers of both, or a score is not a number.
    """
    better, worse = np.asarray(chosen, dtype=np.float64), np.asarray(rejected, dtype=np.float64)
    if better.shape != worse.shape or better.ndim != 1 or not len(better):
        raise ArgumentError(
            f"rejected: expected a score for each of chosen, and at least one, got shapes {list(better.shape)} "
            f"and {list(worse.shape)}"
        )
    for name, scores in (("chosen", better), ("rejected", worse)):
        bad = np.flatnonzero(np.isnan(scores))
        if len(bad):
            raise ArgumentError(f"{name}[{bad[0]}]: expected a score, got nan")
    return MetricScores.mean_of((better > worse) + 0.5 * (better == worse), "preference_accuracy")

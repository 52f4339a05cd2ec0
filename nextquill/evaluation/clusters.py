"""Examples of one user belong together: their statistics added up by user, which is what is resampled and exchanged.

Two texts of one user are more alike than texts of two users. An interval that draws examples one by one takes them for
independent and comes out too narrow; one that draws whole users does not.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nextquill.errors import ArgumentError, ArgumentTypeError
from nextquill.evaluation.metrics.scores import Floats, MetricScores

Scores = MetricScores | Sequence[float] | Floats


def as_scores(name: str, scores: Scores) -> MetricScores:
    """The scores as statistics; plain numbers are averaged.

    Raises:
        ArgumentError: there are none, or a number is not finite.
    """
    return scores if isinstance(scores, MetricScores) else MetricScores.mean_of(scores, name)


def cluster_sums(statistics: Floats, groups: Sequence[str] | None) -> Floats:
    """[examples, columns] -> [clusters, columns], rows of one group added up; without groups each row is its own.

    Clusters stand in the order of their names, so that the order of the examples changes nothing.

    Raises:
        ArgumentTypeError: a group is not a string.
        ArgumentError: there are not as many groups as examples.
    """
    if groups is None:
        return statistics
    if len(groups) != len(statistics):
        raise ArgumentError(f"groups: expected {len(statistics)}, one for each example, got {len(groups)}")
    bad = next((i for i, group in enumerate(groups) if not isinstance(group, str)), None)
    if bad is not None:
        raise ArgumentTypeError(f"groups[{bad}]: expected a string, got {groups[bad]!r}")
    order = {group: k for k, group in enumerate(sorted(set(groups)))}
    sums = np.zeros((len(order), statistics.shape[1]))
    np.add.at(sums, [order[group] for group in groups], statistics)
    return sums

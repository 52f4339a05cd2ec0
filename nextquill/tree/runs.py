"""A row of trees as runs, for layers that carry a state from token to token.

    rows    a b c d | e | f g        a to d are shared; e and f g branch off
    runs    0 [a b c d] from nothing        1 [e e, f g] from the state after run 0

A shared segment gets a run of its own if it is long enough. Its final state is where the runs below it start. A shorter
one is computed again in each branch: a layer that works in chunks takes as long for a few tokens as for a whole chunk.
Branches of similar length run side by side, padded on the right, where nothing reads their final state.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import torch
from torch import Tensor

from nextquill.devices import send
from nextquill.tree.segments import TreeLayout

#: Tokens in a chunk of most layers with a state.
CHUNK = 64
#: Layers take another path for one token after a state, which updates the state in place.
_FEWEST = 2


class StateRun(NamedTuple):
    """Sequences of rows that a layer computes in one call.

    Attributes:
        rows: int64 [B, L] on the device; a shorter sequence repeats its last row.
        origins: for each sequence, the run whose final state it starts from, or -1. Empty if all start from nothing.
        is_origin: whether later runs start from its final state; it has one sequence then, without padding.
    """

    rows: Tensor
    origins: tuple[int, ...]
    is_origin: bool


class StateRuns(NamedTuple):
    """A row of trees as runs.

    Attributes:
        steps: the runs, each after those that it starts from.
        places: int64 [T] on the device, where each row is among the flattened rows of all runs.
    """

    steps: tuple[StateRun, ...]
    places: Tensor


def state_runs(layout: TreeLayout, shared: int, device: torch.device) -> StateRuns:
    """Return the runs of a layout, made once for all layers.

    Args:
        shared: tokens in the shortest shared run that gets a state of its own; at least 2.
    """
    key = ("runs", shared, device)
    if key not in layout.plans:
        layout.plans[key] = _runs(layout.segments.tolist(), max(shared, _FEWEST), device)
    found: StateRuns = layout.plans[key]
    return found


def _runs(segments: list[list[int]], shared: int, device: torch.device) -> StateRuns:
    steps, branches = list[StateRun](), defaultdict[int, list[tuple[int, list[int]]]](list)
    # By segment: the run that its children start from, and the rows between.
    below: dict[int, tuple[int, list[int]]] = {-1: (-1, [])}
    for index, (start, stop, end, _, parent) in enumerate(segments):
        origin, before = below[parent]
        rows = [*before, *range(start, stop)]
        if end == stop:
            branches[((len(rows) - 1) // CHUNK).bit_length()].append((origin, rows))
        elif len(rows) < shared:
            below[index] = origin, rows
        else:
            below[index] = len(steps), []
            steps.append(_run([(origin, rows)], is_origin=True))
    steps += [_run(group, is_origin=False) for group in branches.values()]
    places = _places(torch.cat([step.rows.flatten() for step in steps]))
    return StateRuns(tuple(step._replace(rows=send(step.rows, device)) for step in steps), send(places, device))


def _run(sequences: list[tuple[int, list[int]]], *, is_origin: bool) -> StateRun:
    length = max(_FEWEST, *(len(rows) for _, rows in sequences))
    padded = [rows + rows[-1:] * (length - len(rows)) for _, rows in sequences]
    origins = tuple(origin for origin, _ in sequences)
    return StateRun(torch.tensor(padded), origins if max(origins) >= 0 else (), is_origin)


def _places(flat: Tensor) -> Tensor:
    """Where each row comes first in `flat`."""
    order = flat.argsort(stable=True)
    return order[torch.searchsorted(flat[order], torch.arange(int(flat.max()) + 1))]

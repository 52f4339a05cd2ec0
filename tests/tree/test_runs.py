"""Runs of rows: every row is computed once after exactly its own path, and long shared beginnings once for all."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nextquill.tree import TreeLayout, build_prefix_tree
from nextquill.tree.runs import CHUNK, StateRuns, state_runs
from tests.tree.strategies import branch_lists
from tests.tree.trees import SMALL, prefixes

CPU = torch.device("cpu")


def runs_of(branches: list[list[int]], shared: int) -> StateRuns:
    return state_runs(TreeLayout.of_tree(build_prefix_tree(branches)), shared, CPU)


def computed_after(runs: StateRuns, tokens: list[int]) -> list[tuple[int, ...]]:
    """The path [tokens] after which each flattened row of the runs is computed, itself included."""
    paths, after = list[tuple[int, ...]](), list[tuple[int, ...]]()
    for run in runs.steps:
        for place, rows in enumerate(run.rows.tolist()):
            origin = run.origins[place] if run.origins else -1
            before = after[origin] if origin >= 0 else ()
            own = [tokens[row] for row in rows]
            paths += [(*before, *own[: n + 1]) for n in range(len(own))]
        if run.is_origin:
            after.append(paths[-1])
    return paths


def assert_each_row_follows_its_path(branches: list[list[int]], shared: int) -> None:
    tree, runs = build_prefix_tree(branches), runs_of(branches, shared)
    paths = computed_after(runs, tree.input_ids.tolist())
    assert sorted(paths[place] for place in runs.places.tolist()) == prefixes(branches)
    flat = torch.cat([run.rows.flatten() for run in runs.steps])
    assert flat[runs.places].tolist() == list(range(len(tree)))


@settings(deadline=None, max_examples=60)
@given(branch_lists(), st.sampled_from([0, 2, 3, 5, CHUNK]))
def test_each_row_follows_its_own_path(branches: list[list[int]], shared: int) -> None:
    assert_each_row_follows_its_path(branches, shared)


@pytest.mark.parametrize("shared", [0, 3, CHUNK])
def test_every_shape_at_once(shared: int) -> None:
    assert_each_row_follows_its_path(SMALL, shared)


def test_runs_that_others_start_from_have_no_padding() -> None:
    """Padding would change their final state. One token alone would take a path that writes the state in place."""
    runs = runs_of(SMALL, 0)
    origins = [run for run in runs.steps if run.is_origin]
    assert len(origins) >= 2
    for run in origins:
        assert run.rows.shape[0] == 1
        assert run.rows.shape[1] == len(set(run.rows.flatten().tolist())) >= 2
    assert all(run.rows.shape[1] >= 2 for run in runs.steps)


def test_a_long_shared_beginning_is_computed_once() -> None:
    history = list(range(1000, 1000 + 2 * CHUNK))
    runs = runs_of([[*history, query, query + 1] for query in range(8)], CHUNK)
    first, second = runs.steps
    assert first.rows.shape == (1, 2 * CHUNK)
    assert second.rows.shape == (8, 2)
    assert second.origins == (0,) * 8


def test_a_short_shared_beginning_is_computed_in_each_branch() -> None:
    branches = [[1, 2, 3, query] for query in range(10, 18)]
    (run,) = runs_of(branches, CHUNK).steps
    assert run.rows.shape == (8, 4)
    assert not run.origins


def test_branches_of_other_lengths_do_not_pad_each_other() -> None:
    """At most twice the tokens, or one chunk."""
    lengths = [1, 5, CHUNK, CHUNK + 1, 3 * CHUNK, 9 * CHUNK]
    runs = runs_of([[1000 + place] * length for place, length in enumerate(lengths)], CHUNK)
    widths = sorted(run.rows.shape for run in runs.steps)
    assert widths == [(1, CHUNK + 1), (1, 3 * CHUNK), (1, 9 * CHUNK), (3, CHUNK)]


def test_runs_are_made_once_for_each_layout() -> None:
    layout = TreeLayout.of_tree(build_prefix_tree(SMALL))
    assert state_runs(layout, CHUNK, CPU) is state_runs(layout, CHUNK, CPU)
    assert state_runs(layout, 2, CPU) is not state_runs(layout, CHUNK, CPU)

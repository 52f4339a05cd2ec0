"""Several processes make the runs of one comparison: each holds the run that it makes, and they share the folder.

A hold ends with its process, so no run is left to a process that has ended.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from nextquill.comparison.folder import held_run
from nextquill.comparison.running import PlannedRun, Setup, can_begin, planned_runs, recorded
from nextquill.errors import OutputExistsError
from nextquill.storage.locks import LOCK_FILE, held


@contextmanager
def next_run(setup: Setup, runs: Sequence[PlannedRun]) -> Iterator[PlannedRun | None]:
    """Hold the first of the runs that is not finished, can begin, and that no other process holds; None without one."""
    with ExitStack() as stack:
        yield next((planned for planned in runs if _is_claimed(setup, planned, stack)), None)


def _is_claimed(setup: Setup, planned: PlannedRun, stack: ExitStack) -> bool:
    """Hold a run until the stack ends, and return whether that is possible and of use."""
    if not can_begin(setup, planned):
        return False
    with ExitStack() as hold:
        try:
            hold.enter_context(held_run(setup.folder, planned.name, planned.seed))
        except OutputExistsError:
            return False
        if recorded(setup, planned) is not None:  # another process has just finished it
            return False
        stack.enter_context(hold.pop_all())
    return True


def check_shared(setup: Setup) -> None:
    """Refuse a folder in which this process does not see what the first one does, which has begun.

    OutputExistsError unless the first one is seen to hold the folder, or all runs are finished.
    """
    if not _is_held(setup.folder) and any(recorded(setup, planned) is None for planned in planned_runs(setup)):
        raise OutputExistsError(
            f"folder: expected a folder that all processes see, on a file system with locks, got {setup.folder}"
        )


def _is_held(folder: Path) -> bool:
    """Whether another process holds a comparison's folder."""
    try:
        with held(folder / LOCK_FILE, folder):
            return False
    except OutputExistsError:
        return True
    except FileNotFoundError:
        return False

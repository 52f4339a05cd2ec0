"""Progress of a run in phases: a bar for each phase, or the caller's own callback."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

#: Takes the phase, the steps done, and the most steps.
Progress = Callable[[str, int, int], None]


@contextmanager
def phase_bars(progress: Progress | None, quiet: bool) -> Iterator[Progress]:
    """The caller's callback, or a tqdm bar for each phase, which draws nothing if stderr is not a terminal."""
    if progress is not None or quiet:
        yield progress or (lambda what, done, at_most: None)
        return
    from tqdm import tqdm

    bar: Any = None
    current = ""

    def report(what: str, done: int, at_most: int) -> None:
        nonlocal bar, current
        if what != current:
            if bar is not None:
                bar.close()
            bar, current = tqdm(total=at_most, desc=what, leave=False, disable=None), what
        bar.update(done - bar.n)

    try:
        yield report
    finally:
        if bar is not None:
            bar.close()

"""Progress of a run in phases: a bar for each phase, or the caller's own callback."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

#: Takes the phase, the steps done, and the most steps.
Progress = Callable[[str, int, int], None]


@contextmanager
def phase_bars(progress: Progress | None) -> Iterator[Progress]:
    """The caller's callback, or a tqdm bar for each phase, which draws nothing if stderr is not a terminal."""
    if progress is not None:
        yield progress
        return
    from tqdm import tqdm

    with ExitStack() as opened:
        bars: dict[str, Any] = {}

        def report(what: str, done: int, at_most: int) -> None:
            if what not in bars:
                opened.close()
                bars[what] = opened.enter_context(tqdm(total=at_most, desc=what, leave=False, disable=None))
            bars[what].update(done - bars[what].n)

        yield report

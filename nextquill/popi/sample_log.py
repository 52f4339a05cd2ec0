"""Every summary that training samples, a line each: what the model says of people, to be read while it learns."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from nextquill.storage.atomic_files import write_whole

SAMPLES_FILE = "sampled_summaries.jsonl"


class SampleLog:
    """`sampled_summaries.jsonl` of a run; each further process of a run has a file of its own beside it.

    Args:
        folder: the run's.
        rank: of this process.
        processes: how many there are.
    """

    def __init__(self, folder: Path, rank: int = 0, processes: int = 1) -> None:
        self._folder, self._rank, self._processes = folder, rank, processes
        self.path = folder / _name(rank)

    def append(self, lines: Iterable[Mapping[str, object]]) -> None:
        """Add lines, each with its `step`."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)

    def restart(self, step: int) -> None:
        """Leave the lines of the steps before this one: a resumed run makes the others again."""
        paths = [self.path]
        if self._rank == 0:  # also of processes that there are no more
            known = {_name(rank) for rank in range(self._processes)}
            paths += [path for path in self._folder.glob(_name("*")) if path.name not in known]
        for path in paths:
            if path.is_file():
                # Not by `splitlines`: a summary may hold what else ends a line, and JSON leaves it as it is.
                lines = [line for line in path.read_text(encoding="utf-8").split("\n") if _step_of(line) < step]
                write_whole(path, "".join(f"{line}\n" for line in lines))


def _name(rank: int | str) -> str:
    stem, suffix = Path(SAMPLES_FILE).stem, Path(SAMPLES_FILE).suffix
    return SAMPLES_FILE if rank == 0 else f"{stem}.rank{rank}{suffix}"


def _step_of(line: str) -> float:
    """The step of a line; a line that was cut short is of the last."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")

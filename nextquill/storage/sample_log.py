"""The log of the texts that a training samples: JSON lines, cut to its checkpoint when the run resumes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from nextquill.storage import checkpoints
from nextquill.storage.atomic_files import write_whole
from nextquill.storage.json_files import json_object, line_fields


class SampleLog:
    """A file in a run's folder. Each process except rank 0 has its own file beside it.

    Args:
        folder: the run's folder.
        name: the file's name, such as `sampled_summaries.jsonl`.
        rank, processes: this process's number, and the number of all.
    """

    def __init__(self, folder: Path, name: str, rank: int = 0, processes: int = 1) -> None:
        self._folder, self._name, self._rank, self._processes = folder, Path(name), rank, processes
        self.path = folder / self._of_rank(rank)

    def append(self, lines: Iterable[Mapping[str, object]]) -> None:
        """Add lines, each with its `step`."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)

    def resume(self, checkpoint: Path | None) -> None:
        """Cut the file to the steps of the checkpoint that the run resumes from; a new run's is empty."""
        state = {} if checkpoint is None else json_object(checkpoint / checkpoints.STATE_FILE)
        self.restart(int(state.get("global_step", 0)))

    def restart(self, step: int) -> None:
        """Keep only the lines of the steps before this one, as a resumed run writes the others again."""
        paths = [self.path]
        if self._rank == 0:  # also the files of processes that this run no longer has
            known = {self._of_rank(rank) for rank in range(self._processes)}
            paths += [path for path in self._folder.glob(self._of_rank("*")) if path.name not in known]
        for path in paths:
            if path.is_file():
                # Not `splitlines`: JSON leaves other line breaks as they are, and a text may hold some.
                lines = path.read_text(encoding="utf-8").split("\n")
                kept = [line for line in lines if line_fields(line).get("step", math.inf) < step]
                write_whole(path, "".join(f"{line}\n" for line in kept))

    def _of_rank(self, rank: int | str) -> str:
        return self._name.name if rank == 0 else f"{self._name.stem}.rank{rank}{self._name.suffix}"

"""Several processes work through one list of items; one that ends early is replaced without losing results.

All workers get the same list, divided into blocks of items that belong together. A worker claims a block by creating a
file, so that no two take the same. It writes a line before and after each item to a file of its own. The worker that
replaces it reads that file: it reports the item that was running as failed, and goes on with the items that are left.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

#: Exit code of a worker whose device can no longer be used.
POISONED = 86
#: A worker that ends without any progress so often in a row is not replaced again.
_TRIES = 2
_POLL = 0.1

Record = dict[str, Any]


class Share:
    """One worker's share of the items.

    Args:
        folder: a folder that all workers of one list use, and nothing else.
        worker: the worker's number. The worker that replaces another one has its number.
    """

    def __init__(self, folder: Path, worker: int) -> None:
        self._folder, self._path = folder, folder / f"worker-{worker}.jsonl"

    def items(self, blocks: Sequence[Sequence[str]]) -> Iterator[str]:
        """Names of the items to do now: those left over in own blocks first, then those of newly claimed blocks."""
        lines = read_lines(self._path)
        seen = {line["start"] for line in lines if "start" in line} | {line["name"] for line in lines if "name" in line}
        for block in [line["claim"] for line in lines if "claim" in line]:
            yield from (name for name in blocks[block] if name not in seen)
        for block, names in enumerate(blocks):
            if self._claim(block):
                yield from names

    def interrupted(self) -> list[str]:
        """Names of items that were started and never finished: they ended this worker's last process."""
        lines = read_lines(self._path)
        done = {line["name"] for line in lines if "name" in line}
        return [line["start"] for line in lines if "start" in line and line["start"] not in done]

    def start(self, name: str) -> None:
        """Note that an item is about to run."""
        self._write({"start": name})

    def finish(self, name: str, row: Record) -> None:
        """Note an item's result."""
        self._write({"name": name, "row": row})

    def end(self) -> None:
        """Note that the worker did everything it could."""
        self._write({"end": True})

    def _claim(self, block: int) -> bool:
        try:
            os.close(os.open(self._folder / f"block-{block}", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        self._write({"claim": block})
        return True

    def _write(self, line: Record) -> None:
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")


def read_lines(path: Path) -> list[Record]:
    """The complete lines of a worker's file."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line[-1] == "\n"]


def rows_of(folder: Path) -> dict[str, Record]:
    """The results of all workers so far, by name."""
    lines = [line for path in sorted(folder.glob("worker-*.jsonl")) for line in read_lines(path)]
    return {line["name"]: line["row"] for line in lines if "name" in line}


def work(
    command: Callable[[int], Sequence[str]],
    workers: int,
    folder: Path,
    seconds: float,
    progress: Callable[[dict[str, Record]], None],
    **options: Any,
) -> list[str]:
    """Run workers until the list is done or the time is up, and replace those that end early.

    Args:
        command: the command of a worker, by its number.
        workers: their number.
        folder: an empty folder for their files; `folder/worker-N.log` gets what worker N prints.
        seconds: all processes are killed after this time.
        progress: called with all results so far, whenever there are more.
        options: more arguments of `subprocess.Popen`.

    Returns:
        What went wrong with the workers themselves, in words.
    """
    deadline, known = time.monotonic() + seconds, -1
    running = {number: _start(command(number), folder, number, options) for number in range(workers)}
    fruitless, problems = dict.fromkeys(running, 0), list[str]()
    lengths = dict.fromkeys(running, 0)
    try:
        while running:
            time.sleep(_POLL)
            late = time.monotonic() > deadline
            for number, process in list(running.items()):
                if process.poll() is None and not late:
                    continue
                _kill(process)
                del running[number]
                lines = read_lines(folder / f"worker-{number}.jsonl")
                if any("end" in line for line in lines) or late:
                    continue
                fruitless[number] = fruitless[number] + 1 if len(lines) == lengths[number] else 0
                lengths[number] = len(lines)
                if fruitless[number] < _TRIES:
                    running[number] = _start(command(number), folder, number, options)
                else:
                    problems.append(f"worker {number} ended with {process.returncode} and could not be replaced")
            found = rows_of(folder)
            if len(found) > known:
                known = len(found)
                progress(found)
            if late:
                problems.append(f"stopped after {seconds:.0f} s")
    finally:
        for process in running.values():
            _kill(process)
    return problems


def _start(command: Sequence[str], folder: Path, number: int, options: dict[str, Any]) -> subprocess.Popen[bytes]:
    with (folder / f"worker-{number}.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, **options)


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()

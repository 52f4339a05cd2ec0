"""Kills commands at every change of a file, one after the other, as a power cut or an impatient user may.

A command runs in a process forked from one that has the libraries. There an audit hook counts what changes below the
command's folder: files opened for writing, and names that are made, moved or removed. At the chosen one the process
kills itself before the change is made. What other languages write (safetensors, torch's archives) is not seen, but the
renames around it are.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.processes import PRELOADED, run_command

_CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_COUNT = "changes"
_DATE = re.compile(rb"\d{4}-\d\d-\d\dT[\d:.+]+")


class Ended(NamedTuple):
    """How a command ended, and how often it changed a file."""

    code: int
    err: str
    changes: int


def changes_until_killed(words: Sequence[str], folder: str, streams: Sequence[str], at: int) -> None:
    """Run a command that kills itself before its change number `at`; 0 lets it end and writes the number of changes."""
    seen, below = 0, os.path.realpath(folder) + os.sep

    def hook(event: str, given: tuple[Any, ...]) -> None:
        nonlocal seen
        if event == "open":
            if not (isinstance(given[2], int) and given[2] & _WRITES):
                return
        elif event not in _CHANGES:
            return
        if not any(_path(each).startswith(below) for each in given[:2]):
            return
        seen += 1
        if seen == at:
            os.kill(os.getpid(), signal.SIGKILL)

    os.chdir(folder)
    sys.addaudithook(hook)
    try:
        run_command(list(words), folder, *streams)
    finally:
        Path(streams[0]).with_name(_COUNT).write_text(str(seen))


def _path(given: object) -> str:
    if isinstance(given, (str, bytes, os.PathLike)):
        return os.path.abspath(os.fsdecode(given))
    return ""


class Kills:
    """Runs commands in copies of a folder.

    Args:
        start: a folder with what the commands read.
        place: where the copies are made.
    """

    def __init__(self, start: Path, place: Path) -> None:
        self.start, self.place, self._streams = start, place, place / "streams"
        self._streams.mkdir(parents=True)
        self._context: Any = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([*PRELOADED, "tests.kills"])

    def run(self, folder: Path, words: Sequence[str], at: int = 0) -> Ended:
        """Run `nextquill WORDS` in a folder; see `changes_until_killed`."""
        streams = [self._streams / name for name in ("in", "out", "err")]
        for each in streams:
            each.write_text("")
        (self._streams / _COUNT).unlink(missing_ok=True)
        given = (list(words), str(folder), list(map(str, streams)), at)
        process = self._context.Process(target=changes_until_killed, args=given)
        process.start()
        process.join()
        counted = self._streams / _COUNT
        return Ended(process.exitcode, streams[2].read_text(), int(counted.read_text()) if counted.exists() else at)

    def fresh(self) -> Path:
        """A new copy of the first folder."""
        folder = self.place / "killed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.start, folder, symlinks=True)
        return folder

    def everywhere(
        self, words: Sequence[str], again: Callable[[Path], Sequence[Sequence[str]]], most: int
    ) -> Iterator[tuple[int, Path, Path]]:
        """Kill a command before each change, and repeat it until it is done.

        Args:
            words: the command.
            again: `again(folder)` gives the commands that a user tries next, until one works.
            most: of more changes than this, so many are drawn at random.

        Yields:
            The number of the change, the folder at the end, and that of an uninterrupted command.
        """
        whole = self.place / "whole"
        shutil.copytree(self.start, whole, symlinks=True)
        ended = self.run(whole, words)
        assert ended.code == 0, ended.err
        assert ended.changes > 1
        places = range(1, ended.changes + 1)
        for at in places if len(places) <= most else sorted(random.Random(0).sample(places, most)):
            folder = self.fresh()
            killed = self.run(folder, words, at)
            assert killed.code == -signal.SIGKILL, (at, killed)
            said = ""
            for following in again(folder):
                done = self.run(folder, following)
                if done.code == 0:
                    break
                assert "Traceback" not in done.err, (at, done.err)
                said += done.err
            else:
                raise AssertionError(f"killed before change {at} of {ended.changes}: {said}")
            yield at, folder, whole


def contents(folder: Path, ignored: Sequence[str] = ()) -> dict[str, bytes | None]:
    """Every file below a folder by its relative name, without dates; None for an ignored one."""
    return {
        str(path.relative_to(folder)): None if path.name in ignored else _DATE.sub(b"", path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }

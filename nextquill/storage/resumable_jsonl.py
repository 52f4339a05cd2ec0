"""Files of JSON lines whose writing may be cut short at any moment and gone on with later.

Lines go into `NAME.partial` as they are made, in any order. Its first line says which run they belong to. When all are
there they are put in the order of their `index` into `NAME`, which until then does not exist.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from nextquill.errors import CheckpointError, OutputExistsError
from nextquill.storage.atomic_files import written_whole
from nextquill.storage.locks import HAS_LOCKS, try_lock

_HEADER = "nextquill_partial"


class BegunFile:
    """`NAME.partial`, held by one process at a time, whose first line says which run has begun `NAME`.

    Args:
        target: the file's name when it is complete.
        run: what must agree for a partial file to be gone on with, by name; JSON.
        overwrite: start anew where it does not agree.
        argument: the argument that errors name.

    Attributes:
        path: the partial file.
        is_new: nothing of this run is there; `begin` makes the file its own.

    Raises:
        CheckpointError: the partial file is of another run, or no partial file.
        OutputExistsError: another process is writing it.
    """

    def __init__(
        self, target: Path, run: Mapping[str, Any], *, overwrite: bool = False, argument: str = "output_file"
    ) -> None:
        self.target, self.path, self.argument = target, target.with_name(f"{target.name}.partial"), argument
        self._header = header = _encoded({_HEADER: dict(run)})
        self._stream = self.path.open("a+b")
        try:
            if not try_lock(self._stream):
                raise OutputExistsError(f"{argument}: another process is writing {self.path}")
            self._stream.seek(0)
            first = self._stream.readline()
            reason = self._refusal(first, json.loads(header)[_HEADER])
            unfinished = header.startswith(first) and first != header  # new, or cut short within its first line
            if reason is not None and not unfinished and not overwrite:
                raise CheckpointError(f"{argument}: {reason}; delete it, or start again with overwrite=True")
            self.is_new = unfinished or reason is not None
        except BaseException:
            self._stream.close()
            raise

    def begin(self) -> None:
        """Empty the file and write its first line; until then it is still whosever it was."""
        self._stream.truncate(0)
        self._stream.write(self._header)
        self._stream.flush()

    def close(self, *, remove: bool) -> None:
        """Let go of the file, and delete it where nothing in it is needed any more."""
        if remove and HAS_LOCKS:
            self.path.unlink(missing_ok=True)  # while it is still locked: a later one is somebody else's
        self._stream.close()
        if remove and not HAS_LOCKS:  # Windows deletes no open file
            self.path.unlink(missing_ok=True)

    def _refusal(self, first: bytes, run: Mapping[str, Any]) -> str | None:
        """Why the file that begins with this line cannot be gone on with."""
        saved = _decoded(first).get(_HEADER)
        if not isinstance(saved, dict):
            return f"{self.path} is in the way, and nextquill did not begin it"
        name = next((name for name in {**saved, **run} if saved.get(name) != run.get(name)), None)
        if name is None:
            return None
        return f"{self.path} was begun with another {name}: there {saved.get(name)!r}, here {run.get(name)!r}"


class PartialFile(BegunFile):
    """The lines that are there already, and more. A context manager; what holds no line in the end is deleted.

    Args:
        target, run, overwrite, argument: as of `BegunFile`.

    Raises:
        CheckpointError, OutputExistsError: as `BegunFile`.
    """

    def __init__(
        self, target: Path, run: Mapping[str, Any], *, overwrite: bool = False, argument: str = "output_file"
    ) -> None:
        super().__init__(target, run, overwrite=overwrite, argument=argument)
        self._offsets: dict[int, int] = {}
        if self.is_new:
            self.begin()
        else:
            self._read_back()

    def __enter__(self) -> PartialFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close(remove=not self._offsets)

    def __len__(self) -> int:
        return len(self._offsets)

    def __contains__(self, index: object) -> bool:
        return index in self._offsets

    def write(self, line: Mapping[str, Any]) -> None:
        """Add a line, which has an `index`; it is with the operating system when this returns."""
        self._offsets[line["index"]] = self._stream.seek(0, os.SEEK_END)
        self._stream.write(_encoded(line))
        self._stream.flush()

    def finish(self, indices: Sequence[int]) -> None:
        """Put the lines of these indices into the target, in that order.

        Raises:
            CheckpointError: other lines are there.
        """
        if sorted(self._offsets) != sorted(indices):
            raise CheckpointError(f"{self.argument}: {self.path} does not hold every record once; delete it")
        with written_whole(self.target) as stream:
            for index in indices:
                self._stream.seek(self._offsets[index])
                stream.write(self._stream.readline())
        self._offsets = {}  # leaving removes what holds nothing

    def _read_back(self) -> None:
        """Find the lines that are there; what follows a broken one, as a killed process may leave, is cut off."""
        while True:
            offset = self._stream.tell()
            line = self._stream.readline()
            if not line:
                return
            index = _decoded(line).get("index")
            if not line.endswith(b"\n") or not isinstance(index, int) or index in self._offsets:
                self._stream.truncate(offset)
                return
            self._offsets[index] = offset


def _encoded(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, ensure_ascii=False) + "\n").encode()


def _decoded(line: bytes) -> dict[str, Any]:
    """A line's object; an empty one where it holds none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}

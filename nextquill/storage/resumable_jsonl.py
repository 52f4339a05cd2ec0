"""JSONL files whose writing may stop at any moment and resume later.

Lines go into `NAME.partial` as they are made, in any order. The first line of that file names the run they belong to.
When all lines are there, they are written to `NAME` in the order of their `index`. Until then `NAME` does not exist.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from nextquill.errors import CheckpointError
from nextquill.storage.atomic_files import written_whole
from nextquill.storage.json_files import first_difference, line_fields
from nextquill.storage.locks import HAS_LOCKS, in_the_way, try_lock

_HEADER = "nextquill_partial"


class BegunFile:
    """`NAME.partial`, held by one process at a time, whose first line names the run that writes `NAME`.

    Args:
        target: the file's name when it is complete.
        run: the settings that must be equal for a partial file to be resumed, by name; JSON.
        overwrite: start over if they differ.
        argument: the argument that errors name.

    Attributes:
        path: the partial file.
        is_new: whether the file holds nothing from this run; `begin` then makes it the run's file.

    Raises:
        CheckpointError: the partial file belongs to another run, or nextquill did not write it.
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
                raise in_the_way(self._stream, target, argument)
            self._stream.seek(0)
            first = self._stream.readline()
            reason = self._refusal(first, json.loads(header)[_HEADER])
            unfinished = header.startswith(first) and first != header  # new, or cut off within its first line
            if reason is not None and not unfinished and not overwrite:
                raise CheckpointError(f"{argument}: {reason}; delete it, or start again with overwrite=True")
            self.is_new = unfinished or reason is not None
        except BaseException:
            self._stream.close()
            raise

    def begin(self) -> None:
        """Empty the file and write its first line; before that the file keeps its old contents."""
        self._stream.truncate(0)
        self._stream.write(self._header)
        self._stream.flush()

    def close(self, *, remove: bool) -> None:
        """Close the file, and delete it if `remove`."""
        if remove and HAS_LOCKS:
            self.path.unlink(missing_ok=True)  # before the lock ends, or it could be another process's new file
        self._stream.close()
        if remove and not HAS_LOCKS:  # Windows does not delete open files
            self.path.unlink(missing_ok=True)

    def _refusal(self, first: bytes, run: Mapping[str, Any]) -> str | None:
        """Why the file with this first line cannot be resumed."""
        saved = line_fields(first).get(_HEADER)
        if not isinstance(saved, dict):
            return f"{self.path} exists, and nextquill did not start it"
        difference = first_difference(saved, run)
        return None if difference is None else f"{self.path} was started with another {difference}"


class PartialFile(BegunFile, AbstractContextManager["PartialFile"]):
    """A partial file to which lines are added; arguments and errors are those of `BegunFile`.

    As a context manager, it deletes a file without lines at the end.
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

    def __exit__(self, *error: object) -> None:
        self.close(remove=not self._offsets)

    def __len__(self) -> int:
        return len(self._offsets)

    def __contains__(self, index: object) -> bool:
        return index in self._offsets

    @property
    def indices(self) -> set[int]:
        """The indices of the lines."""
        return set(self._offsets)

    def write(self, line: Mapping[str, Any]) -> None:
        """Add a line with an `index`. When this returns, the operating system has the line."""
        self._offsets[line["index"]] = self._stream.seek(0, os.SEEK_END)
        self._stream.write(_encoded(line))
        self._stream.flush()

    def finish(self, indices: Sequence[int]) -> None:
        """Write the lines with these indices to the target, in this order; CheckpointError if the file holds others."""
        if sorted(self._offsets) != sorted(indices):
            raise CheckpointError(f"{self.argument}: {self.path} does not hold every record once; delete it")
        with written_whole(self.target) as stream:
            for index in indices:
                self._stream.seek(self._offsets[index])
                stream.write(self._stream.readline())
        self._offsets = {}  # so that leaving the context deletes the partial file

    def _read_back(self) -> None:
        """Find the lines in the file, and cut it off at the first broken one, which a killed process may leave."""
        while line := self._stream.readline():
            offset, index = self._stream.tell() - len(line), line_fields(line).get("index")
            if not line.endswith(b"\n") or not isinstance(index, int) or index in self._offsets:
                self._stream.truncate(offset)
                return
            self._offsets[index] = offset


def _encoded(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, ensure_ascii=False) + "\n").encode()

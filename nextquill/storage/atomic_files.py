"""Files and folders that take their names only when they are complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

from nextquill.storage.locks import HAS_LOCKS, held


@contextmanager
def written_together(paths: Sequence[Path]) -> Iterator[list[BinaryIO]]:
    """Open a temporary file beside each path, and rename all of them when the block ends without an error.

    OutputExistsError if another process is writing one of them.
    """
    with ExitStack() as files:
        streams = [files.enter_context(held(temporary(path), path)) for path in paths]
        for stream in streams:
            stream.seek(0)
            stream.truncate()  # what a killed process has left
        yield streams
        for stream in streams:
            stream.flush()
            os.fsync(stream.fileno())
            if not HAS_LOCKS:  # Windows does not rename open files
                stream.close()
        for path in paths:
            os.replace(temporary(path), path)


def temporary(path: Path) -> Path:
    """The file that becomes `path`. Whoever holds it is the only process that writes `path`."""
    return path.with_name(f".{path.name}.tmp")


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path`, and rename it to `path` when the block ends without an error."""
    with written_together([path]) as (stream,):
        yield stream


def write_whole(path: Path, content: bytes | str) -> None:
    """Write `path` so that no half-written file is ever seen under its name."""
    with written_whole(path) as stream:
        stream.write(content.encode() if isinstance(content, str) else content)


def move_into_place(source: Path, target: Path) -> None:
    """Rename a finished folder to `target`, replacing an older folder of that name."""
    retired = source.with_name(f".{target.name}.replaced")
    shutil.rmtree(retired, ignore_errors=True)  # left by a killed process
    if target.exists():
        os.replace(target, retired)
    os.replace(source, target)
    shutil.rmtree(retired, ignore_errors=True)

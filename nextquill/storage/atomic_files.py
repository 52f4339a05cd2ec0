"""Files and folders that take their names only when they are complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def written_together(paths: Sequence[Path]) -> Iterator[list[BinaryIO]]:
    """Open a temporary file beside each path, and rename all of them when the block ends without an error."""
    temporary = [path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in paths]
    try:
        with ExitStack() as files:
            streams: list[BinaryIO] = [files.enter_context(path.open("wb")) for path in temporary]
            yield streams
            for stream in streams:
                stream.flush()
                os.fsync(stream.fileno())
        for source, target in zip(temporary, paths, strict=True):
            os.replace(source, target)
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)


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
    retired = source.with_name(f".{target.name}.{os.getpid()}.replaced")
    if target.exists():
        shutil.rmtree(retired, ignore_errors=True)
        os.replace(target, retired)
    os.replace(source, target)
    shutil.rmtree(retired, ignore_errors=True)

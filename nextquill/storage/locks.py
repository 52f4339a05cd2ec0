"""Files that one process at a time may hold. The system ends a hold with the process, however that ends.

    try_lock    locks an open file
    held        holds a path for a block: the file there, which it makes, belongs to this process alone
    claim       holds a path until `release_claims`, for a command that writes at its end

A folder is held by its file `LOCK_FILE`, a file by its temporary copy (`atomic_files`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from nextquill.errors import OutputExistsError

try:
    import fcntl
except ImportError:  # Windows has no flock, so two processes that write one file go unnoticed there
    fcntl = None  # type: ignore[assignment]

#: Whether this system has these locks.
HAS_LOCKS = fcntl is not None
#: The file in a folder that a process holds while it writes there.
LOCK_FILE = ".nextquill.lock"
_COMMAND_WIDTH = 120
_claims = ExitStack()
_claimed: dict[Path, BinaryIO] = {}


def try_lock(stream: Any) -> bool:
    """Lock an open file or file descriptor until it is closed, and return whether that worked.

    False means that another process holds the lock. Systems and file systems without locks always give True.
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # a file system without locks raises another one
        return not isinstance(error, BlockingIOError)
    return True


@contextmanager
def held(path: Path, target: Path, argument: str | None = None) -> Iterator[BinaryIO]:
    """Hold `path` while the block runs, and yield the file there, open for reading and writing.

    The file is deleted at the end, unless it has been renamed. A file that a killed process has left is taken over.
    What this process has claimed may be held, as part of the claim.

    Args:
        path: the file that is held.
        target: what it stands for, in messages.
        argument: the argument that an error names.

    Raises:
        OutputExistsError: another process holds it, or another block of this one.
    """
    own = _claimed.get(path.absolute())
    if own is not None and is_at(own, path):
        yield own
        return
    stream = _open(path, target, argument)
    try:
        yield stream
    finally:
        if HAS_LOCKS and not stream.closed and is_at(stream, path):
            path.unlink()  # before the lock ends, or it could be another process's new file
        stream.close()
        if not HAS_LOCKS:  # Windows does not delete open files
            path.unlink(missing_ok=True)


def claim(path: Path, target: Path, argument: str | None = None) -> None:
    """Hold `path` until `release_claims`; arguments and errors are those of `held`."""
    _claimed[path.absolute()] = _claims.enter_context(held(path, target, argument))


def release_claims() -> None:
    """End all claims of this process."""
    _claimed.clear()
    _claims.close()


def is_at(stream: Any, path: Path) -> bool:
    """Whether an open file has this name now; another process may have replaced or deleted it."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except FileNotFoundError:
        return False


def in_the_way(stream: Any, target: Path, argument: str | None = None) -> OutputExistsError:
    """The error for a file whose lock another process holds, named where the system says which."""
    name = "" if argument is None else f"{argument}: "
    return OutputExistsError(f"{name}another process{_holder(stream)} is writing {target}")


def _open(path: Path, target: Path, argument: str | None) -> BinaryIO:
    while True:
        # The name can be guessed, so a link that somebody has put there is not followed.
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        stream = os.fdopen(os.open(path, flags, 0o666), "r+b")
        if not try_lock(stream):
            with stream:
                raise in_the_way(stream, target, argument)
        if is_at(stream, path):
            return stream
        stream.close()  # its holder has just renamed or deleted it


def _holder(stream: Any) -> str:
    """The process that holds a file's lock and its command, as Linux lists them."""
    with suppress(OSError, ValueError, IndexError):
        inode = str(os.fstat(stream.fileno()).st_ino)
        for line in Path("/proc/locks").read_text().splitlines():
            words = line.split()  # 1: FLOCK ADVISORY WRITE 4242 fe:00:1234 0 EOF
            if words[1] == "FLOCK" and words[5].rpartition(":")[2] == inode:
                command = Path(f"/proc/{words[4]}/cmdline").read_bytes().decode(errors="replace")
                shown = "".join(each if each.isprintable() else " " for each in command)
                return f" ({words[4]}: {' '.join(shown.split())[:_COMMAND_WIDTH]})"
    return ""

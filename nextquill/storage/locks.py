"""Advisory locks on open files, each held by one process at a time."""

from __future__ import annotations

from typing import Any

try:
    import fcntl
except ImportError:  # Windows has no flock, so two processes that write one file go unnoticed there
    fcntl = None  # type: ignore[assignment]

#: Whether this system has these locks.
HAS_LOCKS = fcntl is not None


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

"""One process at a time: advisory locks on open files."""

from __future__ import annotations

from typing import Any

try:
    import fcntl
except ImportError:  # Windows, where two processes in one file are not noticed
    fcntl = None  # type: ignore[assignment]

#: Whether this system has such locks.
HAS_LOCKS = fcntl is not None


def try_lock(stream: Any) -> bool:
    """Lock an open file (or file descriptor) until it is closed; False where another process holds the lock.

    True as well on systems and file systems without locks.
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True

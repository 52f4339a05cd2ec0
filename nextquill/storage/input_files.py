"""Opens the files that a user names. Only a regular file is read, and a small one no further than its limit.

A pipe would wait for its writer for ever, and /dev/zero never ends. Every refusal is an OSError with a `strerror` for
callers to put into their own errors.
"""

from __future__ import annotations

import errno
import io
import os
import stat
from pathlib import Path

MIB = 2**20


def open_input(path: str | os.PathLike[str]) -> io.BufferedReader:
    """Open a file for reading bytes; OSError where it is a pipe, a socket or a device, which is not opened."""
    try:
        mode = os.stat(path).st_mode
    except ValueError as error:  # a null byte, or half of a surrogate pair
        raise OSError(errno.EINVAL, f"its name is not one of a file: {error}", repr(path)) from error
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # the error about a folder is that of `open`
        raise OSError(errno.EINVAL, "expected a regular file, got a pipe, a socket or a device", os.fspath(path))
    return open(path, "rb")


def read_input(path: str | os.PathLike[str], most: int) -> bytes:
    """The bytes of a file; OSError where it is not regular, or has more than `most` bytes."""
    with open_input(path) as file:
        found = file.read(most + 1)
    if len(found) > most:
        size = f"{most // MIB} MiB" if most >= MIB else f"{most // 1024} KiB"
        raise OSError(errno.EFBIG, f"expected at most {size}, got more", os.fspath(path))
    return found


def real_path(path: str | os.PathLike[str]) -> Path:
    """The absolute path without symbolic links; one in a loop of links stays, where `Path.resolve` raises."""
    return Path(os.path.realpath(path))

"""A lock belongs to one open file at a time, whichever process has it."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from nextquill.storage import locks
from nextquill.storage.locks import try_lock

# Prints whether it got the lock, and keeps the file open until its input ends.
HOLDER = """
import sys
from nextquill.storage.locks import try_lock
stream = open(sys.argv[1], "ab")
print(try_lock(stream), flush=True)
sys.stdin.read()
"""
needs_locks = pytest.mark.skipif(not locks.HAS_LOCKS, reason="this system has no flock")


def start_holder(path: Path) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


@needs_locks
def test_two_processes_cannot_lock_one_file(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    process, answer = start_holder(path)
    with process, path.open("ab") as stream:
        assert answer == "True"
        assert not try_lock(stream)
        assert process.stdin is not None
        process.stdin.close()
        process.wait()
        assert try_lock(stream), "the lock outlived its process"


@needs_locks
def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    process, answer = start_holder(path)
    with process:
        assert answer == "True"
        process.kill()
    with path.open("ab") as stream:
        assert try_lock(stream)


@needs_locks
def test_another_process_is_refused_until_the_file_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with path.open("ab") as stream:
        assert try_lock(stream)
        assert try_lock(stream), "the holder may ask again"
        process, answer = start_holder(path)
        process.communicate()
        assert answer == "False"
    process, answer = start_holder(path)
    process.communicate()
    assert answer == "True"


@needs_locks
def test_a_file_descriptor_can_be_locked(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("ab") as stream, (tmp_path / "lock").open("ab") as second:
        assert try_lock(stream.fileno())
        assert not try_lock(second.fileno())


def test_a_system_without_locks_refuses_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "fcntl", None)
    with (tmp_path / "lock").open("ab") as stream, (tmp_path / "lock").open("ab") as second:
        assert try_lock(stream)
        assert try_lock(second)


@needs_locks
def test_a_file_system_without_locks_refuses_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(locks.fcntl, "flock", unsupported)
    with (tmp_path / "lock").open("ab") as stream:
        assert try_lock(stream)

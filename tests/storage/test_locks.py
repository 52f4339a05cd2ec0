"""A lock belongs to one open file at a time, whichever process has it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nextquill.errors import OutputExistsError
from nextquill.storage import locks
from nextquill.storage.atomic_files import write_whole
from nextquill.storage.locks import claim, held, release_claims, try_lock

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


HELD = """
import sys, time
from pathlib import Path
from nextquill.storage.locks import held
with held(Path(sys.argv[1]), Path("run"), "output_dir"):
    print("held", flush=True)
    sys.stdin.read()
"""


def start_held(path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HELD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@needs_locks
def test_a_held_path_is_refused_and_its_process_named(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    process = start_held(path)
    with process:
        refusal = r"^output_dir: another process.* is writing run$"
        with pytest.raises(OutputExistsError, match=refusal) as refused, held(path, Path("run"), "output_dir"):
            pass
        if Path("/proc/locks").exists():
            assert f"({process.pid}: {sys.executable} -c" in str(refused.value)
        assert path.exists(), "a refused process deletes nothing"
        process.communicate()
    assert not path.exists(), "the holder deletes its file"


@needs_locks
def test_what_a_killed_process_has_left_is_taken_over_and_deleted(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with start_held(path) as process:
        process.kill()
    assert path.exists()
    with held(path, Path("run")):
        assert path.exists()
    assert not path.exists()


@needs_locks
def test_a_renamed_file_stays_and_its_name_is_free(tmp_path: Path) -> None:
    path, target = tmp_path / "lock", tmp_path / "target"
    with held(path, target) as stream:
        stream.write(b"whole")
        stream.flush()
        path.rename(target)
        with held(path, target):
            assert path.exists()
    assert target.read_bytes() == b"whole"
    assert not path.exists()


@needs_locks
def test_a_file_that_is_replaced_while_it_is_opened_is_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, seen = tmp_path / "lock", list[str]()

    def slow_lock(stream: Any) -> bool:
        if not seen:  # its holder deletes it before this process gets the lock
            path.unlink()
        seen.append("tried")
        return try_lock(stream)

    monkeypatch.setattr(locks, "try_lock", slow_lock)
    with held(path, path) as stream:
        assert locks.is_at(stream, path)
    assert len(seen) == 2


@pytest.mark.skipif(not hasattr(os, "O_NOFOLLOW"), reason="this system follows links")
def test_a_link_in_place_of_the_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / ".page.html.tmp").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic links"):
        write_whole(tmp_path / "page.html", "other")
    assert (tmp_path / "precious").read_text() == "precious"


@needs_locks
def test_a_claim_includes_what_is_held_later_and_ends_when_released(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    claim(path, path)
    with held(path, path):
        pass
    assert path.exists(), "the claim goes on"
    release_claims()
    assert not path.exists()
    with held(path, path), pytest.raises(OutputExistsError), held(path, path):
        pass

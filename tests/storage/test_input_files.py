"""Only regular files are read, up to a size; whatever else a name stands for is refused before it is opened."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nextquill.storage.input_files import open_input, read_input, real_path


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "loop", "null byte", "surrogate", "none"])
def test_what_is_no_file_is_refused_with_a_reason(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "input"
    said = "expected a regular file, got a pipe, a socket or a device"
    if kind == "pipe":
        os.mkfifo(path)  # opening it would wait for a writer
    elif kind == "device":
        path = Path("/dev/zero")
    elif kind == "folder":
        path.mkdir()
        said = "Is a directory"
    elif kind == "loop":
        path.symlink_to(path)
        said = "Too many levels of symbolic links"
    elif kind in ("null byte", "surrogate"):
        path = tmp_path / {"null byte": "a\0b", "surrogate": "a\ud800"}[kind]
        said = "its name is not one of a file"
    else:
        said = "No such file"
    with pytest.raises(OSError, match=said) as caught:
        open_input(path)
    assert caught.value.strerror


def test_a_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "input"
    path.write_bytes(b"12345")
    assert read_input(path, 5) == b"12345"
    with pytest.raises(OSError, match="expected at most 0 KiB, got more"):
        read_input(path, 4)


def test_a_loop_of_links_has_a_path(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert real_path(tmp_path / "a" / "x").name == "x"
    (tmp_path / "c").symlink_to(tmp_path / "file")
    assert real_path(tmp_path / "c") == (tmp_path / "file").resolve()

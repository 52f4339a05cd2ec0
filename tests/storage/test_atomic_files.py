"""Files and folders appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nextquill.storage.atomic_files import move_into_place, write_whole, written_together


def test_content_replaces_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    write_whole(path, b"old")
    write_whole(path, "new – ü")
    assert path.read_text(encoding="utf-8") == "new – ü"
    assert [each.name for each in tmp_path.iterdir()] == ["page.html"]


def test_a_failure_leaves_the_old_file_and_no_temporary_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "page.html"
    write_whole(path, "old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_whole(path, "new")
    assert path.read_text(encoding="utf-8") == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["page.html"]


def test_several_files_appear_together(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a", "b")]
    with written_together(paths) as streams:
        for stream, content in zip(streams, (b"1", b"2"), strict=True):
            stream.write(content)
        assert not any(path.exists() for path in paths)
    assert [path.read_bytes() for path in paths] == [b"1", b"2"]
    assert len(list(tmp_path.iterdir())) == 2


def test_an_error_in_one_file_leaves_none_of_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / name for name in ("a", "b")]
    write_whole(paths[0], "old")

    def interrupted() -> None:
        with written_together(paths) as streams:
            streams[0].write(b"new")
            raise KeyboardInterrupt

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError("disk full")

    def disk_full() -> None:
        with written_together(paths) as streams:
            streams[0].write(b"new")

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    calls: list[int] = []
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        disk_full()
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"old")]


def test_a_folder_replaces_an_older_one_and_nothing_else(tmp_path: Path) -> None:
    for name in ("new", "old", "old.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    move_into_place(tmp_path / "new", tmp_path / "old")
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "old", "old.old", "old.old/old.old", "old/new",
    ]  # fmt: skip
    move_into_place(tmp_path / "old", tmp_path / "first")
    assert (tmp_path / "first" / "new").is_file()

"""A file appears whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nextquill.storage.atomic_files import write_whole


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

from __future__ import annotations

import sqlite3
from typing import Any

import pytest

from nextquill.data.loaders import by_user as module
from nextquill.data.loaders.by_user import Entry, by_user


def test_entries_come_together_by_user_in_the_order_of_time() -> None:
    log = [("b", 2.0), ("a", 5.0), ("b", 1.0), ("a", 5.0), ("c\0", None), ("c\0", None), ("c", 0.0), ("a", -1.5)]
    entries = [Entry(user, time, f"line {i}", {"text": f"é{i}"}) for i, (user, time) in enumerate(log)]
    found = [[entries.index(entry) for entry in group] for group in by_user(iter(entries))]
    assert found == [[7, 1, 3], [2, 0], [6], [4, 5]]


def test_a_full_disk_is_an_error_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    real = sqlite3.connect

    def small(*arguments: Any, **options: Any) -> sqlite3.Connection:
        connection = real(*arguments, **options)
        connection.execute("PRAGMA max_page_count = 4")
        return connection

    monkeypatch.setattr(module.sqlite3, "connect", small)
    with pytest.raises(OSError, match=r"^the temporary file that sorts a log: .*full; TMPDIR names its folder$"):
        list(by_user(Entry("u", 1.0, "here", {"text": "x" * 5000}) for _ in range(9)))

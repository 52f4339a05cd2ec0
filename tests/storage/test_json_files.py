"""Damaged JSON is named by file, and by line where there are several."""

from __future__ import annotations

from pathlib import Path

import pytest

from nextquill.errors import RecordError
from nextquill.storage.json_files import json_object, json_objects


def test_objects_are_read_with_their_places(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"b": "東"}\n', encoding="utf-8")
    assert list(json_objects(path)) == [(f"{path} line 1", {"a": 1}), (f"{path} line 2", {"b": "東"})]
    path.write_text('{\n"a": 1}', encoding="utf-8")
    assert json_object(path) == {"a": 1}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"{", "not valid JSON"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b"[]", "expected an object, got list"),
        (b'{"b": {"a": 1, "c": 2, "a": 1}}', "not valid JSON: the key 'a' occurs twice in an object"),
        (b'{"a":' * 10_000, "not valid JSON: its objects or lists are nested too deeply"),
    ],
)
def test_damage_is_named(tmp_path: Path, text: bytes, said: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(text)
    with pytest.raises(RecordError, match=rf"a\.json: {said}"):
        json_object(path)
    path.write_bytes(b"{}\n" + text + b"\n")
    with pytest.raises(RecordError, match=rf"a\.json line 2: {said}"):
        list(json_objects(path))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for read in (json_object, lambda path: list(json_objects(path))):
        with pytest.raises(RecordError, match=r"none\.json: cannot be read: No such file"):
            read(tmp_path / "none.json")

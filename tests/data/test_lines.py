from __future__ import annotations

import gzip
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from nextquill.data import SkippedRecords, iter_jsonl
from nextquill.data.lines import json_lines, numbered_lines
from nextquill.errors import RecordError

PACKED: dict[str, Callable[[bytes], bytes]] = {"plain": bytes, "gzip": gzip.compress}


@pytest.mark.parametrize("pack", PACKED.values(), ids=PACKED.keys())
@pytest.mark.parametrize("end", [b"", b"\n"], ids=["cut", "ended"])
def test_lines_are_numbered_and_whole(tmp_path: Path, pack: Callable[[bytes], bytes], end: bytes) -> None:
    path = tmp_path / "lines"
    path.write_bytes(pack(b"a\n\nb\r\n\xe2\x80\xa8c" + end))
    assert list(numbered_lines(path)) == [(1, b"a\n"), (2, b"\n"), (3, b"b\r\n"), (4, b"\xe2\x80\xa8c" + end)]


@pytest.mark.parametrize("length", [9, 10, 11, 30])
@pytest.mark.parametrize("end", [b"", b"\n"], ids=["cut", "ended"])
def test_the_longest_line_is_read_and_a_longer_one_named(tmp_path: Path, length: int, end: bytes) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b"a\n" + b"x" * length + end)
    skipped = SkippedRecords()
    found = list(numbered_lines(path, max_line_bytes=10, skipped=skipped))
    assert found[1:] == ([(2, b"x" * length + end)] if length <= 10 else [])
    assert skipped.total == (length > 10)
    if length > 10:
        with pytest.raises(
            RecordError, match=rf"line 2: expected a line of at most 10 bytes, got {length + len(end)}$"
        ):
            list(numbered_lines(path, max_line_bytes=10))


def test_a_line_of_a_hundred_megabytes_costs_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    record = b'{"user_id": "u", "query": "q", "response": "r", "history": []}\n'
    with path.open("wb") as file:
        file.write(record + b'{"user_id": "')
        for _ in range(100):
            file.write(b"x" * 2**20)
        file.write(b'"}\n' + record)
    skipped = SkippedRecords(max_share=0.5)
    tracemalloc.start()
    try:
        records = list(iter_jsonl(path, skipped, max_line_bytes=4 * 2**20))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(records) == 2
    assert skipped.messages == [f"{path} line 2: expected a line of at most 4194304 bytes, got 104857616"]
    assert peak < 10 * 2**20


def test_bad_lines_are_skipped_by_kind(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'1\n{\n"\xff"\n' + b"[" * 100_000 + b"\n2\n")
    skipped = SkippedRecords()
    assert [value for _, value in json_lines(path, skipped=skipped)] == [1, 2]
    assert skipped.counts == {"json": 2, "utf-8": 1}


def test_a_key_that_occurs_twice_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1, "b": [{"c": 1}, {"c": 1}]}\n\n{"a": 1, "b": [{"c": 1, "c": 1}]}\n')
    with pytest.raises(RecordError, match=r"a\.jsonl line 3: not valid JSON: the key 'c' occurs twice in an object"):
        list(json_lines(path))
    skipped = SkippedRecords()
    assert len(list(json_lines(path, skipped=skipped))) == 1
    assert skipped.counts == {"json": 1}


def test_only_a_regular_file_is_read() -> None:
    with pytest.raises(RecordError, match=r"^/dev/zero: cannot be read: expected a regular file"):
        next(json_lines("/dev/zero"))


def test_truncated_gzip_is_named(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(gzip.compress(b"1\n2\n")[:-9])
    with pytest.raises(RecordError, match=r"lines.jsonl: cannot be read: "):
        list(json_lines(path))

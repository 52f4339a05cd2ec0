from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nextquill.data import SkippedRecords
from nextquill.data.loaders.csv_rows import csv_rows
from nextquill.errors import RecordError

CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)


def _written(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "t.csv"
    path.write_bytes(content)
    return path


@settings(deadline=None)
@given(rows=st.lists(st.tuples(CELLS, CELLS), max_size=8), ending=st.sampled_from(["\r\n", "\n"]))
def test_cells_and_the_lines_records_begin_on_are_right(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], ending: str
) -> None:
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator=ending, quoting=csv.QUOTE_ALL)
    writer.writerow(["a", "b"])
    expected = []
    for row in rows:
        line = 1 + out.getvalue().count("\n")
        writer.writerow(row)
        expected.append((line, {"a": row[0], "b": row[1]}))
    path = tmp_path_factory.getbasetemp() / "t.csv"
    path.write_bytes(out.getvalue().encode())
    assert list(csv_rows(path)) == [(f"{path} line {line}", cells) for line, cells in expected]


def test_a_byte_order_mark_blank_lines_and_tabs_are_read(tmp_path: Path) -> None:
    path = _written(tmp_path, b"\xef\xbb\xbfa\tb\n\n1\t2\n\n")
    assert list(csv_rows(path, delimiter="\t")) == [(f"{path} line 3", {"a": "1", "b": "2"})]


def test_only_a_file_begins_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = _written(tmp_path, 'a\n"x\n\ufeffy"\n'.encode())
    assert list(csv_rows(path)) == [(f"{path} line 2", {"a": "x\n\ufeffy"})]


HEADERS = {
    "empty": (b"", ": no records, the file is empty"),
    "twice": (b"a,b,a\n", " line 1: expected every column once, got 'a' twice"),
    "blank": (b"a, \n", " line 1: expected a name for every column, got none for column 2"),
    "blank-line": (b"\na\n", " line 1: expected a name for every column, got none for column 1"),
    "not-utf8": (b"a,\xff\n", " line 1: not UTF-8: "),
    "quote": (b'a,"b"c\n', " line 1: not valid CSV: "),
}


@pytest.mark.parametrize(("content", "message"), HEADERS.values(), ids=HEADERS.keys())
def test_an_unusable_header_cannot_be_skipped(tmp_path: Path, content: bytes, message: str) -> None:
    path = _written(tmp_path, content)
    with pytest.raises(RecordError) as caught:
        list(csv_rows(path, skipped=SkippedRecords()))
    assert str(caught.value).startswith(f"{path}{message}")


ROWS = {
    "cells": (b"1\n", "expected 2 cells as in the header, got 1"),
    "quote": (b'"1"x,2\n', "not valid CSV: "),
    "not-utf8": (b"1,\xff\n", "not UTF-8: "),
    "return": (b"1,2\r3,4\n", "not valid CSV: "),
    "too-long": (b"1," + b"x" * 3000 + b"\n", "expected a line of at most 2000 bytes, got 3003"),
}


@pytest.mark.parametrize(("row", "message"), ROWS.values(), ids=ROWS.keys())
def test_a_bad_row_is_named_and_the_next_is_read(tmp_path: Path, row: bytes, message: str) -> None:
    path = _written(tmp_path, b'a,b\n"x\ny",z\n' + row + b"3,4\n")
    with pytest.raises(RecordError) as caught:
        list(csv_rows(path, max_line_bytes=2000))
    assert str(caught.value).startswith(f"{path} line 4: {message}")
    skipped = SkippedRecords()
    found = list(csv_rows(path, max_line_bytes=2000, skipped=skipped))
    assert found == [(f"{path} line 2", {"a": "x\ny", "b": "z"}), (f"{path} line 5", {"a": "3", "b": "4"})]
    assert skipped.total == 1


def test_a_quote_that_is_never_closed_is_named_where_it_opens(tmp_path: Path) -> None:
    path = _written(tmp_path, b'a,b\n1,2\n3,"4\n' + b"5,6\n" * 1000)
    with pytest.raises(RecordError, match=r"line 3: expected a record of at most 2000 bytes, got more; is a quote"):
        list(csv_rows(path, max_line_bytes=2000))
    with pytest.raises(RecordError, match=r"line 3: not valid CSV: unexpected end of data"):
        list(csv_rows(path))


@pytest.mark.parametrize("most", [2000, 2**20])
def test_what_a_quote_that_is_never_closed_swallows_is_not_skipped(tmp_path: Path, most: int) -> None:
    path = _written(tmp_path, b"a,b\n" + b"1,2\n" * 20 + b'3,"4\n' + b"5,6\n" * 1000)
    skipped = SkippedRecords()
    with pytest.raises(RecordError, match=r"^.* line 22: "):
        list(csv_rows(path, max_line_bytes=most, skipped=skipped))
    assert skipped.total == 0


@pytest.mark.parametrize("line", [b"\xff", b"x" * 200], ids=["not-utf8", "too-long"])
def test_the_rest_of_a_cell_with_a_bad_line_is_not_read_as_records(tmp_path: Path, line: bytes) -> None:
    path = _written(tmp_path, b'a,b\n1,"x\n' + line + b'\n6,7\ny"\n8,9\n')
    skipped = SkippedRecords()
    assert list(csv_rows(path, max_line_bytes=100, skipped=skipped)) == [(f"{path} line 6", {"a": "8", "b": "9"})]
    assert skipped.messages[0].startswith(f"{path} line 3: ")

from __future__ import annotations

from datetime import datetime, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from nextquill.data import HistoryItem, Record, SkippedRecords, read_jsonl
from nextquill.data.loaders import load
from nextquill.errors import ArgumentError, RecordError

COLUMNS = {"user_id": "author", "response": "body", "query": "asked", "timestamp": "when", "history": "before"}
ROW: dict[str, Any] = {"user_id": "u", "query": "q", "response": "r", "history": ["a"]}


def test_csv_is_read_with_its_own_names_and_times(fixtures: Path) -> None:
    ann, bob = load("table", fixtures / "posts.csv", columns=COLUMNS)
    assert ann == Record("ann", "Write a post", 'First line,\r\nsecond "line"', (), 1577923200.0)
    assert bob.history == (HistoryItem("Earlier.", "T", 1577836800.0), HistoryItem("Later."))


def test_the_line_of_a_bad_csv_record_counts_quoted_line_breaks(tmp_path: Path, fixtures: Path) -> None:
    path = tmp_path / "posts.csv"
    path.write_bytes((fixtures / "posts.csv").read_bytes().replace(b"2020-01-03T00:00:00Z", b"noon"))
    with pytest.raises(
        RecordError, match=r"posts.csv line 4: field 'timestamp': expected a number or an ISO 8601 time"
    ):
        list(load("table", path, columns=COLUMNS))


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_a_table_is_the_same_records_in_every_kind_of_file(tmp_path: Path, suffix: str, write: Any) -> None:
    item = {"text": "a", "title": None, "timestamp": 3.0}
    rows = [{**ROW, "history": [item], "stars": 5}, {**ROW, "query": "p", "history": [], "stars": 4}]
    path = tmp_path / f"t.{suffix}"
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        write(path.name, *rows) if suffix == "jsonl" else write(path.name, rows)
    assert list(load("table", path)) == [
        Record("u", "q", "r", (HistoryItem("a", None, 3.0),), None, {"stars": 5}),
        Record("u", "p", "r", (), None, {"stars": 4}),
    ]


def test_an_older_json_file_with_a_record_a_line_is_read(write: Any) -> None:
    assert [record.query for record in load("table", write("t.json", ROW, {**ROW, "query": "p"}))] == ["q", "p"]


def test_parquet_values_that_python_cannot_hold_name_row_and_column(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    good, bad = pyarrow.array(["r", "r", "r"]), pyarrow.array([b"r", b"\xff", b"r"])
    bad = pyarrow.StringArray.from_buffers(3, *bad.buffers()[1:])
    late = pyarrow.array([0, 0, 2**60], pyarrow.timestamp("ms", "UTC"))
    columns = {"user_id": good, "query": good, "response": bad, "history": pyarrow.array([[""]] * 3), "timestamp": late}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    with pytest.raises(RecordError, match=r"t.parquet row 1: field 'response': cannot be read: .*utf-8"):
        list(load("table", path))
    skipped = SkippedRecords(max_share=1.0)
    assert len(list(load("table", path, skipped=skipped))) == 1
    assert "row 2: field 'timestamp': cannot be read: " in skipped.messages[1]


def test_values_that_only_parquet_has_become_json(tmp_path: Path) -> None:
    when = datetime(2020, 1, 1, tzinfo=timezone.utc)
    path = tmp_path / "t.parquet"
    row = {**ROW, "timestamp": when, "day": when.date(), "price": Decimal("1.50"), "tags": ["x", None]}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    (record,) = load("table", path)
    assert record.timestamp == 1577836800.0
    assert record.extra == {"day": "2020-01-01", "price": 1.5, "tags": ["x", None]}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{**ROW, "blob": b"x"}]), path)
    with pytest.raises(
        RecordError, match=r"t.parquet row 0: field 'blob': expected a value that JSON can hold, got byt"
    ):
        list(load("table", path))
    path.write_bytes(b"PAR1 and nothing else")
    with pytest.raises(RecordError, match=r"t.parquet: cannot be read: "):
        list(load("table", path))


def test_a_history_may_mix_texts_and_objects() -> None:
    (record,) = load("table", [{**ROW, "history": ["a", {"text": "b", "timestamp": "1970-01-01T00:00:09Z"}]}])
    assert record.history == (HistoryItem("a"), HistoryItem("b", None, 9.0))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "user": ({"user_id": None}, "field 'user_id': required, but null"),
    "no-history": ({"history": None}, "field 'history': required, but missing; format 'events' makes histories"),
    "history-text": ({"history": "a"}, "field 'history': not valid JSON: "),
    "history-number": ({"history": "3"}, "field 'history': expected a list of strings or of objects with 'text'"),
    "history-time": (
        {"history": [{"text": "b", "timestamp": "noon"}]},
        "field 'history[0].timestamp': expected a number or an ISO 8601 time, got 'noon'",
    ),
    "future": (
        {"timestamp": 1, "history": [{"text": "b", "timestamp": 2}]},
        "field 'history[0].timestamp': expected no later than the record's own 1.0, got 2.0",
    ),
    "extra": ({"stars": float("nan")}, "field 'stars': expected a finite number, got nan"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_a_bad_row_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecordError) as caught:
        list(load("table", [{**ROW, **change}]))
    assert str(caught.value).startswith(f"record 0: {message}")


def test_a_column_that_is_not_there_is_named() -> None:
    message = r"^record 0: field 'body': named in columns, but missing; there are history, query, response, user_id$"
    with pytest.raises(RecordError, match=message):
        list(load("table", [ROW], columns={"response": "body"}))


def test_columns_may_change_places() -> None:
    (record,) = load("table", [ROW], columns={"query": "response", "response": "query"})
    assert (record.query, record.response) == ("r", "q")


def test_what_convert_writes_is_what_training_reads(tmp_path: Path, fixtures: Path) -> None:
    import json

    records = list(load("table", fixtures / "posts.csv", columns=COLUMNS))
    path = tmp_path / "r.jsonl"
    path.write_text("".join(json.dumps(record.to_dict()) + "\n" for record in records))
    assert read_jsonl(path) == records


def test_a_table_has_no_options() -> None:
    with pytest.raises(ArgumentError, match=r"^outputs: format 'table' has no such option; expected none$"):
        load("table", [ROW], outputs="x")

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from typing import Any

import pytest

from nextquill.data import SkippedRecords
from nextquill.data.loaders import FORMATS, load
from nextquill.errors import ArgumentError, ArgumentTypeError, RecordError

ROW: dict[str, Any] = {"user_id": "u", "query": "q", "response": "r", "history": []}
ROWS = [{**ROW, "response": f"r{i}"} for i in range(20)]


@pytest.mark.parametrize("name", FORMATS)
def test_the_documented_options_are_those_the_loader_takes(name: str) -> None:
    _, *options = inspect.signature(FORMATS[name].load).parameters
    assert options == list(FORMATS[name].options)


ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "format": ({"format": "lamb"}, "format: expected one of 'lamp', 'longlamp', 'amazon'"),
    "option": ({"format": "chat", "query": "x"}, "query: format 'chat' has no such option; expected one of respond_as"),
    "zone": ({"timezone": "Mars"}, "timezone: expected a name such as 'Europe/Berlin', got 'Mars'"),
    "unit": ({"time_unit": "h"}, "time_unit: expected one of 's', 'ms', got 'h'"),
    "bytes": ({"max_line_bytes": 0}, "max_line_bytes: expected at least 1, got 0"),
    "mapping": ({"source": {"train": ROWS}}, "source: expected a path, hf://owner/name or rows of one split, got dict"),
    "number": ({"source": 3}, "source: expected a path, hf://owner/name or rows of one split, got int"),
    "none": ({"source": []}, "source: expected at least one path, got none"),
    "suffix": ({"source": "records.txt"}, "source: expected a file ending in .jsonl, .ndjson, .json"),
    "hub": ({"source": "hf://owner"}, "source: expected hf://owner/name[/config][:split], got hf://owner"),
    "hub-deep": ({"source": "hf://a/b/c/d"}, "source: expected hf://owner/name[/config][:split], got"),
    "split": ({"source": "a.jsonl", "split": "train"}, "split: expected none for local files, got 'train'"),
}


@pytest.mark.parametrize(("change", "message"), ARGUMENTS.values(), ids=ARGUMENTS.keys())
def test_a_bad_argument_is_refused_before_anything_is_read(change: dict[str, Any], message: str) -> None:
    with pytest.raises((ArgumentError, ArgumentTypeError)) as caught:
        load(**{"format": "table", "source": ROWS, **change})
    assert str(caught.value).startswith(message)


def test_rows_are_read_one_at_a_time() -> None:
    read = []
    records = load("table", (read.append(i) or row for i, row in enumerate(ROWS)))  # type: ignore[func-returns-value]
    assert read == []
    next(records)
    assert read == [0]


def test_a_record_that_has_been_is_named_with_the_first() -> None:
    rows = [*ROWS[:3], {**ROWS[1], "history": ["something else"]}]
    with pytest.raises(RecordError, match=r"^record 3: the same user, query, response and time as record 1$"):
        list(load("table", rows))
    skipped = SkippedRecords(max_share=0.5)
    assert len(list(load("table", rows, skipped=skipped))) == 3
    assert skipped.counts == {"duplicate": 1}
    assert len(list(load("table", rows, keep_duplicates=True))) == 4
    assert len(list(load("table", [ROW, {**ROW, "timestamp": 5}]))) == 2, "at another time it is another record"


def test_an_empty_history_may_be_refused() -> None:
    assert len(list(load("table", ROWS))) == 20
    with pytest.raises(RecordError, match=r"^record 0: field 'history': expected at least one earlier text, got none$"):
        list(load("table", ROWS, require_history=True))


def test_a_source_without_records_is_refused(write: Any) -> None:
    with pytest.raises(RecordError, match=r"empty.jsonl: no records$"):
        list(load("table", write("empty.jsonl")))


@pytest.mark.parametrize(("bad", "refused"), [(2, False), (3, True)])
def test_more_than_the_share_of_bad_records_is_an_error(bad: int, refused: bool) -> None:
    rows = [*ROWS[bad:], *[{**ROW, "query": 1}] * bad]
    skipped = SkippedRecords(max_share=0.1)
    records = load("table", rows, skipped=skipped)
    if refused:
        with pytest.raises(
            RecordError, match=r"^source: 3 of 20 records were skipped, 15.0%; expected at most 10.0%; the"
        ):
            list(records)
    else:
        assert len(list(records)) == 18


def test_nothing_but_bad_records_is_an_error() -> None:
    with pytest.raises(RecordError, match=r"^source: all 3 records were skipped; the first: record 0: field 'query'"):
        list(load("table", [{**ROW, "query": 1}] * 3, skipped=SkippedRecords(max_share=1.0)))


def test_every_kind_of_bad_line_is_counted_and_placed(write: Any) -> None:
    good = [{**ROW, "response": f"r{i}"} for i in range(3)]
    lines = [good[0], b"{", b'"\xff"', {**ROW, "query": None}, "x" * 500, good[1], good[1], [], good[2]]
    path = write("t.jsonl", *lines)
    skipped, seen = SkippedRecords(max_share=0.9, on_skip=lambda error: seen.append(error)), []
    assert len(list(load("table", path, skipped=skipped, max_line_bytes=400))) == 3
    assert skipped.counts == {"json": 1, "utf-8": 1, "field": 2, "length": 1, "duplicate": 1}
    assert [str(error).split(":")[0] for error in seen] == [f"{path} line {number}" for number in (2, 3, 4, 5, 7, 8)]
    assert skipped.messages == [str(error) for error in seen]


def test_a_second_source_has_a_name_of_its_own() -> None:
    with pytest.raises(ArgumentError, match=r"^metadata: expected hf://owner/name.*, got hf://b$"):
        load("amazon", "hf://a/b/c", metadata="hf://b")


def test_several_files_are_one_source(write: Any) -> None:
    paths = [write(f"{i}.jsonl", row) for i, row in enumerate(ROWS[:3])]
    assert [record.response for record in load("table", paths)] == ["r0", "r1", "r2"]
    with pytest.raises(
        RecordError, match=r"1.jsonl line 1: the same user, query, response and time as .*1.jsonl line 1$"
    ):
        list(load("table", [*paths, paths[1]]))


#: For each format, a row with the fewest fields, numbered to differ, and the options.
LEAST: dict[str, tuple[Callable[[int], dict[str, Any]], dict[str, Any]]] = {
    "lamp": (lambda i: {"id": f"u{i}", "input": "q", "output": "r", "profile": []}, {}),
    "longlamp": (lambda i: {"name": "u", "input": "q", "output": f"r{i}", "profile": []}, {}),
    "amazon": (
        lambda i: {"user_id": "u", "profile": [], "data": {"asin": "b", "rating": 5, "title": "t", "text": f"r{i}"}},
        {"metadata": "items.jsonl"},
    ),
    "preferences": (lambda i: {"user_id": "u", "prompt": f"q{i}", "chosen": f"r{i}", "rejected": "s"}, {}),
    "chat": (lambda i: {"user_id": "u", "messages": [{"role": "assistant", "content": f"r{i}"}]}, {}),
    "table": (lambda i: {"user_id": "u", "query": "q", "response": f"r{i}", "history": []}, {}),
    "events": (lambda i: {"user_id": "u", "timestamp": i, "query": "q", "text": f"r{i}"}, {}),
}
#: Fields that some format reads, names of record fields, and one that nobody knows.
ADDED = (
    "user_id", "query", "response", "history", "timestamp", "title", "id", "text", "prompt", "chosen", "rejected",
    "summary", "date", "year", "author", "user", "level", "data", "messages", "profile", "output", "rating", "asin",
    "Demographic Information", "mood",
)  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_every_field_of_a_row_is_in_the_record_or_named_as_an_error(name: str, write: Any) -> None:
    make, options = LEAST[name]
    if "metadata" in options:
        options = {"metadata": write(options["metadata"], {"asin": "b", "title": "t"})}
    times = {"timestamp", "date", "year", "created_at"}
    lost = []
    for field in (field for field in ADDED if field not in make(0)):
        for inside in (False, True) if name == "amazon" else (False,):
            rows = [make(i) for i in range(2)]
            marks = ["1577836800", "1577836801"] if field in times else [f"mark{i}" for i in range(2)]
            for row, mark in zip(rows, marks, strict=True):
                value = int(mark) if field in times else [mark] if field in ("history", "profile", "messages") else mark
                (row["data"] if inside else row).setdefault(field, value)
            try:
                kept = json.dumps([record.to_dict() for record in load(name, rows, time_unit="s", **options)])
            except RecordError as error:
                kept = " ".join(marks) if f"{field!r}" in str(error) else ""
            lost += [field for mark in marks if mark not in kept and (inside is False or field not in make(0)["data"])]
    assert not lost


def test_what_is_absent_is_not_kept() -> None:
    (record,) = load("events", [{"user_id": "u", "timestamp": 1, "query": "q", "text": "r", "title": None, "a": None}])
    assert record.extra == {}

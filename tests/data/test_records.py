from __future__ import annotations

import json
import math
import pickle
import subprocess
import sys
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from nextquill.data import HistoryItem, Record, SkippedRecords, iter_jsonl, load_records, parse_record, read_jsonl
from nextquill.errors import ArgumentError, ArgumentTypeError, RecordError

GOOD: dict[str, Any] = {"user_id": "ann", "query": "a tale", "response": "Good.", "history": ["Fine."]}


def _write(folder: Path, *lines: str | bytes) -> Path:
    path = folder / "train.jsonl"
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return path


def test_parse_record_reads_every_field() -> None:
    raw = {
        **GOOD,
        "history": [{"title": "Sea", "text": "Fine.", "timestamp": 3}, {"text": "Poor.", "timestamp": 5.5}],
        "timestamp": 9,
        "chosen": "a",
        "rejected": "b",
    }
    assert parse_record(raw, "here") == Record(
        user_id="ann",
        query="a tale",
        response="Good.",
        history=(HistoryItem("Fine.", "Sea", 3.0), HistoryItem("Poor.", None, 5.5)),
        timestamp=9.0,
        extra={"chosen": "a", "rejected": "b"},
    )


def test_parse_record_writes_an_integer_user_id_as_a_string() -> None:
    assert parse_record({**GOOD, "user_id": 17}, "here").user_id == "17"


def test_parse_record_takes_an_empty_query_and_an_empty_history() -> None:
    record = parse_record({**GOOD, "query": "", "history": []}, "here")
    assert (record.query, record.history) == ("", ())


def test_dated_history_is_sorted_and_ties_keep_their_order() -> None:
    history = [{"text": text, "timestamp": time} for text, time in [("c", 2), ("a", 1), ("d", 2), ("b", 1)]]
    assert [item.text for item in parse_record({**GOOD, "history": history}, "here").history] == ["a", "b", "c", "d"]


def test_partly_dated_history_keeps_the_given_order() -> None:
    history = [{"text": "late", "timestamp": 2}, "undated", {"text": "early", "timestamp": 1}]
    assert [item.text for item in parse_record({**GOOD, "history": history}, "here").history] == [
        "late",
        "undated",
        "early",
    ]


def test_history_of_the_records_own_second_is_no_leak() -> None:
    raw = {**GOOD, "history": [{"text": "Fine.", "timestamp": 4}], "timestamp": 4}
    assert parse_record(raw, "here").history[0].timestamp == 4.0


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("2020-05-09T06:53:20Z", 1589007200.0),
        ("2020-05-09 08:53:20.5+02:00", 1589007200.5),
        ("2020-05-09", 1588982400.0),
        ("2020", 1577836800.0),
        (datetime(2020, 5, 9, 6, 53, 20, tzinfo=timezone.utc), 1589007200.0),
    ],
    ids=str,
)
def test_a_time_may_be_written_out(written: object, seconds: float) -> None:
    record = parse_record({**GOOD, "history": [{"text": "a", "timestamp": written}], "timestamp": written}, "here")
    assert (record.timestamp, record.history[0].timestamp) == (seconds, seconds)


def test_written_times_sort_with_numbers_and_leak_as_they_do() -> None:
    late, early = {"text": "late", "timestamp": "2020-05-09"}, {"text": "early", "timestamp": 1}
    raw = {**GOOD, "history": [late, early], "timestamp": "2020-05-10"}
    assert [item.text for item in parse_record(raw, "here").history] == ["early", "late"]
    with pytest.raises(RecordError, match="leaks the answer"):
        parse_record({**raw, "timestamp": "2020-05-08"}, "here")


BAD_FIELDS = {
    "user_id-bool": ({"user_id": True}, "field 'user_id': expected a string or an integer, got bool"),
    "user_id-float": ({"user_id": 1.5}, "field 'user_id': expected a string or an integer, got float"),
    "user_id-blank": ({"user_id": " "}, "field 'user_id': expected a name, got a blank string"),
    "query-int": ({"query": 3}, "field 'query': expected a string, got int"),
    "query-null": ({"query": None}, "field 'query': required, but null"),
    "query-surrogate": ({"query": "ab\ud800"}, "field 'query': expected valid Unicode, got a lone surrogate at char"),
    "response-list": ({"response": ["a"]}, "field 'response': expected a string, got list"),
    "response-blank": ({"response": " \n\t"}, "field 'response': expected some text, got a blank string"),
    "history-string": ({"history": "Fine."}, "field 'history': expected a list of strings or of objects with 'text'"),
    "history-dict": ({"history": {"text": "a"}}, "field 'history': expected a list of strings or of objects"),
    "item-int": ({"history": ["a", 3]}, "field 'history[1]': expected a string or an object with 'text', got int"),
    "item-null": ({"history": [None]}, "field 'history[0]': expected a string or an object with 'text', got null"),
    "text-int": ({"history": ["a", "b", {"text": 1}]}, "field 'history[2].text': expected a string, got int"),
    "text-missing": ({"history": [{"title": "a"}]}, "field 'history[0].text': required, but missing"),
    "text-null": ({"history": [{"text": None}]}, "field 'history[0].text': required, but null"),
    "title-int": ({"history": [{"text": "a", "title": 1}]}, "field 'history[0].title': expected a string, got int"),
    "item-timestamp-text": (
        {"history": [{"text": "a", "timestamp": "last May"}]},
        "field 'history[0].timestamp': expected a number or an ISO 8601 time, got 'last May'",
    ),
    "timestamp-zone": ({"timestamp": "2020-05-09T06:53:20"}, "field 'timestamp': expected a time with a zone, such as"),
    "timestamp-naive": ({"timestamp": datetime(2020, 5, 9)}, "field 'timestamp': expected a time with a zone, such as"),
    "timestamp-bool": ({"timestamp": True}, "field 'timestamp': expected a number of seconds or an ISO 8601 time, got"),
    "timestamp-nan": ({"timestamp": math.nan}, "field 'timestamp': expected a finite number of seconds, got nan"),
    "timestamp-inf": ({"timestamp": -math.inf}, "field 'timestamp': expected a finite number of seconds, got -inf"),
    "timestamp-huge": ({"timestamp": 10**400}, "field 'timestamp': expected a finite number of seconds, got inf"),
    "leak": (
        {"timestamp": 4, "history": ["a", {"text": "b", "timestamp": 5}]},
        "field 'history[1].timestamp': expected no later than the record's own 4.0, got 5.0",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD_FIELDS.values(), ids=BAD_FIELDS.keys())
def test_a_bad_field_is_named_with_its_place(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecordError) as caught:
        parse_record({**GOOD, **change}, "train.jsonl line 7")
    assert str(caught.value).startswith(f"train.jsonl line 7: {message}")


@pytest.mark.parametrize("name", sorted(GOOD))
def test_a_missing_field_is_named(name: str) -> None:
    raw = {key: value for key, value in GOOD.items() if key != name}
    with pytest.raises(RecordError, match=f"^here: field '{name}': required, but missing$"):
        parse_record(raw, "here")


@pytest.mark.parametrize("raw", [None, "text", ["list"], 3], ids=repr)
def test_a_record_that_is_no_mapping_is_refused(raw: object) -> None:
    with pytest.raises(RecordError, match=r"^here: expected an object with named fields, got"):
        parse_record(raw, "here")


def test_read_jsonl_skips_blank_lines_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = _write(tmp_path, b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), "", "  \r", json.dumps({**GOOD, "query": "b"}))
    assert [record.query for record in read_jsonl(path)] == ["a tale", "b"]


def test_read_jsonl_keeps_unicode_line_separators_inside_a_record(tmp_path: Path) -> None:
    raw = {**GOOD, "response": "one\u2028two\u0085three"}
    assert read_jsonl(_write(tmp_path, json.dumps(raw, ensure_ascii=False)))[0].response == raw["response"]


BAD_LINES = {
    "not-json": ("{'user_id': 1}", "line 3: not valid JSON: "),
    "cut": ('{"user_id": "a"', "line 3: not valid JSON: "),
    "huge-integer": ("1" * 5000, "line 3: not valid JSON: "),
    "not-utf8": (b'{"user_id": "\xe9"}', "line 3: not UTF-8: "),
    "field": (json.dumps({**GOOD, "query": 1}), "line 3: field 'query': expected a string, got int"),
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.values(), ids=BAD_LINES.keys())
def test_read_jsonl_names_file_and_line(tmp_path: Path, line: str | bytes, message: str) -> None:
    path = _write(tmp_path, json.dumps(GOOD), "", line)
    with pytest.raises(RecordError) as caught:
        read_jsonl(path)
    assert str(caught.value).startswith(f"{path} {message}")


@pytest.mark.parametrize("content", ["", "\n \n"], ids=["no-bytes", "blank-lines"])
def test_read_jsonl_refuses_an_empty_file(tmp_path: Path, content: str) -> None:
    with pytest.raises(RecordError, match=r"train\.jsonl: no records"):
        read_jsonl(_write(tmp_path, content))


def test_read_jsonl_names_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.jsonl", tmp_path):
        with pytest.raises(RecordError) as caught:
            read_jsonl(path)
        assert str(caught.value).startswith(f"{path}: cannot be read: ")


def test_load_records_reads_the_same_from_every_source(tmp_path: Path) -> None:
    raws = [{**GOOD, "history": [{"title": None, "text": "Fine.", "timestamp": None}]}, {**GOOD, "history": []}]
    expected = [parse_record(raw, "here") for raw in raws]
    path = _write(tmp_path, *map(json.dumps, raws))
    assert load_records(path) == load_records(str(path)) == expected
    assert load_records(raws) == load_records(iter(raws)) == load_records(expected) == expected
    assert load_records(Dataset.from_list(raws)) == expected


def test_load_records_names_the_position_of_a_bad_record() -> None:
    with pytest.raises(RecordError, match=r"^record 1: field 'query': expected a string, got int$"):
        load_records([GOOD, {**GOOD, "query": 1}])


def test_load_records_refuses_an_empty_source() -> None:
    with pytest.raises(RecordError, match="no records"):
        load_records([])


@pytest.mark.parametrize(
    "source", [GOOD, DatasetDict({"train": Dataset.from_list([GOOD])}), 3, None, b"train.jsonl"], ids=type
)
def test_load_records_refuses_what_holds_no_records(source: object) -> None:
    with pytest.raises(ArgumentTypeError, match=r"^source: expected a path or an iterable of records"):
        load_records(source)


def test_a_record_can_be_hashed_and_pickled(make_record: Any) -> None:
    record = make_record("Fine.", extra={"chosen": ["unhashable"]})
    assert pickle.loads(pickle.dumps(record)) == record
    assert len({record, record}) == 1


TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
TIMES = st.none() | st.floats(-1e9, 1e9)
ITEMS = st.builds(HistoryItem, text=TEXT, title=st.none() | TEXT, timestamp=st.floats(-1e9, 1e9))
RECORDS = st.builds(
    Record,
    user_id=TEXT.filter(str.strip),
    query=TEXT,
    response=TEXT.filter(str.strip),
    history=st.lists(ITEMS, max_size=4).map(lambda items: tuple(sorted(items, key=lambda item: item.timestamp))),
    timestamp=st.none() | st.floats(1e9, 2e9),
    extra=st.dictionaries(st.sampled_from(["chosen", "rejected", "score"]), TEXT | st.integers(), max_size=2),
)


@settings(deadline=None)
@given(records=st.lists(RECORDS, min_size=1, max_size=3), ascii_only=st.booleans())
def test_records_survive_a_round_trip_through_a_file(
    tmp_path_factory: pytest.TempPathFactory, records: list[Record], ascii_only: bool
) -> None:
    lines = []
    for record in records:
        fields = asdict(record)
        lines.append(json.dumps({**fields.pop("extra"), **fields}, ensure_ascii=ascii_only))
    path = tmp_path_factory.getbasetemp() / "round_trip.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8", newline="\n")
    assert read_jsonl(path) == records


@settings(deadline=None)
@given(record=RECORDS)
def test_a_record_survives_a_round_trip_through_its_mapping(record: Record) -> None:
    assert parse_record(record.to_dict(), "here") == record
    assert parse_record(json.loads(json.dumps(record.to_dict(), allow_nan=False)), "here") == record


@given(
    raw=st.fixed_dictionaries(
        {"user_id": TEXT | st.integers(), "query": TEXT, "response": TEXT},
        optional={
            "history": st.lists(
                TEXT | st.fixed_dictionaries({"text": TEXT}, optional={"timestamp": TIMES}), max_size=3
            ),
            "timestamp": TIMES,
            "more": st.none() | TEXT,
        },
    )
)
def test_what_parse_record_makes_is_kept_by_a_round_trip(raw: dict[str, Any]) -> None:
    try:
        record = parse_record(raw, "here")
    except RecordError:
        return
    assert parse_record(record.to_dict(), "here") == record


def test_a_mapping_has_no_room_for_an_extra_field_of_the_same_name() -> None:
    with pytest.raises(ArgumentError, match=r"^extra: expected keys that are not fields of a record, got 'timestamp'$"):
        Record("u", "q", "r", extra={"timestamp": 3}).to_dict()


def test_bad_lines_are_left_out_and_counted(tmp_path: Path) -> None:
    good = [json.dumps({**GOOD, "query": str(i)}) for i in range(9)]
    path = _write(tmp_path, *good[:4], "{", *good[4:])
    with pytest.raises(RecordError, match=r"line 5: not valid JSON"):
        read_jsonl(path)
    skipped = SkippedRecords()
    assert [record.query for record in read_jsonl(path, skipped)] == [str(i) for i in range(9)]
    assert (skipped.accepted, skipped.counts) == (9, {"json": 1})
    path = _write(tmp_path, *good[:4], "{", json.dumps({**GOOD, "query": 3}))
    with pytest.raises(
        RecordError, match=r"2 of 6 records were skipped, 33.3%; expected at most 10.0%; the first: .*line 5"
    ):
        load_records(path, SkippedRecords())
    with pytest.raises(
        RecordError, match=r"^source: all 2 records were skipped; the first: record 0: expected an object"
    ):
        load_records([1, 2], SkippedRecords(max_share=1.0))


def test_load_records_counts_what_it_leaves_out() -> None:
    skipped = SkippedRecords(max_share=0.5)
    assert load_records([GOOD, {**GOOD, "query": 1}], skipped) == [parse_record(GOOD, "here")]
    assert skipped.messages == ["record 1: field 'query': expected a string, got int"]


def test_iter_jsonl_reads_no_further_than_it_is_asked(tmp_path: Path) -> None:
    records = iter_jsonl(_write(tmp_path, json.dumps(GOOD), "{"))
    assert next(records).query == "a tale"
    with pytest.raises(RecordError, match=r"line 2: not valid JSON"):
        next(records)


def test_importing_the_data_package_imports_nothing_of_hugging_face() -> None:
    code = (
        "import sys, nextquill.data; "
        "print(sorted({'transformers', 'datasets', 'tokenizers', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

"""Training records, each an example of a user's writing: how they are read and checked.

A record is a mapping with `user_id`, `query`, `response` and `history`, an optional `timestamp`, and any other keys,
which are kept in `extra`. Every problem is a `RecordError` that names the record's place and the field at fault, such
as `train.jsonl line 7: field 'history[2].text': expected a string, got int`.

Two rules protect the training. First, `history` must be present, if only as an empty list: otherwise a misspelt key
would train a personalised model without any history. Second, no item of the history may be later than the record,
because a text from the user's future gives away the answer.

Times are seconds since the epoch, or ISO 8601 with a zone, such as "2020-05-09T06:53:20Z"; a date alone is its first
moment in UTC. `nextquill.data.loaders` also converts milliseconds, and clock times of a known zone.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from numbers import Integral, Real
from typing import Any

from nextquill.data.lines import HUB, MAX_LINE_BYTES, json_lines
from nextquill.data.skipped import PlacedError, SkippedRecords, each_good, type_name, unexpected
from nextquill.data.times import Clock, as_float
from nextquill.errors import ArgumentError, ArgumentTypeError

#: The fields of a record; every other key is in `extra`.
RECORD_FIELDS = frozenset({"user_id", "query", "response", "history", "timestamp"})


@dataclass(frozen=True, slots=True)
class HistoryItem:
    """One earlier text of a user.

    Args:
        text: the user's text.
        title: its subject, or None.
        timestamp: seconds since the epoch, or None if unknown.
    """

    text: str
    title: str | None = None
    timestamp: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The item as `parse_record` reads it, without fields that are None."""
        fields = {"title": self.title, "text": self.text, "timestamp": self.timestamp}
        return {name: value for name, value in fields.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Record:
    """One example: a user's response to a query, and the user's earlier texts.

    Args:
        user_id: the user who wrote the response.
        query: the request; may be empty.
        response: the user's answer.
        history: the user's earlier texts, oldest first.
        timestamp: the response's time in seconds since the epoch, or None.
        extra: every other key of the record, such as `chosen` and `rejected`.
    """

    user_id: str
    query: str
    response: str
    history: tuple[HistoryItem, ...] = ()
    timestamp: float | None = None
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def to_dict(self) -> dict[str, Any]:
        """The mapping that `parse_record` reads back as an equal record, ready for JSON if `extra` is.

        Raises:
            ArgumentError: a key of `extra` is a field of the record.
        """
        clash = RECORD_FIELDS & self.extra.keys()
        if clash:
            raise ArgumentError(f"extra: expected keys that are not fields of a record, got {min(clash)!r}")
        dated = {} if self.timestamp is None else {"timestamp": self.timestamp}
        history = [item.to_dict() for item in self.history]
        fields = {"user_id": self.user_id, "query": self.query, "response": self.response, "history": history}
        return {**fields, **dated, **self.extra}


def parse_record(raw: object, where: str) -> Record:
    """Check one raw record and return it as a `Record`.

    Args:
        raw: a mapping with `user_id` (str or int), `query` (str), `response` (str, not blank), `history` (a list of
            strings or of mappings with `text` and optional `title` and `timestamp`; other keys of an item are ignored)
            and optionally `timestamp` (a finite number of seconds, an ISO 8601 string, or a `datetime` with a zone).
            None counts as absent.
        where: the record's place, the first words of every error.

    Returns:
        The record. If every history item has a timestamp, the items are sorted by it, and ties keep their order.
        Otherwise they keep the given order, which should be oldest first.

    Raises:
        RecordError: a field is missing, has the wrong type or an unusable value, or a history item is later than the
            record.
    """
    if not isinstance(raw, Mapping):
        raise PlacedError(where, f"expected an object with named fields, got {type_name(raw)}")
    timestamp = _timestamp(raw.get("timestamp"), where, "timestamp")
    given = required(raw, "history", where)
    if not isinstance(given, Sequence) or isinstance(given, (str, bytes)):
        raise unexpected(where, "history", "a list of strings or of objects with 'text'", given)
    history = [_history_item(item, where, f"history[{position}]") for position, item in enumerate(given)]
    check_times(history, timestamp, where)
    return Record(
        user_id=check_user_id(required(raw, "user_id", where), where),
        query=check_text(required(raw, "query", where), where, "query"),
        response=check_response(required(raw, "response", where), where),
        history=tuple(in_time_order(history)),
        timestamp=timestamp,
        extra={str(key): value for key, value in raw.items() if key not in RECORD_FIELDS},
    )


def iter_jsonl(
    path: str | os.PathLike[str], skipped: SkippedRecords | None = None, *, max_line_bytes: int = MAX_LINE_BYTES
) -> Iterator[Record]:
    """Read records from a UTF-8 file of JSON lines, plain or gzipped, one at a time. Blank lines are ignored.

    Args:
        skipped: counts bad records, which are then left out; None makes the first one an error.
        max_line_bytes: a longer line is a bad record; no more of it than this is held.

    Raises:
        RecordError: the file is missing, unreadable or empty; a line is too long, not UTF-8, not JSON or not a valid
            record, and the message names file and line; or, with `skipped`, too many records are bad.
    """
    lines = json_lines(path, max_line_bytes=max_line_bytes, skipped=skipped)
    return each_good(lines, _record, skipped, os.fspath(path), "no records, the file is empty")


def read_jsonl(path: str | os.PathLike[str], skipped: SkippedRecords | None = None) -> list[Record]:
    """Read all records of a file; arguments and errors are those of `iter_jsonl`."""
    return list(iter_jsonl(path, skipped))


def iter_records(path: str | os.PathLike[str], skipped: SkippedRecords | None = None) -> Iterator[Record]:
    """Read records from a JSONL file or `hf://owner/name[/config][:split]`, one at a time; see `iter_jsonl`."""
    if not str(path).startswith(HUB):
        return iter_jsonl(path, skipped)
    from nextquill.data.loaders import load  # which makes records of rows, so it imports this module

    return load("table", path, skipped=skipped, keep_duplicates=True)


def load_records(source: object, skipped: SkippedRecords | None = None) -> list[Record]:
    """Read records from a file, a data set or an iterable.

    Args:
        source: the path of a JSONL file, `hf://owner/name[/config][:split]`, a `datasets.Dataset`, or any iterable of
            mappings or `Record`s. A `Record` is not checked again.
        skipped: counts bad records, which are then left out; None makes the first one an error.

    Raises:
        RecordError: a record is malformed, or there are none; with `skipped`, too many are malformed.
        ArgumentTypeError: `source` has another type. A mapping, such as a `datasets.DatasetDict`, is refused, since
            iterating it would yield the names of its splits.
    """
    if isinstance(source, (str, os.PathLike)):
        return list(iter_records(source, skipped))
    if isinstance(source, (Mapping, bytes)) or not isinstance(source, Iterable):
        raise ArgumentTypeError(
            f"source: expected a path or an iterable of records (of one split), got {type_name(source)}"
        )
    items = ((f"record {position}", raw) for position, raw in enumerate(source))
    return list(each_good(items, _record, skipped, "source", "no records, the iterable is empty"))


def _record(where: str, raw: object) -> Record:
    return raw if isinstance(raw, Record) else parse_record(raw, where)


def required(raw: Mapping[Any, Any], name: str, where: str, path: str = "") -> object:
    """Return a field's value; raise RecordError if it is missing or None."""
    value = raw.get(name)
    if value is None:
        state = "null" if name in raw else "missing"
        raise PlacedError(where, f"required, but {state}", path + name)
    return value


def check_user_id(value: object, where: str, name: str = "user_id") -> str:
    """Return a user's name as a string; raise RecordError if it is neither a string nor an integer, or blank."""
    if isinstance(value, Integral) and not isinstance(value, bool):
        return str(int(value))
    if not isinstance(value, str):
        raise unexpected(where, name, "a string or an integer", value)
    text = check_text(value, where, name)
    if not text.strip():
        raise PlacedError(where, "expected a name, got a blank string", name)
    return text


def check_response(value: object, where: str, name: str = "response") -> str:
    """Return a response; raise RecordError if it is not a string, blank, or not valid Unicode."""
    text = check_text(value, where, name)
    if not text.strip():
        raise PlacedError(where, "expected some text, got a blank string", name)
    return text


def check_text(value: object, where: str, name: str) -> str:
    """Return a text, which may be empty; raise RecordError if it is not a string, or not valid Unicode."""
    if not isinstance(value, str):
        raise unexpected(where, name, "a string", value)
    if value.isascii():  # without a copy
        return value
    try:
        # JSON can hold half of a surrogate pair, on which tokenizers fail much later without naming the record.
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        problem = f"expected valid Unicode, got a lone surrogate at character {error.start}"
        raise PlacedError(where, problem, name) from error
    return value


def _timestamp(value: object, where: str, name: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, (str, datetime)):
        return Clock().date(value, where, name)  # a new clock, as its errors name earlier times of the same source
    if isinstance(value, bool) or not isinstance(value, (float, Real)):
        raise unexpected(where, name, "a number of seconds or an ISO 8601 time", value)
    seconds = as_float(value)
    if not math.isfinite(seconds):
        raise PlacedError(where, f"expected a finite number of seconds, got {seconds}", name)
    return seconds


def check_times(history: Sequence[HistoryItem], timestamp: float | None, where: str) -> None:
    """Raise RecordError if an item is dated after the record, whose time is `timestamp`."""
    for position, item in enumerate(history):
        if item.timestamp is not None and timestamp is not None and item.timestamp > timestamp:
            raise PlacedError(
                where,
                f"expected no later than the record's own {timestamp}, got {item.timestamp}: a text from the future "
                "leaks the answer",
                f"history[{position}].timestamp",
            )


def in_time_order(history: Sequence[HistoryItem]) -> Sequence[HistoryItem]:
    """The items sorted by timestamp if all have one; otherwise in the given order, which should be oldest first."""
    if any(item.timestamp is None for item in history):
        return history
    return sorted(history, key=lambda item: item.timestamp or 0.0)


def _history_item(raw: object, where: str, name: str) -> HistoryItem:
    if isinstance(raw, str):
        return HistoryItem(check_text(raw, where, name))
    if not isinstance(raw, (dict, Mapping)):  # dict first, as an abstract class takes ten times as long to ask
        raise unexpected(where, name, "a string or an object with 'text'", raw)
    title = raw.get("title")
    return HistoryItem(
        text=check_text(required(raw, "text", where, f"{name}."), where, f"{name}.text"),
        title=None if title is None else check_text(title, where, f"{name}.title"),
        timestamp=_timestamp(raw.get("timestamp"), where, f"{name}.timestamp"),
    )

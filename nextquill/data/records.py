"""Training records: what one example of a user's writing is, and how it is read and checked.

A record is a mapping with `user_id`, `query`, `response` and `history`, an optional `timestamp`, and any other keys,
which are kept in `extra`. Every problem is a `RecordError` that names where the record stands and the field at fault,
such as `train.jsonl line 7: field 'history[2].text': expected a string, got int`.

Two rules protect what is learnt. `history` has to be present, if only as an empty list: a misspelt key would otherwise
train a personalised model on no history at all. And no item of the history may be later than the record itself, because
a text from the user's future tells the model what it is asked to predict.

Times are numbers of seconds since the epoch, and nothing else: what a date, a time zone or a millisecond means is known
where the data come from, so `nextquill.data.loaders` converts them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from nextquill.data.lines import MAX_LINE_BYTES, json_lines
from nextquill.data.skipped import PlacedError, SkippedRecords, each_good
from nextquill.errors import ArgumentError, ArgumentTypeError

_RECORD_FIELDS = frozenset({"user_id", "query", "response", "history", "timestamp"})


@dataclass(frozen=True, slots=True)
class HistoryItem:
    """One earlier text of a user.

    Args:
        text: what the user wrote.
        title: what it was written about, or None.
        timestamp: seconds since the epoch, or None where unknown.
    """

    text: str
    title: str | None = None
    timestamp: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The item as `parse_record` reads it; what is None is left out."""
        fields = {"title": self.title, "text": self.text, "timestamp": self.timestamp}
        return {name: value for name, value in fields.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Record:
    """One example: a user's response to a query, and what that user had written before.

    Args:
        user_id: whose response it is.
        query: what was asked; may be empty.
        response: what the user answered.
        history: the user's earlier texts, oldest first.
        timestamp: seconds since the epoch of the response, or None.
        extra: every other key of the record, such as `chosen` and `rejected`.
    """

    user_id: str
    query: str
    response: str
    history: tuple[HistoryItem, ...] = ()
    timestamp: float | None = None
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def to_dict(self) -> dict[str, Any]:
        """The mapping that `parse_record` reads back as an equal record, ready for JSON where `extra` is.

        Raises:
            ArgumentError: `extra` has a key that is a field of the record.
        """
        clash = _RECORD_FIELDS & self.extra.keys()
        if clash:
            raise ArgumentError(f"extra: expected keys that are no fields of a record, got {min(clash)!r}")
        fields: dict[str, Any] = {
            "user_id": self.user_id,
            "query": self.query,
            "response": self.response,
            "history": [item.to_dict() for item in self.history],
        }
        if self.timestamp is not None:
            fields["timestamp"] = self.timestamp
        return {**fields, **self.extra}


def parse_record(raw: object, where: str) -> Record:
    """Check one raw record and return it as a `Record`.

    Args:
        raw: a mapping with `user_id` (str or int), `query` (str), `response` (str, not blank), `history` (a list of
            strings or of mappings with `text` and optional `title` and `timestamp`; other keys of an item are ignored)
            and optionally `timestamp` (seconds, a finite number). None counts as absent.
        where: where the record comes from, put at the head of every error.

    Returns:
        The record. When every history item has a timestamp, the items are sorted by it (ties keep their order);
        otherwise they keep the given order, which is taken to be oldest first.

    Raises:
        RecordError: a field is missing, has the wrong type or an unusable value, or a history item is later than the
            record.
    """
    if not isinstance(raw, Mapping):
        raise PlacedError(where, f"expected an object with named fields, got {_type_name(raw)}")
    timestamp = _timestamp(raw.get("timestamp"), where, "timestamp")
    history = _history(_required(raw, "history", where), where, timestamp)
    return Record(
        user_id=check_user_id(_required(raw, "user_id", where), where),
        query=check_text(_required(raw, "query", where), where, "query"),
        response=check_response(_required(raw, "response", where), where),
        history=history,
        timestamp=timestamp,
        extra={str(key): value for key, value in raw.items() if key not in _RECORD_FIELDS},
    )


def iter_jsonl(
    path: str | os.PathLike[str], skipped: SkippedRecords | None = None, *, max_line_bytes: int = MAX_LINE_BYTES
) -> Iterator[Record]:
    """Read a UTF-8 file with one JSON record a line, plain or gzipped, a record at a time; blank lines are passed over.

    Args:
        path: the file.
        skipped: takes note of bad records, which are left out; None makes the first of them an error.
        max_line_bytes: a longer line is a bad record; no more of it is held.

    Raises:
        RecordError: the file is missing, unreadable or holds no record; a line is too long, not UTF-8, not JSON or not
            a valid record, and the message names the file and the line; or, with `skipped`, too many records are bad.
    """
    lines = json_lines(path, max_line_bytes=max_line_bytes, skipped=skipped)
    return each_good(lines, _record, skipped, os.fspath(path), "no records, the file is empty")


def read_jsonl(path: str | os.PathLike[str], skipped: SkippedRecords | None = None) -> list[Record]:
    """Read all records of a file; see `iter_jsonl`.

    Raises:
        RecordError: as `iter_jsonl`.
    """
    return list(iter_jsonl(path, skipped))


def load_records(source: object, skipped: SkippedRecords | None = None) -> list[Record]:
    """Read records from wherever they are.

    Args:
        source: the path of a JSONL file, a `datasets.Dataset`, or any iterable of mappings or `Record`s. A `Record` is
            taken as it is.
        skipped: takes note of bad records, which are left out; None makes the first of them an error.

    Raises:
        RecordError: a record is malformed, or there are none; with `skipped`, too many are malformed.
        ArgumentTypeError: `source` is none of the above; a mapping, such as a `datasets.DatasetDict`, is refused,
            since iterating it would yield the names of its splits.
    """
    if isinstance(source, (str, os.PathLike)):
        return read_jsonl(source, skipped)
    if isinstance(source, (Mapping, bytes)) or not isinstance(source, Iterable):
        raise ArgumentTypeError(
            f"source: expected a path or an iterable of records (of one split), got {_type_name(source)}"
        )
    items = ((f"record {position}", raw) for position, raw in enumerate(source))
    return list(each_good(items, _record, skipped, "source", "no records, the iterable is empty"))


def _record(where: str, raw: object) -> Record:
    return raw if isinstance(raw, Record) else parse_record(raw, where)


def _required(raw: Mapping[Any, Any], name: str, where: str, path: str = "") -> object:
    value = raw.get(name)
    if value is None:
        state = "null" if name in raw else "missing"
        raise PlacedError(where, f"required, but {state}", path + name)
    return value


def check_user_id(value: object, where: str, name: str = "user_id") -> str:
    """A user's name as a string; `name` is the field it came from.

    Raises:
        RecordError: it is neither a string nor an integer, or blank.
    """
    if isinstance(value, Integral) and not isinstance(value, bool):
        return str(int(value))
    if not isinstance(value, str):
        raise unexpected(where, name, "a string or an integer", value)
    text = check_text(value, where, name)
    if not text.strip():
        raise PlacedError(where, "expected a name, got a blank string", name)
    return text


def check_response(value: object, where: str, name: str = "response") -> str:
    """A response; `name` is the field it came from.

    Raises:
        RecordError: it is no string, blank, or not valid Unicode.
    """
    text = check_text(value, where, name)
    if not text.strip():
        raise PlacedError(where, "expected some text, got a blank string", name)
    return text


def check_text(value: object, where: str, name: str) -> str:
    """A text, which may be empty; `name` is the field it came from.

    Raises:
        RecordError: it is no string, or not valid Unicode.
    """
    if not isinstance(value, str):
        raise unexpected(where, name, "a string", value)
    try:
        # JSON can spell half of a surrogate pair; tokenizers fail on it much later, without naming the record.
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PlacedError(
            where, f"expected valid Unicode, got a lone surrogate at character {error.start}", name
        ) from error
    return value


def _timestamp(value: object, where: str, name: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Real):
        raise unexpected(where, name, "a number of seconds", value)
    try:
        seconds = float(value)
    except OverflowError:
        seconds = math.inf
    if not math.isfinite(seconds):
        raise PlacedError(where, f"expected a finite number of seconds, got {seconds}", name)
    return seconds


def _history(value: object, where: str, record_timestamp: float | None) -> tuple[HistoryItem, ...]:
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise unexpected(where, "history", "a list of strings or of objects with 'text'", value)
    items = [_history_item(raw, where, f"history[{position}]") for position, raw in enumerate(value)]
    for position, item in enumerate(items):
        if item.timestamp is not None and record_timestamp is not None and item.timestamp > record_timestamp:
            raise PlacedError(
                where,
                f"expected no later than the record's own {record_timestamp}, got {item.timestamp}: a text from the "
                "future leaks the answer",
                f"history[{position}].timestamp",
            )
    dated = [(item.timestamp, item) for item in items if item.timestamp is not None]
    if len(dated) == len(items):
        return tuple(item for _, item in sorted(dated, key=lambda pair: pair[0]))
    return tuple(items)


def _history_item(raw: object, where: str, name: str) -> HistoryItem:
    if isinstance(raw, str):
        return HistoryItem(check_text(raw, where, name))
    if not isinstance(raw, Mapping):
        raise unexpected(where, name, "a string or an object with 'text'", raw)
    title = raw.get("title")
    return HistoryItem(
        text=check_text(_required(raw, "text", where, f"{name}."), where, f"{name}.text"),
        title=None if title is None else check_text(title, where, f"{name}.title"),
        timestamp=_timestamp(raw.get("timestamp"), where, f"{name}.timestamp"),
    )


def unexpected(where: str, name: str, expected: str, value: object) -> PlacedError:
    """The error of a value of the wrong type."""
    return PlacedError(where, f"expected {expected}, got {_type_name(value)}", name)


def _type_name(value: object) -> str:
    return "null" if value is None else type(value).__name__

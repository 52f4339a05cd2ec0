"""Training records: what one example of a user's writing is, and how it is read and checked.

A record is a mapping with `user_id`, `query`, `response` and `history`, an optional `timestamp`, and any other keys,
which are kept in `extra`. Every problem is a `RecordError` that names where the record stands and the field at fault,
such as `train.jsonl line 7: field 'history[2].text': expected a string, got int`.

Two rules protect what is learnt. `history` has to be present, if only as an empty list: a misspelt key would otherwise
train a personalised model on no history at all. And no item of the history may be later than the record itself, because
a text from the user's future tells the model what it is asked to predict.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from nextquill.errors import ArgumentTypeError, RecordError

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
        raise RecordError(f"{where}: expected an object with named fields, got {_type_name(raw)}")
    timestamp = _timestamp(raw.get("timestamp"), where, "timestamp")
    history = _history(_required(raw, "history", where), where, timestamp)
    return Record(
        user_id=_user_id(_required(raw, "user_id", where), where),
        query=_text(_required(raw, "query", where), where, "query"),
        response=_response(_required(raw, "response", where), where),
        history=history,
        timestamp=timestamp,
        extra={str(key): value for key, value in raw.items() if key not in _RECORD_FIELDS},
    )


def read_jsonl(path: str | os.PathLike[str]) -> list[Record]:
    """Read a UTF-8 file with one JSON record a line; blank lines are skipped.

    Raises:
        RecordError: the file is missing, unreadable or holds no record, or a line is not UTF-8, not JSON or not a valid
            record; the message names the file and the line.
    """
    records = [parse_record(raw, where) for where, raw in json_lines(path)]
    if not records:
        raise RecordError(f"{os.fspath(path)}: no records, the file is empty")
    return records


def load_records(source: object) -> list[Record]:
    """Read records from wherever they are.

    Args:
        source: the path of a JSONL file, a `datasets.Dataset`, or any iterable of mappings or `Record`s. A `Record` is
            taken as it is.

    Raises:
        RecordError: a record is malformed, or there are none.
        ArgumentTypeError: `source` is none of the above; a mapping, such as a `datasets.DatasetDict`, is refused,
            since iterating it would yield the names of its splits.
    """
    if isinstance(source, (str, os.PathLike)):
        return read_jsonl(source)
    if isinstance(source, (Mapping, bytes)) or not isinstance(source, Iterable):
        raise ArgumentTypeError(
            f"source: expected a path or an iterable of records (of one split), got {_type_name(source)}"
        )
    records = [
        raw if isinstance(raw, Record) else parse_record(raw, f"record {position}")
        for position, raw in enumerate(source)
    ]
    if not records:
        raise RecordError("source: no records, the iterable is empty")
    return records


def json_lines(path: str | os.PathLike[str]) -> Iterator[tuple[str, object]]:
    """Yield where each line of a JSONL file stands, and what it holds; blank lines are passed over.

    Raises:
        RecordError: the file cannot be read, or a line is not JSON.
    """
    name = os.fspath(path)
    try:
        with open(path, "rb") as file:
            # Bytes, so that a line that is not UTF-8 can be named by its number.
            for number, line in enumerate(file, start=1):
                where = f"{name} line {number}"
                text = _decode(line, where)
                if text.strip():
                    yield where, _parse_json(text, where)
    except OSError as error:
        raise RecordError(f"{name}: cannot be read: {error.strerror or error}") from error


def _decode(line: bytes, where: str) -> str:
    try:
        # Editors on Windows begin a file with a byte-order mark, which no JSON parser accepts.
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecordError(f"{where}: not UTF-8: {error.reason} at byte {error.start}") from error


def _parse_json(text: str, where: str) -> object:
    try:
        parsed: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{where}: not valid JSON: {error}") from error
    return parsed


def _required(raw: Mapping[Any, Any], name: str, where: str) -> object:
    value = raw.get(name)
    if value is None:
        state = "null" if name in raw else "missing"
        raise RecordError(f"{where}: field '{name}': required, but {state}")
    return value


def _user_id(value: object, where: str) -> str:
    if isinstance(value, Integral) and not isinstance(value, bool):
        return str(int(value))
    if not isinstance(value, str):
        raise _expected(where, "user_id", "a string or an integer", value)
    text = _text(value, where, "user_id")
    if not text.strip():
        raise RecordError(f"{where}: field 'user_id': expected a name, got a blank string")
    return text


def _response(value: object, where: str) -> str:
    text = _text(value, where, "response")
    if not text.strip():
        raise RecordError(f"{where}: field 'response': expected some text, got a blank string")
    return text


def _text(value: object, where: str, name: str) -> str:
    if not isinstance(value, str):
        raise _expected(where, name, "a string", value)
    try:
        # JSON can spell half of a surrogate pair; tokenizers fail on it much later, without naming the record.
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RecordError(
            f"{where}: field '{name}': expected valid Unicode, got a lone surrogate at character {error.start}"
        ) from error
    return value


def _timestamp(value: object, where: str, name: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Real):
        raise _expected(where, name, "a number of seconds", value)
    try:
        seconds = float(value)
    except OverflowError:
        seconds = math.inf
    if not math.isfinite(seconds):
        raise RecordError(f"{where}: field '{name}': expected a finite number of seconds, got {seconds}")
    return seconds


def _history(value: object, where: str, record_timestamp: float | None) -> tuple[HistoryItem, ...]:
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise _expected(where, "history", "a list of strings or of objects with 'text'", value)
    items = [_history_item(raw, where, f"history[{position}]") for position, raw in enumerate(value)]
    for position, item in enumerate(items):
        if item.timestamp is not None and record_timestamp is not None and item.timestamp > record_timestamp:
            raise RecordError(
                f"{where}: field 'history[{position}].timestamp': expected no later than the record's own "
                f"{record_timestamp}, got {item.timestamp}: a text from the future leaks the answer"
            )
    dated = [(item.timestamp, item) for item in items if item.timestamp is not None]
    if len(dated) == len(items):
        return tuple(item for _, item in sorted(dated, key=lambda pair: pair[0]))
    return tuple(items)


def _history_item(raw: object, where: str, name: str) -> HistoryItem:
    if isinstance(raw, str):
        return HistoryItem(_text(raw, where, name))
    if not isinstance(raw, Mapping):
        raise _expected(where, name, "a string or an object with 'text'", raw)
    if raw.get("text") is None:
        raise RecordError(f"{where}: field '{name}.text': required, but {'null' if 'text' in raw else 'missing'}")
    title = raw.get("title")
    return HistoryItem(
        text=_text(raw["text"], where, f"{name}.text"),
        title=None if title is None else _text(title, where, f"{name}.title"),
        timestamp=_timestamp(raw.get("timestamp"), where, f"{name}.timestamp"),
    )


def _expected(where: str, name: str, expected: str, value: object) -> RecordError:
    return RecordError(f"{where}: field '{name}': expected {expected}, got {_type_name(value)}")


def _type_name(value: object) -> str:
    return "null" if value is None else type(value).__name__

"""Reads public data sets, logs and tables as records of one schema.

    for record in load("lamp", "train_questions.json", outputs="train_outputs.json"):
        ...

Each family of data sets has a file that converts its fields; `FORMATS` lists them. A loader gets a `Source`, which
yields rows from files or the hub one at a time, and makes a record from each row. A bad row is a `RecordError` that
names file, line and field; with a `SkippedRecords` it is counted there instead.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from nextquill.data._checks import check_integer, check_one_of
from nextquill.data.lines import MAX_LINE_BYTES
from nextquill.data.loaders.amazon import load_amazon
from nextquill.data.loaders.chat import load_chat
from nextquill.data.loaders.events import load_events
from nextquill.data.loaders.lamp import load_lamp
from nextquill.data.loaders.longlamp import load_longlamp
from nextquill.data.loaders.preferences import load_preferences
from nextquill.data.loaders.source import Rows, Source
from nextquill.data.loaders.tables import load_table
from nextquill.data.records import Record
from nextquill.data.skipped import PlacedError, SkippedRecords, each_good
from nextquill.data.times import Clock
from nextquill.errors import ArgumentError
from nextquill.storage.fingerprints import digest_of

__all__ = ["FORMATS", "Format", "load"]


@dataclass(frozen=True)
class Format:
    """A family of data sets.

    Args:
        summary: a description in one line.
        load: takes a source and the options, and yields records with their places.
        options: descriptions of the options, by name.
        time_unit: the default unit of numeric times, "s" or "ms".
    """

    summary: str
    load: Callable[..., Iterator[tuple[str, Record]]]
    options: Mapping[str, str] = field(default_factory=dict)
    time_unit: str = "s"


_MAX_HISTORY = "the most earlier texts, the latest ones; all by default"
FORMATS: Mapping[str, Format] = {
    "lamp": Format(
        "LaMP 1 to 7: a file of questions, and one of outputs",
        load_lamp,
        {"outputs": "the file with the outputs", "task": "the task's name in the records; else as in outputs"},
    ),
    "longlamp": Format("LongLaMP: abstracts, product reviews and topics", load_longlamp),
    "amazon": Format(
        "Amazon reviews as NextQuill uses them (DPL-main with DPL-meta)",
        load_amazon,
        {"metadata": "the items' titles and descriptions", "metadata_split": "their split on the hub; else 'full'"},
        time_unit="ms",
    ),
    "preferences": Format(
        "pairs of a preferred and another response: FSPO, AlignX and the like",
        load_preferences,
        {"max_pairs": "the most earlier pairs of a user that become the history; 8 by default"},
    ),
    "chat": Format(
        "conversations {user_id, messages, timestamp}",
        load_chat,
        {"respond_as": "the role of the response, 'assistant' or 'user'", "max_history": _MAX_HISTORY},
    ),
    "table": Format("records in JSONL, JSON, CSV or Parquet whose columns may have other names", load_table),
    "events": Format(
        "a log of texts {user_id, timestamp, text, title}, whose histories are made from it",
        load_events,
        {
            "query": "the request, such as 'Write the next post titled {title}'; the column 'query' by default",
            "min_history": "the fewest earlier texts that a record needs; 0 by default",
            "max_history": _MAX_HISTORY,
        },
    ),
}


def load(
    format: str,
    source: Rows,
    *,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    timezone: str | None = None,
    time_unit: str | None = None,
    max_line_bytes: int = MAX_LINE_BYTES,
    skipped: SkippedRecords | None = None,
    require_history: bool = False,
    keep_duplicates: bool = False,
    **options: Any,
) -> Iterator[Record]:
    """Read a data set as records, one at a time.

        load("lamp", "train_questions.json", outputs="train_outputs.json")
        load("longlamp", "hf://LongLaMP/LongLaMP/topic_writing_user", split="train")
        load("events", "posts.csv", columns={"user_id": "author", "text": "body"}, query="Write a post")

    Arguments are checked at once, and rows as they are read. To find duplicates, some 200 bytes are held per record.

    Args:
        format: one of `FORMATS`.
        source: a file, `hf://owner/name[/config][:split]`, several of either, or rows such as a
            `datasets.IterableDataset`.
        split: the split on the hub; "train" by default.
        columns: the column of each renamed field, such as {"user_id": "author"}.
        timezone: the zone of clock times that name none, such as "Europe/Berlin"; without it they are errors.
        time_unit: the unit of numeric times, "s" or "ms"; the format's own by default.
        max_line_bytes: the most bytes in a line, CSV record, or item of a JSON list.
        skipped: counts bad records, which are then left out; None makes the first one an error.
        require_history: treat records without history as bad.
        keep_duplicates: keep records with the same user, query, response, rejected response, if any, and time.
            Otherwise all but the first are bad.
        options: the options of the format.

    Raises:
        ArgumentError: an unknown format or option, or an unusable value.
        RecordError: a record is bad, or there are none; with `skipped`, too many are bad. The message names file, line
            and field.
    """
    check_one_of("format", format, tuple(FORMATS))
    check_integer("max_line_bytes", max_line_bytes, 1)
    chosen = FORMATS[format]
    unknown = next((name for name in options if name not in chosen.options), None)
    if unknown is not None:
        known = f"one of {', '.join(chosen.options)}" if chosen.options else "none"
        raise ArgumentError(f"{unknown}: format {format!r} has no such option; expected {known}")
    clock = Clock(timezone, time_unit or chosen.time_unit)
    rows = Source(source, split, dict(columns or {}), clock, max_line_bytes, skipped)
    found = chosen.load(rows, **options)
    seen: dict[bytes, tuple[str, str]] = {}

    def checked(where: str, record: Record) -> Record:
        if require_history and not record.history:
            raise PlacedError(where, "expected at least one earlier text, got none", "history", "history")
        if not keep_duplicates:
            _check_new(record, where, seen)
        return record

    return each_good(found, checked, skipped, rows.name)


def _check_new(record: Record, where: str, seen: dict[bytes, tuple[str, str]]) -> None:
    """Add a record's digest and place to those of earlier ones; RecordError if one of these is the same."""
    # One preferred response may stand in pairs with several others.
    key = (record.user_id, record.query, record.response, record.timestamp, record.extra.get("rejected"))
    start, _, number = where.rpartition(" ")
    place = (sys.intern(start), number)  # places share the text before their number to save memory
    first = seen.setdefault(digest_of(repr(key), 16), place)
    if first is not place:
        problem = f"the same user, query, response and time as {' '.join(first)}"
        raise PlacedError(where, problem, kind="duplicate")

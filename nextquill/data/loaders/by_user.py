"""Makes records from the entries of a log, in any order; histories are the user's earlier entries.

A log may be larger than memory, so a temporary database sorts it by user and time. SQLite's private database `""` keeps
in memory only as much as its cache holds. The rest goes into a file that disappears with the connection, and ORDER BY
merges sorted runs from it.

An entry that a log holds twice, with the same time, stands once in histories.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from itertools import groupby
from typing import Any, NamedTuple

from nextquill.data.loaders.row import Row
from nextquill.data.loaders.source import Source
from nextquill.data.records import HistoryItem, Record
from nextquill.data.skipped import PlacedError, SkippedRecords, skip_or_raise


class Entry(NamedTuple):
    """One entry of a log."""

    user_id: str
    timestamp: float | None
    where: str
    #: `text`, `query`, `response`, `extra` and optionally `title`, ready for JSON.
    content: Mapping[str, Any]


def records_of(
    source: Source, convert: Callable[[Row], Entry], *, min_history: int = 0, max_history: int | None = None
) -> Iterator[tuple[str, Record]]:
    """Yield a record for every entry that has at least `min_history` earlier entries by its user.

    Other entries still become history, of which a record holds the latest `max_history`; None takes all. An entry
    without a timestamp is bad if others of its user have one.
    """
    for entries in by_user(entry for _, entry in source.each(convert)):
        yield from _of_one(_placed(entries, source.skipped), source.skipped, min_history, max_history)


def by_user(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    """Yield each user's entries by timestamp; entries with equal timestamps, or none, keep their order.

    Users come in the order of their names. Only one user's entries are in memory at a time: 300 MiB of texts by 20,000
    users take 7 MiB. OSError if the disk is full.
    """
    with closing(sqlite3.connect("", isolation_level=None, check_same_thread=False)) as log:
        try:
            log.execute("PRAGMA journal_mode = OFF")
            log.execute("CREATE TABLE log (id INTEGER PRIMARY KEY, user TEXT, time REAL, place TEXT, content TEXT)")
            log.execute("BEGIN")
            log.executemany(
                "INSERT INTO log (user, time, place, content) VALUES (?, ?, ?, ?)",
                ((*entry[:3], json.dumps(entry.content, ensure_ascii=False)) for entry in entries),
            )
            rows = log.execute("SELECT user, time, place, content FROM log ORDER BY user, time, id")
            for _, group in groupby(rows, key=lambda row: row[0]):
                yield [Entry(user, time, place, json.loads(content)) for user, time, place, content in group]
        except sqlite3.OperationalError as error:
            raise OSError(f"the temporary file that sorts a log: {error}; TMPDIR names its folder") from error


def _placed(entries: list[Entry], skipped: SkippedRecords | None) -> list[Entry]:
    """The entries that can be ordered: all, or only those with a time if some have one and others do not."""
    dated = [entry for entry in entries if entry.timestamp is not None]
    if not dated or len(dated) == len(entries):
        return entries
    for entry in entries:
        if entry.timestamp is None:
            problem = f"required, as user {entry.user_id!r} has one in {dated[0].where}, but missing"
            skip_or_raise(PlacedError(entry.where, problem, "timestamp"), skipped)
    return dated


def _of_one(
    entries: list[Entry], skipped: SkippedRecords | None, min_history: int, max_history: int | None
) -> Iterator[tuple[str, Record]]:
    items: list[HistoryItem] = []
    before, moment = 0, None  # the number of items strictly before this moment
    for entry in entries:
        if entry.timestamp is None or entry.timestamp != moment:
            before, moment = len(items), entry.timestamp  # all entries of one moment share the same past
        item = HistoryItem(entry.content["text"], entry.content.get("title"), entry.timestamp)
        if moment is None or item not in items[before:]:
            items.append(item)
        if before < min_history:
            if skipped is not None:
                skipped.accept()  # it is good, and counts in the share of bad entries
            continue
        first = 0 if max_history is None else max(0, before - max_history)
        record = Record(
            user_id=entry.user_id,
            query=entry.content["query"],
            response=entry.content["response"],
            history=tuple(items[first:before]),
            timestamp=entry.timestamp,
            extra=entry.content["extra"],
        )
        yield entry.where, record

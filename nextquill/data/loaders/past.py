"""From a user's entries to records, each with the entries strictly before it as its history.

An entry that a log has twice, with the same time, stands once in histories.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from nextquill.data.loaders.by_user import Entry
from nextquill.data.records import HistoryItem, Record
from nextquill.data.skipped import PlacedError, SkippedRecords, skip_or_raise


def records_of(
    users: Iterable[list[Entry]],
    skipped: SkippedRecords | None,
    *,
    min_history: int = 0,
    max_history: int | None = None,
) -> Iterator[tuple[str, Record]]:
    """Yield a record for every entry of every user that has history enough.

    Args:
        users: each user's entries in their order, with `text`, `query`, `response`, `extra` and optionally `title`.
        skipped: takes note of entries that cannot be placed in time instead of raising.
        min_history: entries with fewer earlier ones make no record, though they are history of later ones.
        max_history: most earlier entries, the latest; None takes all.

    Raises:
        RecordError: some entries of a user have a timestamp and others have none.
    """
    for entries in users:
        yield from _of_one(_placed(entries, skipped), skipped, min_history, max_history)


def _placed(entries: list[Entry], skipped: SkippedRecords | None) -> list[Entry]:
    """The entries that can be ordered: all, or, of a user with and without times, those with."""
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
    before, moment = 0, None  # how many items are strictly earlier than this moment
    for entry in entries:
        if entry.timestamp is None or entry.timestamp != moment:
            before, moment = len(items), entry.timestamp  # entries of one moment share the past of the first of them
        item = HistoryItem(entry.content["text"], entry.content.get("title"), entry.timestamp)
        if moment is None or item not in items[before:]:
            items.append(item)
        if before < min_history:
            if skipped is not None:
                skipped.accept()  # it is good, or the share of bad ones would be one of few
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

"""Errors in single records, and a count of the bad records that a reader has skipped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from nextquill.data._checks import check_integer
from nextquill.errors import ArgumentError, RecordError

_T = TypeVar("_T")
_U = TypeVar("_U")


class PlacedError(RecordError):
    """A `RecordError` that also holds the parts of its message.

    Args:
        where: the source and the line or row, such as "train.jsonl line 7".
        problem: the expected and the actual value, in words.
        field: the field at fault, or None if it is the whole record.
        kind: one word for counting: "json", "utf-8", "length", "field", "history", "time zone", "duplicate", …
    """

    def __init__(self, where: str, problem: str, field: str | None = None, kind: str = "field") -> None:
        super().__init__(where, problem, field, kind)  # as `args`, so that a copy can be sent between processes
        self.where, self.problem, self.field, self.kind = where, problem, field, kind

    def __str__(self) -> str:
        return f"{self.where}: {'' if self.field is None else f'field {self.field!r}: '}{self.problem}"


def unexpected(where: str, name: str, expected: str, value: object) -> PlacedError:
    """The error for a value with the wrong type."""
    return PlacedError(where, f"expected {expected}, got {type_name(value)}", name)


def type_name(value: object) -> str:
    """The name of a value's type; that of None is null, as in JSON."""
    return "null" if value is None else type(value).__name__


class SkippedRecords:
    """Counts the records that a reader has skipped, and keeps the first few messages.

    A reader that gets one skips bad records. Each source needs its own, as `max_share` is a share of one source.

    Args:
        max_kept: the most messages kept in `messages`; `counts` always counts all.
        max_share: the largest share of bad records that `check` allows, from 0 to 1.
        on_skip: called with each error, for example to log it.

    Attributes:
        counts: skipped records by the kind of error.
        messages: the messages of the first `max_kept` errors.
        accepted: the number of good records.

    Raises:
        ArgumentError: `max_kept` is negative or `max_share` is outside [0, 1].
    """

    def __init__(
        self, max_kept: int = 100, max_share: float = 0.1, on_skip: Callable[[RecordError], None] | None = None
    ) -> None:
        check_integer("max_kept", max_kept, least=0)
        if not 0 <= max_share <= 1:
            raise ArgumentError(f"max_share: expected a share from 0 to 1, got {max_share}")
        self.max_kept, self.max_share, self.on_skip = max_kept, max_share, on_skip
        self.counts: Counter[str] = Counter()
        self.messages: list[str] = []
        self.accepted = 0

    @property
    def total(self) -> int:
        """The number of skipped records."""
        return self.counts.total()

    def skip(self, error: RecordError) -> None:
        """Count a record as skipped."""
        self.counts[error.kind if isinstance(error, PlacedError) else "field"] += 1
        if len(self.messages) < self.max_kept:
            self.messages.append(str(error))
        if self.on_skip is not None:
            self.on_skip(error)

    def accept(self) -> None:
        """Count a record as good."""
        self.accepted += 1

    def check(self, source: str) -> None:
        """Refuse a source with too many bad records.

        Raises:
            RecordError: all records were skipped, or a larger share than `max_share`.
        """
        if not self.total:
            return
        first = f"; the first: {self.messages[0]}" if self.messages else ""
        if not self.accepted:
            raise RecordError(f"{source}: all {self.total} records were skipped{first}")
        share = self.total / (self.total + self.accepted)
        if share > self.max_share:
            raise RecordError(
                f"{source}: {self.total} of {self.total + self.accepted} records were skipped, {share:.1%}; "
                f"expected at most {self.max_share:.1%}{first}"
            )


def skip_or_raise(error: RecordError, skipped: SkippedRecords | None) -> None:
    """Count the error, or raise it if `skipped` is None."""
    if skipped is None:
        raise error
    skipped.skip(error)


def converted(
    items: Iterable[tuple[str, _T]], convert: Callable[[str, _T], _U], skipped: SkippedRecords | None
) -> Iterator[tuple[str, _U]]:
    """Yield each item's place and the result of `convert(place, item)`; a `RecordError` skips the item or is raised."""
    for where, item in items:
        try:
            result = convert(where, item)
        except RecordError as error:
            skip_or_raise(error, skipped)
        else:
            yield where, result


def each_good(
    items: Iterable[tuple[str, _T]],
    convert: Callable[[str, _T], _U],
    skipped: SkippedRecords | None,
    source: str,
    empty: str = "no records",
) -> Iterator[_U]:
    """Yield the results of `converted` and count them as good; at the end, check the source and that there was one."""
    count = 0
    for _, result in converted(items, convert, skipped):
        count += 1
        if skipped is not None:
            skipped.accept()
        yield result
    if skipped is not None:
        skipped.check(source)
    if not count:
        raise RecordError(f"{source}: {empty}")

"""Reads CSV (RFC 4180). Quoted cells may hold line breaks, so errors name the line on which a record begins."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator

from nextquill.data.lines import MAX_LINE_BYTES, decoded, numbered_lines
from nextquill.data.skipped import PlacedError, SkippedRecords, skip_or_raise
from nextquill.errors import RecordError


def csv_rows(
    path: str | os.PathLike[str],
    *,
    delimiter: str = ",",
    max_line_bytes: int = MAX_LINE_BYTES,
    skipped: SkippedRecords | None = None,
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the first line of each record, and its cells by column.

    The first record of the file, plain or gzipped, names the columns. `max_line_bytes` limits a record over all its
    lines. A quote that is never closed is always an error and never skipped, because the next record cannot be found.

    Raises:
        RecordError: the file cannot be read, or its header is unusable; or a record is too long, not UTF-8, not CSV, or
            has another number of cells than the header, and there is no `skipped` to count it.
    """
    name = os.fspath(path)
    lines = _Lines(name, numbered_lines(path, max_line_bytes=max_line_bytes, skipped=skipped), max_line_bytes)
    # The limit on cells holds for the whole process, so it is only ever raised.
    csv.field_size_limit(max(csv.field_size_limit(), max_line_bytes))
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        lines.begin()
        try:
            cells = next(reader, None)
            if cells is None:
                break
            if lines.bad is not None:
                raise lines.bad
            if header is None:
                header = _header(cells, lines.where)
            elif cells and len(cells) != len(header):
                problem = f"expected {len(header)} cells as in the header, got {len(cells)}"
                raise PlacedError(lines.where, problem, kind="csv")
            elif cells:
                row = dict(zip(header, cells, strict=True))
                yield lines.where, row
        except (csv.Error, RecordError) as error:
            if isinstance(error, csv.Error):
                error = PlacedError(lines.where, f"not valid CSV: {error}", kind="csv")
            skip_or_raise(error, None if header is None or lines.lost else skipped)
    if header is None:
        raise RecordError(f"{name}: no records, the file is empty")


class _Lines:
    """The lines for `csv.reader`, with the place where the current record begins.

    This is not a generator, because a generator would end with the first error.

    Attributes:
        bad: the error in a line of the current record. It is raised after the whole record is read; otherwise the rest
            of a cell would be read as records.
        lost: whether a quote is still open, so that the next record cannot be found.
    """

    def __init__(self, name: str, lines: Iterator[tuple[int, bytes]], most: int) -> None:
        self._name, self._lines, self._most = name, lines, most
        self._first, self._size, self._last = 0, 0, 0
        self.bad: RecordError | None = None
        self.lost = False

    @property
    def where(self) -> str:
        return f"{self._name} line {self._first}"

    def begin(self) -> None:
        """Start a record with the next line."""
        self._first = self._size = 0
        self.bad = None

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        self.lost = self._first > 0
        number, line = next(self._lines)
        self.lost = False
        if self._first and number > self._last + 1:
            self.bad = PlacedError(self.where, f"line {self._last + 1} of it is too long", kind="length")
        self._first, self._last = self._first or number, number
        self._size += len(line)
        if self._size > self._most:
            problem = f"expected a record of at most {self._most} bytes, got more; is a quote never closed?"
            self.lost = True
            raise PlacedError(self.where, problem, kind="length")
        try:
            return decoded(f"{self._name} line {number}", line, byte_order_mark=number == 1)
        except RecordError as error:
            self.bad = self.bad or error
            return line.decode("utf-8", "replace")


def _header(cells: list[str], where: str) -> list[str]:
    blank = next((position for position, cell in enumerate(cells, start=1) if not cell.strip()), None)
    if blank is not None or not cells:
        raise PlacedError(where, f"expected a name for every column, got none for column {blank or 1}", kind="csv")
    twice = next((cell for cell in cells if cells.count(cell) > 1), None)
    if twice is not None:
        raise PlacedError(where, f"expected every column once, got {twice!r} twice", kind="csv")
    return cells

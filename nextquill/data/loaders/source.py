"""Reads rows from files of several kinds, from the Hugging Face hub, or from any iterable of mappings."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, cast

from nextquill.data.lines import HUB, MAX_LINE_BYTES, json_lines, opened
from nextquill.data.loaders.csv_rows import csv_rows
from nextquill.data.loaders.json_list import json_list
from nextquill.data.loaders.row import Row
from nextquill.data.skipped import PlacedError, SkippedRecords, converted
from nextquill.data.times import Clock
from nextquill.errors import ArgumentError, ArgumentTypeError, RecordError
from nextquill.storage.input_files import open_input

Place = str | os.PathLike[str]
#: One place, several places that are read one after another, or rows.
Rows = Place | Sequence[Place] | Iterable[Mapping[str, Any]]
_CSV = {".csv": ",", ".tsv": "\t"}
_SUFFIXES = (".jsonl", ".ndjson", ".json", *_CSV, ".parquet")
_PARQUET_BATCH = 64  # rows held at a time; a row with its history may take megabytes
#: What pyarrow raises for a string that is not UTF-8, a date out of Python's range, and an unknown time zone.
_NOT_PYTHON = (ValueError, OverflowError, KeyError)
_T = TypeVar("_T")


@dataclass(frozen=True)
class Source:
    """A source of rows, and the way to read them; `load` describes its arguments and errors.

    A file's suffix tells its kind: .jsonl, .ndjson, .json (one list, or a record per line), .csv, .tsv or .parquet. All
    but .parquet may be followed by .gz. `argument` is the name of `rows_from` in errors.
    """

    rows_from: Rows
    split: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    clock: Clock = field(default_factory=Clock)
    max_line_bytes: int = MAX_LINE_BYTES
    skipped: SkippedRecords | None = None
    argument: str = "source"

    def __post_init__(self) -> None:
        places = self._places()
        if places is None:
            if isinstance(self.rows_from, (Mapping, bytes)) or not isinstance(self.rows_from, Iterable):
                kind = type(self.rows_from).__name__
                raise ArgumentTypeError(
                    f"{self.argument}: expected a path, hf://owner/name or rows of one split, got {kind}"
                )
            return
        if not places:
            raise ArgumentError(f"{self.argument}: expected at least one path, got none")
        for place in places:
            if place.startswith(HUB):
                if _hub_name(place, self.argument)[2] and self.split is not None:
                    raise ArgumentError(f"split: expected none beside the one in {place}, got {self.split!r}")
            elif _suffix(place) not in _SUFFIXES:
                raise ArgumentError(f"{self.argument}: expected a file ending in {', '.join(_SUFFIXES)}, got {place}")
        if self.split is not None and not any(place.startswith(HUB) for place in places):
            raise ArgumentError(f"split: expected none for local files, got {self.split!r}; name the split's file")

    @property
    def name(self) -> str:
        """The name of the source in errors."""
        places = self._places()
        return "source" if places is None else ", ".join(places)

    def each(self, convert: Callable[[Row], _T]) -> Iterator[tuple[str, _T]]:
        """Yield the place of each good row, and the result of `convert`, which skips a row by a `RecordError`."""
        return converted(
            self._raw(), lambda where, raw: convert(Row(self._renamed(raw, where), where, self.clock)), self.skipped
        )

    def other(self, argument: str, place: Place, split: str) -> Source:
        """A second file, or configuration on the hub, that belongs to this source; bad rows in it are errors."""
        on_hub = split if os.fspath(place).startswith(HUB) else None
        return replace(self, rows_from=place, split=on_hub, columns={}, skipped=None, argument=argument)

    def _places(self) -> list[str] | None:
        """The places, or None if the source is an iterable of rows."""
        given = [self.rows_from] if isinstance(self.rows_from, (str, os.PathLike)) else self.rows_from
        if not isinstance(given, (list, tuple)):
            return None
        places = [os.fspath(place) for place in given if isinstance(place, (str, os.PathLike))]
        return places if len(places) == len(given) else None

    def _raw(self) -> Iterator[tuple[str, object]]:
        places = self._places()
        if places is None:
            for position, values in enumerate(cast(Iterable[object], self.rows_from)):
                yield f"record {position}", values
            return
        for place in places:
            if place.startswith(HUB):
                yield from _hub_rows(place, self.split, self.argument)
            else:
                yield from self._file(place)

    def _file(self, path: str) -> Iterator[tuple[str, object]]:
        suffix = _suffix(path)
        if suffix == ".parquet":
            return _parquet_rows(path, self.skipped)
        if suffix in _CSV:
            return csv_rows(path, delimiter=_CSV[suffix], max_line_bytes=self.max_line_bytes, skipped=self.skipped)
        if suffix == ".json" and _is_list(path):
            return json_list(path, max_item_bytes=self.max_line_bytes)
        return json_lines(path, max_line_bytes=self.max_line_bytes, skipped=self.skipped)

    def _renamed(self, values: object, where: str) -> Mapping[str, object]:
        if not isinstance(values, Mapping):
            raise PlacedError(where, f"expected an object with named fields, got {type(values).__name__}")
        if not self.columns:
            return values
        absent = next((column for column in self.columns.values() if column not in values), None)
        if absent is not None:
            there = ", ".join(sorted(map(str, values)))
            raise PlacedError(where, f"named in columns, but missing; there are {there}", absent)
        taken = set(self.columns.values())
        kept = {name: value for name, value in values.items() if name not in taken}
        return kept | {name: values[column] for name, column in self.columns.items()}


def _suffix(path: str) -> str:
    name = Path(path)
    return (name.with_suffix("") if name.suffix == ".gz" else name).suffix.lower()


def _is_list(path: str) -> bool:
    with opened(path) as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def _parquet_rows(path: str, skipped: SkippedRecords | None) -> Iterator[tuple[str, object]]:
    """The place and the values of each row; a row that Python cannot hold is skipped, or raised without `skipped`."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"pyarrow reads {path}: {error}; pip install 'nextquill[cli]'") from error
    number = 0
    try:
        open_input(path).close()
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_PARQUET_BATCH):
                try:
                    rows = batch.to_pylist()
                except _NOT_PYTHON:
                    rows = [batch.slice(position, 1) for position in range(len(batch))]
                placed = ((f"{path} row {number + position}", row) for position, row in enumerate(rows))
                yield from converted(placed, _parquet_row, skipped)
                number += len(batch)
    except (OSError, pyarrow.ArrowException) as error:
        raise RecordError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error


def _parquet_row(where: str, row: Any) -> object:
    """A row's values by column, of a dictionary or of a batch of one row; PlacedError names the column at fault."""
    if isinstance(row, dict):
        return row
    values = {}
    for name, column in zip(row.schema.names, row.columns, strict=True):
        try:
            (values[name],) = column.to_pylist()
        except _NOT_PYTHON as error:
            raise PlacedError(where, f"cannot be read: {error}", name) from error
    return values


def _hub_name(place: str, argument: str) -> tuple[str, str | None, str | None]:
    """The name, the configuration and the split of a data set."""
    path, colon, split = place.removeprefix(HUB).partition(":")
    parts = path.split("/")
    if len(parts) not in (2, 3) or not all(parts) or (colon and not split):
        raise ArgumentError(f"{argument}: expected {HUB}owner/name[/config][:split], got {place}")
    return "/".join(parts[:2]), parts[2] if len(parts) == 3 else None, split or None


def _hub_rows(place: str, split: str | None, argument: str) -> Iterator[tuple[str, object]]:
    name, config, own_split = _hub_name(place, argument)
    split = own_split or split or "train"
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"datasets reads {place}: {error}; pip install 'nextquill[cli]'") from error
    try:
        rows = datasets.load_dataset(name, config, split=split, streaming=True)
    except (ValueError, OSError) as error:  # no such data set or split, or the hub cannot be reached
        raise ArgumentError(f"{argument}: {place}, split {split!r}: {' '.join(str(error).split())}") from error
    for position, values in enumerate(rows):
        yield f"{place} {split} row {position}", values

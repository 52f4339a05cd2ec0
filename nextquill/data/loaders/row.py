"""A row of a source. Each field is checked when it is read, so that an error names row and field."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from numbers import Integral, Real
from typing import Any

from nextquill.data.records import RECORD_FIELDS, Record, check_response, check_text, check_user_id, parse_record
from nextquill.data.skipped import PlacedError, unexpected
from nextquill.data.times import Clock


@dataclass(frozen=True, slots=True)
class Row:
    """The fields of a row, and its place in the source.

    Several names for a method are spellings of one field, and the first that is there is read. None counts as absent,
    because data sets use it for missing keys.
    """

    values: Mapping[str, object]
    where: str
    clock: Clock
    path: str = ""  # stands before a field's name in errors, such as "profile[2]."
    read: set[str] = field(default_factory=set)  # the names of the fields that have been read

    def has(self, *names: str) -> bool:
        """Whether all these fields are there and not None."""
        return all(self.values.get(name) is not None for name in names)

    def text(self, *names: str) -> str:
        """A string, which may be empty."""
        return check_text(*self._field(names))

    def optional_text(self, *names: str) -> str | None:
        """A string, or None if the field is absent."""
        return self.text(*names) if any(map(self.has, names)) else None

    def response(self, *names: str) -> str:
        """A string that is not blank."""
        return check_response(*self._field(names))

    def user_id(self, *names: str) -> str:
        """A user's name: a string, or an integer as a string."""
        return check_user_id(*self._field(names))

    def label(self, *names: str) -> str:
        """A label such as a rating: a string, or a finite number as a string."""
        value, where, name = self._field(names)
        if isinstance(value, str):
            return check_text(value, where, name)
        if isinstance(value, bool) or not isinstance(value, (Real, Decimal)):
            raise unexpected(where, name, "a string or a number", value)
        return str(_finite(value, where, name))

    def seconds(self, *names: str) -> float | None:
        """A time in seconds since the epoch, or None if the field is absent."""
        return self.clock.seconds(*self._field(names)) if any(map(self.has, names)) else None

    def date(self, *names: str) -> float | None:
        """A date in seconds since the epoch, or None if the field is absent. Four digits are a year."""
        return self.clock.date(*self._field(names)) if any(map(self.has, names)) else None

    def row(self, name: str) -> Row:
        """A mapping inside this one."""
        return self._inside(self._field((name,))[0], name)

    def rows(self, name: str) -> list[Row]:
        """A list of mappings inside this one. A mapping of equally long columns is read as such a list."""
        value, where, path = self._field((name,))
        if isinstance(value, Mapping):
            value = self._transposed(value, name)
        if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
            raise unexpected(where, path, "a list of objects", value)
        return [self._inside(item, f"{name}[{position}]") for position, item in enumerate(value)]

    def record(self, **fields: object) -> Record:
        """A record of these fields; every field of the row that has not been read goes into `extra`."""
        return parse_record(self.with_others(fields), self.where)

    def with_others(self, made: Mapping[str, object]) -> dict[str, object]:
        """`made` and every field that has not been read, converted for JSON, so that no field is dropped silently.

        RecordError if such a field has a name in `made`, or that of a record's field.
        """
        others = {str(name): value for name, value in self.values.items() if name not in self.read}
        others = {name: value for name, value in others.items() if value is not None}
        taken = next((name for name in others if name in made or (name in RECORD_FIELDS and not self.path)), None)
        if taken is not None:
            problem = "expected a row without it, as the record's own comes from elsewhere; columns can rename it"
            raise self.error(taken, problem)
        return {name: json_ready(value, self.where, self.path + name) for name, value in others.items()} | dict(made)

    def error(self, name: str | None, problem: str, kind: str = "field") -> PlacedError:
        """The error for a field, or for the whole row if `name` is None."""
        field = (self.path.rstrip(".") or None) if name is None else self.path + name
        return PlacedError(self.where, problem, field, kind)

    def keys(self) -> str:
        """The names of the fields that are there, for errors."""
        return ", ".join(sorted(str(name) for name in self.values if self.has(name))) or "none"

    def _field(self, names: tuple[str, ...]) -> tuple[object, str, str]:
        """The value of the first of these fields that is there, and the place and the field for errors."""
        found = next(filter(self.has, names), None)
        if found is None:
            state = "null" if any(name in self.values for name in names) else "missing"
            others = f" (or {', '.join(names[1:])})" if len(names) > 1 else ""
            raise self.error(names[0], f"required{others}, but {state}; there are {self.keys()}")
        self.read.add(found)
        return self.values[found], self.where, self.path + found

    def _inside(self, value: object, name: str) -> Row:
        if not isinstance(value, Mapping):
            raise unexpected(self.where, self.path + name, "an object with named fields", value)
        return Row(value, self.where, self.clock, f"{self.path}{name}.")

    def _transposed(self, columns: Mapping[str, Any], name: str) -> list[dict[str, object]]:
        for key, column in columns.items():
            if not isinstance(column, Sequence) or isinstance(column, (str, bytes)):
                raise unexpected(self.where, f"{self.path}{name}.{key}", "a list", column)
        lengths = {key: len(column) for key, column in columns.items()}
        if len(set(lengths.values())) > 1:
            raise self.error(name, f"expected columns of one length, got {lengths}")
        return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


def _finite(value: Real | Decimal, where: str, name: str) -> Real | Decimal:
    if not math.isfinite(value):
        raise PlacedError(where, f"expected a finite number, got {value}", name)
    return value


def json_ready(value: object, where: str, name: str) -> object:
    """Convert a value of an unknown column for JSON: times to ISO 8601, decimals to numbers; or raise RecordError."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return check_text(value, where, name)
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, (Real, Decimal)):
        return float(_finite(value, where, name))
    if isinstance(value, Mapping):
        items = {check_text(str(key), where, name): item for key, item in value.items()}
        return {key: json_ready(item, where, f"{name}.{key}") for key, item in items.items()}
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [json_ready(item, where, f"{name}[{position}]") for position, item in enumerate(value)]
    if hasattr(value, "isoformat"):
        return str(value.isoformat())
    raise unexpected(where, name, "a value that JSON can hold", value)

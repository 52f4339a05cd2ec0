"""One row of a source: its fields by name, each checked where it is read, so that an error names row and field."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from numbers import Integral, Real

from nextquill.data.loaders.times import Clock
from nextquill.data.records import check_response, check_text, check_user_id, unexpected
from nextquill.data.skipped import PlacedError


@dataclass(frozen=True, slots=True)
class Row:
    """A mapping and the place it comes from.

    Where a method takes several names they are spellings of one field; the first that is there is read. None counts as
    absent everywhere, as data sets fill up missing keys with it.

    Args:
        values: the fields.
        where: the source and the line or row.
        clock: reads its times.
        path: what precedes a field's name in errors, such as "profile[2].".
    """

    values: Mapping[str, object]
    where: str
    clock: Clock
    path: str = ""

    def has(self, *names: str) -> bool:
        """Whether all of the fields are there and not None."""
        return all(self.values.get(name) is not None for name in names)

    def text(self, *names: str) -> str:
        """A string, which may be empty."""
        name = self._name(names)
        return check_text(self.values[name], self.where, self.path + name)

    def optional_text(self, *names: str) -> str | None:
        """A string, or None where no spelling of the field is there."""
        return self.text(*names) if any(map(self.has, names)) else None

    def response(self, *names: str) -> str:
        """A string with more than white space in it."""
        name = self._name(names)
        return check_response(self.values[name], self.where, self.path + name)

    def user_id(self, *names: str) -> str:
        """A user's name: a string, or an integer, which is written as one."""
        name = self._name(names)
        return check_user_id(self.values[name], self.where, self.path + name)

    def label(self, *names: str) -> str:
        """A string or a finite number as text, such as a rating."""
        name = self._name(names)
        value = self.values[name]
        if isinstance(value, str):
            return check_text(value, self.where, self.path + name)
        if isinstance(value, bool) or not isinstance(value, (Real, Decimal)):
            raise unexpected(self.where, self.path + name, "a string or a number", value)
        if not math.isfinite(value):
            raise self.error(name, f"expected a finite number, got {value}")
        return str(value)

    def seconds(self, *names: str) -> float | None:
        """A time in seconds since the epoch, or None where no spelling of the field is there."""
        name = next(filter(self.has, names), None)
        return None if name is None else self.clock.seconds(self.values[name], self.where, self.path + name)

    def date(self, *names: str) -> float | None:
        """As `seconds`, for a field of dates, where four digits are a year."""
        name = next(filter(self.has, names), None)
        return None if name is None else self.clock.date(self.values[name], self.where, self.path + name)

    def row(self, name: str) -> Row:
        """A mapping inside this one."""
        value = self.values[self._name((name,))]
        return self._inside(value, name)

    def rows(self, name: str) -> list[Row]:
        """A list of mappings inside this one; a mapping of equally long lists is the same, by columns."""
        value = self.values[self._name((name,))]
        if isinstance(value, Mapping):
            return list(self._transposed(value, name))
        if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
            raise unexpected(self.where, self.path + name, "a list of objects", value)
        return [self._inside(item, f"{name}[{position}]") for position, item in enumerate(value)]

    def error(self, name: str | None, problem: str, kind: str = "field") -> PlacedError:
        """The error of a field, or with None of the row."""
        field = (self.path.rstrip(".") or None) if name is None else self.path + name
        return PlacedError(self.where, problem, field, kind)

    def keys(self) -> str:
        """The names of the fields that are there, for errors."""
        return ", ".join(sorted(str(name) for name in self.values if self.has(name))) or "none"

    def _name(self, names: tuple[str, ...]) -> str:
        found = next(filter(self.has, names), None)
        if found is None:
            state = "null" if any(name in self.values for name in names) else "missing"
            others = f" (or {', '.join(names[1:])})" if len(names) > 1 else ""
            raise self.error(names[0], f"required{others}, but {state}; there are {self.keys()}")
        return found

    def _inside(self, value: object, name: str) -> Row:
        if not isinstance(value, Mapping):
            raise unexpected(self.where, self.path + name, "an object with named fields", value)
        return Row(value, self.where, self.clock, f"{self.path}{name}.")

    def _transposed(self, columns: Mapping[str, object], name: str) -> Iterator[Row]:
        for key, column in columns.items():
            if not isinstance(column, Sequence) or isinstance(column, (str, bytes)):
                raise unexpected(self.where, f"{self.path}{name}.{key}", "a list", column)
        lengths = {key: len(column) for key, column in columns.items() if isinstance(column, Sequence)}
        if len(set(lengths.values())) > 1:
            raise self.error(name, f"expected columns of one length, got {lengths}")
        for position in range(max(lengths.values(), default=0)):
            item = {key: column[position] for key, column in columns.items() if isinstance(column, Sequence)}
            yield self._inside(item, f"{name}[{position}]")


def json_ready(value: object, where: str, name: str) -> object:
    """A value of an unknown column as JSON can hold it: times as ISO 8601, decimals as numbers.

    Raises:
        RecordError: it is not finite, not valid Unicode, or of a type that JSON does not have.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return check_text(value, where, name)
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, (Real, Decimal)):
        if not math.isfinite(value):
            raise PlacedError(where, f"expected a finite number, got {value}", name)
        return float(value)
    if isinstance(value, Mapping):
        return {
            check_text(str(key), where, name): json_ready(item, where, f"{name}.{key}") for key, item in value.items()
        }
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [json_ready(item, where, f"{name}[{position}]") for position, item in enumerate(value)]
    if hasattr(value, "isoformat"):
        return str(value.isoformat())
    raise unexpected(where, name, "a value that JSON can hold", value)

"""Converts the times in data sets to seconds since the epoch.

    1589000000, "1589000000.5"      seconds, or milliseconds if the source's unit is "ms"
    "2020-05-09T06:53:20+02:00"     ISO 8601 with a zone
    "2020-05-09 06:53:20"           without a zone: refused, unless a time zone is given
    "2020-05-09", "2020-05"         a date alone: its first moment, in the given time zone or UTC
    2020, "2020"                    a year, but only in a field that holds dates; otherwise a number

Nothing is guessed. A number of seconds beyond the year 5000, or of milliseconds before 1974, is refused, as its unit is
probably wrong. A clock time without a zone is refused, also in a source whose other times have one.
"""

from __future__ import annotations

import math
import re
from datetime import datetime, timedelta, timezone
from numbers import Real
from zoneinfo import ZoneInfo

from nextquill.data._checks import check_one_of
from nextquill.data.skipped import PlacedError, unexpected
from nextquill.errors import ArgumentError

TIME_UNITS = ("s", "ms")
_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_NUMBER = re.compile(r"[+-]?\d+(?:\.\d*)?(?:[eE][+-]?\d+)?")
_DATE = re.compile(r"(\d{4})(?:-(\d\d))?(?:-(\d\d))?")
_CLOCK = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)[T ](\d\d):(\d\d)(?::(\d\d)(?:[.,](\d{1,9}))?)?\s?(Z|z|UTC|[+-]\d\d(?::?\d\d)?)?"
)
#: 1e11 seconds lead to the year 5138; 1e11 milliseconds lead to March 1973.
_UNIT_BORDER = 1e11


class Clock:
    """Reads the times of one source; an hour that a clock change repeats is read as the earlier one.

    ArgumentError for an unknown time zone or unit.
    """

    def __init__(self, time_zone: str | None = None, unit: str = "s") -> None:
        check_one_of("time_unit", unit, TIME_UNITS)
        try:
            self._zone = None if time_zone is None else ZoneInfo(time_zone)
        except (ValueError, OSError, KeyError) as error:  # ZoneInfoNotFoundError is a KeyError
            raise ArgumentError(f"timezone: expected a name such as 'Europe/Berlin', got {time_zone!r}") from error
        self._unit = unit
        self._zoned_at: str | None = None  # the first clock time with a zone

    def seconds(self, value: object, where: str, name: str) -> float | None:
        """Convert a number, a string as above, or a `datetime` to seconds since the epoch; None or blank gives None.

        Raises:
            RecordError: it is not a time, out of range, in the wrong unit, or has no zone.
        """
        if isinstance(value, str):
            text = value.strip()
            if not text:
                return None
            if _NUMBER.fullmatch(text):
                return self._number(float(text), where, name)
            return self._written(text, where, name)
        if value is None:
            return None
        if isinstance(value, datetime):
            return self._moment(value, where, name)
        if isinstance(value, bool) or not isinstance(value, Real):
            raise unexpected(where, name, "a number or an ISO 8601 time", value)
        return self._number(as_float(value), where, name)

    def date(self, value: object, where: str, name: str) -> float | None:
        """Convert as `seconds` does, for a field of dates, in which four digits or a whole number are a year."""
        # Whole floats count too, because a missing value turns a column of integers into floats.
        if isinstance(value, (int, float)) and not isinstance(value, bool) and 1 <= value <= 9999 and value % 1 == 0:
            value = f"{int(value):04d}"
        if isinstance(value, str) and (parts := _DATE.fullmatch(value.strip())):
            return self._day(parts.groups(), where, name)
        return self.seconds(value, where, name)

    def _number(self, value: float, where: str, name: str) -> float:
        if not math.isfinite(value):
            raise PlacedError(where, f"expected a finite number, got {value}", name)
        if self._unit == "s" and abs(value) > _UNIT_BORDER:
            raise PlacedError(where, f"expected seconds, got {value:.0f}, which looks like ms; see time_unit", name)
        if self._unit == "ms" and 0 < abs(value) < _UNIT_BORDER:
            raise PlacedError(where, f"expected milliseconds, got {value:.0f}, which looks like s; see time_unit", name)
        if self._unit == "ms" and abs(value) > 1000 * _UNIT_BORDER:
            raise PlacedError(where, f"expected milliseconds, got {value:.0f}, which looks like a smaller unit", name)
        return value if self._unit == "s" else value / 1000

    def _written(self, text: str, where: str, name: str) -> float:
        if parts := _DATE.fullmatch(text):
            return self._day(parts.groups(), where, name)
        parts = _CLOCK.fullmatch(text)
        if parts is None:
            raise PlacedError(where, f"expected a number or an ISO 8601 time, got {text[:40]!r}", name)
        *numbers, fraction, zone = parts.groups()
        try:
            moment = datetime(*(int(number or 0) for number in numbers), tzinfo=_zone(zone))  # type: ignore[misc,arg-type]
        except ValueError as error:
            raise PlacedError(where, f"expected an ISO 8601 time, got {text[:40]!r}: {error}", name) from error
        return self._moment(moment, where, name) + (int(fraction) / 10 ** len(fraction) if fraction else 0.0)

    def _day(self, parts: tuple[str | None, ...], where: str, name: str) -> float:
        try:
            day = datetime(*(int(part or 1) for part in parts), tzinfo=self._zone or timezone.utc)  # type: ignore[misc,arg-type]
        except ValueError as error:
            problem = f"expected a date, got {'-'.join(filter(None, parts))!r}: {error}"
            raise PlacedError(where, problem, name) from error
        return (day - _EPOCH).total_seconds()

    def _moment(self, moment: datetime, where: str, name: str) -> float:
        if moment.tzinfo is not None:
            self._zoned_at = self._zoned_at or f"{where} (field {name!r})"
        elif self._zone is not None:
            moment = moment.replace(tzinfo=self._zone)
        else:
            problem = (
                "expected a time with a zone, such as 2020-05-09T06:53:20Z, got one without; convert and load take a "
                "timezone for all of them"
            )
            if self._zoned_at is not None:
                problem = f"got a time without a zone, but {self._zoned_at} has one; give timezone"
            raise PlacedError(where, problem, name, kind="time zone")
        return (moment - _EPOCH).total_seconds()


def as_float(value: float | Real) -> float:
    """The nearest float; infinity if the number is too large for one."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _zone(text: str | None) -> timezone | None:
    """The zone of "Z", "UTC", "+02", "+0200" or "+02:00"."""
    if text is None:
        return None
    if text[0] not in "+-":
        return timezone.utc
    offset = timedelta(hours=int(text[1:3]), minutes=int(text[3:].strip(":") or 0))
    return timezone(-offset if text[0] == "-" else offset)

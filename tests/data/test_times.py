from __future__ import annotations

import math
from datetime import datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextquill.data.times import Clock
from nextquill.errors import ArgumentError, RecordError

# What each is, in seconds since the epoch, worked out by hand or with `date -d`.
READ = {
    "1589007200": 1589007200.0,
    " 1589007200.25 ": 1589007200.25,
    "1.5e9": 1.5e9,
    "-60": -60.0,
    "2020-05-09T06:53:20Z": 1589007200.0,
    "2020-05-09 06:53:20 UTC": 1589007200.0,
    "2020-05-09T08:53:20+02:00": 1589007200.0,
    "2020-05-09T08:53:20+0200": 1589007200.0,
    "2020-05-09T03:23:20-03:30": 1589007200.0,
    "2020-05-09T06:53:20.123456789Z": 1589007200.123456789,
    "2020-05-09T06:53:20,5z": 1589007200.5,
    "2020-05-09T06:53Z": 1589007180.0,
    "2020-05-09": 1588982400.0,
    "2020-05": 1588291200.0,
}


@pytest.mark.parametrize(("text", "seconds"), READ.items(), ids=READ.keys())
def test_a_written_time_is_read(text: str, seconds: float) -> None:
    assert Clock().seconds(text, "here", "when") == seconds


@pytest.mark.parametrize("value", [None, "", "  "], ids=repr)
def test_nothing_is_no_time(value: object) -> None:
    assert Clock().seconds(value, "here", "when") is None


@pytest.mark.parametrize("value", [2020, "2020", 2020.0], ids=repr)
def test_four_digits_are_a_year_in_a_field_of_dates_only(value: object) -> None:
    assert Clock().date(value, "here", "year") == 1577836800.0
    assert Clock().seconds(2020, "here", "when") == 2020.0


BAD = {
    "bool": (True, "expected a number or an ISO 8601 time, got bool"),
    "list": ([1], "expected a number or an ISO 8601 time, got list"),
    "word": ("soon", "expected a number or an ISO 8601 time, got 'soon'"),
    "american": ("05/09/2020", "expected a number or an ISO 8601 time, got '05/09/2020'"),
    "nan": (math.nan, "expected a finite number, got nan"),
    "huge": (10**400, "expected a finite number, got inf"),
    "month": ("2020-13-01", "expected a date, got '2020-13-01': month must be in 1..12"),
    "second": (
        "2020-05-09T06:53:61Z",
        "expected an ISO 8601 time, got '2020-05-09T06:53:61Z': second must be in 0..59",
    ),
    "milliseconds": (1589007200000, "expected seconds, got 1589007200000, which looks like ms; see time_unit"),
    "no-zone": ("2020-05-09T06:53:20", "expected a time with a zone, such as 2020-05-09T06:53:20Z, got one"),
}


@pytest.mark.parametrize(("value", "message"), BAD.values(), ids=BAD.keys())
def test_a_bad_time_is_named(value: object, message: str) -> None:
    with pytest.raises(RecordError) as caught:
        Clock().seconds(value, "log.csv line 3", "when")
    assert str(caught.value).startswith(f"log.csv line 3: field 'when': {message}"[:90])


def test_milliseconds_are_milliseconds_where_it_is_said() -> None:
    assert Clock(unit="ms").seconds(1589007200250, "here", "when") == 1589007200.25
    assert Clock(unit="ms").seconds(0, "here", "when") == 0.0
    with pytest.raises(RecordError, match="expected milliseconds, got 1589007200, which looks like s; see time_unit"):
        Clock(unit="ms").seconds(1589007200, "here", "when")
    with pytest.raises(RecordError, match="expected milliseconds, got 1589007200000000, which looks like a smaller"):
        Clock(unit="ms").seconds(1589007200000000, "here", "when")


def test_the_time_zone_given_is_that_of_times_without_one() -> None:
    clock = Clock("Europe/Berlin")
    assert clock.seconds("2020-05-09T08:53:20", "here", "when") == 1589007200.0  # summer time
    assert clock.seconds("2020-01-01T01:00:00", "here", "when") == 1577836800.0
    assert clock.seconds("2020-05-09T06:53:20Z", "here", "when") == 1589007200.0
    assert clock.seconds("2020-01-01", "here", "when") == 1577836800.0 - 3600
    assert clock.seconds("2020-10-25T02:30:00", "here", "when") == 1603585800.0  # the first of the two half past twos


def test_a_mixture_of_zoned_and_unzoned_names_both_places() -> None:
    clock = Clock()
    clock.seconds("2020-05-09T06:53:20Z", "log.csv line 2", "when")
    with pytest.raises(RecordError) as caught:
        clock.seconds("2020-05-09T06:53:20", "log.csv line 9", "when")
    assert str(caught.value) == (
        "log.csv line 9: field 'when': got a time without a zone, but log.csv line 2 (field 'when') has one; give "
        "timezone"
    )


@pytest.mark.parametrize("name", ["Mars/Olympus", "", "../etc/passwd", "/etc/passwd"], ids=repr)
def test_an_unknown_time_zone_is_refused(name: str) -> None:
    with pytest.raises(ArgumentError, match=r"^timezone: expected a name such as 'Europe/Berlin', got "):
        Clock(name)


def test_an_unknown_unit_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"^time_unit: expected one of 's', 'ms', got 'us'$"):
        Clock(unit="us")


@given(
    st.datetimes(datetime(1, 1, 3), datetime(5100, 1, 1)),
    st.integers(-23 * 60, 23 * 60),
    st.sampled_from(["T", " "]),
)
def test_isoformat_is_read_back(moment: datetime, minutes: int, separator: str) -> None:
    zoned = moment.replace(tzinfo=timezone(timedelta(minutes=minutes)))
    expected = (zoned - datetime(1970, 1, 1, tzinfo=timezone.utc)).total_seconds()
    clock = Clock()
    assert clock.seconds(zoned, "here", "when") == expected
    assert clock.seconds(zoned.isoformat(separator), "here", "when") == pytest.approx(expected, abs=1e-5)

"""A pytest plugin that reports every test as a line of JSON, and tells coverage which test is running.

It is loaded by name (`-p record_tests`) into the pytest of any checkout, so it imports nothing from this one. Coverage
starts by its own `.pth` file, also in pytest's workers and in processes that tests start. These processes take the
test's name from `CONTEXT_VARIABLE`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

OWN = "NEXTQUILL_RECORD_"
REPORT_VARIABLE = f"{OWN}REPORT"
CONTEXT_VARIABLE = f"{OWN}CONTEXT"
FIXTURE = "fixture "


@contextmanager
def _context(name: str) -> Iterator[None]:
    before = os.environ.get(CONTEXT_VARIABLE, "")
    _switch(name)
    try:
        yield
    finally:
        _switch(before)


def _switch(name: str) -> None:
    os.environ[CONTEXT_VARIABLE] = name
    if "coverage" in sys.modules and (coverage := sys.modules["coverage"].Coverage.current()) is not None:
        coverage.switch_context(name)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Assign the lines that run now to this test."""
    with _context(item.nodeid):
        return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_fixture_setup(fixturedef: Any, request: Any) -> Iterator[None]:
    """Assign the lines of a fixture shared by several tests to all of them."""
    if fixturedef.scope == "function":
        return (yield)
    # It is set up only once, for the first test that needs it.
    with _context(f"{FIXTURE}{fixturedef.argname} {request.node.nodeid}"):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Add the data on a test that the map needs."""
    report = yield
    report.fixtures = list(getattr(item, "fixturenames", ()))
    report.is_slow = item.get_closest_marker("slow") is not None
    return report


def pytest_runtest_logreport(report: Any) -> None:
    """Write each report once, as a worker's report also reaches its controller."""
    if "PYTEST_XDIST_WORKER" in os.environ or REPORT_VARIABLE not in os.environ:
        return
    found = {name: getattr(report, name) for name in ("nodeid", "when", "outcome", "duration")}
    # The report of a worker that crashed has neither.
    found |= {"fixtures": getattr(report, "fixtures", []), "is_slow": getattr(report, "is_slow", False)}
    with Path(os.environ[REPORT_VARIABLE]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(found) + "\n")

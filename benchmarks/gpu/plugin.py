"""A pytest plugin: this process runs its share of the collected tests, and ends when the GPU has become useless.

It also stands in for pytest-timeout where that is not installed: `tests/conftest.py` reads its setting, and ends a
process whose test hangs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import device
from benchmarks.gpu.shares import POISONED, Share
from benchmarks.measure import default_device, make_row

#: Most tests of a block. Cases of one test compile the same kernels, so they stay in one process.
_BLOCK = 12
#: Seconds after which a hanging test is ended, less the 60 that `tests/conftest.py` adds.
_TIMEOUT = 60
#: Characters of a failure in the log.
_LONGEST = 3000


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("share")
    group.addoption("--share-folder", type=Path, help="folder that the workers share")
    group.addoption("--share-worker", type=int, default=0, help="this worker's number")
    parser.addini("timeout", "as of pytest-timeout, which is not loaded", default=str(_TIMEOUT))


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Runner(config), "nextquill-share")


class _Runner:
    """Runs the share, and writes a row for each test."""

    def __init__(self, config: pytest.Config) -> None:
        self.share = Share(config.option.share_folder, config.option.share_worker)
        self.reports: list[pytest.TestReport] = []
        self.config = config

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.share.finish(report.nodeid, _row(report.nodeid, "failed", 0, _message(report)))
        elif report.skipped:
            self.share.finish(report.nodeid, _row(report.nodeid, "skipped", 0, _reason(report)))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        if session.config.option.collectonly:
            return None
        for name in self.share.interrupted():
            self.share.finish(name, _row(name, "failed", 0, "the process ended during this test"))
        items = {item.nodeid: item for item in session.items}
        for item, following in _with_next(self._mine(items)):
            self._run(item, following)
        self.share.end()
        return True

    def _mine(self, items: dict[str, pytest.Item]) -> Iterator[pytest.Item]:
        for name in self.share.items(blocks_of(list(items))):
            yield items[name]

    def _run(self, item: pytest.Item, following: pytest.Item | None) -> None:
        self.reports = []
        begun = time.monotonic()
        self.share.start(item.nodeid)
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        outcome, note = _judge(self.reports)
        broken = device.failure()
        if broken:
            outcome, note = "failed", note or f"the device is in error: {broken}"
        self.share.finish(item.nodeid, _row(item.nodeid, outcome, time.monotonic() - begun, note))
        if broken:
            os._exit(POISONED)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.reports.append(report)
        if report.failed:  # now, as a summary at the end would be lost with the process
            self.config.get_terminal_writer().line(f"\n{report.longreprtext[-_LONGEST:]}")


def blocks_of(names: list[str]) -> list[list[str]]:
    """Tests in blocks of cases of the same test, each not too long for one process."""
    blocks = []
    for _, cases in groupby(names, lambda name: name.partition("[")[0]):
        together = list(cases)
        blocks += [together[start : start + _BLOCK] for start in range(0, len(together), _BLOCK)]
    return blocks


def _with_next(items: Iterator[pytest.Item]) -> Iterator[tuple[pytest.Item, pytest.Item | None]]:
    """Each test with the next one, whose fixtures of a module or a session need not be made again."""
    item = next(items, None)
    while item is not None:
        following = next(items, None)
        yield item, following
        item = following


def _judge(reports: list[pytest.TestReport]) -> tuple[str, str]:
    for report in reports:
        if report.failed:
            return "failed", _message(report)
    skipped = next((report for report in reports if report.skipped), None)
    if skipped is not None:
        return ("passed", "expected failure") if hasattr(skipped, "wasxfail") else ("skipped", _reason(skipped))
    return "passed", ""


def _message(report: Any) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash else str(report.longrepr or "")
    return " ".join(text.split())[:400]


def _reason(report: Any) -> str:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return " ".join(reason.removeprefix("Skipped: ").split())[:200]


def _row(name: str, outcome: str, seconds: float, note: str) -> dict[str, Any]:
    return asdict(make_row("tests", name, "", outcome, "s", [seconds], note=note, device=default_device()))

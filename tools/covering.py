"""Maps lines to the tests that execute them, by one run of the suite under coverage, which is kept."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import coverage

from tools.checkouts import Run, copy, fingerprint, run_pytest
from tools.record_tests import CONTEXT_VARIABLE, FIXTURE

SOURCES = ("nextquill", "kernels", "demos")

# `context` names the test in a process that a test starts. In pytest's own process it is empty, and the plugin switches
# contexts. Warnings are off because they would go to the standard error that tests of commands read.
_SETTINGS = """
[run]
core = ctrace
parallel = true
data_file = {parts}/coverage
source =
    {sources}
context = ${{{variable}}}
disable_warnings = no-data-collected, module-not-imported, module-not-measured, module-not-python, couldnt-parse
"""


@dataclass(frozen=True)
class Test:
    """A test that passes in the checkout, and its seconds under coverage."""

    id: str
    seconds: float
    is_slow: bool
    fixtures: tuple[str, ...] = ()


class Covering:
    """The map of a checkout, made once per content in a subfolder of `cache`. `words` go to pytest."""

    def __init__(self, folder: Path, cache: Path, words: Sequence[str], workers: int) -> None:
        self.store = cache / fingerprint(folder, *words)
        self.root = self.store / "checkout"
        if not (self.store / "tests.json").exists():
            self._make(folder, words, workers)
        tests = json.loads((self.store / "tests.json").read_text(encoding="utf-8"))
        self.tests = [Test(**each) for each in tests]
        self._data = coverage.CoverageData(str(self.store / "coverage"))
        self._data.read()

    def _make(self, folder: Path, words: Sequence[str], workers: int) -> None:
        shutil.rmtree(self.store, ignore_errors=True)
        parts, settings = self.store / "parts", self.store / "settings.ini"
        parts.mkdir(parents=True)
        copy(folder, self.root)
        sources = "\n    ".join(str(self.root / name) for name in SOURCES)
        settings.write_text(_SETTINGS.format(parts=parts, sources=sources, variable=CONTEXT_VARIABLE), encoding="utf-8")
        print(f"Mapping lines to tests, once for this content: {self.store}", flush=True)
        # Coverage makes tests slower, so their time limits are raised.
        words = ["-o", "timeout=3600", *words]
        told = {"COVERAGE_PROCESS_START": str(settings), CONTEXT_VARIABLE: ""}
        passed, failed = _outcomes(run_pytest(self.root, words, workers=workers, show=True, **told))
        if not passed:
            raise SystemExit(f"no test passed in {self.root}")
        if failed:
            # Some tests depend on tracing, or on the output of a process.
            print(f"{len(failed)} tests failed under coverage; running them without it", flush=True)
            again, still = _outcomes(run_pytest(self.root, sorted(failed), show=True))
            passed |= again
            for name in sorted(still):
                print(f"left out, as it fails without a mutation: {name}", flush=True)
        combined = coverage.Coverage(data_file=str(self.store / "coverage"), config_file=False)
        combined.combine([str(parts)])
        combined.save()
        tests = json.dumps([asdict(each) for each in passed.values()])
        (self.store / "tests.json").write_text(tests, encoding="utf-8")

    def tests_of(self, file: str, lines: range, more: Iterable[str] = ()) -> list[Test]:
        """The tests that execute these lines or whose ids begin with one of `more`, the most likely to fail first."""
        names = self._contexts(file, lines) if file.endswith(".py") else set()
        fixtures = [name.removeprefix(FIXTURE).split(" ", 1) for name in names if name.startswith(FIXTURE)]
        found = [
            test
            for test in self.tests
            if test.id in names
            or test.id.startswith(tuple(more))
            or any(name in test.fixtures and test.id.startswith(base.strip(".")) for name, base in fixtures)
        ]
        twin = f"test_{Path(file).stem}.py"
        return sorted(found, key=lambda test: (twin not in test.id, test.seconds))

    def _contexts(self, file: str, lines: range) -> set[str]:
        by_line = self._data.contexts_by_lineno(str(self.root / file))
        source = (self.root / file).read_text(encoding="utf-8")
        for chosen in (*_executed(source, lines), by_line):
            if names := {name for line in chosen for name in by_line.get(line, ()) if name}:
                return names
        return set()


def _outcomes(run: Run) -> tuple[dict[str, Test], set[str]]:
    """The tests that passed, by id, and the ids of those that failed."""
    seconds: dict[str, float] = {}
    for each in run.reports:
        seconds[each["nodeid"]] = seconds.get(each["nodeid"], 0.0) + each["duration"]
    calls = {each["nodeid"]: each for each in run.reports if each["when"] == "call" and each["outcome"] == "passed"}
    failed = set(run.failed)
    passed = {
        name: Test(name, round(seconds[name], 3), each["is_slow"], tuple(each["fixtures"]))
        for name, each in calls.items()
        if name not in failed
    }
    return passed, failed


def _executed(source: str, lines: range) -> list[set[int]]:
    """Sets of lines whose tests count for `lines`: their statements, or else the function around them.

    The list is empty for code that runs on import, or once for a cache. Which test runs it first is a coincidence, and
    all tests of the file depend on it.
    """
    around = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body[0].lineno <= lines.start
        and lines[-1] <= (node.end_lineno or 0)
    ]
    if not around or any("cache" in ast.unparse(mark) for node in around for mark in node.decorator_list):
        return []
    function = max(around, key=lambda node: node.lineno)
    statements: set[int] = set()
    for node in ast.walk(function):
        if isinstance(node, ast.stmt) and node is not function:
            body = getattr(node, "body", None)
            end = body[0].lineno - 1 if body else node.end_lineno or 0
            own = range(node.lineno, max(end, node.lineno) + 1)
            if own.start < lines.stop and lines.start < own.stop:
                statements |= set(own)
    return [statements, set(range(function.lineno, (function.end_lineno or 0) + 1))]

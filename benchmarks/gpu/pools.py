"""Phases `smoke` and `tests`: several processes, a file of results that grows, and a verdict."""

from __future__ import annotations

import math
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.gpu.shares import Record, rows_of, work
from benchmarks.gpu.verdict import Verdict
from benchmarks.measure import Row, write_csv

ROOT = Path(__file__).resolve().parents[2]
TESTS = (
    "tests/kernels",
    "tests/tree/test_on_gpu.py",
    "tests/test_on_gpu.py",
    "tests/test_implementations.py",
    "tests/test_linear_pair_jsd.py",
    "tests/test_large_logits.py",
    "tests/test_token_weights.py",
    *(f"tests/ops/test_{name}.py" for name in ("head", "dispatch", "label_check")),
)
#: Processes at most. A kernel's first use is its compilation on one core; all processes share Triton's cache on disk.
_WORKERS = 8
#: The most of a worker's output that goes into the log.
_LOG_BYTES = 200_000


def workers() -> int:
    """Processes that work side by side: two cores for each, as a compilation starts another one."""
    return max(1, min(_WORKERS, (os.cpu_count() or 2) // 2))


def run_smoke(csv: Path, log: Path, seconds: float, device: str, quick: bool, environment: dict[str, str]) -> Verdict:
    """Check every public operator (`benchmarks.gpu.smoke`)."""

    def command(folder: Path, worker: int) -> list[str]:
        flags = ["--folder", str(folder), "--worker", str(worker), "--device", device, *(["--quick"] if quick else [])]
        return [sys.executable, "-m", "benchmarks.gpu.smoke", *flags]

    count = 1 if quick else workers()
    found, problems = _pool(command, count, csv, log, seconds, environment)
    bad = sum(bool(row["note"]) for row in found.values())
    summary = f"{len(found) - bad} cases right, {bad} FAILED" + "".join(f"; {each}" for each in problems)
    return Verdict("smoke", bool(found) and not bad and not problems, summary)


def run_tests(
    csv: Path, log: Path, seconds: float, environment: dict[str, str], tests: Sequence[str] = TESTS
) -> Verdict:
    """Run the tests that need a GPU, without the slow ones and those that compile for other GPUs."""
    there = [test for test in tests if (ROOT / test.split("::")[0]).exists()]
    if not there:
        return Verdict("tests", False, f"FAILED, none of {', '.join(tests)} exists")

    def command(folder: Path, worker: int) -> list[str]:
        flags = ["-c", str(ROOT / "benchmarks" / "gpu_pytest.ini"), f"--rootdir={ROOT}", "-p", "benchmarks.gpu.plugin"]
        flags += ["--share-folder", str(folder), "--share-worker", str(worker), "--continue-on-collection-errors"]
        flags += ["--no-summary", "--tb=short", "-m", "not slow and not compiles"]
        return [sys.executable, "-m", "pytest", *flags, *there]

    own = environment | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "TORCHINDUCTOR_COMPILE_THREADS": "2"}
    count = 1 if len(there) == 1 else workers()
    found, problems = _pool(command, count, csv, log, seconds, own)
    counts = Counter(row["metric"] for row in found.values())
    summary = ", ".join(f"{counts[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped"))
    if not counts["passed"]:
        problems.append("no test passed")
    return Verdict("tests", not counts["failed"] and not problems, "; ".join([summary, *problems]))


def _pool(
    command: Callable[[Path, int], list[str]],
    count: int,
    csv: Path,
    log: Path,
    seconds: float,
    environment: dict[str, str],
) -> tuple[dict[str, Record], list[str]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def save(found: dict[str, Record]) -> None:
            write_csv([Row(**row) for row in found.values()], csv)

        problems = work(lambda worker: command(folder, worker), count, folder, seconds, save, cwd=ROOT, env=environment)
        rows = [Row(**row) for row in rows_of(folder).values()]
        # The list is not complete: without such a row, the file would look as if it were.
        rest = [
            replace(rows[0], case="the rest", metric="status", value=math.nan, note=f"not measured: {problem}")
            for problem in problems
            if rows
        ]
        write_csv([*rows, *rest], csv)
        with log.open("a", encoding="utf-8") as stream:
            for path in sorted(folder.glob("*.log")):
                text = path.read_bytes()[-_LOG_BYTES:].decode(errors="replace")
                stream.write(f"\n---- {csv.stem}, {path.stem}\n{text}")
        return rows_of(folder), problems

"""Verify everything on a GPU with one command: `python -m benchmarks.verify_gpu --out DIR`.

It runs the kernels' tests on the GPU and then suite `head`, from a checkout, within eight minutes. It needs only torch,
triton and pytest; with pytest-xdist the tests run in parallel. DIR gets:

    junit.xml      every test
    head.csv       every figure, rewritten after each task, so that a stopped run keeps its figures
    tests.log, head.log

Exit codes: 0 if all is well; 1 if a test failed, no test passed, or a figure was refused; 2 without a GPU, or for a
wrong flag.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
TESTS = (
    "tests/kernels",
    "tests/tree/test_on_gpu.py",
    "tests/test_implementations.py",
    "tests/test_large_logits.py",
    *(f"tests/ops/test_{name}.py" for name in ("head", "dispatch", "label_check")),
)
#: The tests' share of the time. The suite gets the rest, and the time that the tests leave.
_TESTS_SHARE = 0.5
#: Seconds for imports and for the end, which are not part of the suite's budget.
_MARGIN = 30
_GRACE = 10
#: Test processes, if pytest-xdist is installed. Most of a kernel's first test is its compilation on one core, and the
#: processes share Triton's cache on disk.
_WORKERS = 6


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tests, measure, and print a summary."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.verify_gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for junit.xml and head.csv")
    parser.add_argument("--seconds", type=float, default=480, help="time limit for everything")
    parser.add_argument("--quick", action="store_true", help="tiny shapes in the suite")
    parser.add_argument("--stop-on-failure", action="store_true", help="do not measure after a failed test")
    parser.add_argument("--tests", nargs="+", default=list(TESTS), help="files or folders of tests")
    parser.add_argument(
        "--dry-run", action="store_true", help="run without a GPU: interpreted kernels, and tiny shapes on the CPU"
    )
    options = parser.parse_args(arguments)
    if options.seconds <= 0:
        parser.error(f"--seconds: expected a positive number, got {options.seconds}")
    reason = _no_gpu()
    if reason and not options.dry_run:
        print(f"verify_gpu: {reason}; this command needs an NVIDIA or AMD GPU (--dry-run needs none)", file=sys.stderr)
        return 2
    begun = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    out = options.out.resolve()
    tested = _run_tests(out, options.tests, _TESTS_SHARE * options.seconds)
    print(tested.line, flush=True)
    if not tested.passed and options.stop_on_failure:
        return 1
    left = options.seconds - (time.monotonic() - begun)
    measured = _run_suite(out, left, "cpu" if options.dry_run else "cuda", options.quick or options.dry_run)
    _summarise(out / "head.csv")
    print(f"\n{tested.line}\n{measured.line}")
    print(f"{time.monotonic() - begun:.0f} s; results in {out}")
    return 0 if tested.passed and measured.passed else 1


def _no_gpu() -> str | None:
    try:
        import torch
    except ImportError as error:
        return f"torch cannot be imported ({error})"
    return None if torch.cuda.is_available() else f"torch {torch.__version__} sees no GPU"


class Part:
    """The result of one part: whether it passed, and its line in the summary."""

    def __init__(self, passed: bool, line: str) -> None:
        self.passed, self.line = passed, line


def _run_tests(out: Path, tests: Sequence[str], seconds: float) -> Part:
    junit = out / "junit.xml"
    junit.unlink(missing_ok=True)
    found = [test for test in tests if (ROOT / test.split("::")[0]).exists()]
    if not found:
        return Part(False, f"tests: FAILED, none of {', '.join(tests)} exists")
    flags = ["-c", str(ROOT / "benchmarks" / "gpu_pytest.ini"), f"--rootdir={ROOT}", f"--junit-xml={junit}"]
    command = [sys.executable, "-m", "pytest", *flags, *_plugins(), "-m", "not slow and not compiles", *found]
    code = _run(command, out / "tests.log", seconds, {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"})
    return _judge_tests(junit, code, seconds)


def _plugins() -> list[str]:
    """Flags that load the useful plugins; other installed plugins are not loaded."""
    flags = ["-p", "pytest_timeout"] if importlib.util.find_spec("pytest_timeout") else []
    workers = min(_WORKERS, os.cpu_count() or 1)
    if workers > 1 and importlib.util.find_spec("xdist"):
        flags += ["-p", "xdist.plugin", "-n", str(workers), "--dist", "worksteal"]
    return flags


def _judge_tests(junit: Path, code: int | None, seconds: float) -> Part:
    """Judge by the JUnit file and the exit code, as a run in which all tests were skipped verifies nothing."""
    counts = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    if junit.is_file():
        for suite in ElementTree.parse(junit).getroot().iter("testsuite"):
            for name in counts:
                counts[name] += int(suite.get(name, 0))
    passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    bad = counts["failures"] + counts["errors"]
    summary = f"{passed} passed, {bad} failed, {counts['skipped']} skipped (junit.xml, tests.log)"
    if code is None:
        return Part(False, f"tests: FAILED, stopped after {seconds:.0f} s; {summary}")
    if passed == 0:
        return Part(False, f"tests: FAILED, no test passed (pytest ended with {code}); {summary}")
    return Part(code == 0, f"tests: {'ok' if code == 0 else 'FAILED'}, {summary}")


def _run_suite(out: Path, seconds: float, device: str, quick: bool) -> Part:
    path = out / "head.csv"
    path.unlink(missing_ok=True)
    flags = ["--suite", "head", "--device", device, "--csv", str(path), *(["--quick"] if quick else [])]
    budget = max(10.0, seconds - _MARGIN)
    command = [sys.executable, "-m", "benchmarks.run", *flags, "--budget", f"{budget:.0f}"]
    code = _run(command, out / "head.log", seconds - _GRACE, _allocator())
    rows = _rows(path)
    timed = sum(row["metric"] == "time" for row in rows)
    summary = f"{timed} ratios (head.csv, head.log)"
    if code is None:
        return Part(timed > 0, f"head: stopped after {seconds:.0f} s; {summary}")
    return Part(code == 0 and timed > 0, f"head: {'ok' if code == 0 and timed else 'FAILED, see head.log'}, {summary}")


def _allocator() -> dict[str, str]:
    """Use segments that grow. Sizes differ between tasks, so fixed segments would run out of memory early."""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    if any(name in os.environ for name in names):
        return {}
    import torch

    release = tuple(int(part) for part in torch.__version__.split(".")[:2])
    return {names[0] if release >= (2, 9) else names[1]: "expandable_segments:True"}  # 2.9 warns about the old name


def _run(command: Sequence[str], log: Path, seconds: float, extra: Mapping[str, str] | None = None) -> int | None:
    """Run a command in its own process group; return its exit code, or None after a timeout, which kills the group."""
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    environment.update(extra or {})
    with log.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(max(1.0, seconds))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)  # pytest then still writes its JUnit file
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE)
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def _summarise(path: Path) -> None:
    """Print the training steps' times over plain PyTorch's, and what was refused."""
    group = None
    for row in _rows(path):
        if row["metric"] not in ("time", "gemm_fraction", "peak", "transient") or row["mode"] != "forward+backward":
            continue
        if (row["case"], row["loss"], row["head"]) != group:
            group = row["case"], row["loss"], row["head"]
            print(f"\n{row['case']}, {row['loss']}, {row['head']} head")
        of = f" of {row['baseline']}" if row["baseline"] else ""
        print(f"  {row['provider']:<28} {row['metric']:<14} {float(row['value']):9.3f} {row['unit']}{of}")
    refused = {(row["provider"], row["note"]) for row in _rows(path) if row["metric"] == "status"}
    for provider, note in sorted(refused):
        print(f"not measured: {provider or 'everything'}: {note}")


if __name__ == "__main__":
    sys.exit(main())

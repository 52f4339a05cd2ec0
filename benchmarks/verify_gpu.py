"""Verify and measure everything on a GPU: `python -m benchmarks.verify_gpu --out DIR`.

It runs from a checkout that is not installed, and needs torch, triton and pytest; suite `step` needs transformers too.
Each phase (`benchmarks.gpu`) is a process of its own with a time limit. Its results are in DIR as soon as they exist.
A failure in one phase does not stop the next one. DIR gets:

    report.md     one page: what holds, what does not, and what was not measured
    probe.csv     versions, hardware, and the rates of copies and products
    smoke.csv     every public operator against float64
    tests.csv     every test
    head.csv      the loss alone, against other code
    step.csv      whole optimiser steps
    tuning.csv    chunk sizes, kernels by time, tiles, counters
    log.txt       what the phases printed

`--part a` checks (probe, smoke, tests; 260 s), `--part b` measures (the others; 420 s). Part b judges by the rates in
DIR/probe.csv, or in the file of `--probe`; without one it measures them first.

Exit codes: 0 if all is well; 1 if a phase failed or has no figures; 2 without a GPU, or for a wrong flag.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu.verdict import Verdict

ROOT = Path(__file__).resolve().parent.parent
#: Seconds of each part.
SECONDS = {"a": 260.0, "b": 420.0}
#: Seconds of a part that are left for starting and ending processes.
_MARGIN = 10
_GRACE = 5


@dataclass(frozen=True)
class Setting:
    """What all phases need: the folder, the device, whether sizes are tiny, tests, and variables for children."""

    out: Path
    device: str
    quick: bool
    tests: tuple[str, ...]
    environment: Mapping[str, str]

    @property
    def log(self) -> Path:
        return self.out / "log.txt"


class Phase(NamedTuple):
    """A phase: its part, its share of the time that is left, and a function of the setting and its seconds."""

    name: str
    part: str
    weight: float
    run: Callable[[Setting, float], Verdict]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the phases, and write the page after each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.verify_gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--part", choices=("a", "b", "all"), default="all", help="a checks, b measures")
    parser.add_argument("--seconds", type=float, help="time limit; by default 260 for part a and 420 for part b")
    parser.add_argument("--phases", nargs="+", choices=[each.name for each in PHASES], help="only these phases")
    parser.add_argument("--probe", type=Path, help="probe.csv of an earlier part a on the same machine")
    parser.add_argument("--commit", help="the commit, where git cannot tell")
    parser.add_argument("--quick", action="store_true", help="tiny shapes")
    parser.add_argument("--tests", nargs="+", help="files or folders of tests")
    parser.add_argument(
        "--dry-run", action="store_true", help="run without a GPU: interpreted kernels, and tiny shapes on the CPU"
    )
    options = parser.parse_args(arguments)
    parts = ("a", "b") if options.part == "all" else (options.part,)
    total = sum(SECONDS[part] for part in parts)
    if options.seconds is not None and options.seconds <= 0:
        parser.error(f"--seconds: expected a positive number, got {options.seconds}")
    if options.probe and not options.probe.is_file():
        parser.error(f"--probe: expected a file, got {options.probe}")
    reason = _no_gpu()
    if reason and not options.dry_run:
        print(f"verify_gpu: {reason}; this command needs an NVIDIA or AMD GPU (--dry-run needs none)", file=sys.stderr)
        return 2
    setting = _setting(options)
    verdicts, begun = list[Verdict](), time.monotonic()
    for part in parts:
        phases = _chosen(part, options.phases, setting)
        seconds = (options.seconds or total) * SECONDS[part] / total
        verdicts += _run_part(phases, setting, seconds, verdicts)
    from benchmarks.gpu.report import write

    page = write(setting.out, verdicts)
    print(f"\n{page.read_text(encoding='utf-8')}\n{time.monotonic() - begun:.0f} s; results in {setting.out}")
    return 0 if verdicts and all(each.passed for each in verdicts) else 1


def _no_gpu() -> str | None:
    try:
        import torch
    except ImportError as error:
        return f"torch cannot be imported ({error})"
    return None if torch.cuda.is_available() else f"torch {torch.__version__} sees no GPU"


def _setting(options: argparse.Namespace) -> Setting:
    from benchmarks.gpu.pools import TESTS
    from benchmarks.measure import commit

    options.out.mkdir(parents=True, exist_ok=True)
    out = options.out.resolve()
    if options.probe and options.probe.resolve() != out / "probe.csv":
        shutil.copyfile(options.probe, out / "probe.csv")
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "NEXTQUILL_COMMIT": options.commit or commit(),
    }
    if options.dry_run:
        environment["TRITON_INTERPRET"] = "1"
    device = "cpu" if options.dry_run else "cuda"
    return Setting(out, device, options.quick or options.dry_run, tuple(options.tests or TESTS), environment)


def _chosen(part: str, names: Sequence[str] | None, setting: Setting) -> list[Phase]:
    """The phases of a part; the measurements need the rates of phase `probe`."""
    chosen = [phase for phase in PHASES if phase.part == part and (names is None or phase.name in names)]
    if chosen and part == "b" and not (setting.out / "probe.csv").is_file():
        chosen.insert(0, PHASES[0])
    return chosen


def _run_part(phases: Sequence[Phase], setting: Setting, seconds: float, before: Sequence[Verdict]) -> list[Verdict]:
    """Run phases, each with its share of the time that is left, so that what one does not need is the others'."""
    from benchmarks.gpu.report import write

    deadline, verdicts = time.monotonic() + seconds - min(_MARGIN, seconds / 10), list[Verdict]()
    if phases and phases[-1].part == "b" and setting.device == "cuda":
        setting = _with_growing_segments(setting)
    for place, phase in enumerate(phases):
        left = deadline - time.monotonic()
        share = left * phase.weight / sum(each.weight for each in phases[place:])
        if share < 1:
            verdict = Verdict(phase.name, False, "not measured, out of time")
        else:
            begun = time.monotonic()
            verdict = phase.run(setting, share)
            verdict = verdict._replace(summary=f"{verdict.summary} ({time.monotonic() - begun:.0f} of {share:.0f} s)")
        verdicts.append(verdict)
        print(verdict, flush=True)
        write(setting.out, [*before, *verdicts])
    return verdicts


def _with_growing_segments(setting: Setting) -> Setting:
    from benchmarks.gpu.allocator import growing_segments

    extra, note = growing_segments(setting.environment)
    with setting.log.open("a", encoding="utf-8") as stream:
        stream.write(f"\n---- allocator: {note}\n")
    print(f"allocator: {note}", flush=True)
    return replace(setting, environment={**setting.environment, **extra})


# ---- the phases --------------------------------------------------------------------------------------


def _smoke(setting: Setting, seconds: float) -> Verdict:
    from benchmarks.gpu.pools import run_smoke

    path, environment = setting.out / "smoke.csv", dict(setting.environment)
    return run_smoke(path, setting.log, seconds, setting.device, setting.quick, environment)


def _tests(setting: Setting, seconds: float) -> Verdict:
    from benchmarks.gpu.pools import run_tests

    return run_tests(setting.out / "tests.csv", setting.log, seconds, dict(setting.environment), setting.tests)


def _suite(name: str) -> Callable[[Setting, float], Verdict]:
    """A suite of `benchmarks.run`."""

    def run(setting: Setting, seconds: float) -> Verdict:
        budget = max(5.0, seconds - 2 * _MARGIN)
        flags = ["--suite", name, "--device", setting.device, *(["--quick"] if setting.quick else [])]
        if setting.quick:
            flags += ["--rounds", "2"]
        path = setting.out / f"{name}.csv"
        path.unlink(missing_ok=True)
        command = ["benchmarks.run", *flags, "--csv", str(path), "--budget", f"{budget:.0f}"]
        return _judge(name, name, path, _run(command, setting, seconds), seconds)

    return run


def _phase(name: str, file: str) -> Callable[[Setting, float], Verdict]:
    """A phase with a module of its own, which starts nothing new a little before its end."""

    def run(setting: Setting, seconds: float) -> Verdict:
        path = setting.out / f"{file}.csv"
        flags = ["--csv", str(path), "--device", setting.device, "--seconds", f"{max(1.0, seconds - _MARGIN):.0f}"]
        command = [f"benchmarks.gpu.{name}", *flags, *(["--quick"] if setting.quick else [])]
        return _judge(name, name, path, _run(command, setting, seconds), seconds)

    return run


def _judge(name: str, suite: str, path: Path, code: int | None, seconds: float) -> Verdict:
    """Judge by the exit code and the rows. A phase that was stopped is judged by what it has."""
    from benchmarks.gpu.phase import read_rows

    rows = [row for row in read_rows(path) if row.suite == suite]
    measured, wrong = sum(row.rounds > 0 for row in rows), sum(row.note.startswith("FAILED") for row in rows)
    left_out = sum(row.note.startswith("not measured") for row in rows)
    summary = f"{measured} figures ({path.name})" + f", {wrong} FAILED" * bool(wrong)
    summary += f", {left_out} not measured" * bool(left_out)
    if code is None:
        summary += f", stopped after {seconds:.0f} s"
    elif code != 0:
        summary += f", FAILED with exit code {code}, see log.txt"
    return Verdict(name, code in (0, None) and not wrong and bool(measured or left_out), summary)


def _run(module: Sequence[str], setting: Setting, seconds: float) -> int | None:
    """Run a module in a process group of its own; return its exit code, or None if it had to be stopped."""
    with setting.log.open("a", encoding="utf-8") as stream:
        stream.write(f"\n---- {' '.join(module)}\n")
        stream.flush()
        process = subprocess.Popen(
            [sys.executable, "-m", *module],
            cwd=ROOT, env=dict(setting.environment), stdout=stream, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            return process.wait(max(1.0, seconds - _GRACE))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)  # it may still write what it has
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE)
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


#: In order of importance within a part.
PHASES = (
    Phase("probe", "a", 1, _phase("probe", "probe")),
    Phase("smoke", "a", 2, _smoke),
    Phase("tests", "a", 5, _tests),
    Phase("head", "b", 5, _suite("head")),
    Phase("step", "b", 6, _suite("step")),
    Phase("sweep", "b", 2, _phase("sweep", "tuning")),
    Phase("profile", "b", 1, _phase("profile", "tuning")),
    Phase("tune", "b", 2, _phase("tune", "tuning")),
    Phase("counters", "b", 2, _phase("counters", "tuning")),
)


if __name__ == "__main__":
    sys.exit(main())

"""Run the study, or resume it: `python -m benchmarks.study --preset cpu --model DIR --data NAME=DIR …`."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS
from benchmarks.study.folder import RunFolder, Study, make_study
from benchmarks.study.plan import PRESETS
from nextquill.errors import NextQuillError
from nextquill.storage.atomic_files import write_whole

_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the runs that are left, `--workers` at a time; 0 when the study is complete."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__, allow_abbrev=False)
    add_study_flags(parser)
    add_driver_flags(parser)
    chosen = parser.parse_args(arguments)
    return drive("benchmarks.study.run", study_of, chosen)


def drive(module: str, study_of: Callable[[argparse.Namespace], RunFolder], chosen: argparse.Namespace) -> int:
    """Make the runs that are left, each as `python -m module --run NAME`; the exit code."""
    try:
        study = study_of(chosen)
        study.open()
    except NextQuillError as error:
        print(f"study: {error}", file=sys.stderr)
        return 1
    words = [sys.executable, "-m", module]
    for name in ("preset", "model", "data", "prose", "losses", "out"):
        value = getattr(chosen, name, None)
        values = value if isinstance(value, list) else [] if value is None else [value]
        words += [word for each in values for word in (f"--{name}", str(each))]
    return Driver(study, words, chosen.workers, chosen.minutes).go_on()


def make_one(study: RunFolder, name: str, worker: Callable[[Any, Any], Any], parser: argparse.ArgumentParser) -> int:
    """Make the run of that name in this process, as `worker(study, run)` performs it; the exit code."""
    runs = {run.name: run for run in study.runs()}
    if name not in runs:
        parser.error(f"--run: expected one of {', '.join(runs)}, got {name!r}")
    result = worker(study, runs[name]).perform()
    write_whole(study.path(name), json.dumps(result, ensure_ascii=False) + "\n")
    shutil.rmtree(study.work / name, ignore_errors=True)
    return 0


def add_driver_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say how many runs are started, and until when."""
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="runs at a time, a thread each")
    parser.add_argument("--minutes", type=float, help="start no run after so many minutes, and stop those under way")


def add_study_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say which study."""
    add_run_flags(parser, PRESETS, "study-PRESET")
    parser.add_argument("--prose", help="a text file of general prose, to see what training forgets")


def add_run_flags(parser: argparse.ArgumentParser, presets: Iterable[str], folder: str) -> None:
    """The flags that any study has."""
    parser.add_argument("--preset", choices=list(presets), default="cpu")
    parser.add_argument("--model", required=True, help="the pretrained model: a folder or a name on the hub")
    parser.add_argument("--data", action="append", default=[], metavar="NAME=DIR", help="a data set; once for each")
    parser.add_argument("--out", type=Path, help=f"the study's folder (benchmarks/results/{folder})")


def study_of(chosen: argparse.Namespace) -> Study:
    """The study that the flags describe."""
    folder = chosen.out or RESULTS / f"study-{chosen.preset}"
    return make_study(folder, chosen.preset, chosen.model, data_of(chosen), chosen.prose)


def data_of(chosen: argparse.Namespace) -> dict[str, Path]:
    """The folders of the data sets by name."""
    pairs = [each.partition("=") for each in chosen.data]
    return {name: Path(folder) for name, _, folder in pairs}


class Driver:
    """Starts the runs of a study, `workers` at a time, each with one thread, as `command` with `--run NAME`."""

    def __init__(self, study: RunFolder, command: Sequence[str], workers: int, minutes: float | None) -> None:
        self.study, self.command, self.workers, self.minutes = study, command, workers, minutes
        self.under_way: dict[str, subprocess.Popen[bytes]] = {}
        self.failed: set[str] = set()
        self.began = time.monotonic()

    def go_on(self) -> int:
        """Make all runs that are left; the exit code."""
        for number in (signal.SIGINT, signal.SIGTERM):  # a shell ignores the first in the background
            signal.signal(number, signal.default_int_handler)
        try:
            while not self._is_late():
                self._collect()
                waiting = self._waiting()
                if not waiting and not self.under_way:
                    return 1 if self.failed else 0
                for run in waiting[: self.workers - len(self.under_way)]:
                    self._start(run)
                time.sleep(1)
            return _INTERRUPTED
        except KeyboardInterrupt:
            return _INTERRUPTED
        finally:
            for process in self.under_way.values():
                process.terminate()

    def _is_late(self) -> bool:
        return self.minutes is not None and time.monotonic() - self.began > 60 * self.minutes

    def _waiting(self) -> list[Any]:
        """The runs that can start now, in their order."""
        taken = {*self.under_way, *self.failed}
        left = [run for run in self.study.runs() if run.name not in taken and not self.study.path(run.name).is_file()]
        return [run for run in left if all(self.study.path(name).is_file() for name in run.needs)]

    def _start(self, run: Any) -> None:
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), "1")
        folder = self.study.work / run.name
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "log.txt").open("ab") as log:
            words = [*self.command, "--run", run.name]
            process = subprocess.Popen(words, env={**os.environ, **threads}, stdout=log, stderr=log)
        self.under_way[run.name] = process
        self._say(f"{run.name}: started")

    def _collect(self) -> None:
        for name, process in list(self.under_way.items()):
            if process.poll() is None:
                continue
            del self.under_way[name]
            if process.returncode:
                self.failed.add(name)
                self._say(f"{name}: failed with exit code {process.returncode}; see {self.study.work / name}/log.txt")
            else:
                self._say(f"{name}: finished")

    def _say(self, text: str) -> None:
        runs = self.study.runs()
        done = sum(self.study.path(run.name).is_file() for run in runs)
        minutes = (time.monotonic() - self.began) / 60
        print(f"[{minutes:6.1f} min, {done} runs finished] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

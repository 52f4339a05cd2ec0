"""Phase `counters`: what NVIDIA's profiler `ncu` reads of three kernels, where it is installed.

It runs `python -m benchmarks.gpu.profile --once`, and leaves the clocks as they are. Each kernel has a run of its own
with a limit, because `ncu` starts a kernel several times and intercepts every other launch.
"""

from __future__ import annotations

import csv
import importlib
import os
import pkgutil
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

import nextquill_kernels
import torch

from benchmarks.gpu.phase import Sheet, phase_main, read_rows
from benchmarks.gpu.pools import ROOT
from benchmarks.measure import make_row

#: What is read, by the name in our file.
METRICS = {
    "time": "gpu__time_duration.sum",
    "memory": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "arithmetic": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "bytes": "dram__bytes.sum",
    "warps": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
}
#: Used if phase `profile` left no names. A regular expression matches a part of a name.
_KERNELS = ("pair_stats", "pair_grad", "stream_fwd")
_LEAST_SECONDS = 15


def run(sheet: Sheet, device: torch.device, quick: bool, deadline: float) -> None:
    """Read the counters of the kernels, one after the other."""
    program = shutil.which("ncu")
    if program is None or (device.type != "cuda" and not quick):
        sheet.note("three kernels", "ncu is not on PATH" if program is None else "needs a GPU")
        return
    kernels = _kernels(sheet)
    for place, kernel in enumerate(kernels):
        left = deadline - time.monotonic()
        if left < _LEAST_SECONDS * (not quick):
            sheet.note(kernel, "out of time")
            continue
        found, problem = _ask(program, kernel, left / (len(kernels) - place), quick)
        if not found:
            sheet.note(kernel, problem)
        for name, value, unit in found:
            sheet.add(make_row("counters", kernel, name, "counter", unit, [value], device=device.type))


def _kernels(sheet: Sheet) -> list[str]:
    """Our kernels of the profiled calls, the longest first."""
    modules = [
        importlib.import_module(f"nextquill_kernels.{found.name}")
        for found in pkgutil.iter_modules(nextquill_kernels.__path__)
    ]
    ours = {name.lstrip("_") for module in modules for name in vars(module) if name.endswith("_kernel")}
    rows = [row for row in read_rows(sheet.path) if row.suite == "profile" and row.metric == "kernel"]
    longest = sorted((row for row in rows if row.provider.lstrip("_") in ours), key=lambda row: -row.value)
    return list(dict.fromkeys(row.provider for row in longest))[:3] or list(_KERNELS)


def _ask(program: str, kernel: str, seconds: float, quick: bool) -> tuple[list[tuple[str, float, str]], str]:
    """Counters of one launch of a kernel, the second one, as (name, value, unit); or why there are none."""
    command = [
        program, "--clock-control", "none", "--csv", "--metrics", ",".join(METRICS.values()),
        "--kernel-name", f"regex:{kernel}", "--launch-skip", "1", "--launch-count", "1", "--kill", "yes",
        sys.executable, "-m", "benchmarks.gpu.profile", "--once", *(["--quick"] if quick else []),
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, start_new_session=True
    )
    try:
        text, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return [], f"stopped after {seconds:.0f} s"
    found = parse(text)
    return found, "" if found else f"ncu ended with {process.returncode}: {' '.join(text.split())[-200:]}"


def parse(text: str) -> list[tuple[str, float, str]]:
    """The metrics in ncu's CSV output, which has other lines before it."""
    lines = text.splitlines()
    start = next((place for place, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    names = {metric: name for name, metric in METRICS.items()}
    found = []
    for row in csv.DictReader(lines[start:]):
        name, value = names.get(row.get("Metric Name") or ""), (row.get("Metric Value") or "").replace(",", "")
        if name and value.replace(".", "", 1).isdigit():
            found.append((name, float(value), row.get("Metric Unit") or ""))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the phase alone."""
    return phase_main("counters", run, arguments)


if __name__ == "__main__":
    raise SystemExit(main())

"""Phase `counters`: what NVIDIA's profiler `ncu` reads of three kernels, where it is installed.

It runs `python -m benchmarks.gpu.profile --once`, and leaves the clocks as they are. A figure is the median over the
kernel's launches in one call.
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

#: Values of each launch, by the kernel's name, the counter's, and the unit.
Counters = dict[tuple[str, str, str], list[float]]


def run(sheet: Sheet, device: torch.device, quick: bool, deadline: float) -> None:
    """Read the counters of all kernels in one run."""
    program = shutil.which("ncu")
    if program is None or (device.type != "cuda" and not quick):
        sheet.note("three kernels", "ncu is not on PATH" if program is None else "needs a GPU")
        return
    kernels = _kernels(sheet)
    found, problem = _ask(program, kernels, deadline - time.monotonic(), quick)
    for kernel in kernels:
        mine = {key: values for key, values in found.items() if kernel in key[0]}
        for (_, name, unit), values in mine.items():
            sheet.add(make_row("counters", kernel, name, "counter", unit, values, device=device.type))
        if not mine:
            sheet.note(kernel, problem or "ncu saw no launch")


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


def _ask(program: str, kernels: Sequence[str], seconds: float, quick: bool) -> tuple[Counters, str]:
    """The counters of the kernels' launches, and what went wrong."""
    command = [
        program, "--clock-control", "none", "--csv", "--metrics", ",".join(METRICS.values()),
        "--profile-from-start", "off", "--kernel-name", f"regex:{'|'.join(kernels)}", "--launch-count", "16",
        sys.executable, "-m", "benchmarks.gpu.profile", "--once", *(["--quick"] if quick else []),
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, start_new_session=True
    )
    try:
        text, _ = process.communicate(timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        text, _ = process.communicate()
        return parse(text), f"stopped after {seconds:.0f} s"
    print(text[-5000:], flush=True)
    return parse(text), f"ncu ended with {process.returncode}: {' '.join(text.split())[-200:]}" * bool(
        process.returncode
    )


def parse(text: str) -> Counters:
    """The metrics in ncu's CSV output, which has other lines before it, by kernel, name and unit."""
    lines = text.splitlines()
    start = next((place for place, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    names = {metric: name for name, metric in METRICS.items()}
    found: Counters = {}
    for row in csv.DictReader(lines[start:]):
        name, value = names.get(row.get("Metric Name") or ""), (row.get("Metric Value") or "").replace(",", "")
        if name and value.replace(".", "", 1).isdigit():
            found.setdefault((row["Kernel Name"], name, row.get("Metric Unit") or ""), []).append(float(value))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the phase alone."""
    return phase_main("counters", run, arguments)


if __name__ == "__main__":
    raise SystemExit(main())

"""Measures on a machine with other load: providers take turns, and figures are ratios within a turn."""

from __future__ import annotations

import csv
import gc
import math
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from statistics import median, quantiles

import torch

RESULTS = Path(__file__).parent / "results"


#: The fewest rounds for a useful median.
LEAST_ROUNDS = 3


class GateError(RuntimeError):
    """A result of ours, or of plain PyTorch, is wrong and was not timed."""


@dataclass(frozen=True)
class Row:
    """One figure: `value` is the median over rounds, p20 and p80 its spread. If it is nan, `note` gives the reason."""

    suite: str
    case: str
    loss: str
    provider: str
    mode: str
    head: str
    dtype: str
    metric: str
    unit: str
    value: float
    p20: float
    p80: float
    rounds: int
    baseline: str
    note: str
    device: str
    threads: int
    torch: str
    triton: str
    python: str
    commit: str
    time: str


@dataclass(frozen=True)
class Options:
    """Options of a suite's run.

    Args:
        rounds: the most turns that each provider takes.
        quick: tiny shapes, as a test run.
        device: "cpu" or "cuda"; by default a GPU if there is one.
        budget: the seconds for the suite. If time is short, fewer rounds run, but at least three, and the last cases
            are left out.
        save: called with all rows so far after every new one.
        full: the largest size, however long it takes, if a suite has one.
        model: the name or folder of a model, if a suite takes one.
    """

    rounds: int = 7
    quick: bool = False
    device: str | None = None
    budget: float | None = None
    save: Callable[[list[Row]], None] = lambda rows: None
    full: bool = False
    model: str | None = None


def time_in_turns(
    providers: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int = 1,
    budget: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each provider in each round. In every round each provider runs once, in rotating order.

    On a CPU that other programs use, `time.process_time` as the `clock` counts this process's own work alone.

    With a `budget` in seconds, no round starts that would exceed it, judging by the round before. At least three rounds
    run, or `rounds` if that is fewer.
    """
    gc.collect()
    gc.freeze()  # with torch's compiler imported, one garbage collection takes 180 ms, most of a small suite
    try:
        return _take_turns(providers, rounds, warmup, budget, clock)
    finally:
        gc.unfreeze()


def _take_turns(
    providers: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int,
    budget: float | None,
    clock: Callable[[], float],
) -> dict[str, list[float]]:
    names = list(providers)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    begun = round_begun = time.perf_counter()
    for turn in range(-warmup, rounds):
        now = time.perf_counter()
        last_round, round_begun = now - round_begun, now
        if budget is not None and turn >= LEAST_ROUNDS and now - begun + last_round > budget:
            break
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            gc.collect()
            synchronise()
            start = clock()
            providers[name]()
            synchronise()
            if turn >= 0:
                seconds[name].append(clock() - start)
    return seconds


def ratios(seconds: Mapping[str, list[float]], baseline: str) -> dict[str, list[float]]:
    """Each provider's time over the baseline's, round by round."""
    return {
        name: [own / base for own, base in zip(values, seconds[baseline], strict=True)]
        for name, values in seconds.items()
    }


def make_row(
    suite: str,
    case: str,
    provider: str,
    metric: str,
    unit: str,
    values: list[float],
    baseline: str = "",
    *,
    loss: str = "",
    mode: str = "",
    head: str = "",
    dtype: str = "",
    note: str = "",
    device: str | None = None,
) -> Row:
    """Summarise the rounds of one figure, to five significant digits. Without values, the row only holds a note."""
    own = values or [math.nan]
    cuts = quantiles(own, n=5, method="inclusive") if len(own) > 1 else own * 4
    value, p20, p80 = (float(f"{number:.5g}") for number in (median(own), cuts[0], cuts[-1]))
    return Row(
        suite=suite,
        case=case,
        loss=loss,
        provider=provider,
        mode=mode,
        head=head,
        dtype=dtype,
        metric=metric,
        unit=unit,
        value=value,
        p20=p20,
        p80=p80,
        rounds=len(values),
        baseline=baseline,
        note=note,
        device=device_name(device),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        triton=triton_version(),
        python=platform.python_version(),
        commit=commit(),
        time=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
    )


def write_csv(rows: list[Row], path: Path) -> None:
    """Write the rows to a temporary file, and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, [f.name for f in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    os.replace(temporary, path)


def default_device() -> str:
    """Return "cuda" if there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@lru_cache
def device_name(kind: str | None = None) -> str:
    """The accelerator's name, or the processor's; `kind` is "cuda" or "cpu"."""
    if (kind or default_device()) == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def short_name(device: str) -> str:
    """A device's name without trademarks, cores and clock: "Intel(R) Xeon(R) Processor" becomes "Intel Xeon"."""
    return " ".join(re.sub(r"\((R|TM)\)|\b\d+-Core\b|\b(CPU|Processor)\b|@.*", " ", device).split()) or device


@lru_cache
def commit() -> str:
    """The commit of this checkout: NEXTQUILL_COMMIT for a copy without its history, else what git says."""
    if os.environ.get("NEXTQUILL_COMMIT"):
        return os.environ["NEXTQUILL_COMMIT"]
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        done = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True, check=False)
    except OSError:  # no git
        return "unknown"
    return done.stdout.strip() or "unknown"


@lru_cache
def triton_version() -> str:
    """The installed version, or an empty string."""
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return ""


def synchronise() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()

"""Measuring on a machine that is never quiet: providers take turns, and what counts is the ratio within a turn."""

from __future__ import annotations

import csv
import gc
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from statistics import median, quantiles

import torch

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One figure: `value` is the median over rounds, p20 and p80 their spread."""

    suite: str
    case: str
    provider: str
    metric: str
    unit: str
    value: float
    p20: float
    p80: float
    rounds: int
    baseline: str
    device: str
    threads: int
    torch: str
    python: str
    commit: str
    time: str


def time_in_turns(
    providers: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of each provider in each round; in every round each runs once, in rotating order."""
    names = list(providers)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-warmup, rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            gc.collect()
            _synchronise()
            start = time.perf_counter()
            providers[name]()
            _synchronise()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratios(seconds: Mapping[str, list[float]], baseline: str) -> dict[str, list[float]]:
    """Each provider's time over the baseline's, round by round."""
    return {
        name: [own / base for own, base in zip(values, seconds[baseline], strict=True)]
        for name, values in seconds.items()
    }


def make_row(
    suite: str, case: str, provider: str, metric: str, unit: str, values: list[float], baseline: str = ""
) -> Row:
    """Summarise the rounds of one figure."""
    cuts = quantiles(values, n=5, method="inclusive") if len(values) > 1 else [values[0]] * 4
    return Row(
        suite=suite,
        case=case,
        provider=provider,
        metric=metric,
        unit=unit,
        value=round(median(values), 4),
        p20=round(cuts[0], 4),
        p80=round(cuts[-1], 4),
        rounds=len(values),
        baseline=baseline,
        device=device_name(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        python=platform.python_version(),
        commit=_commit(),
        time=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
    )


def write_csv(rows: list[Row], path: Path) -> None:
    """Write the rows through a temporary name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, [f.name for f in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    os.replace(temporary, path)


def device_name() -> str:
    """The accelerator's name, or the processor's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    done = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()

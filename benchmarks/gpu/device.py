"""Whether the device still works, and how long a call takes on it."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch


def failure() -> str | None:
    """Wait for the GPU; return the error that makes it useless for this process, or None."""
    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()
        torch.ones(1, device="cuda").add_(1).item()
    except RuntimeError as error:
        return one_line(error)
    return None


def one_line(error: BaseException, longest: int = 300) -> str:
    """An error's type and message in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:longest]


def seconds_of(call: Callable[[], object], device: torch.device, rounds: int = 5, warmup: int = 2) -> list[float]:
    """Seconds of each round of a call, by the GPU's own clock where there is one."""
    for _ in range(warmup):
        call()
    if device.type != "cuda":
        return [_host_seconds(call) for _ in range(rounds)]
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for start, stop in events:
        start.record()
        call()
        stop.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) / 1000 for start, stop in events]


def _host_seconds(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def middle(values: list[float]) -> float:
    """The median."""
    return float(median(values))

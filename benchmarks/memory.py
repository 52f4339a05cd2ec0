"""Peak memory of one call beyond its inputs.

On a GPU, the caching allocator counts it. On a CPU (Linux), each call runs in a forked child of a fresh process. That
process has only run every provider on tiny inputs, on one thread, as a fork would lose other threads. The child runs
the provider on tiny inputs again, makes the inputs, resets the high-water mark of its resident memory, and reads it
after the call.

A whole call is measured, and its forward alone. `transient` is the forward's peak minus the finished gradients that it
keeps; everything else that it keeps for the backward counts. The peak of the whole call cannot replace it, because a
float32 dW is narrowed to W's dtype only in the backward, when the buffers of the forward are gone.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.cases import Shape, Task, for_task, make_inputs
from benchmarks.provider import Call
from benchmarks.registry import PROVIDERS

MIB = 2**20
#: Blocks of 128 KiB or more come from the kernel and go back at once, so that the mark shows the memory in use.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


class Request(NamedTuple):
    """A provider's call for a task, either whole or only its forward."""

    task: Task
    provider: str
    forward: bool


def cuda_peak(call: Call) -> int:
    """Bytes allocated at the call's peak, with its results, beyond the memory allocated before it."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def cpu_peaks(shape: Shape, requests: Sequence[Request], timeout: float = 300) -> list[int | None]:
    """Peak bytes of requests at a shape, each in its own process; None if a peak could not be read."""
    if not sys.platform.startswith("linux"):
        return [None] * len(requests)
    order = json.dumps([asdict(shape), [[asdict(task), *rest] for task, *rest in requests], torch.get_num_threads()])
    command = [sys.executable, "-m", "benchmarks.memory"]
    root, environment = Path(__file__).parent.parent, os.environ | _MALLOC
    try:
        done = subprocess.run(
            command,
            input=order,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
            cwd=root,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return [None] * len(requests)
    peaks = [int(line) for line in done.stdout.split()]
    return [peak if peak >= 0 else None for peak in peaks] + [None] * (len(requests) - len(peaks))


def _serve(order: str) -> None:
    """Print a line for every request; -1 if its child died."""
    shape, requests, threads = json.loads(order)
    shape, asked = Shape(**shape), [Request(Task(**task), *rest) for task, *rest in requests]
    torch.set_num_threads(1)
    for request in asked:
        _bind(_tiny(shape), request)()
    gc.freeze()  # garbage collection in a child would copy every shared page
    for request in asked:
        child = os.fork()
        if child == 0:
            torch.set_num_threads(threads)
            os.write(1, f"{_measure(shape, request)}\n".encode())
            os._exit(0)
        if os.waitpid(child, 0)[1] != 0:
            os.write(1, b"-1\n")


def _tiny(shape: Shape) -> Shape:
    return Shape("", 32, 64, 512, shape.softcap)


def _bind(shape: Shape, request: Request) -> Call:
    provider = next(each for each in PROVIDERS if each.name == request.provider)
    inputs = for_task(make_inputs(shape, torch.float32, torch.device("cpu")), request.task)
    return (provider.bind_forward if request.forward else provider.bind)(request.task, inputs)


def _measure(shape: Shape, request: Request) -> int:
    _bind(_tiny(shape), request)()  # pages of library code count in a child as soon as they are used
    call = _bind(shape, request)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _status("VmRSS")
    call()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


if __name__ == "__main__":
    _serve(sys.stdin.read())

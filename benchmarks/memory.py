"""Peak memory of one call beyond its inputs.

On a GPU the caching allocator counts it. On a CPU (Linux) each call runs in a forked child of a fresh process that has
run every provider on tiny inputs only, on one thread so that there are no others to lose. The child does so again,
makes the inputs, resets the high-water mark of its resident memory, and reads it after the call.

`gradients` are what the call must return. `transient` is the peak less the gradients and, for a provider that keeps
dW in float32 while W is narrower, less that.
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

import torch

from benchmarks.cases import TRAINABLE, Inputs, Shape, Task, for_task, make_inputs
from benchmarks.registry import Call, Provider, providers

MIB = 2**20
#: Every block of 128 KiB or more comes from the kernel and goes back at once, so that the mark shows what is in use.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


def gradient_bytes(inputs: Inputs) -> int:
    """Bytes of the gradients that a task returns."""
    return sum(tensor.numel() * tensor.element_size() for tensor in inputs.wanted.values())


def kept_bytes(provider: Provider, task: Task, inputs: Inputs) -> int:
    """Gradients, and a float32 dW beside a narrower one."""
    kept = gradient_bytes(inputs)
    if provider.float32_weight_gradient and task.head == TRAINABLE and inputs.weight.element_size() < 4:
        kept += 4 * inputs.weight.numel()
    return kept


def cuda_peak(call: Call) -> int:
    """Bytes allocated at the call's peak beyond those allocated before it."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def cpu_peaks(shape: Shape, requests: Sequence[tuple[Task, str]], timeout: float = 300) -> list[int | None]:
    """Peak bytes of (task, provider's name) at a shape, each in a process of its own; None where none was read."""
    if not sys.platform.startswith("linux"):
        return [None] * len(requests)
    order = json.dumps([asdict(shape), [[asdict(task), name] for task, name in requests], torch.get_num_threads()])
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
    """Answer every request with a line; -1 for a child that died."""
    shape, requests, threads = json.loads(order)
    shape, tasks = Shape(**shape), [(Task(**task), name) for task, name in requests]
    torch.set_num_threads(1)
    for task, name in tasks:
        _bind(_tiny(shape), task, name)()
    gc.freeze()  # a collection in a child would copy every page it shares
    for task, name in tasks:
        child = os.fork()
        if child == 0:
            torch.set_num_threads(threads)
            os.write(1, f"{_measure(shape, task, name)}\n".encode())
            os._exit(0)
        if os.waitpid(child, 0)[1] != 0:
            os.write(1, b"-1\n")


def _tiny(shape: Shape) -> Shape:
    return Shape("", 32, 64, 512, shape.softcap)


def _bind(shape: Shape, task: Task, name: str) -> Call:
    provider = next(each for each in providers() if each.name == name)
    return provider.bind(task, for_task(make_inputs(shape, torch.float32, torch.device("cpu")), task))


def _measure(shape: Shape, task: Task, name: str) -> int:
    _bind(_tiny(shape), task, name)()  # a child's pages of library code count once they are touched
    call = _bind(shape, task, name)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _status("VmRSS")
    call()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


if __name__ == "__main__":
    _serve(sys.stdin.read())

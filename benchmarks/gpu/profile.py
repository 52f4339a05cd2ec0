"""Phase `profile`: the kernels of one call of NextQuill's loss, and of one scoring call, by their time.

    kernel      ms   the sum over a kernel's launches in one call; `note` has their number and share
    all kernels ms   the sum over all kernels
    call        ms   the call by the host's clock; what exceeds the sum is time in which the GPU waits

`python -m benchmarks.gpu.profile --once` makes the two calls with fewer rows, for other profilers.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import nextquill as nq
from benchmarks.cases import FORWARD, TARGET, TRAINABLE, TRAINING, Shape, Task, for_task, make_inputs
from benchmarks.gpu.phase import Sheet, phase_main
from benchmarks.measure import default_device, make_row, synchronise

_LONGEST = 90
_TOP = 12
#: Enough for a full chunk and a shorter one.
_ONCE_ROWS = 1024


def calls(device: torch.device, quick: bool, rows: int = TARGET.rows) -> dict[str, Callable[[], Any]]:
    """A training call and a scoring call at the target's shape, with so many rows."""
    shape = Shape("tiny", 32, 32, 300, sequences=4) if quick else replace(TARGET, rows=rows)
    inputs = make_inputs(shape, torch.bfloat16 if device.type == "cuda" else torch.float32, device)
    mine = for_task(inputs, Task("NextQuill", TRAINING, TRAINABLE))
    scored = for_task(inputs, Task("pair nll", FORWARD))
    loss_fn = nq.NextQuillLoss()

    def train() -> tuple[Tensor, ...]:
        loss = cast(Tensor, loss_fn(mine.h1, mine.h0, mine.weight, mine.labels, sequence_ids=mine.ids))
        return torch.autograd.grad(loss, list(mine.wanted.values()))

    def score() -> nq.PairNLL:
        return nq.linear_pair_nll(scored.h1, scored.h0, scored.weight, scored.labels)

    return {f"NextQuill, forward and backward, {shape}": train, f"pair nll, {shape}": score}


def run(sheet: Sheet, device: torch.device, quick: bool, deadline: float) -> None:
    """Profile both calls."""
    for case, call in calls(device, quick).items():
        if time.monotonic() > deadline:
            sheet.note(case, "out of time")
            continue
        for _ in range(2):
            call()
        synchronise()
        begun = time.perf_counter()
        call()
        synchronise()
        took = time.perf_counter() - begun
        found = kernels_of(call, device)
        total = sum(seconds for _, seconds, _ in found)
        for name, seconds, count in found[:_TOP]:
            note = f"{count} launches, {seconds / total:.1%}" if total else f"{count} launches"
            _add(sheet, device, case, name[:_LONGEST], "kernel", seconds, note)
        if found:
            _add(sheet, device, case, "all kernels", "total", total)
        else:
            sheet.note(case, "the profiler recorded no kernel")
        _add(sheet, device, case, "call", "total", took)


def kernels_of(call: Callable[[], Any], device: torch.device) -> list[tuple[str, float, int]]:
    """Name, seconds and launches of every kernel of a call, the longest first; on a CPU, of every operator."""
    on_gpu = device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity], acc_events=True) as recorded:  # without, torch 2.11 warns of later cycles
        call()
        synchronise()
    events = recorded.key_averages()
    times = {event.key: _self_time(event, on_gpu) / 1e6 for event in events}
    counts = {event.key: event.count for event in events}
    found = [(name, seconds, counts[name]) for name, seconds in times.items() if seconds > 0]
    return sorted(found, key=lambda each: -each[1])


def _self_time(event: Any, on_gpu: bool) -> float:
    return float(event.self_device_time_total if on_gpu else event.self_cpu_time_total)


def _add(sheet: Sheet, device: torch.device, case: str, name: str, metric: str, seconds: float, note: str = "") -> None:
    sheet.add(make_row("profile", case, name, metric, "ms", [1000 * seconds], note=note, device=device.type))


def once(device: torch.device, quick: bool) -> None:
    """Make each call twice. The first one compiles; a profiler that waits for its start sees the second one."""
    todo = calls(device, quick, _ONCE_ROWS).values()
    for call in todo:
        call()
    synchronise()
    if device.type == "cuda":
        torch.cuda.profiler.start()
    for call in todo:
        call()
    synchronise()
    if device.type == "cuda":
        torch.cuda.profiler.stop()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the phase alone."""
    flags = list(sys.argv[1:] if arguments is None else arguments)
    if "--once" in flags:
        once(torch.device(default_device()), "--quick" in flags)
        return 0
    return phase_main("profile", run, flags)


if __name__ == "__main__":
    raise SystemExit(main())

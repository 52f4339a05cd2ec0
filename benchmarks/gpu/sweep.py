"""Phase `sweep`: NextQuill's loss for several chunk sizes, lengths of responses, heads and softcaps.

seconds     s     forward and backward of one call
floor_ratio x     seconds over the floor of its products at the probe's rates (`benchmarks.gpu.probe.floor`)
peak        MiB   beyond the inputs
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

import nextquill as nq
from benchmarks.cases import FROZEN, TARGET, TRAINABLE, TRAINING, Inputs, Shape, Task, for_task, make_inputs
from benchmarks.gpu.device import middle, one_line, seconds_of
from benchmarks.gpu.phase import Sheet, phase_main
from benchmarks.gpu.probe import floor, read_rates
from benchmarks.measure import make_row
from benchmarks.memory import MIB, cuda_peak

LENGTHS = (300, 512, 1024)
#: MiB; None is the default.
CHUNKS = (None, 256, 512, 1024, 2048, 4096)
SOFTCAPS = (None, 30.0)
_ROWS = 8192


@dataclass(frozen=True)
class Setting:
    """One call: the tokens of each response, the head, the softcap, and the chunk's size in MiB."""

    length: int
    head: str
    softcap: float | None
    chunk: float | None


def settings(quick: bool = False) -> Iterator[Setting]:
    """All settings: trainable heads without softcap first. Those of one length and softcap follow each other."""
    lengths, chunks, caps = ((8,), (None, 0.01), (None,)) if quick else (LENGTHS, CHUNKS, SOFTCAPS)
    for softcap in caps:
        for length in lengths:
            for head in (TRAINABLE, FROZEN):
                yield from (Setting(length, head, softcap, chunk) for chunk in chunks)


def run(sheet: Sheet, device: torch.device, quick: bool, deadline: float) -> None:
    """Measure the settings in order, until the deadline."""
    rates = read_rates(sheet.path.parent / "probe.csv")
    base = Shape("tiny", 32, 32, 300) if quick else replace(TARGET, rows=_ROWS)
    shape, inputs = base, None
    for setting in settings(quick):
        rows = base.rows // setting.length * setting.length
        wanted = replace(base, rows=rows, sequences=rows // setting.length, softcap=setting.softcap)
        if time.monotonic() > deadline:
            sheet.note(f"{wanted}, {setting.head} head, {_name(setting)}", "out of time")
            continue
        if inputs is None or wanted != shape:
            inputs = None  # frees the tensors first
            dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
            shape, inputs = wanted, make_inputs(wanted, dtype, device)
        _measure(sheet, shape, setting, inputs, rates)


def _measure(sheet: Sheet, shape: Shape, setting: Setting, inputs: Inputs, rates: dict[tuple[str, int], float]) -> None:
    task = Task("NextQuill", TRAINING, setting.head)
    mine, device = for_task(inputs, task), inputs.h1.device
    chunk_bytes = None if setting.chunk is None else int(setting.chunk * MIB)
    loss_fn = nq.NextQuillLoss(softcap=setting.softcap, chunk_bytes=chunk_bytes)

    def call() -> tuple[Tensor, ...]:
        loss = cast(Tensor, loss_fn(mine.h1, mine.h0, mine.weight, mine.labels, sequence_ids=mine.ids))
        return torch.autograd.grad(loss, list(mine.wanted.values()))

    def add(metric: str, unit: str, values: Sequence[float], baseline: str = "", note: str = "") -> None:
        sheet.add(
            make_row(
                "sweep", str(shape), _name(setting), metric, unit, list(values), baseline, loss=task.loss,
                mode=task.mode, head=task.head, dtype=str(inputs.h1.dtype).removeprefix("torch."), note=note,
                device=device.type,
            )
        )  # fmt: skip

    try:
        seconds = seconds_of(call, device, rounds=3, warmup=1)
    except Exception as error:  # noqa: BLE001 - the other settings must still run
        add("status", "", [], note=f"FAILED: {one_line(error)}")
        return
    add("seconds", "s", seconds)
    least = floor(rates, task, shape.rows, shape.hidden, shape.vocabulary)
    if least is not None:
        add("floor_ratio", "x", [middle(seconds) / least], "floor")
    if device.type == "cuda":
        add("peak", "MiB", [cuda_peak(call) / MIB])


def _name(setting: Setting) -> str:
    return "default chunk" if setting.chunk is None else f"chunk of {setting.chunk:g} MiB"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the phase alone."""
    return phase_main("sweep", run, arguments)


if __name__ == "__main__":
    raise SystemExit(main())

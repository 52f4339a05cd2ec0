"""Phase `probe`: what this machine is, and how fast it copies and multiplies. Everything else is judged by its rates.

    copy        GB/s       a large copy on the device, bytes read plus bytes written
    gemm        TFLOP/s    one bfloat16 product with a float32 result, of M rows of a chunk:
                           `z`  [M, D] @ [D, V], the logits
                           `dh` [M, V] @ [V, D], a gradient of the hidden states
                           `dW` [V, M] @ [M, D], added to a float32 gradient of W in place
    floor       s          the products of a loss at N rows, at the best of these rates: no code of the same
                           products is faster

`python -m benchmarks.gpu.probe --csv probe.csv` runs it alone.
"""

from __future__ import annotations

import csv
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import FROZEN, TRAINABLE, TRAINING, Task
from benchmarks.environment import describe
from benchmarks.gpu.device import one_line, seconds_of
from benchmarks.gpu.phase import Sheet, phase_main
from benchmarks.measure import make_row

ROWS = (1024, 1200, 2048, 4096)
HIDDEN = (896, 2048, 4096)
VOCABULARY = 151936
KINDS = ("z", "dh", "dW")
_COPY_BYTES = 2**32


def run(sheet: Sheet, device: torch.device, quick: bool, deadline: float) -> None:
    """Measure, the sizes of the largest model first, until the deadline."""
    for line in _machine(device):
        sheet.add(make_row("probe", line, "", "fact", "", [], device=device.type))
    _copy(sheet, device, (2**20 if quick else _COPY_BYTES) // 4)
    vocabulary, sizes, rows = (512, (32,), (16, 64)) if quick else (VOCABULARY, HIDDEN[::-1], ROWS)
    for hidden in sizes:
        for kind in KINDS:
            for count in rows:
                if time.monotonic() > deadline:
                    sheet.note(f"gemm {kind} D={hidden} M={count}", "out of time")
                    continue
                _gemm(sheet, device, kind, count, hidden, vocabulary)
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _copy(sheet: Sheet, device: torch.device, numel: int) -> None:
    source, target = torch.randn(numel, device=device), torch.empty(numel, device=device)
    seconds = seconds_of(lambda: target.copy_(source), device)
    rates = [2 * 4 * numel / value / 1e9 for value in seconds]
    sheet.add(make_row("probe", f"{4 * numel} bytes", "copy", "copy", "GB/s", rates, device=device.type))


def _gemm(sheet: Sheet, device: torch.device, kind: str, rows: int, hidden: int, vocabulary: int) -> None:
    case = f"M={rows}, D={hidden}, V={vocabulary}"
    try:
        seconds = seconds_of(_product(kind, rows, hidden, vocabulary, device), device)
    except Exception as error:  # noqa: BLE001 - the other products must still run
        sheet.note(f"gemm {kind}, {case}", one_line(error))
        return
    rates = [2 * rows * hidden * vocabulary / value / 1e12 for value in seconds]
    sheet.add(make_row("probe", case, kind, "gemm", "TFLOP/s", rates, dtype="bfloat16", device=device.type))


def _product(kind: str, rows: int, hidden: int, vocabulary: int, device: torch.device) -> Callable[[], Tensor]:
    """One product as the losses call it. A CPU has none with another result type, and takes float32 inputs."""
    wide: dict[str, Any] = {"out_dtype": torch.float32} if device.type == "cuda" else {}
    dtype = torch.bfloat16 if wide else torch.float32

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    shapes = {"z": (rows, hidden, vocabulary), "dh": (rows, vocabulary, hidden), "dW": (vocabulary, rows, hidden)}
    n, k, m = shapes[kind]
    out = torch.zeros(n, m, device=device)
    if kind == "z":
        h, weight = random(n, k), random(m, k).T  # W is [V, D]
        return lambda: torch.mm(h, weight, out=out, **wide)
    if kind == "dh":
        dz, weight = random(n, k), random(k, m)
        return lambda: torch.mm(dz, weight, out=out, **wide)
    dz, h = random(k, n).T, random(k, m)
    return lambda: torch.addmm(out, dz, h, out=out, **wide)


def _machine(device: torch.device) -> list[str]:
    facts = [f"python {platform.python_version()}, {os.cpu_count()} processors, {platform.platform()}"]
    if device.type != "cuda":
        return [*facts, f"torch {torch.__version__}, no GPU"]
    properties = torch.cuda.get_device_properties(device)
    facts += describe(device)
    facts.append(
        f"{properties.multi_processor_count} multiprocessors, {properties.total_memory / 2**30:.0f} GiB, "
        f"compute capability {properties.major}.{properties.minor}, {torch.cuda.device_count()} GPUs"
    )
    return [*facts, f"nvidia-smi: {_smi()}"]


def _smi() -> str:
    query = "name,driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
            capture_output=True, text=True, check=False, timeout=20,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return "cannot be asked"
    return "; ".join(done.stdout.split("\n")).strip("; ") or "no answer"


# ---- floors ------------------------------------------------------------------------------------------

#: The products of each loss with a trainable head: of z, dh and dW.
_PRODUCTS = {
    "NextQuill": (2, 2, 2),
    "NextQuill detached": (2, 1, 1),
    "PerCE": (2, 1, 1),
    "SFT": (1, 1, 1),
    "pair nll": (2, 0, 0),
    "token nll": (1, 0, 0),
}


def read_rates(path: Path) -> dict[tuple[str, int], float]:
    """The best rate in TFLOP/s of each kind of product, by hidden size, from the probe's file (empty without one)."""
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as stream:
        return best_rates(csv.DictReader(stream))


def best_rates(rows: Iterable[Mapping[str, str]]) -> dict[tuple[str, int], float]:
    """The best rate over M, by kind of product and hidden size."""
    found: dict[tuple[str, int], float] = {}
    for row in rows:
        if row["metric"] == "gemm":
            hidden = int(row["case"].split("D=")[1].split(",")[0])
            key = row["provider"], hidden
            found[key] = max(found.get(key, 0.0), float(row["value"]))
    return found


def floor(rates: Mapping[tuple[str, int], float], task: Task, rows: int, hidden: int, vocabulary: int) -> float | None:
    """Seconds that the products of a task take at the probe's rates; None if the hidden size was not probed."""
    z, dh, dw = _PRODUCTS[task.loss]
    counts = {"z": z, "dh": dh * (task.mode == TRAINING), "dW": dw * (task.mode == TRAINING and task.head == TRAINABLE)}
    assert task.head in (TRAINABLE, FROZEN, "")
    unit = 2 * rows * hidden * vocabulary / 1e12
    if any(count and (kind, hidden) not in rates for kind, count in counts.items()):
        return None
    return sum(count * unit / rates[kind, hidden] for kind, count in counts.items() if count)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the phase alone."""
    return phase_main("probe", run, arguments)


if __name__ == "__main__":
    raise SystemExit(main())

"""Phase `tune`: the fastest tiles of the streaming kernels, and of the kernels that walk along rows of logits.

    tflops   TFLOP/s  a streaming kernel with its fastest tile, as `python -m nextquill_kernels.tune` finds it; `note`
                      holds the entry for `kernels/nextquill_kernels/tile_table.json` as JSON
    row_tile GB/s     a kernel of a chunk with each candidate for its `RowTile`, the bytes that it must read and write

Without a GPU it times two tiles under Triton's interpreter, which shows only that the phase runs.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from nextquill_kernels import chunk_grad, chunk_stats, stream
from nextquill_kernels import tune as tuner
from nextquill_kernels.launch import RowTile, target_of
from nextquill_kernels.tiles import DTYPE_CLASSES, TABLE_PATH, Tile, bucket_of, entries

from benchmarks.gpu.device import one_line, seconds_of
from benchmarks.gpu.phase import Sheet, phase_main
from benchmarks.measure import make_row

#: Family and hidden size, the most useful first.
PROBLEMS = (("pair", 4096), ("pair", 896), ("token", 4096), ("token", 896))
#: Columns, threads and stages of `RowTile`, beside the kernel's own.
ROW_TILES = (
    (1024, 256, 2), (1024, 256, 4), (1024, 128, 3), (2048, 256, 3), (2048, 512, 3), (2048, 256, 2), (4096, 512, 2),
)  # fmt: skip


def run(sheet: Sheet, device: torch.device, quick: bool, deadline: float) -> None:
    """Tune one problem after the other; each gets an equal part of the time that is left."""
    if device.type != "cuda":
        _interpreted(sheet)
        for name in ("pair_stats", "pair_grad"):
            _tune_rows(sheet, device, name, 60, quick=True)
        return
    jobs: list[tuple[str, Callable[[float], None]]] = [
        (f"{family}, bfloat16, D={hidden}", partial(_tune, sheet, device, family, hidden))
        for family, hidden in PROBLEMS
    ]
    jobs[1:1] = [(name, partial(_tune_rows, sheet, device, name)) for name in ("pair_stats", "pair_grad")]
    for place, (case, job) in enumerate(jobs):
        left = deadline - time.monotonic()
        if left < 5:
            sheet.note(case, "out of time")
            continue
        try:
            job(left / (len(jobs) - place))
        except Exception as error:  # noqa: BLE001 - the other kernels must still be tuned
            sheet.note(case, one_line(error))


def _tune(sheet: Sheet, device: torch.device, family: str, hidden: int, seconds: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "tiles.json"
        flags = ["--out", str(table), "--family", family, "--d", str(hidden), "--seconds", str(max(1, int(seconds)))]
        if tuner.main(flags) != 0:
            sheet.note(f"{family}, D={hidden}", "no candidate could be measured")
            return
        key = (family, target_of(device), DTYPE_CLASSES[torch.bfloat16], bucket_of(hidden))
        entry = next(each for each in entries(table) if each.key == key)
    old = next((each.tile for each in entries(TABLE_PATH) if each.key == key), None)
    note = json.dumps({**dataclasses.asdict(entry), "unchanged": entry.tile == old})
    rate = float(entry.origin["tflops"])
    case = f"{family}, bfloat16, D={hidden}, V={entry.origin['v']}"
    sheet.add(make_row("tune", case, "fastest tile", "tflops", "TFLOP/s", [rate], note=note, device="cuda"))


def _tune_rows(sheet: Sheet, device: torch.device, name: str, seconds: float, quick: bool = False) -> None:
    """Time a kernel of a chunk of 512 rows of two streams with several tiles, its own first."""
    rows, vocabulary = (8, 300) if quick else (512, 151936)
    module, constant = (chunk_stats, "PAIR_STATS") if name == "pair_stats" else (chunk_grad, "PAIR_GRAD")
    logits = torch.randn(2, rows, vocabulary, device=device)
    labels = torch.randint(0, vocabulary, (rows,), device=device)
    stats, ones = torch.empty(9, rows, device=device), torch.ones(rows, device=device)
    out = torch.empty(2, rows, vocabulary, device=device, dtype=torch.float32 if quick else torch.bfloat16)
    chunk_stats.pair_stats((logits[0], logits[1]), labels, stats)
    moved, call = logits.nbytes, partial(chunk_stats.pair_stats, (logits[0], logits[1]), labels, stats)
    if name == "pair_grad":
        moved += out.nbytes
        call = partial(
            chunk_grad.pair_grad, (logits[0], logits[1]), labels, stats, (ones, None, ones), (out[0], out[1])
        )
    own, end = getattr(module, constant), time.monotonic() + seconds
    try:
        for sizes in dict.fromkeys([tuple(own), *ROW_TILES][: 2 if quick else None]):
            tile, case = RowTile(*sizes), f"{name}, columns, threads, stages {sizes}"
            if time.monotonic() > end:
                sheet.note(case, "out of time")
                continue
            setattr(module, constant, tile)
            try:
                rates = [moved / value / 1e9 for value in seconds_of(call, device, rounds=1 if quick else 7)]
            except Exception as error:  # noqa: BLE001 - the other tiles must still be timed
                sheet.note(case, one_line(error))
                continue
            note = "in use" if tile == own else ""
            sheet.add(make_row("tune", case, name, "row_tile", "GB/s", rates, note=note, device=device.type))
    finally:
        setattr(module, constant, own)


def _interpreted(sheet: Sheet) -> None:
    h, weight, labels = torch.randn(8, 32), torch.randn(64, 32), torch.zeros(8, dtype=torch.long)

    def measure(tile: Tile) -> float:
        begun = time.perf_counter()
        stream.label_stats((h, h), weight, labels, tile=tile)
        return 1000 * (time.perf_counter() - begun)

    tiles = tuner.candidates("pair", "interpreter", torch.float32, 32)[:2]
    tile, milliseconds = tuner.fastest(tiles, measure, lambda line: print(line, flush=True))
    note = json.dumps(dataclasses.asdict(tile))
    sheet.add(make_row("tune", "pair, interpreted", "fastest tile", "time", "ms", [milliseconds], note=note))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the phase alone."""
    return phase_main("tune", run, arguments)


if __name__ == "__main__":
    raise SystemExit(main())

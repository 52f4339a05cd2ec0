"""Phase `tune`: the fastest tiles of the streaming kernels, as `python -m nextquill_kernels.tune` finds them.

The `note` of a row holds the entry for `kernels/nextquill_kernels/tile_table.json` as JSON. Without a GPU, it times two
tiles under Triton's interpreter, which shows only that the phase runs.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from nextquill_kernels import stream
from nextquill_kernels import tune as tuner
from nextquill_kernels.launch import target_of
from nextquill_kernels.tiles import DTYPE_CLASSES, TABLE_PATH, Tile, bucket_of, entries

from benchmarks.gpu.device import one_line
from benchmarks.gpu.phase import Sheet, phase_main
from benchmarks.measure import make_row

#: Family and hidden size, the most useful first.
PROBLEMS = (("pair", 4096), ("pair", 896), ("token", 4096), ("token", 896))


def run(sheet: Sheet, device: torch.device, quick: bool, deadline: float) -> None:
    """Tune one problem after the other; each gets an equal part of the time that is left."""
    if device.type != "cuda":
        _interpreted(sheet)
        return
    for place, (family, hidden) in enumerate(PROBLEMS):
        case, left = f"{family}, bfloat16, D={hidden}", deadline - time.monotonic()
        if left < 5:
            sheet.note(case, "out of time")
            continue
        try:
            _tune(sheet, device, family, hidden, left / (len(PROBLEMS) - place))
        except Exception as error:  # noqa: BLE001 - the other problems must still be tuned
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

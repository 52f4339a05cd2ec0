"""Time the streaming kernel's candidate tiles on this machine's GPU and write the fastest into a tile table.

    python -m nextquill_kernels.tune                                   # bfloat16, N=8192, D=4096, V=151936
    python -m nextquill_kernels.tune --family token --d 2048 --dtype float16 --out my_table.json

One run sets one entry: a family, this GPU's target, a dtype class, a bucket of hidden sizes. A candidate counts only if
it compiles without spills, fits the shared memory, and agrees with plain PyTorch on a sample of rows. The table is
written at the end, in one step; an interrupted run leaves it as it was.
"""

from __future__ import annotations

import argparse
import datetime
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import triton
from torch import Tensor

from nextquill_kernels import stream
from nextquill_kernels.crosscompile import refuse
from nextquill_kernels.launch import shared_memory_of, target_of
from nextquill_kernels.tiles import (
    DTYPE_CLASSES,
    FAMILIES,
    TABLE_PATH,
    TableEntry,
    Tile,
    bucket_of,
    lookup,
    write_entry,
)

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPE_CLASSES}
_SAMPLE_ROWS = 64
# The order of D sums differs from PyTorch's: 1e-5 of a logit of about 10.
_TOLERANCE = 1e-4
_REPEATS = 7


@dataclass(frozen=True)
class Problem:
    """The family, dtype and shape to tune for: `n` tokens, hidden size `d`, vocabulary `v`."""

    family: str
    dtype: torch.dtype
    n: int
    d: int
    v: int

    @property
    def streams(self) -> int:
        """Number of streams of hidden states that the kernel reads: 1 or 2."""
        return FAMILIES.index(self.family) + 1

    @property
    def flops(self) -> float:
        """Number of floating-point operations of the matrix products."""
        return 2.0 * self.streams * self.n * self.d * self.v


def candidates(family: str, target: str, dtype: torch.dtype, d: int) -> list[Tile]:
    """Return tiles to try: the table's own first, then its neighbours in size, warps, stages and order."""
    own = lookup(family, target, dtype, d)
    rows, columns = (256, 128) if target == "sm_100" and family == "pair" else (128, 256)
    sizes = [
        (rows, columns, 64, 8, 3),
        (rows, columns, 64, 8, 4),
        (128, 128, 64, 4, 3),
        (128, 128, 64, 8, 4),
        (64, 256, 64, 4, 3),
        (256, 128, 64, 8, 3),
        (128, 256, 32, 8, 4),
        (128, 128, 32, 4, 4),
    ]
    if dtype == torch.float32:
        sizes = [(128, 64, 32, 8, 2), (128, 64, 16, 8, 3), (64, 64, 32, 4, 3), (128, 128, 16, 8, 2)]
    found = [own]
    two_products = 2 * own.interleave == own.block_n
    for block_n, block_v, block_d, warps, stages in sizes:
        tile = replace(
            own,
            block_n=block_n,
            block_v=block_v,
            block_d=block_d,
            num_warps=warps,
            num_stages=stages,
            interleave=block_n // 2 if two_products else own.interleave,
        )
        found.append(tile)
        if target.startswith("sm_") and int(target[3:]) >= 90 and dtype != torch.float32:
            found.append(replace(tile, descriptors=not tile.descriptors))
    found += [replace(own, group_n=group_n) for group_n in (4, 8, 16, 32, 64)]
    return list(dict.fromkeys(found))


def fastest(
    tiles: Sequence[Tile],
    measure: Callable[[Tile], float],
    report: Callable[[str], object],
    seconds: float = math.inf,
) -> tuple[Tile, float]:
    """Measure tiles until `seconds` have passed, and return the fastest with its milliseconds.

    Args:
        tiles: the candidates.
        measure: returns the milliseconds of a tile; an error refuses the tile.
        report: receives a line for every tile.
        seconds: no candidate is started after this time.

    Raises:
        RuntimeError: no candidate could be measured.
    """
    end = time.monotonic() + seconds
    best: tuple[Tile, float] | None = None
    for number, tile in enumerate(tiles, start=1):
        if time.monotonic() > end:
            report(f"stopped after {seconds:.0f} s")
            break
        try:
            milliseconds = measure(tile)
        except Exception as error:  # noqa: BLE001 - compilers raise anything, and the other candidates must still run
            reason = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
            report(f"{number:3d}/{len(tiles)}    refused  {_describe(tile)}: {reason}")
            continue
        report(f"{number:3d}/{len(tiles)} {milliseconds:7.2f} ms  {_describe(tile)}")
        if best is None or milliseconds < best[1]:
            best = tile, milliseconds
    if best is None:
        raise RuntimeError("no candidate compiled, fitted and agreed with PyTorch")
    return best


def _describe(tile: Tile) -> str:
    extra = ["descriptors"] * tile.descriptors + ["warp_specialize"] * tile.warp_specialize
    return (
        f"{tile.block_n}x{tile.block_v}x{tile.block_d} warps {tile.num_warps} stages {tile.num_stages} "
        f"group {tile.group_n} interleave {tile.interleave} {' '.join(extra)}"
    ).rstrip()


class _Bench:
    """Inputs of one problem on the GPU; calling it with a tile checks and times the tile on them."""

    def __init__(self, problem: Problem, target: str, device: torch.device) -> None:
        self.problem, self.target, self.device = problem, target, device
        torch.manual_seed(0)
        shape = (problem.n, problem.d)
        self.hidden = tuple(torch.randn(shape, device=device).to(problem.dtype) for _ in range(problem.streams))
        self.weight = torch.empty(problem.v, problem.d, device=device, dtype=problem.dtype).normal_(std=problem.d**-0.5)
        self.labels = torch.randint(problem.v, (problem.n,), device=device)
        self.expected = self._plain()

    def _plain(self) -> Tensor:
        """Compute the first rows of the result in plain PyTorch, from float32 logits."""
        weight, labels = self.weight.float(), self.labels[:_SAMPLE_ROWS, None]
        logits = [hidden[:_SAMPLE_ROWS].float() @ weight.T for hidden in self.hidden]
        if len(logits) == 2:
            logits.append(logits[0] - logits[1])
        lse = [z.logsumexp(-1) for z in logits]
        return torch.stack([*lse, *(a - z.gather(1, labels)[:, 0] for a, z in zip(lse, logits, strict=True))])

    def run(self, tile: Tile) -> Tensor:
        return stream.label_stats(self.hidden, self.weight, self.labels, tile=tile)

    def __call__(self, tile: Tile) -> float:
        problem = self.problem
        limit = shared_memory_of(self.device)
        if tile.fitted(problem.dtype.itemsize, limit) != tile:
            raise ValueError(f"tile: expected at most {limit} bytes of shared memory")
        dtype, aligned = stream.TYPE_NAMES[problem.dtype], problem.d % tile.block_d == 0
        case = stream.compile_case("candidate", problem.streams, dtype, tile, self.target, aligned)
        refuse(case.compile(self.target))
        difference = (self.run(tile)[:, :_SAMPLE_ROWS] - self.expected).abs().max().item()
        if not difference < _TOLERANCE:
            raise ValueError(f"result: expected within {_TOLERANCE} of PyTorch's, got {difference}")
        times: list[float] = []
        for _ in range(_REPEATS):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            self.run(tile)
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop))
        return float(statistics.median(times))


def origin(problem: Problem, milliseconds: float, device_name: str) -> dict[str, object]:
    """Return the origin that the table gives for a measured entry."""
    return {
        "kind": "measured",
        "device": device_name,
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "dtype": str(problem.dtype).removeprefix("torch."),
        "n": problem.n,
        "d": problem.d,
        "v": problem.v,
        "milliseconds": round(milliseconds, 3),
        "tflops": round(problem.flops / milliseconds / 1e9, 1),
    }


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text}")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """Tune one entry of the tile table on this machine's GPU."""
    parser = argparse.ArgumentParser(prog="python -m nextquill_kernels.tune", description=main.__doc__)
    parser.add_argument("--out", type=Path, default=TABLE_PATH, help="table to update; the package's own by default")
    parser.add_argument("--family", choices=FAMILIES, default="pair")
    parser.add_argument("--dtype", choices=_DTYPES, default="bfloat16")
    parser.add_argument("--n", type=_positive, default=8192, help="supervised tokens")
    parser.add_argument("--d", type=_positive, default=4096, help="hidden size")
    parser.add_argument("--v", type=_positive, default=151936, help="vocabulary")
    parser.add_argument("--seconds", type=_positive, default=150, help="start no candidate after so long")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("expected a CUDA or ROCm GPU to measure on, found none; the table stays as it is")
    if not options.out.parent.is_dir():
        parser.error(f"--out: expected a file in an existing folder, got {options.out}")

    device = torch.device("cuda", torch.cuda.current_device())
    target = target_of(device)
    problem = Problem(options.family, _DTYPES[options.dtype], options.n, options.d, options.v)
    tiles = candidates(problem.family, target, problem.dtype, problem.d)
    name = torch.cuda.get_device_name(device)
    _say(f"{name} ({target}): {len(tiles)} candidates, {problem}")
    bench = _Bench(problem, target, device)
    try:
        tile, milliseconds = fastest(tiles, bench, _say, options.seconds)
    except RuntimeError as error:
        _say(str(error))
        return 1
    key = (problem.family, target, DTYPE_CLASSES[problem.dtype], bucket_of(problem.d))
    write_entry(options.out, TableEntry(*key, tile, origin(problem, milliseconds, name)))
    _say(f"{options.out}: {_describe(tile)}, {milliseconds:.2f} ms, {problem.flops / milliseconds / 1e9:.0f} TFLOP/s")
    return 0


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())

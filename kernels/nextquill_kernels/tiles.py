"""Tile sizes of the streaming kernel by family (token or pair), GPU, dtype and hidden size.

They are read from `tile_table.json`; no program searches for them while it runs. `python -m nextquill_kernels.tune`
measures better ones on this machine's GPU. The table names the origin of every entry: "measured" with device, date and
versions; "resources" means that the tile compiles without spills and fits the shared memory, but was not timed.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

TABLE_PATH = Path(__file__).with_name("tile_table.json")
FAMILIES = ("token", "pair")
TABLE_TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942", "interpreter")
DTYPE_CLASSES = {torch.bfloat16: "half", torch.float16: "half", torch.float32: "float32"}
# Largest hidden size of each bucket; the last one has no limit.
BUCKETS = {"1024": 1024, "4096": 4096, "larger": None}


@dataclass(frozen=True)
class Tile:
    """How the streaming kernel divides its work.

    Attributes:
        block_n: rows of hidden states per program; for a pair half as many tokens.
        block_v: rows of W per program.
        block_d: columns of both per step.
        num_warps: warps per program.
        num_stages: steps in flight.
        group_n: row tiles that pass over the whole of W before the next ones do.
        interleave: tokens of one stream that follow each other in a pair's tile before those of the other stream;
            block_n / 2 gives each stream a product of its own.
        descriptors: load through tensor descriptors (TMA) where the alignment of W allows it.
        warp_specialize: let Triton give loads and products to different warps; with descriptors only.
    """

    block_n: int
    block_v: int
    block_d: int
    num_warps: int
    num_stages: int
    group_n: int
    interleave: int
    descriptors: bool = False
    warp_specialize: bool = False

    def __post_init__(self) -> None:
        for name in ("block_n", "block_v", "block_d", "num_warps", "interleave"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ValueError(f"{name}: expected a power of two, got {value}")
        # The matrix instructions of every target need at least 16.
        for name in ("block_n", "block_v", "block_d"):
            if getattr(self, name) < 16:
                raise ValueError(f"{name}: expected at least 16, got {getattr(self, name)}")
        for name in ("num_stages", "group_n"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if 2 * self.interleave > self.block_n:
            raise ValueError(f"interleave: expected at most block_n / 2 = {self.block_n // 2}, got {self.interleave}")
        if self.warp_specialize and not self.descriptors:
            raise ValueError("warp_specialize: expected descriptors as well, got warp_specialize alone")

    def fitted(self, element_size: int, shared_memory: int) -> Tile:
        """Return this tile, with fewer stages if its operands would not fit into `shared_memory` bytes.

        A GPU may use the entry of a target that has more shared memory than the GPU.
        """
        stage = (self.block_n + self.block_v) * self.block_d * element_size
        # Reserve 1 KiB for barriers and reductions.
        stages = max(1, min(self.num_stages, (shared_memory - 1024) // stage))
        return self if stages == self.num_stages else dataclasses.replace(self, num_stages=stages)


@dataclass(frozen=True)
class TableEntry:
    """One line of the table: its key, the tile, and the tile's origin."""

    family: str
    target: str
    dtype_class: str
    bucket: str
    tile: Tile
    origin: Mapping[str, Any]

    @property
    def key(self) -> tuple[str, str, str, str]:
        """Kernel family, target, class of dtypes and bucket of hidden sizes: one entry each."""
        return self.family, self.target, self.dtype_class, self.bucket


def bucket_of(hidden_size: int) -> str:
    """Return the name of the table's bucket for a hidden size."""
    return next(name for name, limit in BUCKETS.items() if limit is None or hidden_size <= limit)


def lookup(family: str, target: str, dtype: torch.dtype, hidden_size: int) -> Tile:
    """Return the table's tile.

    Args:
        family: "token" or "pair".
        target: a name as `launch.target_of` gives; an unknown "sm_*" gets the nearest lower one, an unknown "gfx*"
            gfx942.
        dtype: dtype of hidden states and weight.
        hidden_size: D.

    Raises:
        ValueError: an unknown family, or a target without a similar one in the table.
        TypeError: a dtype without kernels.
    """
    if family not in FAMILIES:
        raise ValueError(f"family: expected one of {', '.join(FAMILIES)}, got {family!r}")
    if dtype not in DTYPE_CLASSES:
        raise TypeError(f"dtype: expected bfloat16, float16 or float32, got {dtype}")
    return _table()[family, nearest_target(target), DTYPE_CLASSES[dtype], bucket_of(hidden_size)].tile


def nearest_target(target: str) -> str:
    """Return `target` if the table has it, else the nearest target in the table whose instructions it has."""
    if target in TABLE_TARGETS:
        return target
    kind, _, number = target.partition("_")
    if kind == "sm" and number.rstrip("af").isdigit():
        known = sorted(int(name[3:]) for name in TABLE_TARGETS if name.startswith("sm_"))
        return f"sm_{max((value for value in known if value <= int(number.rstrip('af'))), default=known[0])}"
    if target.startswith("gfx"):
        return "gfx942"
    raise ValueError(f"target: expected one of {', '.join(TABLE_TARGETS)}, sm_* or gfx*, got {target!r}")


def entries(path: Path = TABLE_PATH) -> list[TableEntry]:
    """Read and check all entries of a table file.

    Raises:
        ValueError: the file has a key twice, or a name that the table's format does not have.
    """
    found: dict[tuple[str, ...], TableEntry] = {}
    for record in json.loads(path.read_text(encoding="utf-8"))["entries"]:
        entry = TableEntry(**{**record, "tile": Tile(**record["tile"])})
        known = (FAMILIES, TABLE_TARGETS, DTYPE_CLASSES.values(), BUCKETS)
        if any(value not in values for value, values in zip(entry.key, known, strict=True)):
            raise ValueError(f"{path}: expected names of the table's format, got {entry.key}")
        if entry.key in found:
            raise ValueError(f"{path}: expected each entry once, got {entry.key} twice")
        found[entry.key] = entry
    return list(found.values())


def write_entries(path: Path, new: list[TableEntry]) -> None:
    """Write `new` into the table at `path`, replacing entries with the same keys; the file need not exist.

    The file is replaced in one step, so that it is never half-written.
    """
    merged = {entry.key: entry for entry in [*(entries(path) if path.exists() else []), *new]}
    ordered = sorted(merged.values(), key=lambda entry: _position(entry.key))
    records = [json.dumps(dataclasses.asdict(entry)) for entry in ordered]
    text = '{"entries": [\n' + ",\n".join(records) + "\n]}\n"
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        # mkstemp makes files that only their owner can read.
        os.chmod(name, path.stat().st_mode & 0o777 if path.exists() else 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _position(key: tuple[str, str, str, str]) -> tuple[int, int, str, int]:
    family, target, dtype_class, bucket = key
    return TABLE_TARGETS.index(target), FAMILIES.index(family), dtype_class, list(BUCKETS).index(bucket)


@functools.cache
def _table() -> dict[tuple[str, str, str, str], TableEntry]:
    return {entry.key: entry for entry in entries()}

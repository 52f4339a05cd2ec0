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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

TABLE_PATH = Path(__file__).with_name("tile_table.json")
FAMILIES = ("token", "pair")  # one stream of hidden states, or two
TABLE_TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942", "portable", "interpreter")
DTYPE_CLASSES = {torch.bfloat16: "half", torch.float16: "half", torch.float32: "float32"}
# Largest hidden size of each bucket; the last one has no limit.
BUCKETS = {"1024": 1024, "4096": 4096, "larger": None}


@dataclass(frozen=True)
class Tile:
    """The division of the streaming kernel's work.

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
        # The matrix instructions of every target need blocks of at least 16.
        for name, least in (("block_n", 16), ("block_v", 16), ("block_d", 16), ("num_warps", 1), ("interleave", 1)):
            value = getattr(self, name)
            if value < least or value & (value - 1):
                raise ValueError(f"{name}: expected a power of two of at least {least}, got {value}")
        for name in ("num_stages", "group_n"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if 2 * self.interleave > self.block_n:
            raise ValueError(f"interleave: expected at most block_n / 2 = {self.block_n // 2}, got {self.interleave}")
        if self.warp_specialize and not self.descriptors:
            raise ValueError("warp_specialize: expected descriptors as well, got warp_specialize alone")

    def fitted(self, element_size: int, shared_memory: int) -> Tile:
        """Return this tile, with fewer stages if its operands would not fit into `shared_memory` bytes.

        A GPU may use the entry of a target that has more shared memory than the GPU. If not even two stages fit, so
        that loads could not overlap with products, it is `PORTABLE`.
        """
        stage = (self.block_n + self.block_v) * self.block_d * element_size
        # Reserve 1 KiB for barriers and reductions.
        stages = min(self.num_stages, (shared_memory - 1024) // stage)
        if stages < min(2, self.num_stages):
            return PORTABLE
        return self if stages == self.num_stages else dataclasses.replace(self, num_stages=stages)


#: For any GPU: at most 33 KiB of shared memory, and no spills on any target, those with waves of 32 included.
PORTABLE = Tile(block_n=64, block_v=64, block_d=32, num_warps=8, num_stages=2, group_n=16, interleave=8)


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
    """Return the table's tile for a family, a target as `launch.target_of` names it, a dtype and a hidden size D.

    "portable" has the tile `PORTABLE` unless somebody has put an entry for it into the table.
    """
    key = family, target, DTYPE_CLASSES[dtype], bucket_of(hidden_size)
    if target == "portable" and key not in _table():
        return PORTABLE
    return _table()[key].tile


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


def write_entry(path: Path, new: TableEntry) -> None:
    """Write `new` into a table, in place of the entry with its key; a new table starts as a copy of the package's own.

    The file is replaced in one step, so that it is never half-written.
    """
    merged = {entry.key: entry for entry in [*entries(path if path.exists() else TABLE_PATH), new]}
    ordered = sorted(merged.values(), key=lambda entry: _position(entry.key))
    records = [json.dumps(dataclasses.asdict(entry)) for entry in ordered]
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text('{"entries": [\n' + ",\n".join(records) + "\n]}\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _position(key: tuple[str, str, str, str]) -> tuple[int, int, str, int]:
    family, target, dtype_class, bucket = key
    return TABLE_TARGETS.index(target), FAMILIES.index(family), dtype_class, list(BUCKETS).index(bucket)


@functools.cache
def _table() -> dict[tuple[str, str, str, str], TableEntry]:
    return {entry.key: entry for entry in entries()}

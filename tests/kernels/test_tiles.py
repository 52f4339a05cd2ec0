"""The tile table: its format, the look-up, the cost of its tiles when compiled for their GPUs, and the tuner.

Compilation runs in a separate process without TRITON_INTERPRET, which replaces kernels by Python functions at import.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from nextquill_kernels import tiles, tune
from nextquill_kernels.crosscompile import OTHER_TARGETS
from nextquill_kernels.tiles import (
    BUCKETS,
    DTYPE_CLASSES,
    FAMILIES,
    TABLE_PATH,
    TABLE_TARGETS,
    TableEntry,
    Tile,
    lookup,
)

GPU_TARGETS = [target for target in TABLE_TARGETS if target not in ("interpreter", "portable")]
TILE = Tile(block_n=128, block_v=256, block_d=64, num_warps=8, num_stages=4, group_n=16, interleave=8)


def run_compiler(script: str) -> dict[str, object]:
    """Run `script` with compiled instead of interpreted kernels, and return its output as JSON."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", script]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout)


COMPILE_TABLE = """
import json, re
from nextquill_kernels.crosscompile import refuse
from nextquill_kernels.stream import compile_cases
report = {{}}
for case in compile_cases(thorough={thorough}):
    if {target!r} in case.targets and re.search({names!r}, case.name):
        resources = case.compile({target!r})
        try:
            refuse(resources)
            refused = None
        except ValueError as error:
            refused = str(error)
        report[case.name] = [resources.registers, resources.shared_bytes, refused]
print(json.dumps(report))
"""


@pytest.mark.compiles
@pytest.mark.parametrize(
    "target", [pytest.param(t, marks=() if t == "sm_90" else pytest.mark.slow) for t in GPU_TARGETS]
)
def test_half_precision_pair_tiles_fit_their_gpu(target):
    report = run_compiler(COMPILE_TABLE.format(target=target, names="pair_(bf16|gather|combine)", thorough=False))
    assert len(report) >= 3
    assert {name: refused for name, (*_, refused) in report.items() if refused} == {}


COMPILE_OTHERS = """
import dataclasses, json
from nextquill_kernels.crosscompile import refuse, registered_cases
from nextquill_kernels.stream import UNALIGNED, compile_case
from nextquill_kernels.tiles import FAMILIES, PORTABLE, entries
cases = {{(streams, dtype, PORTABLE) for streams in (1, 2) for dtype in ("bf16", "fp32")}}
if {of_sm_80}:
    cases |= {{(streams, dtype, UNALIGNED) for streams, dtype, _ in cases}}
    for entry in entries():
        if entry.target == "sm_80":
            dtype = "bf16" if entry.dtype_class == "half" else "fp32"
            cases.add((FAMILIES.index(entry.family) + 1, dtype, dataclasses.replace(entry.tile, group_n=16)))
for streams, dtype, tile in cases:
    case = compile_case("other", streams, dtype, tile, {target!r}, tile != UNALIGNED, with_options=True)
    try:
        refuse(case.compile({target!r}))
    except ValueError as error:
        raise ValueError(f"{{streams}} {{dtype}} {{tile}}: {{error}}")
for case in registered_cases(["chunk_stats", "chunk_grad"]):
    refuse(case.compile({target!r}))
print(len(cases))
"""


@pytest.mark.compiles
@pytest.mark.slow
@pytest.mark.parametrize("target", OTHER_TARGETS)
def test_gpus_without_tiles_of_their_own_can_run_those_they_get(target):
    count = run_compiler(COMPILE_OTHERS.format(target=target, of_sm_80=target.startswith("sm_")))
    assert count == (12 if target.startswith("sm_") else 4)


@pytest.mark.compiles
@pytest.mark.slow
@pytest.mark.parametrize("target", GPU_TARGETS)
def test_every_tile_fits_its_gpu(target):
    report = run_compiler(COMPILE_TABLE.format(target=target, names="", thorough=True))
    assert len(report) >= 16
    assert {name: refused for name, (*_, refused) in report.items() if refused} == {}


COMPILE_ONE = """
import json, re
from nextquill_kernels.crosscompile import refuse
from nextquill_kernels.stream import compile_case
from nextquill_kernels.tiles import Tile
resources = compile_case("one", 2, "bf16", Tile(**{tile!r}), {target!r}, with_options={options}).compile({target!r})
try:
    refuse(resources)
    refused = None
except ValueError as error:
    refused = str(error)
# Offsets added to pointers into the hidden states and W, in the order of the program: [shape, type].
offsets = re.findall(r"tt.addptr .*: tensor<([\\dx]+)x!tt.ptr<bf16>>, tensor<[\\dx]+x(i\\d+)>", resources.ttir)
assembly = resources.assembly
print(json.dumps({{
    "refused": refused, "offsets": offsets, "shared_loads": len(re.findall("ld.shared", assembly)),
    "wgmma": "wgmma.mma_async" in assembly, "tma": "cp.async.bulk.tensor" in assembly,
    "shared_stores": len(re.findall("st.shared", assembly)), "copies": len(re.findall("cp.async.cg", assembly)),
}}))
"""


def compiled(tile: Tile, target: str, options: bool = False) -> dict[str, object]:
    return run_compiler(COMPILE_ONE.format(tile=dataclasses.asdict(tile), target=target, options=options))


@pytest.mark.slow
@pytest.mark.compiles
def test_tile_that_spills_is_refused():
    bad = dataclasses.replace(TILE, block_n=256, num_warps=4, num_stages=2)
    assert "spills" in str(compiled(bad, "sm_90")["refused"])


@pytest.mark.compiles
def test_tile_beyond_shared_memory_is_refused():
    assert "shared memory" in str(compiled(dataclasses.replace(TILE, num_stages=8), "sm_90")["refused"])


@pytest.mark.compiles
def test_hopper_tile_compiles_to_wgmma_and_tma_and_a_register_local_epilogue():
    found = compiled(lookup("pair", "sm_90", torch.bfloat16, 4096), "sm_90")
    assert found["refused"] is None
    assert found["wgmma"]
    assert found["tma"]
    # One exchange per reduced statistic and stored row; splitting the streams through shared memory takes 64 more.
    assert found["shared_loads"] <= 16
    assert found["shared_stores"] <= 16


@pytest.mark.compiles
def test_addresses_are_computed_in_int64():
    """V·D may exceed 2³¹, so the offsets of rows must be int64."""
    found = compiled(TILE, "sm_80")
    assert found["copies"]
    assert ["128x1", "i64"] in found["offsets"]
    assert ["1x256", "i64"] in found["offsets"]
    assert ["128x1", "i32"] not in found["offsets"]
    assert ["1x256", "i32"] not in found["offsets"]


def test_table_is_complete_and_says_where_it_comes_from():
    found = tiles.entries()
    targets = [*GPU_TARGETS, "interpreter"]
    expected = {(f, t, c, b) for f in FAMILIES for t in targets for c in DTYPE_CLASSES.values() for b in BUCKETS}
    assert {entry.key for entry in found} == expected
    for entry in found:
        assert entry.origin["kind"] in ("measured", "resources"), entry.key
        if entry.origin["kind"] == "measured":
            assert {"device", "date", "torch", "triton", "milliseconds"} <= set(entry.origin), entry.key


def test_tensor_descriptors_are_for_gpus_that_have_them():
    assert {entry.target for entry in tiles.entries() if entry.tile.descriptors} <= {"sm_90", "sm_100"}


def test_lookup_by_bucket_and_dtype():
    assert [tiles.bucket_of(d) for d in (1, 1024, 1025, 4096, 4097, 16384)] == [*BUCKETS][:1] * 2 + [
        *[*BUCKETS][1:2] * 2,
        *[*BUCKETS][2:] * 2,
    ]
    half = lookup("pair", "sm_90", torch.bfloat16, 4096)
    assert lookup("pair", "sm_90", torch.float16, 2000) == half
    assert lookup("pair", "sm_90", torch.float32, 4096) != half
    assert lookup("pair", "sm_90", torch.bfloat16, 512) != half


BAD_TILES = {
    "block_n": {"block_n": 96},
    "block_d": {"block_d": 8},
    "num_stages": {"num_stages": 0},
    "group_n": {"group_n": 0},
    "interleave": {"interleave": 128},
    "warp_specialize": {"warp_specialize": True},
}


@pytest.mark.parametrize("named", BAD_TILES)
def test_impossible_tile_is_named(named):
    with pytest.raises(ValueError, match=named):
        dataclasses.replace(TILE, **BAD_TILES[named])


def test_fewer_stages_where_shared_memory_is_short():
    stage = (128 + 256) * 64 * 2
    assert TILE.fitted(2, 227 * 1024) == TILE
    assert TILE.fitted(2, 99 * 1024).num_stages == 99 * 1024 // stage == 2
    assert TILE.fitted(2, 64 * 1024) == tiles.PORTABLE, "one stage would not overlap loads with products"
    assert tiles.PORTABLE.fitted(4, 48 * 1024) == tiles.PORTABLE


def test_written_table_is_read_back_and_merged(tmp_path):
    path = tmp_path / "table.json"
    first = TableEntry("pair", "sm_90", "half", "4096", TILE, {"kind": "resources"})
    other = dataclasses.replace(first, target="sm_80")
    tiles.write_entry(path, first)
    tiles.write_entry(path, other)
    better = dataclasses.replace(first, tile=dataclasses.replace(TILE, num_stages=3), origin={"kind": "measured"})
    tiles.write_entry(path, better)
    expected = {entry.key: entry for entry in tiles.entries()} | {other.key: other, better.key: better}
    assert {entry.key: entry for entry in tiles.entries(path)} == expected
    assert list(tmp_path.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o644


def test_failed_write_leaves_the_table_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    entry = TableEntry("pair", "sm_90", "half", "4096", TILE, {"kind": "resources"})
    tiles.write_entry(path, entry)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        tiles.write_entry(path, dataclasses.replace(entry, bucket="1024"))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("change", [{"family": "triple"}, {"target": "sm_1"}, {"bucket": "2"}, {"dtype_class": "int8"}])
def test_table_with_unknown_names_is_refused(change, tmp_path):
    record = {"family": "pair", "target": "sm_90", "dtype_class": "half", "bucket": "4096", "origin": {}}
    record |= {"tile": dataclasses.asdict(TILE)} | change
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"entries": [record]}))
    with pytest.raises(ValueError, match="format"):
        tiles.entries(path)


def test_table_with_an_entry_twice_is_refused(tmp_path):
    path = tmp_path / "table.json"
    record = {"family": "pair", "target": "sm_90", "dtype_class": "half", "bucket": "4096", "origin": {}}
    path.write_text(json.dumps({"entries": [record | {"tile": dataclasses.asdict(TILE)}] * 2}))
    with pytest.raises(ValueError, match="twice"):
        tiles.entries(path)


@pytest.mark.parametrize("target", GPU_TARGETS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_candidates_start_with_the_table_and_differ(family, target, dtype):
    found = tune.candidates(family, target, dtype, 4096)
    assert found[0] == lookup(family, target, dtype, 4096)
    assert len(found) == len(set(found)) >= 8
    if target not in ("sm_90", "sm_100"):
        assert not any(tile.descriptors for tile in found)


def test_fastest_skips_what_fails_and_stops_in_time():
    slow, fast, broken = (dataclasses.replace(TILE, group_n=group_n) for group_n in (1, 2, 3))
    lines: list[str] = []

    def measure(tile: Tile) -> float:
        if tile == broken:
            raise ValueError("spills")
        return 2.0 if tile == fast else 3.0

    assert tune.fastest([broken, slow, fast, slow], measure, lines.append) == (fast, 2.0)
    assert len(lines) == 4
    assert "refused" in lines[0]
    assert "spills" in lines[0]
    with pytest.raises(RuntimeError, match="no candidate"):
        tune.fastest([broken], measure, lines.append)
    with pytest.raises(RuntimeError, match="no candidate"):
        tune.fastest([fast], measure, lines.append, seconds=-1)
    assert "stopped" in lines[-1]


def test_tuned_entry_is_put_beside_the_others(tmp_path):
    problem = tune.Problem("pair", torch.bfloat16, 8192, 4096, 151936)
    entry = TableEntry("pair", "sm_90", "half", "4096", TILE, tune.origin(problem, 30.0, "A GPU"))
    assert entry.origin["tflops"] == pytest.approx(679.7, abs=0.1)
    path = tmp_path / "table.json"
    tiles.write_entry(path, entry)
    tiles.write_entry(path, dataclasses.replace(entry, bucket="1024"))
    found = {each.key: each for each in tiles.entries(path)}
    assert set(found) == {each.key for each in tiles.entries()}
    assert found[entry.key] == entry
    assert found[("pair", "sm_90", "half", "1024")].tile == TILE


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tuner_refuses_without_a_gpu(tmp_path, capsys):
    before = TABLE_PATH.read_bytes()
    with pytest.raises(SystemExit) as exit_info:
        tune.main(["--out", str(tmp_path / "table.json")])
    assert exit_info.value.code == 2
    assert "GPU" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert TABLE_PATH.read_bytes() == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tuner_writes_a_table_that_is_read(tmp_path, capsys):
    path = tmp_path / "table.json"
    assert tune.main(["--out", str(path), "--n", "512", "--d", "256", "--v", "4000", "--seconds", "5"]) == 0
    measured = [entry for entry in tiles.entries(path) if entry.origin["kind"] == "measured"]
    assert len(measured) == 1
    assert "ms" in capsys.readouterr().out

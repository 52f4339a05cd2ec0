"""The measuring phases and what they need: rates, sweep, profile, tiles, counters, and the allocator."""

from __future__ import annotations

import csv
import os
import subprocess
import time
from dataclasses import replace

import pytest
import torch
from nextquill_kernels import chunk_stats

from benchmarks import verify_gpu
from benchmarks.cases import FROZEN, TRAINABLE, TRAINING, Task
from benchmarks.gpu import allocator, counters, probe, profile, sweep, tune
from benchmarks.gpu.phase import Sheet, read_rows
from tests.benchmarks.gpu_helpers import CPU, environment, no_gpu, write


def test_probe_measures_every_kind_of_product_and_gives_floors(tmp_path):
    assert probe.main(["--csv", str(tmp_path / "probe.csv"), "--device", "cpu", "--quick"]) == 0
    rates = probe.read_rates(tmp_path / "probe.csv")
    assert set(rates) == {(kind, 32) for kind in probe.KINDS}
    assert probe.read_rates(tmp_path / "absent.csv") == {}


def test_floors_count_the_products_of_a_loss():
    rates = {("z", 8): 1.0, ("dh", 8): 2.0, ("dW", 8): 0.5}
    unit = 2 * 100 * 8 * 1000 / 1e12
    trainable, frozen = (Task("NextQuill", TRAINING, head) for head in (TRAINABLE, FROZEN))
    assert probe.floor(rates, trainable, 100, 8, 1000) == pytest.approx(unit * (2 + 2 / 2 + 2 / 0.5))
    assert probe.floor(rates, frozen, 100, 8, 1000) == pytest.approx(unit * 3)
    assert probe.floor(rates, replace(trainable, loss="PerCE"), 100, 8, 1000) == pytest.approx(unit * 4.5)
    assert probe.floor(rates, Task("token nll", "forward"), 100, 8, 1000) == pytest.approx(unit)
    assert probe.floor(rates, trainable, 100, 16, 1000) is None


def test_each_measuring_phase_leaves_its_rows_beside_those_of_the_others(tmp_path, capsys):
    path, sizes = tmp_path / "tuning.csv", tuple(chunk_stats.PAIR_STATS)
    flags = ["--csv", str(path), "--device", "cpu", "--quick"]
    for phase in (sweep, profile, tune, counters):
        assert phase.main(flags) == 0
    found = {(row.suite, row.metric) for row in read_rows(path)}
    assert {
        ("sweep", "seconds"),
        ("profile", "kernel"),
        ("profile", "total"),
        ("tune", "time"),
        ("tune", "row_tile"),
    } <= found
    assert chunk_stats.RowTile(*sizes) == chunk_stats.PAIR_STATS, "tuning leaves the kernel's own tile"
    assert any(suite == "counters" for suite, _ in found)
    before = len(read_rows(path))
    assert sweep.main(flags) == 0
    assert len(read_rows(path)) == before, "a second run replaces its own rows"
    assert profile.main(["--once", "--quick"]) == 0


@pytest.mark.parametrize("phase", [probe, sweep, profile])
def test_what_no_longer_fits_is_listed(tmp_path, phase):
    sheet = Sheet(tmp_path / "x.csv", "x")
    phase.run(sheet, CPU, True, time.monotonic() - 1)
    assert [row.note for row in sheet.rows if row.metric == "status"].count("not measured: out of time") >= 2


NCU = r"""#!/bin/sh
case "$*" in *"--clock-control none"*"--profile-from-start off"*) ;; *) exit 9;; esac
cat <<'END'
==PROF== Connected to process 1
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","1","_pair_stats_kernel","dram__throughput.avg.pct_of_peak_sustained_elapsed","%","71.5"
"0","1","_pair_stats_kernel","gpu__time_duration.sum","ns","1,234,567"
"0","1","_pair_stats_kernel","something.else","","1"
"1","1","_pair_stats_kernel","dram__throughput.avg.pct_of_peak_sustained_elapsed","%","80.5"
"2","1","stream_fwd_kernel","launch__registers_per_thread","register/thread","128"
END
"""


def test_counters_of_three_kernels_where_ncu_is_there(tmp_path, monkeypatch):
    write(tmp_path / "ncu", NCU).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert counters.main(["--csv", str(tmp_path / "tuning.csv"), "--device", "cpu", "--quick"]) == 0
    rows = read_rows(tmp_path / "tuning.csv")
    assert [(row.case, row.provider, row.value, row.unit) for row in rows if row.metric == "counter"] == [
        ("pair_stats", "memory", 76.0, "%"),
        ("pair_stats", "time", 1234600, "ns"),
        ("stream_fwd", "registers", 128, "register/thread"),
    ]
    (missing,) = (row for row in rows if row.metric == "status")
    assert (missing.case, missing.note) == ("pair_grad", "not measured: ncu saw no launch")


def test_ncu_that_fails_or_hangs_is_a_reason(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    for text, reason in (
        ("echo no permission; exit 3", "ncu ended with 3: no permission"),
        ("sleep 60", "stopped after"),
    ):
        write(tmp_path / "ncu", f"#!/bin/sh\n{text}\n").chmod(0o755)
        sheet = Sheet(tmp_path / "tuning.csv", "counters")
        counters.run(sheet, CPU, True, time.monotonic() + 2)
        assert all(reason in row.note for row in sheet.rows)


# ---- the allocator -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "name"), [("2.8.1", "PYTORCH_CUDA_ALLOC_CONF"), ("2.11.0+cu130", "PYTORCH_ALLOC_CONF")]
)
def test_segments_grow_where_the_allocator_takes_that(monkeypatch, version, name):
    asked = []

    def run(command, env, **options):
        asked.append(env)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(allocator.subprocess, "run", run)
    assert allocator.growing_segments({}) == ({name: "expandable_segments:True"}, "segments that grow")
    assert asked == [{name: "expandable_segments:True"}]
    assert allocator.growing_segments({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512"})[0] == {}


@pytest.mark.parametrize(
    ("code", "stderr"),
    [(1, "RuntimeError: CUDA driver error: operation not supported"), (0, "expandable_segments not supported")],
)
def test_segments_stay_fixed_where_it_does_not(monkeypatch, code, stderr):
    done = subprocess.CompletedProcess([], code, "", f"line\n{stderr}\n")
    monkeypatch.setattr(allocator.subprocess, "run", lambda *_, **__: done)
    assert allocator.growing_segments({}) == ({}, f"fixed segments: {stderr}")


@no_gpu
def test_the_allocators_test_fails_without_a_gpu():
    setting, note = allocator.growing_segments(dict(os.environ))
    assert setting == {}
    assert note.startswith("fixed segments: ")


# ---- what a bare machine has -------------------------------------------------------------------------


@pytest.mark.slow
def test_suite_head_runs_on_what_a_bare_machine_has(tmp_path):
    """It imports neither Hugging Face packages nor matplotlib, and the file holds the figures of ten seconds."""
    absent = "accelerate datasets hypothesis liger_kernel matplotlib peft pytest_timeout transformers".split()
    write(tmp_path / "sitecustomize.py", f"import sys\nsys.modules.update(dict.fromkeys({absent!r}))\n")
    variables = environment()
    variables["PYTHONPATH"] = os.pathsep.join([str(tmp_path), variables["PYTHONPATH"]])
    setting = verify_gpu.Setting(tmp_path, "cpu", True, (), variables)
    verdict = verify_gpu._suite("head")(setting, 40)
    assert verdict.passed, (tmp_path / "log.txt").read_text(encoding="utf-8")
    with (tmp_path / "head.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert {"ours, torch", "plain"} <= {row["provider"] for row in rows if row["metric"] == "time"}

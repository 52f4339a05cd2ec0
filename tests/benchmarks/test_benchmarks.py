"""The statistics are right, and the README's tables come from files."""

from __future__ import annotations

import csv
import math
import re
import time

import pytest
import torch

from benchmarks import measure, run, table


def test_ratios_are_taken_within_a_round():
    seconds = {"a": [1.0, 10.0, 2.0], "b": [2.0, 20.0, 4.0]}
    assert measure.ratios(seconds, "a")["b"] == [2.0, 2.0, 2.0]


def test_time_in_turns_runs_every_provider_once_a_round_and_warms_up():
    calls = []
    providers = {"slow": lambda: (calls.append("slow"), time.sleep(0.02)), "fast": lambda: calls.append("fast")}
    seconds = measure.time_in_turns(providers, rounds=3, warmup=1)
    assert calls.count("slow") == calls.count("fast") == 4
    assert all(len(values) == 3 for values in seconds.values())
    assert min(seconds["slow"]) > 0.015


@pytest.mark.parametrize(("budget", "rounds"), [(0.0, 3), (0.26, 4), (60.0, 8)])
def test_a_budget_takes_rounds_away_but_leaves_three(monkeypatch, budget, rounds):
    ticks = iter(range(10**6))
    clock = lambda: next(ticks) * 0.01  # noqa: E731  a call takes .01, a round .05
    monkeypatch.setattr(measure.time, "perf_counter", clock)
    providers = {"a": lambda: None, "b": lambda: None}
    seconds = measure.time_in_turns(providers, rounds=8, warmup=1, budget=budget, clock=clock)
    assert {len(values) for values in seconds.values()} == {rounds}


def test_csv_has_hardware_and_versions(tmp_path):
    rows = [measure.make_row("step", "case", "p", "time", "x", [1.0, 2.0, 3.0], "base")]
    measure.write_csv(rows, tmp_path / "step.csv")
    with (tmp_path / "step.csv").open(encoding="utf-8") as stream:
        (row,) = csv.DictReader(stream)
    assert row["value"] == "2.0"
    assert row["torch"] == torch.__version__
    assert row["device"]
    assert row["commit"]
    assert [path.name for path in tmp_path.iterdir()] == ["step.csv"]


def test_a_small_error_keeps_its_digits_and_a_missing_figure_is_no_number():
    assert measure.make_row("head", "case", "p", "error_loss", "x", [1.23456e-8]).value == 1.2346e-8
    assert math.isnan(measure.make_row("head", "case", "p", "status", "", [], note="not installed").value)


def test_committed_results_have_the_columns_of_a_row():
    for path in measure.RESULTS.glob("*.csv"):
        rows = table.read(path.name)
        assert rows
        assert list(rows[0]) == list(measure.Row.__dataclass_fields__), path.name


def native_row(case, loss, mode, threads, value, rounds=7):
    row = {"suite": "native", "metric": "time", "case": case, "loss": loss, "mode": mode, "value": str(value)}
    row |= {"threads": str(threads), "rounds": str(rounds), "device": "CPU", "torch": "2.13", "dtype": "float32"}
    return row | {"triton": "", "time": "2026-01-02T03:04Z"}


def test_table_of_the_extension(monkeypatch):
    kernels, whole = "chunk kernels", "forward+backward"
    rows = [
        native_row("N=5, V=9", "pair", kernels, 1, 0.2),
        native_row("N=5, V=9", "one stream", kernels, 1, 0.5),
        native_row("N=6, V=9", "pair", kernels, 1, 0.125),
        native_row("N=5, D=2, V=9", "SFT", whole, 1, 0.9),
        native_row("N=5, D=2, V=9", "PerCE", whole, 1, 0.4),
        native_row("N=5, V=9", "pair", kernels, 10, 0.185),
        native_row("N=5, D=2, V=9", "SFT", whole, 10, 1.04, rounds=5),
    ]
    monkeypatch.setattr(table, "read", {"native.csv": rows}.__getitem__)
    lines = table.native_table().splitlines()
    assert lines[0] == (
        "| chunk kernels, native | pair, 1 thread | pair, 10 threads | one stream, 1 thread | one stream, 10 threads |"
    )
    assert lines[1] == "|---|---|---|---|---|"
    assert lines[2:4] == ["| N=5, V=9 | 5.0× | 5.4× | 2.0× | – |", "| N=6, V=9 | 8.0× | – | – | – |"]
    assert lines[4] == ""
    assert lines[5].startswith("Speed-up over the same kernels in plain PyTorch. Whole losses (SFT, PerCE; forward and")
    assert "1 sizes) take 0.40, 0.90 and 1.04 times as long" in lines[5]
    assert (
        "smallest, median and largest of 3. Medians of at least 5 rounds in one run; CPU, 1 and 10 threads" in lines[5]
    )
    text = "a\n<!-- table: native -->\nold\n<!-- end table -->\nb"
    assert table.fill(text) == "\n".join(["a", "<!-- table: native -->", *lines, "<!-- end table -->", "b"])


def test_a_gpu_and_the_cpu_write_different_files(monkeypatch):
    names = {"cuda": "NVIDIA H200", "cpu": "AMD EPYC 7763 64-Core Processor"}
    monkeypatch.setattr(measure, "device_name", names.__getitem__)
    assert run.file_name("head", "cuda") == "head-nvidia-h200.csv"
    assert run.file_name("head", "cpu") == "head.csv"
    assert run.file_name("step", "cuda") == "step-nvidia-h200.csv"
    assert run.file_name("step", "cpu") == "step-cpu-amd-epyc-7763.csv"
    assert run.file_name("real-step", "cpu") == "real-step-cpu-amd-epyc-7763.csv"


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("Intel(R) Xeon(R) Processor", "Intel Xeon"),
        ("Intel(R) Core(TM) i7-8700K CPU @ 3.70GHz", "Intel Core i7-8700K"),
        ("AMD EPYC 7763 64-Core Processor", "AMD EPYC 7763"),
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB HBM3"),
        ("CPU", "CPU"),
    ],
)
def test_short_names_of_devices(name, short):
    assert measure.short_name(name) == short


def test_tables_are_those_of_the_committed_results():
    found = set()
    for page in table.PAGES:
        text = page.read_text(encoding="utf-8")
        found |= set(re.findall(r"<!-- table: (\w+) -->", text))
        assert table.fill(text) == text, f"{page.name}: run python -m benchmarks.table"
    assert found == set(table.TABLES)

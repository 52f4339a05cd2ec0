"""The benchmarks refuse to time what is wrong, their statistics are right, and the README's tables come from files."""

from __future__ import annotations

import csv
import time

import pytest
import torch

from benchmarks import head, measure, step, table
from nextquill.integrations.scratch import ScratchSize

SIZE = ScratchSize(vocabulary=64, hidden_size=16, layers=1, heads=2, intermediate_size=32)


def test_step_gate_passes_when_ours_and_plain_agree():
    step.gate(SIZE, step.make_batch(SIZE, 4, 8, 4))


def test_step_gate_stops_at_a_wrong_loss(monkeypatch):
    monkeypatch.setattr(
        step, "perce_plain", lambda h1, h0, w, labels, ids: 1.001 * head.perce_plain(h1, h0, w, labels, ids)
    )
    with pytest.raises(SystemExit, match="PerCE"):
        step.gate(SIZE, step.make_batch(SIZE, 4, 8, 4))


def test_head_gate_stops_at_a_wrong_gradient():
    providers = head.make_providers(head.Shape(24, 8, 40))
    head.gate(providers)
    right = providers["NextQuill (plain)"]

    def wrong():
        loss, dh1, dh0, dw = right()
        return loss, dh1, 1.001 * dh0, dw

    with pytest.raises(SystemExit, match="NextQuill"):
        head.gate(providers | {"NextQuill (plain)": wrong})


def test_every_provider_of_a_step_changes_the_parameters():
    for call in step.steps(SIZE, step.make_batch(SIZE, 4, 8, 4)).values():
        assert call() is None


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


def test_readme_tables_are_those_of_the_committed_results():
    text = table.README.read_text(encoding="utf-8")
    assert "<!-- table: step -->" in text
    assert table.fill(text) == text

"""The GPU verification's whole path without a GPU: every phase, time limits, replaced workers, and the page."""

from __future__ import annotations

import os
import re
import time

import pytest

from benchmarks import verify_gpu
from benchmarks.gpu import allocator
from benchmarks.gpu.phase import read_rows
from benchmarks.gpu.verdict import Verdict
from benchmarks.measure import make_row, write_csv
from benchmarks.verify_gpu import PHASES, Phase, main
from tests.benchmarks.gpu_helpers import no_gpu, write


@no_gpu
def test_it_refuses_without_a_gpu(tmp_path, capsys):
    assert main(["--out", str(tmp_path / "out")]) == 2
    assert "sees no GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_dry_run_runs_every_phase_and_leaves_at_most_eight_files(tmp_path, capsys):
    test = write(tmp_path / "test_one.py", "import nextquill_kernels\ndef test_it(): pass\n")
    out = tmp_path / "out"
    assert main(["--out", str(out), "--dry-run", "--tests", str(test), "--commit", "abc"]) == 0
    printed = capsys.readouterr().out
    assert [phase.name for phase in PHASES if f"{phase.name}: ok" not in printed] == []
    files = sorted(path.name for path in out.iterdir())
    assert files == [
        "head.csv", "log.txt", "probe.csv", "report.md", "smoke.csv", "step.csv", "tests.csv", "tuning.csv",
    ]  # fmt: skip
    rows = [row for path in out.glob("*.csv") for row in read_rows(path)]
    assert {row.commit for row in rows} == {"abc"}
    assert {row.suite for row in rows} == {phase.name for phase in PHASES}
    assert "Nothing is judged" in (out / "report.md").read_text(encoding="utf-8")


@pytest.fixture
def phases(monkeypatch):
    """Replace the phases; return what each was given, and how long it takes by name."""
    given, takes = [], {"head": 1.0}

    def fake(name):
        def run(setting, seconds):
            given.append((name, seconds))
            time.sleep(takes.get(name, 0))
            return Verdict(name, name != "tests", "done")

        return run

    monkeypatch.setattr(verify_gpu, "PHASES", tuple(each._replace(run=fake(each.name)) for each in PHASES))
    return given


def test_phases_share_the_time_of_their_part_and_what_one_leaves_is_the_others(tmp_path, phases):
    assert main(["--out", str(tmp_path), "--dry-run"]) == 1  # the tests failed, and the rest runs
    assert [name for name, _ in phases][:3] == ["probe", "smoke", "tests"]
    seconds = dict(phases)
    assert 240 < seconds["tests"] <= 250  # it is last, and the others took none
    assert seconds["counters"] > 400
    page = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert re.search(r"- tests: NOT OK, done \(0 of 2[45]\d s\)", page)


@pytest.mark.parametrize(
    ("part", "first", "most"), [("a", ["probe", "smoke", "tests"], 260), ("b", ["probe", "head", "step"], 420)]
)
def test_each_part_keeps_its_limit_and_part_b_measures_rates_first(tmp_path, phases, part, first, most):
    main(["--out", str(tmp_path), "--dry-run", "--part", part])
    assert [name for name, _ in phases][:3] == first
    assert all(seconds < most for _, seconds in phases)
    write_csv([make_row("probe", "a fact", "", "fact", "", [])], tmp_path / "before.csv")
    phases.clear()
    main(["--out", str(tmp_path / "b"), "--dry-run", "--part", "b", "--probe", str(tmp_path / "before.csv")])
    assert [name for name, _ in phases] == [phase.name for phase in PHASES if phase.part == "b"]


def test_on_a_gpu_the_measurements_get_the_allocators_setting_and_the_checks_do_not(tmp_path, monkeypatch):
    given = []

    def run(setting, seconds):
        given.append((setting.device, setting.environment.get("PYTORCH_ALLOC_CONF")))
        return Verdict("x", True, "done")

    phases = (Phase("probe", "a", 1, run), Phase("head", "b", 1, run))
    monkeypatch.setattr(verify_gpu, "PHASES", phases)
    monkeypatch.setattr(verify_gpu, "_no_gpu", lambda: None)
    monkeypatch.setattr(allocator, "growing_segments", lambda _: ({"PYTORCH_ALLOC_CONF": "grow"}, "segments that grow"))
    write_csv([make_row("probe", "a fact", "", "fact", "", [])], tmp_path / "probe.csv")
    assert main(["--out", str(tmp_path)]) == 0
    assert given == [("cuda", None), ("cuda", "grow")]
    assert "allocator: segments that grow" in (tmp_path / "log.txt").read_text(encoding="utf-8")


def test_some_phases_alone_in_a_time_of_ones_own(tmp_path, phases):
    main(["--out", str(tmp_path), "--dry-run", "--phases", "smoke", "--seconds", "50", "--part", "a"])
    ((name, seconds),) = phases
    assert name == "smoke"
    assert 40 < seconds < 50


def test_a_phase_for_which_no_time_is_left_is_not_measured(tmp_path, monkeypatch):
    late = Phase("late", "a", 1, lambda *_: Verdict("late", True, ""))
    monkeypatch.setattr(verify_gpu, "PHASES", (late,))
    monkeypatch.setattr(verify_gpu.time, "monotonic", iter(range(0, 10**6, 100)).__next__)
    assert main(["--out", str(tmp_path), "--dry-run", "--part", "a", "--seconds", "50"]) == 1
    assert "late: NOT OK, not measured, out of time" in (tmp_path / "report.md").read_text(encoding="utf-8")


CHILD = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
late = os.environ["LATE"]
subprocess.Popen([sys.executable, "-c", f"import time; time.sleep(3); open({late!r}, 'w')"])
time.sleep(60)
"""


def test_nothing_of_a_phase_is_left_when_its_time_is_up(tmp_path, monkeypatch):
    monkeypatch.setattr(verify_gpu, "_GRACE", 0.5)
    write(tmp_path / "hanging.py", CHILD)
    variables = os.environ | {"PYTHONPATH": str(tmp_path), "LATE": str(tmp_path / "late")}
    setting = verify_gpu.Setting(tmp_path, "cpu", True, (), variables)
    assert verify_gpu._run(["hanging"], setting, 1.5) is None
    time.sleep(3)
    assert not (tmp_path / "late").exists()


@pytest.mark.parametrize(
    ("code", "notes", "passed", "words"),
    [
        (0, ["", ""], True, "2 figures (x.csv)"),
        (0, ["", "FAILED: wrong"], False, "2 figures (x.csv), 1 FAILED"),
        (None, ["", "not measured: late"], True, "2 figures (x.csv), 1 not measured, stopped after 9 s"),
        (3, [""], False, "FAILED with exit code 3, see log.txt"),
        (None, [], False, "0 figures (x.csv), stopped after 9 s"),
    ],
)
def test_a_phase_is_judged_by_its_rows_and_its_end(tmp_path, code, notes, passed, words):
    write_csv([make_row("x", "case", "", "m", "s", [1.0], note=note) for note in notes], tmp_path / "x.csv")
    verdict = verify_gpu._judge("x", "x", tmp_path / "x.csv", code, 9)
    assert verdict.passed is passed
    assert words in verdict.summary

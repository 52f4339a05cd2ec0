"""The GPU verification's whole path without a GPU: every phase, time limits, replaced workers, and the page."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from nextquill_kernels import chunk_stats

from benchmarks import verify_gpu
from benchmarks.cases import FROZEN, TRAINABLE, TRAINING, Task
from benchmarks.gpu import allocator, counters, pools, probe, profile, report, shares, smoke, sweep, tune
from benchmarks.gpu.phase import Sheet, read_rows
from benchmarks.gpu.verdict import Verdict
from benchmarks.measure import make_row, write_csv
from benchmarks.verify_gpu import PHASES, Phase, main

CPU = torch.device("cpu")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def environment() -> dict[str, str]:
    root = str(verify_gpu.ROOT)
    return os.environ | {"PYTHONPATH": os.pathsep.join([root, f"{root}/kernels"]), "TRITON_INTERPRET": "1"}


@pytest.fixture
def log(tmp_path):
    return write(tmp_path / "log.txt", "")


# ---- the command ---------------------------------------------------------------------------------------


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


# ---- workers that are replaced -------------------------------------------------------------------------


WORKER = """
import os, sys
from pathlib import Path
from benchmarks.gpu.shares import POISONED, Share
share = Share(Path(sys.argv[1]), int(sys.argv[2]))
for name in share.interrupted():
    share.finish(name, {"name": name, "result": "ended the process"})
for name in share.items([["a", "poison", "b"], ["c"], ["crash", "d", "e"]]):
    share.start(name)
    if name == "crash":
        os.abort()
    share.finish(name, {"name": name, "result": "done"})
    if name == "poison":
        os._exit(POISONED)
share.end()
"""


def workers(tmp_path, code, count=2, seconds=60.0):
    folder = tmp_path / "share"
    folder.mkdir()
    seen = []
    script = str(write(tmp_path / "worker.py", code))
    command = lambda number: [sys.executable, script, str(folder), str(number)]  # noqa: E731
    problems = shares.work(command, count, folder, seconds, lambda found: seen.append(len(found)), env=environment())
    return {name: row["result"] for name, row in shares.rows_of(folder).items()}, problems, seen


def test_a_worker_that_ends_is_replaced_and_no_item_is_lost_or_done_twice(tmp_path):
    found, problems, seen = workers(tmp_path, WORKER)
    assert problems == []
    assert found.pop("crash") == "ended the process"
    assert found == dict.fromkeys(["a", "poison", "b", "c", "d", "e"], "done")
    assert seen == sorted(seen)


def test_a_worker_that_cannot_start_is_given_up(tmp_path):
    found, problems, _ = workers(tmp_path, "raise SystemExit(7)", count=1)
    assert found == {}
    assert problems == ["worker 0 ended with 7 and could not be replaced"]


def test_workers_that_take_too_long_are_killed_and_their_results_kept(tmp_path):
    slow = WORKER.replace("share.start(name)", "share.start(name); name == 'b' and __import__('time').sleep(60)")
    begun = time.monotonic()
    found, problems, _ = workers(tmp_path, slow, count=1, seconds=4)
    assert time.monotonic() - begun < 20
    assert problems == ["stopped after 4 s"]
    assert found["a"] == "done"
    assert "b" not in found


# ---- tests ---------------------------------------------------------------------------------------------


TESTS = """
import os
from pathlib import Path
import pytest
import torch

def test_passes(pytestconfig):
    root = Path(pytestconfig.rootpath)
    assert (root / "kernels" / "nextquill_kernels").is_dir()
    names = [plugin for plugin, _ in pytestconfig.pluginmanager.list_plugin_distinfo()]
    assert not any(word in str(name) for name in names for word in ("benchmark", "hypothesis", "xdist"))

def test_fails(): assert 1 == 2
def test_ends_the_process(): os._exit(3)
@pytest.mark.skip(reason="why not")
def test_skipped(): pass
@pytest.mark.parametrize("x", range(30))
def test_cases(x): pass

def test_leaves_an_error(monkeypatch):
    from benchmarks.gpu import device
    device.failure = lambda: "an illegal memory access"

def test_after_it(): pass
@pytest.mark.compiles
def test_left_out(): raise AssertionError
@pytest.mark.slow
def test_left_out_too(): raise AssertionError
"""


def test_tests_run_in_replaced_processes_and_each_has_a_row(tmp_path, log):
    test = write(tmp_path / "test_one.py", TESTS)
    verdict = pools.run_tests(tmp_path / "tests.csv", log, 100, environment(), [str(test)])
    rows = {row.case.partition("::")[2]: row for row in read_rows(tmp_path / "tests.csv")}
    assert not verdict.passed
    assert verdict.summary == "32 passed, 3 failed, 1 skipped"
    assert {name for name, row in rows.items() if row.metric == "failed"} == {
        "test_fails", "test_ends_the_process", "test_leaves_an_error",
    }  # fmt: skip
    assert rows["test_fails"].note == "assert 1 == 2"
    assert rows["test_ends_the_process"].note == "the process ended during this test"
    assert rows["test_leaves_an_error"].note == "the device is in error: an illegal memory access"
    assert rows["test_after_it"].metric == "passed"
    assert rows["test_skipped"].note == "why not"
    text = log.read_text(encoding="utf-8")
    assert "def test_fails(): assert 1 == 2" in text, "the traceback is printed at once"
    assert "PytestUnknownMarkWarning" not in text


@pytest.mark.parametrize(
    ("text", "words"),
    [("import absent_package\ndef test_it(): pass", "0 passed, 1 failed"), ("x = 1", "no test passed")],
    ids=["cannot-import", "no-tests"],
)
def test_a_run_that_verifies_nothing_is_a_failure(tmp_path, log, text, words):
    verdict = pools.run_tests(
        tmp_path / "tests.csv", log, 60, environment(), [str(write(tmp_path / "test_x.py", text))]
    )
    assert not verdict.passed
    assert words in verdict.summary


def test_without_test_files_it_fails_and_all_that_are_listed_exist(tmp_path, log):
    assert "gone exists" in pools.run_tests(tmp_path / "t.csv", log, 9, {}, ["gone"]).summary
    assert [test for test in pools.TESTS if not (pools.ROOT / test).exists()] == []


def test_every_file_with_a_test_that_needs_a_gpu_is_run():
    marked = [
        path.relative_to(pools.ROOT).as_posix()
        for path in (pools.ROOT / "tests").rglob("test_*.py")
        if "mark.gpu" in path.read_text(encoding="utf-8") and path != Path(__file__)
    ]
    assert marked
    assert [path for path in marked if not path.startswith(pools.TESTS)] == []


@pytest.mark.slow
def test_the_project_s_own_tests_are_collected_without_its_plugins(tmp_path, log):
    """`tests/conftest.py` reads a setting of pytest-timeout, which is not loaded."""
    verdict = pools.run_tests(tmp_path / "tests.csv", log, 200, environment(), ["tests/ops/test_dispatch.py"])
    assert verdict.passed, log.read_text(encoding="utf-8")


def test_a_list_that_was_not_finished_says_so_in_its_file(tmp_path, log, monkeypatch):
    row = make_row("tests", "t::a", "", "passed", "s", [1.0])

    def work(command, count, folder, seconds, progress, **options):
        share = shares.Share(folder, 0)
        share.finish("t::a", vars(row))
        return ["stopped after 9 s"]

    monkeypatch.setattr(pools, "work", work)
    verdict = pools.run_tests(tmp_path / "tests.csv", log, 9, environment(), [__file__])
    assert (verdict.passed, verdict.summary) == (False, "1 passed, 0 failed, 0 skipped; stopped after 9 s")
    page = report.write(tmp_path).read_text(encoding="utf-8")
    assert line_of(page, "tests on the GPU").endswith(
        "| 1 right, 0 wrong; the rest not measured: stopped after 9 s | holds so far |"
    )


# ---- smoke -----------------------------------------------------------------------------------------------


def test_every_operator_has_cases_in_every_dtype_and_each_is_right_in_plain_pytorch():
    cases = [case for block in smoke.cases() for case in block]
    assert len(set(map(str, cases))) == len(cases)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert {case.operator for case in cases if case.dtype == dtype} == set(smoke.OPERATORS)
    small = [case for case in cases if case.shape is smoke.SMALL]
    errors = {str(case): smoke.check(case, CPU, "torch") for case in small[:: 3 if len(small) % 3 else 4]}
    assert {name: error for name, error in errors.items() if error[0] > 1} == {}


def test_a_wrong_operator_is_found(monkeypatch):
    case = smoke.Case("token nll", "plain", torch.float32)
    right = smoke.nq.linear_token_nll
    wrong = lambda *given, **options: right(*given, **options) * 1.001  # noqa: E731
    monkeypatch.setattr(smoke.nq, "linear_token_nll", wrong)
    error, what = smoke.check(case, CPU, "torch")
    assert error > 10
    assert what.startswith(("nll: ", "grad "))


def test_a_smoke_worker_goes_on_after_an_error_and_ends_when_the_device_is_lost(tmp_path, monkeypatch):
    few = [[smoke.Case(name, "plain", torch.float32) for name in ("token nll", "SFT", "pair nll")]]
    monkeypatch.setattr(smoke, "cases", lambda quick: few)
    right = smoke.check

    def check(case, device, impl):
        if case.operator == "token nll":
            raise RuntimeError("a\nbad launch")
        return right(case, device, impl)

    monkeypatch.setattr(smoke, "check", check)
    lost = iter([None, "an illegal memory access", None])
    monkeypatch.setattr(smoke.the_device, "failure", lambda: next(lost))
    assert smoke.work(shares.Share(tmp_path, 0), CPU, True, "torch") == shares.POISONED
    assert smoke.work(shares.Share(tmp_path, 0), CPU, True, "torch") == 0
    notes = [row["note"] for row in shares.rows_of(tmp_path).values()]
    assert notes == ["FAILED: RuntimeError: a bad launch", "FAILED: an illegal memory access", ""]


# ---- rates, sweep, profile, tiles, counters ----------------------------------------------------------------


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


# ---- the allocator -------------------------------------------------------------------------------------


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


# ---- the page --------------------------------------------------------------------------------------------


CASE = "Qwen3-8B: N=8192, D=4096, V=151936"


def figures(folder, ours=0.1, liger=0.6, failed=0):
    """Files as a GPU leaves them, with one figure for each goal."""
    of = {"loss": "NextQuill", "mode": TRAINING, "head": TRAINABLE}
    products = [
        make_row("probe", f"M={m}, D=4096, V=151936", kind, "gemm", "TFLOP/s", [700.0 if m == 4096 else 300.0])
        for kind in probe.KINDS
        for m in (1024, 4096)
    ]
    head = [make_row("head", CASE, name, "seconds", "s", [value], **of) for name, value in
            (("ours, triton", ours), ("Liger", liger))]  # fmt: skip
    head.append(make_row("head", CASE, "CCE", "status", "", [], note="cut-cross-entropy is not installed", **of))
    step = [
        make_row("step", "Qwen2.5-0.5B: 24 layers", provider, metric, unit, [value], loss="NextQuill")
        for provider, metric, unit, value in (
            ("ours, K=1", "examples", "x", 7.0), ("ours, K=8", "examples", "x", 12.0),
            ("ours, K=1", "seconds", "s", 0.05), ("ours, K=1", "peak", "MiB", 9e3), ("official", "peak", "MiB", 4e4),
        )
    ]  # fmt: skip
    tests = [make_row("tests", f"t::{n}", "", "failed" if n < failed else "passed", "s", [1.0]) for n in range(3)]
    for name, rows in (("probe", products), ("head", head), ("step", step), ("tests", tests)):
        write_csv(rows, folder / f"{name}.csv")


def line_of(page, start):
    (line,) = (line for line in page.splitlines() if line.startswith(f"| {start}"))
    return line


def test_the_page_judges_each_goal_by_its_bar(tmp_path):
    figures(tmp_path)
    page = report.write(tmp_path, [Verdict("head", True, "3 figures")]).read_text(encoding="utf-8")
    # 6 products of 2 N D V at 700 TFLOP/s
    assert line_of(page, "NextQuill, trainable head").endswith(
        f"| {0.1 / (12 * 8192 * 4096 * 151936 / 7e14):.3g}× | holds |"
    )
    assert line_of(page, "NextQuill over Liger").endswith("| ≥ 5 × faster | 6× | holds |")
    assert line_of(page, "examples per second, ours, K=1").endswith("| 7× | holds |")
    assert line_of(page, "examples per second, ours, K=8").endswith("| 12× | DOES NOT HOLD |")
    assert line_of(page, "memory, ours, K=1").endswith("| 0.225× | holds |")
    assert line_of(page, "memory without weights").endswith("| – | not measured |")
    assert line_of(page, "operators against float64").endswith("| – | not measured |")
    assert line_of(page, "tests on the GPU").endswith("| 3 right, 0 wrong | holds |")
    assert "- head: ok, 3 figures" in page
    missing = page.split("## Not measured")[1]
    assert "- smoke: no row" in missing
    assert "CCE, " + CASE + ": cut-cross-entropy is not installed" in missing


def test_the_page_says_what_does_not_hold_and_what_failed(tmp_path):
    figures(tmp_path, ours=0.2, failed=1)
    assert report.main([str(tmp_path)]) == 0
    page = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert line_of(page, "NextQuill, trainable head").endswith("DOES NOT HOLD |")
    assert line_of(page, "NextQuill over Liger").endswith("| 3× | DOES NOT HOLD |")
    assert line_of(page, "tests on the GPU").endswith("| 2 right, 1 wrong | DOES NOT HOLD |")
    assert "- `t::0`: " in page.split("## What failed")[1]


@pytest.mark.parametrize(
    ("note", "wrong"),
    [
        ("grad_weight off by 3.0e-01, allowed 5.0e-02", True),
        ("loss 1.5, separate passes have 1.2; not timed", True),
        ("AcceleratorError: CUDA error: an illegal memory access", True),
        ("FAILED: nll: 3.1 of the allowed error", True),
        ("out of memory", False),
        ("liger-kernel is not installed", False),
        ("not measured: RuntimeError: no out_dtype", False),
    ],
)
def test_the_page_tells_what_is_wrong_from_what_is_absent(tmp_path, note, wrong):
    write_csv([make_row("head", CASE, "ours, triton", "status", "", [], note=note)], tmp_path / "head.csv")
    page, missing = report.write(tmp_path).read_text(encoding="utf-8").split("## Not measured")
    assert (note in page, note.removeprefix("not measured: ") in missing) == (wrong, not wrong)


def test_the_page_of_an_empty_folder_measures_nothing(tmp_path, capsys):
    page = report.write(tmp_path).read_text(encoding="utf-8")
    assert page.count(report.MISSING) >= 5
    assert report.HOLDS + " |" not in page
    assert report.main([]) == 2


# ---- what a bare machine has ---------------------------------------------------------------------------


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

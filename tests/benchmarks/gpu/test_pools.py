"""The pools of workers of phases `smoke` and `tests`: replaced processes, rows, and what verifies nothing."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import pools, report, shares, smoke
from benchmarks.gpu.phase import read_rows
from benchmarks.measure import make_row
from tests.benchmarks.gpu_helpers import CPU, environment, line_of, write

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


# ---- tests -------------------------------------------------------------------------------------------


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


# ---- smoke -------------------------------------------------------------------------------------------


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

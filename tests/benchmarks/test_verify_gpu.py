"""The GPU verification's whole path without a GPU: tests, suite, deadlines, exit codes and files."""

from __future__ import annotations

import csv
import sys
import time
from xml.etree import ElementTree

import pytest
import torch

from benchmarks import verify_gpu
from benchmarks.verify_gpu import Part, main

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
PASSING = (
    "import torch\nfrom tests.helpers import make_case\nimport nextquill, nextquill_kernels\ndef test_it(): pass\n"
)


@pytest.fixture
def suite(monkeypatch):
    """Replace the suite by a function that records its arguments."""
    calls = []

    def run(out, seconds, device, quick):
        calls.append((seconds, device, quick))
        return Part(True, "head: ok")

    monkeypatch.setattr(verify_gpu, "_run_suite", run)
    return calls


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


@no_gpu
def test_it_refuses_without_a_gpu(tmp_path, capsys):
    assert main(["--out", str(tmp_path / "out")]) == 2
    assert "sees no GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_dry_run_tests_and_measures(tmp_path, capsys, suite):
    test = write(tmp_path / "test_one.py", PASSING)
    assert main(["--out", str(tmp_path / "out"), "--dry-run", "--tests", str(test), "--seconds", "100"]) == 0
    assert "tests: ok, 1 passed, 0 failed, 0 skipped" in capsys.readouterr().out
    ElementTree.parse(tmp_path / "out" / "junit.xml")
    ((seconds, device, quick),) = suite
    assert 50 < seconds < 100
    assert (device, quick) == ("cpu", True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def test_a(): pass\ndef test_b(): assert False", "FAILED, 1 passed, 1 failed"),
        ("import pytest\n@pytest.mark.skip\ndef test_it(): pass", "no test passed (pytest ended with 0)"),
        ("import absent_package\ndef test_it(): pass", "no test passed (pytest ended with "),  # 2, or 1 side by side
    ],
    ids=["one-fails", "skipped", "cannot-import"],
)
def test_a_run_that_fails_or_verifies_nothing_is_a_failure_and_is_measured_all_the_same(
    tmp_path, capsys, suite, text, message
):
    test = write(tmp_path / "test_one.py", text)
    assert main(["--out", str(tmp_path), "--dry-run", "--tests", str(test)]) == 1
    assert message in capsys.readouterr().out
    assert len(suite) == 1


def test_without_tests_it_fails_and_may_stop_there(tmp_path, capsys, suite):
    assert main(["--out", str(tmp_path), "--dry-run", "--tests", str(tmp_path / "gone"), "--stop-on-failure"]) == 1
    assert "gone exists" in capsys.readouterr().out
    assert suite == []
    assert "no test passed (pytest ended with 5)" in verify_gpu._judge_tests(tmp_path / "junit.xml", 5, 10).line


CAREFUL = """
import sys
from pathlib import Path
import pytest

def test_paths(pytestconfig):
    root = Path(pytestconfig.rootpath)
    found = [Path(path).resolve() for path in sys.path]
    assert root in found and root / "kernels" in found and root / "benchmarks" not in found

def test_plugins(pytestconfig):
    names = [plugin for plugin, _ in pytestconfig.pluginmanager.list_plugin_distinfo()]
    assert not any("benchmark" in str(name) or "hypothesis" in str(name) for name in names), names

@pytest.mark.compiles
def test_left_out():
    raise AssertionError

@pytest.mark.slow
def test_left_out_too():
    raise AssertionError
"""


def test_paths_markers_and_plugins_of_the_tests(tmp_path):
    test = write(tmp_path / "test_one.py", CAREFUL)
    part = verify_gpu._run_tests(tmp_path, [str(test)], 60)
    log = (tmp_path / "tests.log").read_text(encoding="utf-8")
    assert "tests: ok, 2 passed, 0 failed, 0 skipped" in part.line, log
    assert "PytestUnknownMarkWarning" not in log


@pytest.mark.parametrize("there", [set(), {"xdist"}, {"pytest_timeout", "xdist"}], ids=["none", "xdist", "both"])
def test_plugins_are_used_where_they_are(monkeypatch, there):
    monkeypatch.setattr(verify_gpu.importlib.util, "find_spec", lambda name: name in there or None)
    monkeypatch.setattr(verify_gpu.os, "cpu_count", lambda: 16)
    flags = " ".join(verify_gpu._plugins())
    assert ("-p xdist.plugin -n 6 --dist worksteal" in flags) is ("xdist" in there)
    assert ("-p pytest_timeout" in flags) is ("pytest_timeout" in there)
    monkeypatch.setattr(verify_gpu.os, "cpu_count", lambda: 1)
    assert "xdist" not in " ".join(verify_gpu._plugins())


@pytest.mark.parametrize(
    ("version", "name"),
    [("2.8.1", "PYTORCH_CUDA_ALLOC_CONF"), ("2.11.0+cu130", "PYTORCH_ALLOC_CONF")],
)
def test_the_suites_allocator_grows_its_segments_unless_told_otherwise(tmp_path, monkeypatch, version, name):
    for each in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setattr(torch, "__version__", version)
    assert verify_gpu._allocator() == {name: "expandable_segments:True"}
    given = []
    monkeypatch.setattr(verify_gpu, "_run", lambda command, log, seconds, extra: given.append(extra))
    verify_gpu._run_suite(tmp_path, 60, "cuda", quick=True)
    assert given == [{name: "expandable_segments:True"}]
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:512")
    assert verify_gpu._allocator() == {}


@pytest.mark.slow
def test_tests_that_hang_are_ended_and_leave_their_report(tmp_path):
    test = write(tmp_path / "test_one.py", "import time\ndef test_a(): pass\ndef test_b(): time.sleep(100)")
    begun = time.monotonic()
    part = verify_gpu._run_tests(tmp_path, [str(test)], 12)
    assert time.monotonic() - begun < 30
    assert not part.passed
    assert "stopped after 12 s; 1 passed" in part.line


CHILD = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3); open(" + repr(sys.argv[1]) + ", 'w')"])
time.sleep(60)
"""


def test_nothing_of_a_command_is_left_when_its_time_is_up(tmp_path, monkeypatch):
    monkeypatch.setattr(verify_gpu, "_GRACE", 0.5)
    command = [sys.executable, "-c", CHILD, str(tmp_path / "late")]
    assert verify_gpu._run(command, tmp_path / "log", 1) is None
    time.sleep(3)
    assert not (tmp_path / "late").exists()


@pytest.mark.slow
def test_the_suite_runs_on_what_a_bare_machine_has(tmp_path, monkeypatch):
    """It imports neither Hugging Face packages nor matplotlib, and the file holds the figures of ten seconds."""
    absent = "accelerate datasets hypothesis liger_kernel matplotlib peft pytest_timeout transformers".split()
    write(tmp_path / "sitecustomize.py", f"import sys\nsys.modules.update(dict.fromkeys({absent!r}))\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    part = verify_gpu._run_suite(tmp_path, verify_gpu._MARGIN + 10, "cpu", quick=True)
    log = (tmp_path / "head.log").read_text(encoding="utf-8")
    assert part.passed, log
    with (tmp_path / "head.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert {"ours, torch", "plain"} <= {row["provider"] for row in rows if row["metric"] == "time"}

"""The page that judges each goal."""

from __future__ import annotations

import pytest

from benchmarks.cases import TRAINABLE, TRAINING
from benchmarks.gpu import probe, report
from benchmarks.gpu.verdict import Verdict
from benchmarks.measure import make_row, write_csv
from tests.benchmarks.gpu_helpers import line_of

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

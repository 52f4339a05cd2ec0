"""`nextquill report`: run folders in, one page out."""

import json
import os
import re

import pytest

from tests.report.example_runs import write_evaluation, write_training


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of two runs, `a` and `b`, with evaluations."""
    root = tmp_path_factory.mktemp("runs")
    for name, gain in (("a", 0.0), ("b", 0.3)):
        write_evaluation(write_training(root / name) / "evaluation", gain=gain)
    return root


def test_runs_stand_first_or_behind_their_flag(nextquill, runs, tmp_path):
    pages = []
    for words in ((runs / "a", runs / "b"), ("--runs", runs / "a", runs / "b")):
        file = tmp_path / f"{len(pages)}.html"
        result = nextquill("report", *words, "--output_file", file, "--examples", 3)
        assert result.code == 0, result.err
        assert f"Written to {file} (" in result.err
        assert result.out == ""
        pages.append(file.read_text(encoding="utf-8"))
    assert pages[0] == pages[1]
    assert pages[0].count("<article") == 3
    assert "<h1>nextquill: a, b</h1>" in pages[0]
    assert "Difference to a" in pages[0]


def test_a_trained_run_of_the_command_itself(nextquill, trained, tmp_path):
    """The report reads the files of a real `nextquill train`."""
    result = nextquill("report", trained, "--output_file", tmp_path / "r.html", "--title", "Mine <b>")
    assert result.code == 0, result.err
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "<h1>Mine &lt;b&gt;</h1>" in page
    assert "No run has been evaluated, so there is no verdict." in page
    assert "<h3>Own history against another person&#x27;s</h3>" in page
    assert "no evaluation, so no measures with intervals" in page
    assert "<polyline" in page, "both steps are logged"


def test_the_baseline_is_a_folder_or_a_label(nextquill, runs, tmp_path):
    for position, baseline in enumerate((runs / "b", "b", os.path.relpath(runs / "b"))):
        file = tmp_path / f"{position}.html"
        flags = ("--baseline", baseline, "--output_file", file)
        assert nextquill("report", runs / "a", runs / "b", *flags).code == 0
        assert "Difference to b" in file.read_text(encoding="utf-8")


def test_asked_for_examples(nextquill, runs, tmp_path):
    result = nextquill("report", runs / "a", "--index", 5, 2, "--output_file", tmp_path / "r.html")
    assert result.code == 0, result.err
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert re.findall(r"<h3>(Example \d+)</h3>", page) == ["Example 5", "Example 2"]


def test_an_existing_page_is_not_replaced_unasked(nextquill, runs, tmp_path):
    file = tmp_path / "r.html"
    file.write_text("precious")
    result = nextquill("report", runs / "a", "--output_file", file)
    assert result.code == 1
    assert "r.html exists; give another name or --overwrite" in result.err
    assert file.read_text() == "precious"
    assert nextquill("report", runs / "a", "--output_file", file, "--overwrite").code == 0
    assert file.read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize(("words", "start"), [(("--format", "svg"), b"<?xml"), ((), b"\x89PNG")])
def test_plots_are_files_too(nextquill, runs, tmp_path, words, start):
    file = tmp_path / ("r" if words else "r.png")
    files = []
    for _ in range(2):
        result = nextquill("report", runs / "a", runs / "b", *words, "--output_file", file, "--overwrite")
        assert result.code == 0, result.err
        files.append(file.read_bytes())
    assert files[0].startswith(start)
    assert files[0] == files[1]


def test_nothing_to_draw_is_said(nextquill, runs, tmp_path):
    folder = write_training(tmp_path / "x", steps=2)
    metrics = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps(metrics | {"eval": {}}))
    result = nextquill("report", folder, "--output_file", tmp_path / "r.svg")
    assert result.code == 2
    assert "--format: expected html, as there is neither a measure nor a curve to draw, got svg" in result.err
    assert not (tmp_path / "r.svg").exists()


WRONG = {
    "format": (
        ("{root}/a", "--format", "png"),
        "--format: expected html, the ending of r.html, or another output_file",
    ),
    "unknown format": (("{root}/a", "--format", "pdf"), "argument --format"),
    "no runs": (("--examples", "3"), "expected --runs"),
    "no folder": (("nowhere",), "--runs: expected a folder, nowhere is not there"),
    "no run": (("{root}",), "is not a run: it holds neither metrics.json of nextquill train nor evaluation.json of"),
    "twice": (("{root}/a", "{root}/b/../a"), "a is given twice"),
    "both places": (("{root}/a", "--runs", "{root}/b"), "--runs: expected all runs in one place"),
    "behind a flag": (("{root}/a", "--overwrite", "true", "{root}/b"), "unexpected argument"),
    "examples": (("{root}/a", "--examples", "-1"), "--examples: expected 0 or more, got -1"),
    "index": (("{root}/a", "--index", "12"), "--index: no example 12; the runs have 12 examples, 0 to 11"),
    "baseline": (("{root}/a", "--baseline", "c"), "--baseline: expected one of the runs, "),
    "flag": (("{root}/a", "--titel", "x"), "unknown flag --titel; did you mean --title?"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_words_are_refused_in_one_line(nextquill, runs, tmp_path, what):
    words, said = WRONG[what]
    words = [word.format(root=runs) for word in words]
    result = nextquill("report", *words, "--output_file", tmp_path / "r.html")
    assert result.code == 2
    assert said in result.err
    assert result.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_run_fails_and_writes_nothing(nextquill, runs, tmp_path):
    folder = write_evaluation(tmp_path / "x")
    path = folder / "effects.jsonl"
    path.write_text(path.read_text(encoding="utf-8")[:-40], encoding="utf-8")
    result = nextquill("report", folder, "--output_file", tmp_path / "r.html")
    assert result.code == 1
    assert "effects.jsonl line 12: not valid JSON" in result.err
    assert not (tmp_path / "r.html").exists()

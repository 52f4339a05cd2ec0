"""`nextquill bench`: the suites of a checkout, and a clear error outside of one."""

import csv

import nextquill as package
from nextquill.cli.main import OK, USAGE


def test_it_runs_the_checkouts_suites_with_its_own_flags(nextquill, monkeypatch, tmp_path):
    from benchmarks import head, measure

    rows = [measure.make_row("head", "case", "ours, torch", "time", "x", [0.5, 0.6], "plain", loss="NextQuill")]
    seen = []
    monkeypatch.setattr(head, "run", lambda options: seen.append(options) or rows)
    result = nextquill("bench", "--suite", "head", "--quick", "--rounds", 2, "--device", "cpu", "--out", tmp_path)
    assert (result.code, result.err) == (OK, "")
    assert "0.55 x of plain" in result.out
    assert (seen[0].rounds, seen[0].quick, seen[0].device) == (2, True, "cpu")
    with (tmp_path / "head.csv").open(encoding="utf-8") as stream:
        assert [row["loss"] for row in csv.DictReader(stream)] == ["NextQuill"]


def test_a_wrong_flag_is_one_line(nextquill):
    result = nextquill("bench", "--suit", "head")
    assert result.code == USAGE
    assert result.err == "nextquill: unknown flag --suit; did you mean --suite?; see nextquill bench --help\n"
    assert "unrecognized arguments: head; see" in nextquill("bench", "head").err
    assert "invalid choice: 'heads'" in nextquill("bench", "--suite", "heads").err
    assert "--rounds: expected a positive number, got 0" in nextquill("bench", "--rounds", 0).err
    assert "--csv: expected exactly one --suite" in nextquill("bench", "--csv", "a.csv").err


def test_what_is_wrong_fails_the_command(nextquill, monkeypatch, tmp_path):
    from benchmarks import head, measure

    def run(options):
        raise measure.GateError("head: not timed: ours, torch: loss off by 1.0e-01")

    monkeypatch.setattr(head, "run", run)
    result = nextquill("bench", "--suite", "head", "--out", tmp_path)
    assert result.code == 1
    assert "loss off by" in result.err


def test_an_installed_wheel_says_where_the_benchmarks_are(nextquill, monkeypatch, tmp_path):
    monkeypatch.setattr(package, "__file__", str(tmp_path / "site-packages" / "nextquill" / "__init__.py"))
    result = nextquill("bench", "--help")
    assert result.code == USAGE
    assert result.err.startswith("nextquill: bench: the benchmarks are part of the source tree")
    assert "clone nextquill and run `make bench` there" in result.err
    assert result.err.count("\n") == 1

"""The list of mutations fits the checkout, and in a toy package the command tells caught mutations from survivors."""

from __future__ import annotations

import ast
import json
import subprocess
from pathlib import Path

import pytest

from tools.checkouts import run_pytest
from tools.mutation import DoesNotApply, Mutation
from tools.mutation_list import MUTATIONS
from tools.mutations import main

ROOT = Path(__file__).resolve().parents[2]


def test_every_mutation_applies_and_compiles() -> None:
    complaints = []
    for mutation in MUTATIONS:
        try:
            mutated = mutation.source(ROOT).replace(mutation.old, mutation.new)
            if mutation.file.endswith(".py"):
                ast.parse(mutated, feature_version=(3, 10))
        except (DoesNotApply, SyntaxError) as error:
            complaints.append(f"{mutation.name}: {error}")
        if mutation.old == mutation.new:
            complaints.append(f"{mutation.name}: changes nothing")
    assert complaints == []


def test_names_are_unique() -> None:
    names = [mutation.name for mutation in MUTATIONS]
    assert len(names) == len(set(names))


def test_changed_lines_leave_out_what_surrounds_them() -> None:
    source = "a\nb\nc\nd\n"
    for old, new, lines in (
        ("b\nc", "b\nx", range(3, 4)),
        ("b\nc\nd", "b\nd", range(3, 4)),
        ("b\nc", "x\nc", range(2, 3)),
        ("b\nc", "b\nx\nc", range(2, 3)),
        ("a", "x", range(1, 2)),
    ):
        assert Mutation("", "", old, new, "").lines(source) == lines


PACKAGE = '''\
"""A toy."""

from functools import cache


def double(x):
    return 2 * x


def positive(x):
    if x < 0:
        raise ValueError(x)
    return x


@cache
def setting():
    return {"depth": 3}


def depth():
    return setting()["depth"]


def main():
    print("one", "two")
'''
TESTS = """\
import subprocess
import sys

import pytest

from nextquill.toy import depth, double, positive


@pytest.fixture(scope="module")
def four():
    return double(2)


def test_takes_the_fixture_first(four):
    pass


def test_checks_the_fixture(four):
    assert four == 4


def test_positive():
    assert positive(1) == 1


def test_fills_the_cache():
    depth()


@pytest.mark.slow
def test_depth():
    assert depth() == 3


def test_command():
    code = "from nextquill.toy import main; main()"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.startswith("one")
"""
TOY = (
    ("fixture", "2 * x", "3 * x", "test_checks_the_fixture"),
    ("cached", '"depth": 3', '"depth": 4', "test_depth"),
    ("subprocess", '"one"', '"none"', "test_command"),
    ("hidden", "if x < 0", "if x < -9", None),
    ("absent", "not there", "", None),
)


# What pytest's other plugins take to load is most of the time of a toy's run.
FAST_START = 'addopts = ["-p", "no:hypothesispytest", "-p", "no:benchmark", "-p", "no:anyio"]\n'


def test_toy_defects_get_their_verdicts(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    toy = tmp_path / "toy"
    for name, text in {
        "nextquill/__init__.py": "",
        "nextquill/toy.py": PACKAGE,
        "tests/test_toy.py": TESTS,
        "pyproject.toml": '[tool.pytest.ini_options]\nmarkers = ["slow"]\n' + FAST_START,
    }.items():
        (toy / name).parent.mkdir(parents=True, exist_ok=True)
        (toy / name).write_text(text, encoding="utf-8")
    subprocess.run(["git", "init", "--quiet"], cwd=toy, check=True)
    subprocess.run(["git", "add", "."], cwd=toy, check=True)
    mutations = [Mutation(name, "nextquill/toy.py", old, new, "a toy") for name, old, new, _ in TOY]
    words = [str(toy), "--workers", "1", "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out.jsonl")]

    assert main(words, mutations) == 1

    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {each["name"]: each["verdict"] for each in found} == {
        "fixture": "fast",
        "cached": "slow",
        "subprocess": "fast",
        "hidden": "survived",
        "absent": "inapplicable",
    }
    details = {each["name"]: each["detail"] for each in found}
    assert {name: details[name].split("::")[1] for name, *_, test in TOY if test} == {
        name: test for name, *_, test in TOY if test
    }
    assert (toy / "nextquill/toy.py").read_text(encoding="utf-8") == PACKAGE
    capfd.readouterr()

    assert main(words, mutations) == 1  # nothing is judged again but what does not apply
    assert "4 of them judged before" in capfd.readouterr().out


def test_a_run_that_hangs_is_ended(tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy/test_endless.py").write_text("import time\n\ndef test_endless():\n    time.sleep(600)\n")
    assert run_pytest(tmp_path / "copy", ["test_endless.py"], seconds=1.0).code is None

"""Commands that read a model, on several processes: the files are those of one, and a fault ends all of them."""

from __future__ import annotations

import filecmp
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.shared_run_worker import PATIENCE, launch

#: Seconds from a fault to the end of the last process.
BOUND = 20
FORWARDS = ("--batch_size", 2, "--max_tokens", 400)


def test_a_launcher_is_refused_by_a_command_for_one_process(
    nextquill: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "launcher" not in nextquill("report", "runs").err, "a cluster's shell"
    monkeypatch.setenv("LOCAL_RANK", "0")
    result = nextquill("report", "runs")
    assert result.code == 2
    assert result.err.strip().splitlines()[-1] == (
        "nextquill: rank 0: report runs in one process, and a launcher started 2; see nextquill report --help"
    )


@pytest.fixture(scope="module")
def scored(nextquill: Callable[..., Any], trained: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The words of `nextquill score` without its output file, and that file as one process writes it."""
    file = tmp_path_factory.mktemp("scored") / "one.jsonl"
    records = (data / "eval.jsonl").read_text().splitlines()
    for name, chosen in (("eval.jsonl", records * 4), ("other.jsonl", records * 3)):
        (file.parent / name).write_text("\n".join(chosen) + "\n")
    words = ["score", "--model", trained, "--eval_file", file.parent / "eval.jsonl", *FORWARDS]
    result = nextquill(*words, "--output_file", file)
    assert result.code == 0, result.err
    return words, file


@pytest.mark.slow
@pytest.mark.timeout(PATIENCE + 30)
@pytest.mark.parametrize("processes", [2, 3])
def test_scores_of_several_processes_are_those_of_one(processes: int, scored: Any, tmp_path: Path) -> None:
    words, one = scored
    code, (first, *others) = launch(processes, "equal", tmp_path / "p", *words, "--output_file", tmp_path / "two.jsonl")
    assert code == 0, first
    assert filecmp.cmp(one, tmp_path / "two.jsonl", shallow=False)
    assert first
    assert not any(others)


@pytest.mark.slow
@pytest.mark.timeout(2 * PATIENCE)
@pytest.mark.parametrize("case", ["killed", "error", "bug", "data"])
def test_a_fault_on_one_process_ends_all_and_the_run_resumes(case: str, scored: Any, tmp_path: Path) -> None:
    words, one = scored
    target = tmp_path / "two.jsonl"
    code, (first, second) = launch(2, case, tmp_path / "p", *words, "--output_file", target)
    ended = time.time()
    assert code != 0
    assert not target.exists()
    told = first.splitlines()[-1]
    if case == "data":
        assert "expected the same in all processes" in told
        return
    assert ended - (tmp_path / "p-fault").stat().st_mtime < BOUND
    assert {
        "killed": "nextquill: rank 0: another process of the group has ended or does not answer; its message says why",
        "bug": "nextquill: rank 0: another process of the group has ended or does not answer; its message says why",
        "error": "nextquill: rank 0: --model: it gives a nan",
    }[case] in told
    assert ("KeyError: 'a bug'" in second) is (case == "bug")
    finished = len((tmp_path / "two.jsonl.partial").read_text().splitlines()) - 1
    assert finished >= 2
    code, (first, _) = launch(2, "equal", tmp_path / "p", *words, "--output_file", target)
    assert code == 0, first
    assert f"{finished} of 20 records are already in {target}.partial" in first
    assert filecmp.cmp(one, target, shallow=False)


@pytest.mark.slow
@pytest.mark.timeout(PATIENCE + 60)
def test_an_evaluation_by_two_processes_is_that_of_one(
    nextquill: Callable[..., Any], trained: Path, pairs: Path, tmp_path: Path
) -> None:
    (tmp_path / "prose.txt").write_text("There was once a garden behind the house. " * 40)
    records = [json.loads(line) for line in (pairs / "test.jsonl").read_text().splitlines()]
    with (tmp_path / "eval.jsonl").open("w") as stream:
        for place, record in enumerate(records):
            record["history"] = [f"A {record['user_id']} thing, number {place % 5}."]
            stream.write(json.dumps(record) + "\n")
    words = ["evaluate", "--model", trained, "--eval_file", tmp_path / "eval.jsonl", "--max_new_tokens", 5]
    words += ["--item_effects", 2, "--judge_model", trained, "--prose_file", tmp_path / "prose.txt", "--batch_size", 2]
    words += ["--max_tokens", 1024, "--guidance", 0.5, "--generate_branches", "factual", "placebo"]
    one, two = tmp_path / "one", tmp_path / "two"
    result = nextquill(*words, "--output_dir", one)
    assert result.code == 0, result.err
    code, (first, other) = launch(2, "equal", tmp_path / "p", *words, "--output_dir", two)
    assert code == 0, first
    assert first.replace(str(two), str(one)).endswith(result.out[-200:])
    assert not other
    names = sorted(path.name for path in one.iterdir())
    assert sorted(path.name for path in two.iterdir()) == names
    assert filecmp.cmpfiles(one, two, names, shallow=False)[0] == names


@pytest.mark.slow
@pytest.mark.timeout(2 * PATIENCE)
def test_summaries_and_their_evaluation_by_two_processes_are_those_of_one(
    popi: Callable[..., Any], popi_model: Path, pairs: Path, tmp_path: Path
) -> None:
    def lines(file: Path) -> list[dict[str, Any]]:
        return [json.loads(line) | {"created": ""} for line in file.read_text().splitlines()]

    files = ["--model", popi_model, "--records_file", pairs / "test.jsonl"]
    words = ["summarize", *files, "--held_out", "--batch_size", 1]
    assert popi(*words, "--output_file", tmp_path / "one.jsonl").code == 0
    code, (first, other) = launch(2, "equal", tmp_path / "p", "popi", *words, "--output_file", tmp_path / "two.jsonl")
    assert code == 0, first + other
    assert "3 written, 0 kept" in first
    assert lines(tmp_path / "two.jsonl") == lines(tmp_path / "one.jsonl")
    words = ["evaluate", "--model", popi_model, "--eval_file", pairs / "test.jsonl"]
    assert popi(*words, "--output_file", tmp_path / "one.json").code == 0
    code, (first, _) = launch(2, "equal", tmp_path / "p", "popi", *words, "--output_file", tmp_path / "two.json")
    assert code == 0, first
    assert filecmp.cmp(tmp_path / "one.json", tmp_path / "two.json", shallow=False)

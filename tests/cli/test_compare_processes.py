"""A comparison whose runs several processes make: its files are those of one, and a stopped one resumes."""

from __future__ import annotations

import filecmp
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nextquill.comparison.folder import read_record, run_folder
from tests.cli.shared_run_worker import PATIENCE, launch
from tests.processes import end_family

ARMS, SEEDS = ("sft", "perce"), (0, 1)
#: Seconds from a fault to the end of the last process; a step and a checkpoint may come first.
BOUND = 30


def words(data: Path, folder: Path, *more: object, seeds: tuple[int, ...] = SEEDS) -> list[object]:
    files = ["--train_file", data / "train.jsonl", "--eval_file", data / "eval.jsonl", "--output_dir", folder]
    sizes = ["--max_steps", 3, "--save_steps", 1, "--per_device_train_batch_size", 4, "--learning_rate", 1e-3]
    model = ["--model", "tiny", "--use_cpu", "true", "--save_models", "--generate", "false", "--resamples", 50]
    return ["compare", *files, *sizes, *model, "--arms", *ARMS, "--seeds", *seeds, *more]


@pytest.fixture(autouse=True)
def _without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let any number of processes start where there is a GPU."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(scope="module")
def one(nextquill: Callable[..., Any], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a comparison that one process has made."""
    folder = tmp_path_factory.mktemp("one") / "out"
    result = nextquill(*words(data, folder))
    assert result.code == 0, result.err
    return folder


def assert_same(one: Path, other: Path, seeds: tuple[int, ...] = SEEDS) -> None:
    """The weights, evaluations and examples of all runs are equal."""
    for seed in seeds:
        for arm in ("base", *ARMS):
            mine, theirs = (run_folder(folder, arm, seed) for folder in (one, other))
            names = [f"evaluation/{path.name}" for path in (mine / "evaluation").iterdir()]
            names += [] if arm == "base" else ["model.safetensors", "nextquill_prompt.json"]
            assert len(names) > 2
            assert filecmp.cmpfiles(mine, theirs, names, shallow=False)[0] == names
            orders = [read_record(each) for each in (mine, theirs)]
            assert orders[0] is not None
            assert orders[1] is not None
            assert (orders[0].start, orders[0].order) == (orders[1].start, orders[1].order)
    assert not [*other.rglob("checkpoint-*"), *other.rglob("*.lock"), *other.rglob("*.partial")]


def figures(folder: Path) -> dict[str, Any]:
    """The comparison's figures without times."""
    found: dict[str, Any] = json.loads((folder / "comparison.json").read_text())
    for name in ("machines", "resumed", "processes"):
        del found[name]
    for arm in found["arms"]:
        arm["cost"] = arm["cost"] and {name: arm["cost"][name] for name in ("steps", "learning_rate")}
    return found


@pytest.mark.slow
@pytest.mark.timeout(PATIENCE + 60)
def test_runs_of_two_processes_are_those_of_one(one: Path, data: Path, tmp_path: Path) -> None:
    two = tmp_path / "two"
    code, printed = launch(2, "equal", tmp_path / "p", *words(data, two))
    assert code == 0, printed
    assert_same(one, two)
    assert figures(two) == figures(one)
    assert json.loads((two / "comparison.json").read_text())["processes"] == 2
    assert "Up to 2 runs were made at the same time" in (two / "comparison.md").read_text()
    for number in range(1, 7):
        assert sum(text.count(f"run {number} of 6 is finished") for text in printed) == 1
    for rank, text in enumerate(printed):
        told = [line for line in text.splitlines() if line.startswith(("nextquill:", "rank"))]
        assert any("is finished" in line for line in told)
        assert all(line.removeprefix("nextquill: ").startswith(f"rank {rank}: ") for line in told)
    assert "What they reach" in printed[0]
    assert "What they reach" not in printed[1]


@pytest.mark.slow
@pytest.mark.timeout(2 * PATIENCE)
@pytest.mark.parametrize(("case", "then"), [("killed", 3), ("error", 1), ("bug", 1), ("stopped", 2)])
def test_a_fault_on_one_process_ends_all_and_the_comparison_resumes(
    case: str, then: int, one: Path, nextquill: Callable[..., Any], data: Path, tmp_path: Path
) -> None:
    two = tmp_path / "two"
    code, (_, second) = launch(2, case, tmp_path / "p", *words(data, two))
    ended = time.time()
    assert code != 0
    assert ended - (tmp_path / "p-fault").stat().st_mtime < BOUND
    assert not (two / "comparison.json").exists()
    last = second.splitlines()[-1]
    assert (last == "nextquill: rank 1: --model: it gives a nan") is (case == "error")
    assert (last == "KeyError: 'a bug'") is (case == "bug")
    assert len(list(two.rglob("checkpoint-*"))) >= 1
    finished = len(list(two.rglob("run.json")))  # none, if the other process was slow to start
    if then == 1:
        result = nextquill(*words(data, two))
        code, told = result.code, result.err
    else:
        code, (told, *_) = launch(then, "equal", tmp_path / "p", *words(data, two))
    assert code == 0, told
    assert (f"{finished} of 6 runs are finished in" in told) is (finished > 0)
    assert_same(one, two)
    assert figures(two) == figures(one)


@pytest.mark.slow
@pytest.mark.timeout(PATIENCE + 60)
def test_an_arm_of_equal_time_waits_for_the_runs_that_it_follows(data: Path, tmp_path: Path) -> None:
    two, arms = tmp_path / "two", ("sft_time", *ARMS)
    more = ("--arms", *arms, "--time_reference", "perce")
    code, (first, *_) = launch(3, "equal", tmp_path / "p", *words(data, two, *more, seeds=(0,)))
    assert code == 0, first
    records = {arm: json.loads((run_folder(two, arm, 0) / "run.json").read_text()) for arm in arms}
    matched = records["sft_time"]["matched"]
    assert matched["seconds"] == records["perce"]["seconds"]
    assert matched["ratio"] == records["perce"]["seconds"] / records["sft"]["seconds"]


@pytest.mark.slow
@pytest.mark.timeout(3 * PATIENCE)
def test_what_is_wrong_is_told_once_before_any_work(one: Path, data: Path, tmp_path: Path) -> None:
    two = tmp_path / "two"
    for more, message in (
        (("--lr", 3), "unknown flag --lr; did you mean --learning_rate?; see nextquill compare --help"),
        (("--output_dir", one, "--max_length", 500), f"--output_dir: {one} holds a comparison with another prompt max"),
    ):
        code, (first, second) = launch(2, "equal", tmp_path / "p", *words(data, two, *more))
        assert code != 0
        assert first.startswith(f"nextquill: rank 0: {message}")
        assert (first.count("\n"), second) == (1, "")
        assert not two.exists()


@pytest.mark.slow
@pytest.mark.timeout(2 * PATIENCE)
@pytest.mark.parametrize("other", ["missing", "different"])
def test_a_process_with_other_records_says_so_itself(other: str, data: Path, tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    for name in ("train.jsonl", "eval.jsonl"):
        (files / name).write_text((data / name).read_text())
    if other == "different":
        (files / "other.jsonl").write_text((data / "eval.jsonl").read_text() * 2)
    code, (_, second) = launch(2, "data", tmp_path / "p", *words(files, tmp_path / "two"))
    assert code != 0
    assert "expected the same in all processes" in second if other == "different" else "cannot be read" in second
    assert second.startswith("nextquill: rank 1: --eval_file: ")
    assert second.count("\n") == 1


@pytest.mark.slow
@pytest.mark.timeout(2 * PATIENCE)
def test_a_second_comparison_in_the_folder_is_refused_meanwhile(
    nextquill: Callable[..., Any], data: Path, tmp_path: Path
) -> None:
    two = tmp_path / "two"
    told = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "nextquill.cli.main", *map(str, words(data, two, "--max_steps", 5000))]
    process = subprocess.Popen(
        command, env=told, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + PATIENCE
        while not list(two.glob("perce/seed-0/checkpoint-*")) and time.monotonic() < deadline:
            time.sleep(0.05)
        alone = nextquill(*words(data, two, "--max_steps", 5000))
        assert (alone.code, alone.err.count("\n")) == (1, 1)
        assert alone.err.startswith("nextquill: --output_dir: another process")
        code, (first, second) = launch(2, "equal", tmp_path / "p", *words(data, two, "--max_steps", 5000))
        assert code != 0
        assert first.startswith("nextquill: rank 0: --output_dir: another process")
        assert (first.count("\n"), second) == (1, "")
    finally:
        end_family(process.pid)
        process.wait()

"""Two gloo processes under torchrun against one: DDP and FSDP2 around the plain loop, DDP in the trainer.

All cases of a kind share one launch, because a launch takes ten seconds.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.processes import run_to_end
from tests.training.distributed_worker import CASES, TRAINED, train

HERE = Path(__file__).parent
#: Workers print their stacks and end after this many seconds, and are killed a little later.
TIMEOUT = 150


def run_workers(kind: str, folder: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    told = {"PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1", "NEXTQUILL_TEST_TIMEOUT": str(TIMEOUT)}
    run_to_end([*launch, str(HERE / "distributed_worker.py"), kind, str(folder)], timeout=TIMEOUT + 30, **told)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The measurements of each process for each case."""
    folder = tmp_path_factory.mktemp("engines")
    run_workers("engines", folder)
    return [json.loads((folder / f"engines_{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_two_processes_equal_one(name: str, engines: list[dict[str, Any]]) -> None:
    for rank, measured in enumerate(engines):
        error = measured[name]["error"]
        assert error <= 1e-6, f"{name}: gradient on rank {rank} is off by {error:.1e} of the largest"
        assert (measured[name]["norm"] > 0) is ("all-empty" not in name)
    counts = {measured[name]["parts"] for measured in engines}
    assert (len(counts) > 1) is name.endswith("parts"), "processes have different numbers of parts where it says so"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders of runs on one process and on two."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    for name in TRAINED:
        train(one / name, name, processes=1)
    run_workers("trainer", two)
    return one, two


def results(folder: Path, rank: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"results_{rank}.json").read_text())
    return found


# What depends on the clock, or on what shares a forward.
_OTHERWISE = ("runtime", "per_second", "total_flos", "sharing_factor")


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_trainer_on_two_processes_equals_one(name: str, trained: tuple[Path, Path]) -> None:
    """Parameters after two steps of 8 examples, logs, evaluation and checkpoints are equal."""
    one, two = (folder / name for folder in trained)
    for a, b in zip(torch.load(one / "parameters.pt"), torch.load(two / "parameters.pt"), strict=True):
        assert float((a - b).abs().max()) <= 1e-6, "parameters of 2 x 4 differ from 1 x 8"
    alone, both = results(one), [results(two, rank) for rank in range(2)]
    for got, expected in zip(both[0]["log"], alone["log"], strict=True):
        wanted = {key: value for key, value in expected.items() if not key.endswith(_OTHERWISE)}
        assert {key: got[key] for key in wanted} == pytest.approx(wanted, rel=1e-4, abs=1e-6), "logs"
    for measured in both:
        assert measured["metrics"] == pytest.approx(alone["metrics"], rel=1e-4, abs=1e-6)
    files = {path.name for path in (two / "checkpoint-2").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth", "nextquill_run.json"} <= files, "files of both ranks"
    assert not (two / ".incomplete").exists()


@pytest.mark.slow
def test_a_process_with_fewer_parts_gets_empty_ones(trained: tuple[Path, Path]) -> None:
    counts = [results(trained[1] / "parts", rank)["parts"] for rank in range(2)]
    for first, second in zip(*counts, strict=True):
        assert len(first) == len(second)
    assert any(0 in part for rank in counts for part in rank), "no process had fewer parts than the other"
    assert all(0 not in part for part in results(trained[0] / "parts")["parts"])

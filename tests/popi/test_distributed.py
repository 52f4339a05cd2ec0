"""Two processes learn the same from some users as one process does."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.popi.distributed_worker import train
from tests.popi.popi_helpers import logs_of, summaries_of, trained_weights
from tests.processes import run_to_end

pytestmark = pytest.mark.filterwarnings(  # PEFT still uses the old names
    r"ignore:`(is_gradient_checkpointing|gradient_checkpointing_enable)` is deprecated:FutureWarning"
)
ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 150


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    one, folder = train(tmp_path / "one", processes=1), tmp_path / "two"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    told = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NEXTQUILL_TEST_TIMEOUT": str(TIMEOUT)}
    folder.mkdir()
    run_to_end(
        [*launch, str(Path(__file__).parent / "distributed_worker.py"), str(folder)], timeout=TIMEOUT + 30, **told
    )
    results: list[dict[str, Any]] = [torch.load(folder / f"result_{rank}.pt") for rank in range(2)]
    expected = trained_weights(one)
    for result in results:
        for name, want in expected.items():
            error = float((result["weights"][name] - want).norm() / want.norm().clamp(min=1e-3))
            assert error <= 2e-5, f"{name}: relative error {error:.1e}"
    for name, tensor in results[0]["weights"].items():
        assert torch.equal(tensor, results[1]["weights"][name]), f"{name} differs between the processes"
    assert results[0]["metrics"] == pytest.approx(results[1]["metrics"])
    logged = [entry for entry in results[0]["logs"] if "preference_loss" in entry]
    for ours, theirs in zip(logs_of(one), logged, strict=True):
        for name in ("loss", "preference_loss", "preference_accuracy", "reward", "kl", "summary_tokens"):
            assert theirs[name] == pytest.approx(ours[name], rel=1e-4, abs=1e-6), name
    # Each process writes its own users' summaries; together they are the single process's.
    parts = [folder / "sampled_summaries.jsonl", folder / "sampled_summaries.rank1.jsonl"]
    lines = [line for part in parts for line in part.read_text().splitlines()]
    assert len(lines) == len(summaries_of(tmp_path / "one"))
    assert {line.split('"reward"')[0] for line in lines} == {
        line.split('"reward"')[0] for line in (tmp_path / "one" / "sampled_summaries.jsonl").read_text().splitlines()
    }

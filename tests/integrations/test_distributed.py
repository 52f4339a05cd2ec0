"""Two gloo processes under torchrun against one: DDP in the trainer, FSDP2 around the loss in the head."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def run_worker(folder: Path, processes: int) -> None:
    environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1", "WANDB_DISABLED": "true"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    prefix = [sys.executable] if processes == 1 else launch
    done = subprocess.run(
        [*prefix, str(HERE / "distributed_worker.py"), str(folder)],
        env=environment, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    for processes in (1, 2):
        run_worker(tmp_path / str(processes), processes)
    for name in ("official", "detached", "padded", "parts"):
        one, two = (tmp_path / str(processes) / name for processes in (1, 2))
        for a, b in zip(torch.load(one / "parameters.pt"), torch.load(two / "parameters.pt"), strict=True):
            assert float((a - b).abs().max()) <= 1e-6, f"{name}: parameters of 2 x 4 differ from 1 x 8"
        first, second = (json.loads((folder / "results.json").read_text()) for folder in (one, two))
        for got, expected in zip(second["log"], first["log"], strict=True):
            timing = ("runtime", "per_second", "total_flos", "sharing_factor")
            wanted = {key: value for key, value in expected.items() if not key.endswith(timing)}
            assert {key: got[key] for key in wanted} == pytest.approx(wanted, rel=1e-4, abs=1e-6), f"{name}: logs"
        files = {path.name for path in (two / "checkpoint-2").iterdir()}
        assert {"rng_state_0.pth", "rng_state_1.pth", "nextquill_run.json"} <= files, "files of both ranks"
        assert not (two / ".incomplete").exists()
        parts = [json.loads((two / f"parts_{rank}.json").read_text()) for rank in (0, 1)]
        assert len(parts[0]) == len(parts[1]) == 2
        assert (parts[0] != parts[1]) is (name == "parts"), f"{name}: parts of each rank's batches {parts}"

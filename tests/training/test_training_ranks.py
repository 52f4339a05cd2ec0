"""Processes that would not train together are refused, and one that ends or stops ends the others."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import TrainingArguments

from nextquill.errors import ArgumentError
from nextquill.ranks import check_group
from tests.processes import end_family
from tests.training.rank_worker import DIFFERENT, SIGNALS, TIMEOUT, UNGROUPED

HERE = Path(__file__).parent
#: Seconds from a fault to the end of the last process, and those after which the test gives up, launch included.
BOUND, PATIENCE = 20, 150
#: Seconds that torchrun leaves a process to end by itself, which a stopped one cannot; torchrun has no flag for it.
GRACE = 30
#: Cases with more than two processes.
THREE = {"seed": 3, "killed": 3}
#: What the message of each case names.
NAMED = {
    "seed": "seed: expected the same in all processes, got 42 and, on rank 1, 7",
    "loss": "loss: expected the same",
    "learning_rate": "learning_rate: expected the same in all processes, got 5e-05 and, on rank 1, 0.5",
    "batch": "per_device_train_batch_size: expected the same in all processes, got 1 and, on rank 1, 2",
    "max_steps": "max_steps: expected the same in all processes, got 2 and, on rank 1, 3",
    "order": "expected the same in all processes",
    "fewer": "expected the same in all processes",
}


def test_processes_without_a_group_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = TrainingArguments(str(tmp_path))
    check_group(args)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ArgumentError, match=r"^args\.use_cpu: expected True where 2 processes .* got False$"):
        check_group(args)
    check_group(SimpleNamespace(parallel_mode=SimpleNamespace(value="distributed"), ddp_timeout_delta=None))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    lines = [
        f'{{"user_id": "u{place % 3}", "query": "say {place}", "history": ["so {place}"], "response": "is {place}"}}\n'
        for place in range(8)
    ]
    for name, chosen in (("train", lines), ("reversed", lines[::-1]), ("fewer", lines[:6])):
        (folder / f"{name}.jsonl").write_text("".join(chosen))
    return folder


def launch(case: str, folder: Path) -> tuple[int, list[str], float]:
    """Run a case on two processes or three: exit code, what each has printed, and the time at which all are gone."""
    count = THREE.get(case, 2)
    shutil.rmtree(folder / case, ignore_errors=True)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    told = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*words, str(HERE / "rank_worker.py"), case, str(folder)], env=told, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        code, ended = process.wait(PATIENCE), time.time()
    finally:
        if process.poll() is None:
            end_family(process.pid)  # torchrun's workers are in sessions of their own
            process.wait()
    return code, [(folder / f"{case}-{rank}").read_text() for rank in range(count)], ended


@pytest.mark.slow
@pytest.mark.timeout(PATIENCE + 30)
@pytest.mark.parametrize("case", ["equal", *DIFFERENT, *UNGROUPED, *SIGNALS])
def test_processes_train_together_or_end_with_one_line(case: str, folder: Path) -> None:
    code, printed, ended = launch(case, folder)
    assert (code == 0) is (case == "equal"), printed
    for rank, each in enumerate(printed):
        assert "Traceback" not in each, each
        told = [line for line in each.splitlines() if line.startswith("nextquill: ")]
        if case == "equal" or (case in SIGNALS and rank == 1):
            assert not told
        elif case == "missing" and rank == 1:
            assert told == ["nextquill: rank 1: --train_file: missing.jsonl: cannot be read: No such file or directory"]
        elif case in SIGNALS or case == "missing":
            assert f"rank {rank}: another process of the group has ended or does not answer" in told[-1]
        elif case in UNGROUPED:
            assert f"rank {rank}: --use_cpu: expected True where 2 processes train together" in told[-1]
        else:
            assert f"rank {rank}: " in told[-1]
            assert NAMED[case] in told[-1]
    if case != "equal":
        fault, told_at = ((folder / f"{case}-{what}").stat().st_mtime for what in ("fault", "0"))
        # A process that stops is noticed only when the others have waited for it; one that ends is noticed at once.
        least, most = (TIMEOUT, TIMEOUT + BOUND) if case == "stopped" else (0, BOUND)
        assert least <= told_at - fault < most
        assert ended - fault < most + GRACE * (case == "stopped")
        assert not (folder / case / "model.safetensors").exists()

"""One of the processes of `test_ranks.py`: `rank_worker.py CASE FOLDER`, under torchrun. It runs `nextquill train`.

In most cases rank 1 differs from rank 0, or ends or stops in the middle. A process prints into FOLDER/CASE-RANK. The
file FOLDER/CASE-fault was last changed at the moment of the fault: where rank 1 ends or stops, or where the last
process looks at what differs.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import Trainer

from nextquill.cli import training_checks
from nextquill.cli.main import main
from nextquill.training import atomic_checkpoints, checks

#: Flags of rank 1 that differ from those of rank 0, by case.
DIFFERENT = {
    "seed": ["--seed", "7"],
    "loss": ["--loss", "sft"],
    "learning_rate": ["--learning_rate", "0.5"],
    "batch": ["--per_device_train_batch_size", "2"],
    "max_steps": ["--max_steps", "3"],
    "order": ["--train_file", "reversed.jsonl"],
    "fewer": ["--train_file", "fewer.jsonl"],
    "missing": ["--train_file", "missing.jsonl"],
}
#: Flags of all ranks in place of `--use_cpu true`, by case.
UNGROUPED = {"ungrouped": [], "gloo": ["--ddp_backend", "gloo"]}
#: The signal that rank 1 gives itself before its second step, by case.
SIGNALS = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}
#: Seconds that a process waits for the others.
TIMEOUT = 10


def run(case: str, folder: Path) -> int:
    rank = int(os.environ["RANK"])
    os.chdir(folder)
    printed = os.open(f"{case}-{rank}", os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(printed, stream)
    words = ["train", "--train_file", "train.jsonl", "--model", "tiny", "--output_dir", case, "--max_steps", "2"]
    words += ["--per_device_train_batch_size", "1", "--ddp_timeout", str(TIMEOUT)]
    words += UNGROUPED.get(case, ["--use_cpu", "true"])
    if rank == 1:
        words += DIFFERENT.get(case, [])
        if case in SIGNALS:
            _signalled(SIGNALS[case], case)
    for module, name in (
        (checks, "check_group"),
        (training_checks, "check_group"),
        (atomic_checkpoints, "check_agreement"),
    ):
        if case not in SIGNALS and case != "missing":
            setattr(module, name, _noting(getattr(module, name), case))
    code = main(words)
    if case == "missing" and rank == 1:
        _note(case)
    return code


def _note(case: str) -> None:
    """Note the moment of a fault."""
    Path(f"{case}-fault").touch()


def _noting(function: Callable[..., Any], case: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        _note(case)
        return function(*args)

    return call


def _signalled(number: int, case: str) -> None:
    step: Any = Trainer.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 1:
            _note(case)
            os.kill(os.getpid(), number)
        return step(self, *args, **kwargs)

    Trainer.training_step = training_step  # type: ignore[method-assign]


if __name__ == "__main__":
    sys.exit(run(sys.argv[1], Path(sys.argv[2])))

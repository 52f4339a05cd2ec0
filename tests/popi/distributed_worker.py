"""One of the processes of `test_distributed.py`: `distributed_worker.py FOLDER`, under torchrun."""

from __future__ import annotations

import faulthandler
import os
import sys
import warnings
from pathlib import Path

import torch

from nextquill.popi import POPITrainer
from tests.popi.popi_helpers import make_trainer, make_users, trained_weights
from tests.sharding import CHECKPOINTING


def train(folder: Path, processes: int) -> POPITrainer:
    """Train three steps with four users; two processes run layers again in the backward."""
    options = {
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4 // processes, "optim": "sgd",
        "learning_rate": 0.3, "max_steps": 3, "save_strategy": "steps", "save_steps": 2, "eval_dataset": make_users(3),
        CHECKPOINTING: processes > 1,
    }  # fmt: skip
    trainer = make_trainer(folder, {"update": "joint"}, **options)
    trainer.train()
    return trainer


def main() -> None:
    faulthandler.dump_traceback_later(float(os.environ.get("NEXTQUILL_TEST_TIMEOUT", "150")), exit=True)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    trainer = train(folder, processes=2)
    metrics = trainer.evaluate()
    torch.save(
        {"weights": trained_weights(trainer), "logs": trainer.state.log_history, "metrics": metrics},
        folder / f"result_{rank}.pt",
    )
    # Before the process group: DDP's destructor waits for it otherwise.
    trainer.model_wrapped = trainer.roles
    del trainer
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()

"""Trainers under FSDP2 on two CPUs, for the tests of systems that sample in training."""

from __future__ import annotations

import faulthandler
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments

from tests.examples.engines_on_cpu import engines_on_cpu
from tests.processes import run_to_end

ROOT = Path(__file__).resolve().parents[1]
#: Seconds after which a worker prints its stack and ends.
TIMEOUT = 300
#: The training argument of gradient checkpointing, renamed in transformers 5.20 or so.
CHECKPOINTING = "activation_checkpointing"
if CHECKPOINTING not in TrainingArguments.__dataclass_fields__:
    CHECKPOINTING = "gradient_checkpointing"


def fsdp2(case: str) -> dict[str, Any]:
    """Training arguments of FSDP2. In a case with these words, weights are kept after a forward, or layers run again.

    "kept", "checkpointing".
    """
    config = {"version": 2, "reshard_after_forward": "kept" not in case}
    return {"use_cpu": False, "fsdp": True, "fsdp_config": config, CHECKPOINTING: "checkpointing" in case}


def in_float64(model: nn.Module) -> nn.Module:
    """The model in float64 throughout; Llama's own norms round to float32, which steps of training magnify."""
    for name, module in list(model.double().named_modules()):
        if type(module).__name__ == "LlamaRMSNorm":
            norm = nn.RMSNorm(module.weight.shape, module.variance_epsilon, dtype=torch.float64)  # type: ignore[arg-type]
            norm.weight = module.weight  # type: ignore[assignment]
            model.set_submodule(name, norm)
    return model


def trained(module: nn.Module) -> dict[str, Tensor]:
    """The trained weights, whole."""
    named = ((name, p) for name, p in module.named_parameters() if p.requires_grad)
    return {name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for name, p in named}


def run_two(worker: Path, folder: Path) -> None:
    """Run `worker` FOLDER on two processes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    told = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run_to_end([*launch, str(worker), str(folder)], timeout=TIMEOUT + 30, **told)


def found(folder: Path, rank: int) -> dict[str, Any]:
    """What a worker of `run_two` has left."""
    result: dict[str, Any] = torch.load(folder / f"found_{rank}.pt")
    return result


def begin() -> tuple[Path, int]:
    """What a worker does first; its folder and rank."""
    faulthandler.dump_traceback_later(TIMEOUT, exit=True)
    torch.set_num_threads(1)
    engines_on_cpu()
    return Path(sys.argv[1]), int(os.environ["RANK"])

"""One of the processes of `test_sharded.py`: `sharded_worker.py FOLDER`, under torchrun: MIRROR under FSDP2."""

from __future__ import annotations

import gc
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import nextquill as nq
from nextquill.mirror import MirrorTrainer
from tests.mirror.mirror_helpers import make_trainer
from tests.models.model_helpers import make_records, tiny_model
from tests.sharding import begin, fsdp2, in_float64, trained

#: Words of a case: what is trained, the engine that samples, and settings.
CASES = ("whole tree", "whole tied hf", "lora tree checkpointing", "lora hf kept")


def build(case: str) -> nn.Module:
    model = in_float64(tiny_model(tie_word_embeddings="tied" in case))
    if "lora" not in case:
        return model
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    adapter: nn.Module = get_peft_model(model, config)
    return adapter


def make(folder: Path, case: str, processes: int, **options: Any) -> MirrorTrainer:
    """A trainer of three steps of eight examples; one process does without the settings, which change no weight."""
    size, accumulation = (8, 1) if processes == 1 else (2, 2)
    if processes > 1:
        options = {**fsdp2(case), **options}
    trainer = make_trainer(
        folder, build(case), make_records(16), loss=nq.MirrorLoss(alpha=0.5), ddp_timeout=60,
        per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, save_strategy="steps", save_steps=2,
        **{"optim": "sgd", "learning_rate": 0.3, "max_steps": 3, **options},
    )  # fmt: skip
    sampling: Any = trainer.rollouts
    sampling._options = replace(sampling._options, engine="hf" if "hf" in case else "tree")
    return trainer


def resumed(folder: Path) -> bool:
    """Whether a run that was stopped after its second step ends with the same bits as one that was not."""
    ends = list[dict[str, Tensor]]()
    for name in ("uninterrupted", "stopped"):
        trainer = make(folder / name, "lora tree", 2, optim="adamw_torch", learning_rate=1e-2, max_steps=4)
        if ends and trainer.is_world_process_zero():
            shutil.copytree(folder / "uninterrupted" / "checkpoint-2", folder / name / "checkpoint-2")
        dist.barrier()
        trainer.train(resume_from_checkpoint=bool(ends))
        ends.append(trained(trainer.model))
    return all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def main() -> None:
    (folder, rank), found = begin(), dict[str, Any]()
    for case in CASES:
        trainer = make(folder / case, case, 2)
        trainer.train()
        trainer.save_model()
        found[case] = {"weights": trained(trainer.model), "logs": trainer.state.log_history}
    found["resumed"] = resumed(folder)
    torch.save(found, folder / f"found_{rank}.pt")
    del trainer
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

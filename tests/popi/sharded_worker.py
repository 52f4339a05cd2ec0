"""One of the processes of `test_sharded.py`: `sharded_worker.py FOLDER`, under torchrun: POPI under FSDP2."""

from __future__ import annotations

import gc
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import Tensor

from nextquill.popi import POPITrainer
from tests.popi.popi_helpers import lora, make_trainer, make_users, tiny_model
from tests.sharding import begin, fsdp2, in_float64, trained

#: Words of a case: the models of the roles, the engine that samples, and settings.
CASES = (
    "shared", "shared tied hf kept", "shared alternate parts", "separate checkpointing", "separate lora given tied hf",
)  # fmt: skip


def models(case: str) -> dict[str, Any]:
    first = in_float64(tiny_model(0, tie_word_embeddings="tied" in case))
    if "shared" in case:
        return {"model": first, "peft_config": lora()}
    pair: list[Any] = [first, in_float64(tiny_model(1, num_hidden_layers=1))]
    if "lora" in case:
        torch.manual_seed(4)
        for place, model in enumerate(pair):
            model.name_or_path = "somewhere"
            # An adapter that has an effect already has a frozen copy as its initial state.
            pair[place] = get_peft_model(model, lora(r=2 + place, init_lora_weights="given" not in case))
    return {"inference_model": pair[0], "generator_model": pair[1]}


def make(folder: Path, case: str, processes: int, **options: Any) -> POPITrainer:
    """A trainer of three steps of four users; one process does without the settings, which change no weight."""
    if processes > 1:
        options = {**fsdp2(case), **options, **({"max_tokens": 60} if "parts" in case else {})}
    trainer = make_trainer(
        folder, {"update": "alternate" if "alternate" in case else "joint"}, **models(case),
        per_device_train_batch_size=4 if processes == 1 else 1, gradient_accumulation_steps=1 if processes == 1 else 2,
        ddp_timeout=60, eval_dataset=make_users(3), **{"optim": "sgd", "learning_rate": 0.3, "max_steps": 3, **options},
    )  # fmt: skip
    sampling: Any = trainer.rollouts
    sampling._options = replace(sampling._options, engine="hf" if "hf" in case else "tree")
    return trainer


def resumed(folder: Path, case: str) -> bool:
    """Whether a run that was stopped after its second step ends with the same bits as one that was not."""
    ends = list[dict[str, Tensor]]()
    for name in ("uninterrupted", "stopped"):
        trainer = make(
            folder / case / name, case, 2, optim="adamw_torch", learning_rate=1e-2, max_steps=4, save_strategy="steps",
            save_steps=2, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
            metric_for_best_model="loss",
        )  # fmt: skip
        if ends and trainer.is_world_process_zero():
            shutil.copytree(folder / case / "uninterrupted" / "checkpoint-2", folder / case / name / "checkpoint-2")
        dist.barrier()
        trainer.train(resume_from_checkpoint=bool(ends))
        ends.append(trained(trainer.roles))
    return all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def main() -> None:
    warnings.simplefilter("ignore")
    (folder, rank), found = begin(), dict[str, Any]()
    for case in CASES:
        trainer = make(folder / case, case, 2)
        trainer.train()
        trainer.save_model()
        metrics = trainer.evaluate()
        found[case] = {"weights": trained(trainer.roles), "logs": trainer.state.log_history, "metrics": metrics}
    found["resumed"] = {case: resumed(folder, case) for case in (CASES[2], CASES[3])}
    torch.save(found, folder / f"found_{rank}.pt")
    del trainer
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

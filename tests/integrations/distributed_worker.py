"""One process of `test_distributed.py`: trains, evaluates and saves under DDP, and runs the loss under FSDP2."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from integration_helpers import (
    gradients,
    loss_cases,
    make_records,
    make_trainer,
    random_examples,
    run_loss,
    tiny_model,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from nextquill.integrations.passes import PairPasses

#: Loss, reduction and options. Of the last one's two batches the ranks make different numbers of parts.
RUNS = {
    "official": ("official", "sequence", {}),
    "detached": ("detached", "token", {}),
    "padded": ("official", "token", {"attention": "padded"}),
    "parts": ("official", "token", {"max_tokens": 52, "examples_per_user": 2}),
}


def train(folder: Path, loss_name: str, reduction: str, options: dict[str, Any]) -> None:
    """4 per process: two steps of 8 in all."""
    loss = loss_cases(reduction=reduction)[loss_name].loss
    trainer = make_trainer(
        folder, loss, optim="sgd", learning_rate=0.3, train_dataset=make_records(16), eval_dataset=make_records(7),
        per_device_train_batch_size=8 // trainer_processes(), per_device_eval_batch_size=2,
        save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1,
        metric_for_best_model="loss", load_best_model_at_end=True, save_total_limit=2,
        **options,
    )  # fmt: skip
    counts: list[int] = []
    fill_up = trainer._fill_up
    trainer._fill_up = lambda batches, most: (counts.extend(len(b["parts"]) for b in batches), fill_up(batches, most))
    trainer.train()
    (folder / f"parts_{trainer.args.process_index}.json").write_text(json.dumps(counts))
    best = trainer.state.best_model_checkpoint
    assert best is not None
    assert Path(best).is_dir(), f"rank {trainer.args.process_index} knows the best checkpoint as {best}"
    metrics = {k: v for k, v in trainer.evaluate().items() if not k.endswith(("runtime", "per_second"))}
    if trainer.is_world_process_zero():
        torch.save([p.detach() for p in trainer.model.parameters()], folder / "parameters.pt")
        results = {"log": trainer.state.log_history, "metrics": metrics}
        (folder / "results.json").write_text(json.dumps(results))


def trainer_processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else int(__import__("os").environ.get("WORLD_SIZE", "1"))


def check_fully_sharded(loss_name: str) -> None:
    """The gradient of one batch on both ranks under FSDP2 equals the unsharded model's."""
    case, examples = loss_cases()[loss_name], random_examples()
    plain = tiny_model()
    loss, _ = run_loss(plain, case.loss, examples)
    expected = gradients(plain, loss)
    model = tiny_model()
    passes = PairPasses(model, case.loss)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    sharded, _ = passes.training_loss(passes.collator()(examples))
    sharded.backward()
    for name, parameter in model.named_parameters():
        assert isinstance(parameter.grad, DTensor), f"{name} was not sharded"
        got = parameter.grad.full_tensor()
        error = float((got - expected[name]).norm() / expected[name].norm())
        assert error < 1e-5, f"{loss_name} under FSDP2: gradient of {name} is off by {error:.1e}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    for name, run in RUNS.items():
        train(root / name, *run)
    if dist.is_initialized():
        for name in ("official", "detached"):
            check_fully_sharded(name)
        dist.destroy_process_group()

"""Two processes that share a model by FSDP2 and run different numbers of forwards of it."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from nextquill.models.sharded import run_in_step
from tests.models.model_helpers import tiny_model
from tests.training.distributed_worker import by_accelerate

PROCESSES = 2
#: The forwards of each process in a call.
NUMBERS = ((3, 1), (0, 2), (1, 1), (0, 0))


def build(*, adapted: bool) -> nn.Module:
    model = tiny_model(dtype=torch.float64)
    if not adapted:
        return model
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    adapter: nn.Module = get_peft_model(model, config)
    return adapter


def inputs(rank: int, number: int) -> Tensor:
    """Token ids [1, T] that differ between processes and calls, in length too."""
    return torch.arange(2, 5 + 2 * rank + number)[None]


def measure(rank: int, *, adapted: bool) -> dict[str, Any]:
    """The largest error of a logit, the forwards that ran in each call, and the gradient's error afterwards."""
    whole, model, error, counts = build(adapted=adapted).train(), build(adapted=adapted).train(), 0.0, list[int]()
    inner: Any = model.get_base_model() if adapted else model  # type: ignore[operator]
    expected: Any = whole.get_base_model() if adapted else whole  # type: ignore[operator]
    by_accelerate(model)
    inner.model.register_forward_hook(lambda *_: counts.append(1))
    forwards, before = [], len(inner._forward_pre_hooks)
    for numbers in NUMBERS:

        def run(own: int = numbers[rank]) -> None:
            nonlocal error
            for number in range(own):
                got, wanted = (each(input_ids=inputs(rank, number)).logits for each in (inner, expected))
                error = max(error, float((got - wanted).abs().max()))

        counts.clear()
        with torch.no_grad():
            run_in_step(model, run, inner)
        forwards.append(len(counts))
    for each in (model, whole):
        each(input_ids=inputs(0, 0)).logits.square().mean().backward()
    grown = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    off = max(float((grown[name].full_tensor() - p.grad).abs().max()) for name, p in whole.named_parameters()
              if p.requires_grad)  # type: ignore[operator, union-attr]  # fmt: skip
    return {"error": error, "gradient": off, "forwards": forwards, "hooks": len(inner._forward_pre_hooks) - before}


def work(rank: int, root: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{root}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=PROCESSES, timeout=timedelta(seconds=60))
    torch.save({adapted: measure(rank, adapted=adapted) for adapted in (False, True)}, Path(root, f"found_{rank}.pt"))
    dist.destroy_process_group()

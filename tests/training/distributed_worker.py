"""One of the processes of `test_distributed.py`: `distributed_worker.py engines|trainer FOLDER`, under torchrun.

A process that waits too long for the others prints its stack and ends.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from nextquill.data import EncodedExample
from nextquill.models.branch_passes import PairPasses
from tests.models.model_helpers import loss_cases, make_records, make_trainer, shared_examples, tiny_model

TIMEOUT = float(os.environ.get("NEXTQUILL_TEST_TIMEOUT", "150"))


# ---- engines around the plain loop -----------------------------------------------------------------


def by_layer(model: nn.Module) -> nn.Module:
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model


def by_accelerate(model: nn.Module) -> nn.Module:
    """Shard as Accelerate's FSDP2 does: layers, embedding, final norm with head; tied ends together."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    state = SimpleNamespace(fsdp_plugin=plugin)
    accelerator = SimpleNamespace(state=state, mixed_precision="no", is_main_process=dist.get_rank() == 0)
    return fsdp2_prepare_model(accelerator, model)


@dataclass(frozen=True)
class Case:
    """A division of five examples over two processes, and the preparation of the model."""

    wrap: Callable[[nn.Module], nn.Module]
    loss: str = "detached"
    model: dict[str, Any] = field(default_factory=dict)
    split: tuple[slice, slice] = (slice(0, 3), slice(3, 5))
    max_tokens: int | None = None
    checkpointing: bool = False
    lora: bool = False

    def build(self) -> nn.Module:
        model = tiny_model(**{"dtype": torch.float64, **self.model}).train()
        if self.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if self.lora:
            torch.manual_seed(1)
            config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
            model = get_peft_model(model, config)
        return model


_UNEVEN, _EMPTY, _NONE = (slice(0, 4), slice(4, 5)), (slice(0, 5), slice(0, 0)), (slice(0, 0), slice(0, 0))
_TIED, _UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
# Its experts' kernel takes no float64.
_ROUTED = {"kind": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 1, "dtype": torch.float32}
# Convolutions, whose forward is replaced on the modules that the engines wrap; its norms round to float32.
_STATES = {"kind": "lfm2", "layer_types": ["conv", "full_attention"], "dtype": torch.float32}
CASES = {
    "ddp-detached": Case(DistributedDataParallel),
    "ddp-official-tied": Case(DistributedDataParallel, "official", _TIED),
    "ddp-parts": Case(DistributedDataParallel, "official", split=_UNEVEN, max_tokens=48),
    "ddp-checkpointing": Case(DistributedDataParallel, checkpointing=True),
    "ddp-empty": Case(DistributedDataParallel, split=_EMPTY),
    "ddp-empty-lora": Case(DistributedDataParallel, "official", split=_EMPTY, lora=True),
    "ddp-empty-experts": Case(DistributedDataParallel, model=_ROUTED, split=_EMPTY),
    "ddp-empty-router-loss": Case(
        DistributedDataParallel, model={**_ROUTED, "output_router_logits": True}, split=_EMPTY
    ),
    "ddp-empty-states": Case(DistributedDataParallel, model=_STATES, split=_EMPTY),
    "ddp-all-empty": Case(DistributedDataParallel, split=_NONE),
    "fsdp2-detached-untied": Case(by_layer, model=_UNTIED),
    "fsdp2-detached-tied": Case(by_layer, model=_TIED),
    "fsdp2-official-untied": Case(by_layer, "official", _UNTIED, checkpointing=True),
    "fsdp2-official-tied": Case(by_layer, "official", _TIED),
    "fsdp2-parts": Case(by_layer, split=_UNEVEN, max_tokens=24),
    "fsdp2-states": Case(by_layer, "official", _STATES, checkpointing=True),
    "fsdp2-empty": Case(by_layer, split=_EMPTY),
    "fsdp2-all-empty": Case(by_layer, "official", split=_NONE),
    "fsdp2-accelerate-untied": Case(by_accelerate, model=_UNTIED),
    "fsdp2-accelerate-tied": Case(by_accelerate, "official", _TIED, checkpointing=True),
    "fsdp2-accelerate-lora": Case(by_accelerate, model=_TIED, split=_EMPTY, lora=True),
}


def expected_gradients(case: Case, examples: list[EncodedExample]) -> dict[str, Tensor]:
    """The gradients of one process, in one tree; zero without examples."""
    model = case.build()
    if case.split != _NONE:
        with PairPasses(model, loss_cases()[case.loss].loss) as passes:
            passes.backward(passes.collator()(examples))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in trained.items()}


def gradients_of_all(case: Case, examples: list[EncodedExample]) -> tuple[dict[str, Tensor], int]:
    """The engine's gradients from both processes' shares, and the number of this process's parts."""
    model = case.build()
    with PairPasses(model, loss_cases()[case.loss].loss) as passes:
        collate, own = passes.collator(max_tokens=case.max_tokens), examples[case.split[dist.get_rank()]]
        batch = collate(own) if own else {"parts": [collate.empty_part()]}
        items = torch.tensor(float(passes.count_items(batch)))
        dist.all_reduce(items)
        passes.backward(batch, items.clamp(min=1.0) / dist.get_world_size(), case.wrap(model))
    got = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            gradient = parameter.grad
            assert gradient is not None, f"{name} has no gradient"
            assert isinstance(gradient, DTensor) is (case.wrap is not DistributedDataParallel), name
            got[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return got, len(batch["parts"])


def check_engines(folder: Path) -> None:
    """Write each case's error, relative to the largest gradient of a parameter, as soon as it is known."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    examples, results = shared_examples(5), dict[str, dict[str, Any]]()
    for name, case in CASES.items():
        expected = expected_gradients(case, examples)
        got, parts = gradients_of_all(case, examples)
        assert got.keys() == expected.keys()
        norm = max(float(gradient.norm()) for gradient in expected.values())
        error = max(float((got[key] - expected[key]).norm()) for key in expected) / (norm or 1.0)
        results[name] = {"error": error, "norm": norm, "parts": parts}
        (folder / f"engines_{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


# ---- NextQuillTrainer ------------------------------------------------------------------------------

TRAINED: dict[str, dict[str, Any]] = {
    "official-sequence": {"loss": "official"},
    "detached-token": {"loss": "detached", "reduction": "token"},
    "accumulated": {"loss": "detached", "reduction": "token", "gradient_accumulation_steps": 2},
    "parts": {"loss": "official", "max_tokens": 56, "examples_per_user": 2},
}


def train(folder: Path, name: str, processes: int) -> None:
    """Train two steps of 8 examples in total, with evaluation and checkpoint. A single process takes all 8."""
    options = {"reduction": "sequence", **TRAINED[name]}
    if processes == 1:
        options.pop("gradient_accumulation_steps", None)
    size = 8 // processes // options.get("gradient_accumulation_steps", 1)
    loss = loss_cases(reduction=options.pop("reduction"))[options.pop("loss")].loss
    trainer = make_trainer(
        folder, loss, optim="sgd", learning_rate=0.3, train_dataset=make_records(16), eval_dataset=make_records(7),
        per_device_train_batch_size=size, per_device_eval_batch_size=2, ddp_timeout=60,
        save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1,
        metric_for_best_model="loss", load_best_model_at_end=True, save_total_limit=2, **options,
    )  # fmt: skip
    parts: list[list[int]] = []
    original = trainer.get_batch_samples

    def watched(*args: Any) -> Any:
        batches, items = original(*args)
        parts.extend([part["num_sequences"] for part in batch["parts"]] for batch in batches)
        return batches, items

    trainer.get_batch_samples = watched
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best is not None
    assert Path(best).is_dir(), f"rank {trainer.args.process_index} knows the best checkpoint as {best}"
    metrics = {k: v for k, v in trainer.evaluate().items() if not k.endswith(("runtime", "per_second"))}
    results = {"log": trainer.state.log_history, "metrics": metrics, "parts": parts}
    (folder / f"results_{trainer.args.process_index}.json").write_text(json.dumps(results))
    if trainer.is_world_process_zero():
        torch.save([p.detach() for p in trainer.model.parameters()], folder / "parameters.pt")


if __name__ == "__main__":
    faulthandler.dump_traceback_later(TIMEOUT, exit=True)
    faulthandler.register(signal.SIGTERM, chain=True)
    torch.set_num_threads(1)
    kind, root = sys.argv[1], Path(sys.argv[2])
    if kind == "engines":
        check_engines(root)
    else:
        for name in TRAINED:
            train(root / name, name, processes=int(os.environ["WORLD_SIZE"]))
        gc.collect()  # DDP must not outlive its process group
        dist.destroy_process_group()

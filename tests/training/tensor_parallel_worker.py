"""The processes of `test_tensor_parallel.py`: models that transformers has divided by their `tp_plan`, against one.

Accelerate refuses tensor parallelism on CPUs, so it is told that these processes have GPUs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from nextquill.data import EncodedExample
from nextquill.errors import NextQuillError
from nextquill.mirror import MirrorLoss
from nextquill.models.branch_passes import PairPasses
from tests.examples.engines_on_cpu import engines_on_cpu
from tests.mirror.mirror_helpers import make_trainer as mirror_trainer
from tests.models.model_helpers import loss_cases, make_records, make_trainer, shared_examples, tiny_model

PROCESSES = 2


@dataclass(frozen=True)
class Case:
    """A model, its division, and a loss."""

    model: dict[str, Any] = field(default_factory=dict)
    loss: str = "official"
    plan: Any = "auto"
    lora: tuple[str, ...] = ()
    attention: str = "auto"

    @property
    def options(self) -> dict[str, Any]:
        return {"dtype": torch.float64, **self.model}


_TIED, _UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
_ROUTED = {"kind": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "dtype": torch.float32}
_OWN_HEAD = {"lm_head": "colwise"}
CASES = {
    "untied": Case(_UNTIED),
    "tied": Case(_TIED, "detached"),
    "padded": Case(_TIED, attention="padded"),
    "whole-head": Case(_UNTIED, plan={"lm_head": "replicate"}),
    "uneven-vocabulary": Case({**_UNTIED, "vocab_size": 97}),
    "qwen3": Case({"kind": "qwen3", **_TIED}),
    "softcap": Case({"kind": "gemma2"}),
    "experts": Case(_ROUTED),
    "lora-on-head": Case(_UNTIED, plan=_OWN_HEAD, lora=("lm_head",)),
    "lora-elsewhere": Case(_UNTIED, "detached", lora=("q_proj", "v_proj")),
}


def adapted(model: nn.Module, case: Case) -> nn.Module:
    """The model with LoRA whose values do not depend on its division."""
    if not case.lora:
        return model
    config = LoraConfig(r=2, target_modules=list(case.lora), task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if "lora_" in name:
            values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index), dtype=torch.float64)
            _set(parameter, values * 0.3)
    return model


def _set(parameter: Any, values: Tensor) -> None:
    with torch.no_grad():
        if isinstance(parameter, DTensor):
            (placement,), rank = parameter.placements, parameter.device_mesh.get_local_rank()
            parameter.to_local().copy_(values.chunk(PROCESSES, placement.dim)[rank])
        else:
            parameter.copy_(values)


def gradients(
    model: nn.Module, case: Case, examples: list[EncodedExample], items: float | None = None
) -> tuple[float, dict[str, Tensor]]:
    model = adapted(model, case)
    with PairPasses(model, loss_cases()[case.loss].loss, case.attention) as passes:
        loss = passes.backward(passes.collator()(examples), items)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return float(loss), {name: _whole(parameter.grad) for name, parameter in trained.items()}


def _whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def divided(folder: Path, model: nn.Module, plan: Any, fsdp_size: int = 1) -> nn.Module:
    """The model as transformers loads it in parts."""
    if dist.get_rank() == 0:
        model.save_pretrained(folder)
    dist.barrier()
    loaded: nn.Module = AutoModelForCausalLM.from_pretrained(
        folder, dtype=model.dtype, attn_implementation=model.config._attn_implementation,
        distributed_config=DistributedConfig(tp_size=PROCESSES, tp_plan=plan, fsdp_size=fsdp_size),
    )  # fmt: skip
    return loaded


def check(folder: Path, case: Case) -> dict[str, float]:
    """The differences of loss and gradients, relative to the largest gradient of a parameter."""
    whole = tiny_model(**case.options)
    parts = divided(folder, whole, case.plan)
    loss, expected = gradients(whole, case, shared_examples(5))
    got_loss, got = gradients(parts, case, shared_examples(5))
    assert got.keys() == expected.keys()
    norm = max(float(gradient.norm()) for gradient in expected.values())
    error = max(float((got[name] - gradient).norm()) for name, gradient in expected.items())
    return {"loss": abs(got_loss - loss), "error": error / norm, "norm": norm}


def refusal(folder: Path) -> str:
    """PEFT gives a head that gathers its logits an adapter of the wrong size."""
    config = LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(divided(folder, tiny_model(**_UNTIED), "auto"), config)
    return _message(lambda: PairPasses(model, loss_cases()["official"].loss))


def best_model(folder: Path) -> str:
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1}
    model = divided(folder, tiny_model(**_UNTIED), "auto")
    return _message(lambda: make_trainer(folder, None, model, save_steps=1, save_only_model=True, **options))


def _message(function: Callable[[], Any]) -> str:
    try:
        function()
    except NextQuillError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"


# ---- NextQuillTrainer ------------------------------------------------------------------------------

TRAINED: dict[str, dict[str, Any]] = {
    "official": {"loss": "official", "model": _TIED},
    "token": {"loss": "detached", "model": _UNTIED, "reduction": "token", "gradient_accumulation_steps": 2},
}


def train(folder: Path, name: str, model: nn.Module | None = None) -> None:
    """Train two steps of 8 examples with evaluation and checkpoints."""
    options = {"reduction": "sequence", "gradient_accumulation_steps": 1, **TRAINED[name]}
    whole, model_of = model is None, tiny_model(**options.pop("model"))
    loss = loss_cases(reduction=options.pop("reduction"))[options.pop("loss")].loss
    trainer = make_trainer(
        folder, loss, model_of if model is None else model, optim="sgd", learning_rate=0.3, use_cpu=whole,
        train_dataset=make_records(16), eval_dataset=make_records(7), max_steps=2, ddp_timeout=60,
        per_device_train_batch_size=8 // options["gradient_accumulation_steps"], per_device_eval_batch_size=2,
        save_strategy="steps", save_steps=1, save_only_model=True, eval_strategy="steps", eval_steps=1, **options,
    )  # fmt: skip
    trainer.train()
    scores = [float(score.nll_factual.sum()) for score in trainer.score()]
    rank = trainer.args.process_index
    (folder / f"log_{rank}.json").write_text(json.dumps({"log": trainer.state.log_history, "scores": scores}))
    parameters = {key: _whole(parameter).detach() for key, parameter in trainer.model.named_parameters()}
    torch.save(parameters, folder / f"parameters_{rank}.pt")


def train_mirror(folder: Path, model: nn.Module | None = None) -> None:
    """Train two steps of MIRROR-F, with responses that the model samples."""
    trainer = mirror_trainer(
        folder, tiny_model(**_TIED) if model is None else model, make_records(8), loss=MirrorLoss(alpha=0.5),
        optim="sgd", learning_rate=0.3, use_cpu=model is None, max_steps=2, ddp_timeout=60,
        per_device_train_batch_size=4,
    )  # fmt: skip
    trainer.train()
    rank = trainer.args.process_index
    (folder / f"log_{rank}.json").write_text(json.dumps(trainer.state.log_history))
    parameters = {key: _whole(parameter).detach() for key, parameter in trainer.model.named_parameters()}
    torch.save(parameters, folder / f"parameters_{rank}.pt")


def start(rank: int, processes: int, root: str) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes),
        WANDB_DISABLED="true",
    )  # fmt: skip
    torch.set_num_threads(1)
    engines_on_cpu()
    dist.init_process_group(
        "gloo", init_method=f"file://{root}/store", rank=rank, world_size=processes, timeout=timedelta(seconds=60)
    )


def work_with_fsdp(rank: int, root: str) -> None:
    """Four processes: two pairs, each with a model in two parts, and other examples on each pair."""
    start(rank, 2 * PROCESSES, root)
    examples, found = shared_examples(6), dict[str, Any]()
    for name in ("untied", "tied"):
        case = CASES[name]
        whole = tiny_model(**case.options)
        parts = divided(Path(root, name), whole, case.plan, fsdp_size=2)
        loss, expected = gradients(whole, case, examples)
        own = examples[:4] if rank < PROCESSES else examples[4:]
        share, got = gradients(parts, case, own, items=len(examples) / 2)
        total = torch.tensor([share])
        dist.all_reduce(total)
        norm = max(float(gradient.norm()) for gradient in expected.values())
        error = max(float((got[key] - gradient).norm()) for key, gradient in expected.items())
        found[name] = {"loss": abs(float(total) / 4 - loss), "error": error / norm, "norm": norm}
    Path(root, f"found_{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def work(rank: int, root: str) -> None:
    start(rank, PROCESSES, root)
    folder, found = Path(root), dict[str, Any]()
    for name, case in CASES.items():
        found[name] = check(folder / name, case)
    found["refusal"], found["best"] = refusal(folder / "refusal"), best_model(folder / "best")
    (folder / f"found_{rank}.json").write_text(json.dumps(found))
    for name, options in TRAINED.items():
        train(folder / name, name, divided(folder / name / "model", tiny_model(**options["model"]), "auto"))
    train_mirror(folder / "mirror", divided(folder / "mirror" / "model", tiny_model(**_TIED), "auto"))
    dist.destroy_process_group()

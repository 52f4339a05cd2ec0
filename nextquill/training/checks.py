"""Checks of a trainer's arguments, before any work: they must fit each other, and the trainer must use each one."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor

from nextquill.errors import ArgumentError, ArgumentTypeError
from nextquill.losses import PairLoss
from nextquill.models.configs import check_vocabulary
from nextquill.ranks import check_group

#: Options of transformers' Trainer that our trainers set themselves.
FILLED_OPTIONS = (
    "compute_loss_func",
    "compute_metrics",
    "data_collator",
    "preprocess_logits_for_metrics",
    "model_init",
)

# Training arguments that would be ignored or fail later, with the accepted values and the reason.
_ARGUMENTS: dict[str, tuple[tuple[Any, ...], str]] = {
    "label_smoothing_factor": ((0, 0.0), "the loss runs inside the model's head, where labels are not smoothed"),
    "batch_eval_metrics": ((False,), "metrics are means over all tokens of an evaluation"),
    "eval_do_concat_batches": ((True,), "metrics are means over all tokens of an evaluation"),
    "include_for_metrics": (([], None), "metrics are computed from the loss's results"),
    "use_liger_kernel": ((False,), "it replaces the model's forward, and the loss runs inside that forward"),
    "train_sampling_strategy": (("random", "sequential"), "an example has two lengths, one for each branch"),
}


def check_options(options: dict[str, Any], trainer: str = "NextQuillTrainer") -> None:
    """Raise ArgumentError for an option that the trainer sets itself."""
    for name in FILLED_OPTIONS:
        if options.get(name) is not None:
            raise ArgumentError(f"{name}: {trainer} sets this itself; subclass it to change it")


def check_arguments(args: Any) -> None:
    """Raise ArgumentError for training arguments that would be ignored or fail later."""
    check_group(args)
    for name, (accepted, reason) in _ARGUMENTS.items():
        value = getattr(args, name, accepted[0])
        if value not in accepted:
            raise ArgumentError(f"args.{name}: {value!r} is not supported: {reason}")
    metric = str(getattr(args, "metric_for_best_model", None) or "").removeprefix("eval_")
    if metric.startswith("nll_") and args.greater_is_better:
        raise ArgumentError(
            f"args.greater_is_better: True would keep the checkpoint with the worst {metric}; set it to False "
            "(by default TrainingArguments minimises only metrics whose name ends in 'loss')"
        )
    loading = getattr(args, "accelerator_config", None)
    if getattr(loading, "dispatch_batches", None):
        raise ArgumentError(
            "args.accelerator_config: dispatch_batches=True is not supported: it cuts tensors along their first axis, "
            "which does not count examples in a batch of trees"
        )
    if args.world_size > 1 and not getattr(loading, "even_batches", True):
        raise ArgumentError(
            f"args.accelerator_config: even_batches=False is not supported with {args.world_size} processes: one with "
            "fewer batches than another would end an epoch first, and the other would wait for it"
        )
    if args.n_gpu > 1:
        raise ArgumentError("args: expected one process per GPU (torchrun or accelerate launch), got DataParallel")
    parallelism = getattr(args, "parallelism_config", None)
    for name in ("cp_size", "sp_size"):
        if getattr(parallelism, name, 1) not in (1, None):
            raise ArgumentError(
                f"args.parallelism_config: {name} above 1 is not supported, only data and tensor parallelism"
            )


def check_batching(args: Any, max_tokens: Any, examples_per_user: Any) -> None:
    """Raise ArgumentError or ArgumentTypeError for batches that cannot be made."""
    for name, value in (("max_tokens", max_tokens), ("examples_per_user", examples_per_user)):
        if name == "max_tokens" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise ArgumentTypeError(f"{name}: expected an integer, got {value!r}")
        if value < 1:
            raise ArgumentError(f"{name}: expected a positive number, got {value}")
    if examples_per_user > 1 and getattr(args, "train_sampling_strategy", "random") == "sequential":
        raise ArgumentError(
            "examples_per_user: expected 1 with args.train_sampling_strategy='sequential', because a larger number "
            f"changes the order; got {examples_per_user}"
        )
    if args.per_device_train_batch_size % examples_per_user:
        raise ArgumentError(
            f"examples_per_user: expected a divisor of per_device_train_batch_size={args.per_device_train_batch_size}, "
            f"got {examples_per_user}"
        )


def fsdp_plugin(trainer: Any) -> Any:
    """Accelerate's settings of FSDP; None without it."""
    return trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None


def why_not_alone(trainer: Any) -> str | None:
    """Why a model cannot run by itself during training, as for samples; None where it can."""
    if trainer.is_deepspeed_enabled:
        return "under DeepSpeed processes with different numbers of forwards would wait for each other for ever"
    plugin = fsdp_plugin(trainer)
    if plugin is not None and plugin.fsdp_version == 1:
        return "FSDP1 gathers weights only in the forward of its own wrapper; set fsdp_version: 2"
    if plugin is not None and isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        return "with cpu_offload the weights are on another device than the one that computes"
    return None


def check_saves_whole(trainer: Any) -> None:
    """Raise ArgumentError if transformers would write no model at the end of a training under FSDP."""
    plugin = fsdp_plugin(trainer)
    if plugin is not None and plugin.state_dict_type.name != "FULL_STATE_DICT":
        raise ArgumentError(
            f"args.fsdp_config: expected state_dict_type FULL_STATE_DICT, got {plugin.state_dict_type.name}, with "
            "which transformers writes no model at the end"
        )


def check_divided(model: nn.Module, args: Any) -> None:
    """Raise ArgumentError for arguments that fail at the end of a training whose parameters processes divide."""
    if args.load_best_model_at_end and any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ArgumentError(
            "args.load_best_model_at_end: True is not supported for a model that was loaded in parts: transformers "
            "cannot load the best checkpoint into it"
        )


def check_model(model: Any, processing_class: Any, loss: Any) -> None:
    """Raise unless these are a causal language model, its tokenizer, and a loss, and the tokenizer fits the model."""
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"model: expected a torch module, got {type(model).__name__}")
    if processing_class is None:
        raise ArgumentTypeError("processing_class: expected a tokenizer, got None")
    if not isinstance(loss, PairLoss):
        hint = "; give an instance" if isinstance(loss, type) else ""
        raise ArgumentTypeError(f"loss: expected a nextquill loss, got {type(loss).__name__} {loss!r}{hint}")
    check_vocabulary(model, processing_class)

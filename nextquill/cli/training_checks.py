"""Checks of training flags that transformers would make late, during training, or not at all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from transformers import TrainingArguments

from nextquill.cli.flags import UsageError, check_positive
from nextquill.cli.parsing import WIDE_REFUSALS, refusals
from nextquill.errors import BackendUnavailableError
from nextquill.ranks import check_group
from nextquill.training.meter import EVAL_COLUMNS

_COUNTS = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
METRICS = (*EVAL_COLUMNS, "effect_logprob", "effect_placebo")


def check_arguments(args: TrainingArguments, *, has_eval_file: bool, metrics: Sequence[str] = METRICS) -> None:
    """Raise UsageError or ArgumentError for values that do not fit each other or the run."""
    check_group(args)
    check_positive(args, _COUNTS)
    if not math.isfinite(args.learning_rate) or args.learning_rate < 0:
        raise UsageError(f"learning_rate: expected a number of at least 0, got {args.learning_rate}")
    if args.max_steps <= 0 and not args.num_train_epochs > 0:
        raise UsageError(f"num_train_epochs: expected a positive number, got {args.num_train_epochs}")
    needs_evaluation = {
        "eval_strategy": args.eval_strategy != "no",
        "load_best_model_at_end": args.load_best_model_at_end,
        "save_strategy": args.save_strategy == "best",
        "eval_on_start": args.eval_on_start,
    }
    for name, asked in needs_evaluation.items():
        if asked and not has_eval_file:
            raise UsageError(f"{name}: expected --eval_file with it, to evaluate on")
    _check_metric(args, metrics)
    _check_reports(args)
    _check_schedule(args)


def check_optimizer(args: TrainingArguments, model: Any) -> None:
    """Raise UsageError where the optimiser is not installed or does not take its arguments."""
    from transformers import Trainer

    with refusals("optim_args" if args.optim_args else "optim", kinds=WIDE_REFUSALS):
        Trainer.get_optimizer_cls_and_kwargs(args, model)


def _check_metric(args: TrainingArguments, metrics: Sequence[str]) -> None:
    if args.metric_for_best_model is None:
        return
    name = args.metric_for_best_model.removeprefix("eval_")
    if name not in metrics:
        raise UsageError(f"metric_for_best_model: expected one of {', '.join(metrics)}, got {name!r}")
    if name.startswith("nll_"):
        args.greater_is_better = False  # by default transformers minimises only names that end in "loss"


def _check_reports(args: TrainingArguments) -> None:
    for name, packages in {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}.items():
        if name in (args.report_to or ()) and not any(map(find_spec, packages)):
            raise BackendUnavailableError(f"report_to: {name} is not installed; pip install 'nextquill[{name}]'")


def _check_schedule(args: TrainingArguments) -> None:
    from transformers import get_scheduler

    if args.lr_scheduler_kwargs is not None and not isinstance(args.lr_scheduler_kwargs, dict):
        raise UsageError(f"lr_scheduler_kwargs: expected a JSON mapping, got {args.lr_scheduler_kwargs!r}")
    steps = args.max_steps if args.max_steps > 0 else 100
    stand_in = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args.learning_rate)
    with refusals("lr_scheduler_kwargs" if args.lr_scheduler_kwargs else "lr_scheduler_type", kinds=WIDE_REFUSALS):
        get_scheduler(
            args.lr_scheduler_type,
            optimizer=stand_in,
            num_warmup_steps=args.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )

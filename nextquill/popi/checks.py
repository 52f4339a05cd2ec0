"""What `POPITrainer` refuses before any work: what does not go together, or what it would silently ignore."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from nextquill.errors import ArgumentError, CheckpointError
from nextquill.models.architectures import random_rates
from nextquill.models.configs import base_model, context_length
from nextquill.models.router import asks_for_router_loss
from nextquill.popi.config import POPIConfig
from nextquill.popi.roles import Role, Roles
from nextquill.popi.rollouts import Sample
from nextquill.popi.sample_log import SAMPLES_FILE
from nextquill.training.checks import check_arguments

_FILLED = ("compute_loss_func", "compute_metrics", "data_collator", "preprocess_logits_for_metrics", "model_init")
_REFUSED = {
    "fsdp": "only single processes and data parallel",
    "deepspeed": "only single processes and data parallel",
    "neftune_noise_alpha": "rewards are measured without noise",
    "torch_compile": "it compiles a forward that is not called; each role's model runs by itself",
    "auto_find_batch_size": "a batch is in users and takes no memory by itself; max_tokens bounds a forward",
    "push_to_hub": f"the run's folder holds what was said of users ({SAMPLES_FILE}); upload what save_model writes",
    "fp16": "a step may have no gradient, which a loss's scaling does not allow for; take bf16",
    "fp16_full_eval": "evaluation has the weights of training",
    "bf16_full_eval": "evaluation has the weights of training",
    "torch_empty_cache_steps": "a step is sampled, scored and trained in one",
}


def check_options(options: dict[str, Any]) -> None:
    """Raise ArgumentError where an option is given that the trainer fills itself."""
    for name in _FILLED:
        if options.get(name) is not None:
            raise ArgumentError(f"{name}: POPITrainer fills this itself; subclass it to change it")


def check_args(args: TrainingArguments) -> None:
    """Raise ArgumentError for training arguments that would be ignored or break later."""
    check_arguments(args)
    for name, reason in _REFUSED.items():
        if getattr(args, name, None) not in (None, False, [], ""):
            raise ArgumentError(f"args.{name}: not supported by POPITrainer: {reason}")


def check_given_roles(roles: Roles, config: POPIConfig, others: dict[str, Any]) -> None:
    """Raise ArgumentError where given roles do not go with the settings, or come with what they have already."""
    for name, value in others.items():
        if value is not None:
            raise ArgumentError(f"{name}: expected None with a model that is Roles already")
    for role, frozen in zip(roles, (config.freeze_inference, config.freeze_generator), strict=True):
        if role.frozen is not frozen:
            raise ArgumentError(
                f"model: its role {role.name} is {'frozen' if role.frozen else 'trained'}, expected what "
                f"freeze_{role.name}={frozen} says; of loaded roles, give the model: roles.inference.model"
            )


def check_roles(roles: Roles) -> None:
    """Raise ArgumentError where what is trained would be another thing than what is measured."""
    for role in roles:
        base = base_model(role.model)
        if asks_for_router_loss(base):
            raise ArgumentError(
                f"model: the {role.name} model's config.output_router_logits asks for a router loss, which has no part "
                "in this objective; set it to False"
            )
        if role.adapter is not None and not roles.is_shared and not getattr(base, "name_or_path", ""):
            raise ArgumentError(
                f"{role.name}_model: expected an adapter of a model that was loaded from somewhere, or it could not be "
                "loaded again; save its base model first, and load it from there"
            )
        for name, module, attribute in () if role.frozen else random_rates(role.model):
            if rate := getattr(module, attribute, 0.0):
                raise ArgumentError(
                    f"model: expected the {role.name} model without dropout, got {name}.{attribute}={rate}: losses and "
                    "rewards are measured without, and the gradient has to be theirs"
                )


def check_batches(args: TrainingArguments, users: int) -> None:
    """Raise ArgumentError where all users together are no batch."""
    batch = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and users < batch:
        raise ArgumentError(f"args.dataloader_drop_last: True leaves no batch of {batch}, there are {users} users")


def check_resumable(checkpoint: Path) -> None:
    """Raise CheckpointError where a checkpoint lacks the optimiser's state, which would be reset without a warning."""
    for name in ("optimizer.pt", "scheduler.pt"):
        if not (checkpoint / name).is_file():
            raise CheckpointError(
                f"resume_from_checkpoint: {checkpoint} has no {name}, as with save_only_model=True; its adapters can "
                "be trained anew, see Roles.load"
            )


def check_samples(samples: Sequence[Sample], expected: int) -> None:
    """Raise ArgumentError where rollouts give another number of samples, or one without tokens."""
    if len(samples) != expected:
        raise ArgumentError(f"rollouts: expected {expected} samples, got {len(samples)}")
    for place, sample in enumerate(samples):
        if not sample.ids:
            raise ArgumentError(f"rollouts: expected at least one token in each sample, sample {place} has none")


def within_context(config: POPIConfig, roles: Roles) -> POPIConfig:
    """The settings with budgets that the models' contexts have room for.

    Raises:
        ArgumentError: a summary alone takes all of the inference model's context.
    """
    inference, generator = (_context(role) for role in roles)
    if inference <= config.max_summary_tokens:
        raise ArgumentError(
            f"max_summary_tokens: expected less than the inference model's context of {inference} tokens, got "
            f"{config.max_summary_tokens}"
        )
    return dataclasses.replace(
        config,
        max_signal_tokens=min(config.max_signal_tokens, inference - config.max_summary_tokens),
        max_length=min(config.max_length, generator),
    )


def _context(role: Role) -> int:
    return context_length(role.model) or 2**31

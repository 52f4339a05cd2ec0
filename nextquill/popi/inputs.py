"""The inputs of `POPITrainer`: checks them before any work, and makes roles and users from them."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainingArguments

from nextquill.data import load_records
from nextquill.errors import ArgumentError, ArgumentTypeError, CheckpointError, naming
from nextquill.models.architectures import random_rates
from nextquill.models.configs import base_model, check_vocabulary, context_length
from nextquill.models.router import asks_for_router_loss
from nextquill.popi.config import POPIConfig
from nextquill.popi.prompts import GeneratorPrompts
from nextquill.popi.roles import Role, Roles
from nextquill.popi.saved_run import SAMPLES_FILE
from nextquill.popi.users import User, UserCounts, check_users, users_from_records
from nextquill.training.checks import check_arguments

_REFUSED = {
    "fsdp": "only single processes and data parallelism are",
    "deepspeed": "only single processes and data parallelism are",
    "neftune_noise_alpha": "rewards are measured without noise",
    "torch_compile": "it compiles a forward that is never called, as each role's model runs by itself",
    "auto_find_batch_size": "a batch is a number of users and takes no memory by itself; max_tokens bounds a forward",
    "push_to_hub": f"the run's folder holds texts about users ({SAMPLES_FILE}); upload what save_model writes",
    "fp16": "a step may have no gradient, which loss scaling does not allow; use bf16",
    "fp16_full_eval": "evaluation uses the weights of training",
    "bf16_full_eval": "evaluation uses the weights of training",
    "torch_empty_cache_steps": "a step is sampled, scored and trained in one call",
}


# ---- training arguments and settings ----------------------------------------------------------------


def check_args(args: TrainingArguments) -> None:
    """Raise ArgumentError for training arguments that would be ignored or fail later."""
    check_arguments(args)
    for name, reason in _REFUSED.items():
        if getattr(args, name, None) not in (None, False, [], ""):
            raise ArgumentError(f"args.{name}: not supported by POPITrainer: {reason}")


def check_batches(args: TrainingArguments, users: int) -> None:
    """Raise ArgumentError if there are too few users for a single batch."""
    batch = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and users < batch:
        raise ArgumentError(f"args.dataloader_drop_last: True leaves no batch of {batch}, there are {users} users")


def check_resumable(checkpoint: Path) -> None:
    """Raise CheckpointError if a checkpoint lacks the optimizer's state, which would be reset without a warning."""
    for name in ("optimizer.pt", "scheduler.pt"):
        if not (checkpoint / name).is_file():
            raise CheckpointError(
                f"resume_from_checkpoint: {checkpoint} has no {name}, as with save_only_model=True; start a new run "
                "from its adapters, see Roles.load"
            )


def within_context(config: POPIConfig, roles: Roles) -> POPIConfig:
    """Return the settings with token budgets that fit into the models' contexts.

    Raises:
        ArgumentError: a summary alone fills the inference model's context.
    """
    inference, generator = (context_length(base_model(role.model)) or 2**31 for role in roles)
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


# ---- roles ------------------------------------------------------------------------------------------


def make_roles(
    config: POPIConfig,
    model: Any,
    inference_model: Any,
    generator_model: Any,
    tokenizer: Any,
    generator_tokenizer: Any,
    peft_config: Any,
) -> Roles:
    """Make both roles from the arguments of `POPITrainer`.

    Args:
        config: says which roles are frozen.
        model: the model of both roles, or None.
        inference_model, generator_model: a model for each role, or None.
        tokenizer: the inference model's tokenizer, and the generator's if it has no other.
        generator_tokenizer: the generator's own tokenizer, or None.
        peft_config: the config of fresh adapters, or None.

    Raises:
        ArgumentError, ArgumentTypeError: the arguments do not fit each other, or cannot be trained exactly.
    """
    others = {
        "inference_model": inference_model, "generator_model": generator_model,
        "generator_tokenizer": generator_tokenizer, "peft_config": peft_config,
    }  # fmt: skip
    models = {"model": model, "inference_model": inference_model, "generator_model": generator_model}
    for name, given in models.items():
        if given is not None and not isinstance(given, nn.Module):
            raise ArgumentTypeError(f"{name}: expected a torch module, got {type(given).__name__}")
    frozen = {"freeze_inference": config.freeze_inference, "freeze_generator": config.freeze_generator}
    if isinstance(model, Roles):
        _check_given(model, frozen, others)
        roles = model
    elif (model is None) is (inference_model is None) or (inference_model is None) is not (generator_model is None):
        raise ArgumentError(
            "model: expected one model for both roles, or inference_model and generator_model together, got "
            f"{[type(m).__name__ for m in models.values()]}"
        )
    elif model is not None:
        if generator_tokenizer is not None:
            raise ArgumentError("generator_tokenizer: expected None with one model for both roles")
        check_vocabulary(model, tokenizer)
        roles = Roles.shared(model, tokenizer, peft_config, **frozen)
    else:
        if peft_config is not None:
            raise ArgumentError("peft_config: expected None with separate models; wrap them with get_peft_model")
        check_vocabulary(inference_model, tokenizer)
        check_vocabulary(generator_model, tokenizer if generator_tokenizer is None else generator_tokenizer)
        roles = Roles.separate(inference_model, generator_model, tokenizer, generator_tokenizer, **frozen)
    for role in roles:
        _check_role(role, shared=roles.is_shared)
    return roles


def _check_given(roles: Roles, frozen: dict[str, bool], others: dict[str, Any]) -> None:
    for name, value in others.items():
        if value is not None:
            raise ArgumentError(f"{name}: expected None with a model that is Roles already")
    for role, (setting, expected) in zip(roles, frozen.items(), strict=True):
        if role.frozen is not expected:
            raise ArgumentError(
                f"model: its role {role.name} is {'frozen' if role.frozen else 'trained'}, expected what "
                f"{setting}={expected} says; to train loaded roles, give their model: roles.inference.model"
            )


def _check_role(role: Role, *, shared: bool) -> None:
    """Raise ArgumentError if training would differ from what is measured, or its result could not be loaded."""
    base = base_model(role.model)
    if asks_for_router_loss(base):
        raise ArgumentError(
            f"model: the {role.name} model's config.output_router_logits asks for a router loss, which is not part of "
            "this objective; set it to False"
        )
    if role.adapter is not None and not shared and not getattr(base, "name_or_path", ""):
        raise ArgumentError(
            f"{role.name}_model: expected an adapter of a model that was loaded from somewhere, or it could not be "
            "loaded again; save its base model first, and load it from there"
        )
    for name, module, attribute in () if role.frozen else random_rates(role.model):
        if rate := getattr(module, attribute, 0.0):
            raise ArgumentError(
                f"model: expected the {role.name} model without dropout, got {name}.{attribute}={rate}: losses and "
                "rewards are measured without dropout, so the gradient must be too"
            )


# ---- users ------------------------------------------------------------------------------------------


def usable_users(name: str, given: Any, config: POPIConfig, prompts: GeneratorPrompts) -> UserCounts | None:
    """Return the users that can be drawn from, or None for None; all their pairs fit into the generator's prompt.

    Raises:
        ArgumentTypeError: the argument `name` holds neither users nor records.
        RecordError: no user can be drawn from.
        BudgetError: a pair leaves no room for a summary.
    """
    if given is None:
        return None
    if isinstance(given, dict):
        raise ArgumentTypeError(f"{name}: expected users or records, got a dict")
    found = list(given) if isinstance(given, Sequence) and not isinstance(given, (str, bytes)) else None
    if found is None or not all(isinstance(each, User) for each in found):
        found = users_from_records(load_records(given))
    with naming(name):
        counts = check_users(found, num_pairs=1, num_signals=config.signals_per_user)
    if counts.skipped:
        warnings.warn(f"{name}: {counts}", UserWarning, stacklevel=4)
    for user in counts.users:
        for pair in user.pairs:
            prompts.check(pair, config.max_summary_tokens, f"{name}: user {user.user_id!r}")
    return counts


def check_warm_start(config: POPIConfig, users: UserCounts | None) -> None:
    """Raise ArgumentError if the warm start needs given summaries and a user has none."""
    if not (config.warm_start_steps and config.warm_start == "given") or users is None:
        return
    missing = [user.user_id for user in users.users if user.summary is None]
    if missing:
        raise ArgumentError(
            f"warm_start: expected every user's records to have a field 'summary' with warm_start='given', "
            f"{len(missing)} of {len(users.users)} users have none, such as {missing[0]!r}"
        )

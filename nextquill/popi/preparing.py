"""What `POPITrainer` is given, as what it trains: roles, and users that can be drawn from."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn

from nextquill.data import load_records
from nextquill.errors import ArgumentError, ArgumentTypeError, naming
from nextquill.models.configs import check_vocabulary
from nextquill.popi.checks import check_given_roles
from nextquill.popi.config import POPIConfig
from nextquill.popi.prompts import GeneratorPrompts
from nextquill.popi.roles import Roles
from nextquill.popi.users import User, UserCounts, check_users, users_from_records


def make_roles(
    config: POPIConfig,
    model: Any,
    inference_model: Any,
    generator_model: Any,
    tokenizer: Any,
    other: Any,
    peft_config: Any,
) -> Roles:
    """Both roles of what a trainer is given for them; see `POPITrainer`.

    Args:
        config: which of them are frozen.
        model: of both, or None.
        inference_model, generator_model: separate ones, or None.
        tokenizer: the inference model's, and the generator's where there is no other.
        other: the generator's own.
        peft_config: of fresh adapters.

    Raises:
        ArgumentError, ArgumentTypeError: they do not go together.
    """
    frozen = {"freeze_inference": config.freeze_inference, "freeze_generator": config.freeze_generator}
    for name, given in (
        ("model", model),
        ("inference_model", inference_model),
        ("generator_model", generator_model),
    ):
        if given is not None and not isinstance(given, nn.Module):
            raise ArgumentTypeError(f"{name}: expected a torch module, got {type(given).__name__}")
    if isinstance(model, Roles):
        others = {
            "inference_model": inference_model, "generator_model": generator_model, "generator_tokenizer": other,
            "peft_config": peft_config,
        }  # fmt: skip
        check_given_roles(model, config, others)
        return model
    if (model is None) is (inference_model is None) or (inference_model is None) is not (generator_model is None):
        raise ArgumentError(
            "model: expected one model for both roles, or inference_model and generator_model together, got "
            f"{[type(m).__name__ for m in (model, inference_model, generator_model)]}"
        )
    if model is not None:
        if other is not None:
            raise ArgumentError("generator_tokenizer: expected None with one model for both roles")
        check_vocabulary(model, tokenizer)
        return Roles.shared(model, tokenizer, peft_config, **frozen)
    if peft_config is not None:
        raise ArgumentError("peft_config: expected None with separate models; wrap them with get_peft_model")
    check_vocabulary(inference_model, tokenizer)
    check_vocabulary(generator_model, tokenizer if other is None else other)
    return Roles.separate(inference_model, generator_model, tokenizer, other, **frozen)


def usable_users(name: str, given: Any, config: POPIConfig, prompts: GeneratorPrompts) -> UserCounts | None:
    """Those that can be drawn from, whose pairs and signals fit."""
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
    """Raise ArgumentError where summaries are to be taught that users do not have."""
    if not (config.warm_start_steps and config.warm_start == "given") or users is None:
        return
    missing = [user.user_id for user in users.users if user.summary is None]
    if missing:
        raise ArgumentError(
            f"warm_start: expected every user's records to have a field 'summary' with warm_start='given', "
            f"{len(missing)} of {len(users.users)} users have none, such as {missing[0]!r}"
        )

"""The settings of POPI's training, and checks of everything else that `POPITrainer` is given, before any work."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from nextquill.data import load_records
from nextquill.data._checks import check_integer
from nextquill.errors import ArgumentError, ArgumentTypeError, naming
from nextquill.models.architectures import random_rates
from nextquill.models.configs import base_model, check_vocabulary, context_length
from nextquill.models.router import asks_for_router_loss
from nextquill.popi.objective import ESTIMATORS, KINDS, PreferenceLoss
from nextquill.popi.prompts import GeneratorPrompts, InferencePrompts
from nextquill.popi.roles import Role, Roles
from nextquill.popi.users import User, UserCounts, check_users, users_from_records
from nextquill.training.checks import check_arguments, fsdp_plugin, why_not_alone
from nextquill.weighting import check_number

if TYPE_CHECKING:
    from transformers import TrainingArguments

#: The file in a run's folder with every summary that training has sampled.
SAMPLES_FILE = "sampled_summaries.jsonl"


def _setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class POPIConfig:
    """POPI: the settings of `POPITrainer`. The paper publishes no hyper-parameters, so all defaults are ours.

    The metadata of each field describes it; the command line shows it as help.

    Raises:
        ArgumentError, ArgumentTypeError: a setting has an unusable value; the message names it.
    """

    objective: str = _setting("dpo", "Preference loss of the generator: dpo or ipo.")
    beta: float = _setting(0.1, "β of DPO, τ of IPO.")
    reference_sees_summary: bool = _setting(
        False, "Give the reference the summary too; without it, a log-ratio contains the summary's causal effect."
    )
    estimator: str = _setting("rloo", "Estimator of advantages within a group of summaries: rloo, grpo or reinforce.")
    group_size: int = _setting(4, "Summaries sampled per user and step.")
    pairs_per_user: int = _setting(4, "Pairs of a user over which a step averages its rewards.")
    signals_per_user: int = _setting(8, "Most signals of a user in the inference model's prompt.")
    kl_coef: float = _setting(0.01, "Penalty on the reward for each nat of log φ(s) - log φ_initial(s).")
    length_penalty: float = _setting(0.0, "Penalty on the reward for each token of a summary.")
    unfinished_penalty: float = _setting(0.5, "Penalty on the reward for a summary that did not end within its budget.")
    max_summary_tokens: int = _setting(64, "Most tokens of a sampled summary.")
    max_signal_tokens: int = _setting(
        2048, "Most tokens of the inference model's prompt; the oldest signals are dropped."
    )
    max_length: int = _setting(2048, "Most tokens of the generator's prompt and response.")
    temperature: float = _setting(1.0, "Sampling temperature; the gradient has the same temperature.")
    update: str = _setting("joint", "joint: train both models in every step; alternate: in turns.")
    alternate_every: int = _setting(1, "With --update alternate: steps of one model in a row, the generator first.")
    freeze_inference: bool = _setting(False, "Train only the generator.")
    freeze_generator: bool = _setting(False, "Train only the inference model.")
    warm_start_steps: int = _setting(0, "Number of first steps in which the inference model imitates summaries.")
    warm_start: str = _setting(
        "self", "given: imitate the summaries in the records; self: the best sampled summary of each group."
    )
    rollouts: str = _setting("hf", "Library that samples summaries: hf (transformers) or vllm.")
    rollout_batch_size: int = _setting(32, "Summaries sampled at once.")

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            name, value = each.name, getattr(self, each.name)
            if name in _CHOICES and value not in _CHOICES[name]:
                raise ArgumentError(f"{name}: expected one of {', '.join(_CHOICES[name])}, got {value!r}")
            if type(each.default) is int:
                check_integer(name, value, _LEAST.get(name, 1))
            if type(each.default) is float:
                positive = name in ("beta", "temperature")
                check_number(name, value, low=None if positive else 0.0, above=0.0 if positive else None)
        if self.estimator != "reinforce" and self.group_size < 2 and not self.freeze_inference:
            raise ArgumentError(f"group_size: expected at least 2 with estimator={self.estimator!r}, got 1")
        if self.freeze_inference and self.freeze_generator:
            raise ArgumentError("freeze_inference: expected False with freeze_generator=True, or nothing is trained")

    @property
    def loss(self) -> PreferenceLoss:
        """The preference loss."""
        return PreferenceLoss(self.objective, self.beta)

    def to_dict(self) -> dict[str, Any]:
        """All settings, ready for JSON."""
        return dataclasses.asdict(self)


_CHOICES = {"objective": KINDS, "estimator": ESTIMATORS, "update": ("joint", "alternate"),
            "warm_start": ("given", "self"), "rollouts": ("hf", "vllm")}  # fmt: skip
# The least value of an integer, if it is not 1.
_LEAST = {"max_length": 2, "warm_start_steps": 0}


# ---- training arguments and settings ----------------------------------------------------------------

_REFUSED = {
    "deepspeed": "its engine makes a step of one backward of one model, and here a step has several, of two roles",
    "neftune_noise_alpha": "rewards are measured without noise",
    "torch_compile": "it compiles a forward that is never called, as each role's model runs by itself",
    "auto_find_batch_size": "a batch is a number of users and takes no memory by itself; max_tokens bounds a forward",
    "push_to_hub": f"the run's folder holds texts about users ({SAMPLES_FILE}); upload what save_model writes",
    "fp16": "a step may have no gradient, which loss scaling does not allow; use bf16",
    "fp16_full_eval": "evaluation uses the weights of training",
    "bf16_full_eval": "evaluation uses the weights of training",
    "torch_empty_cache_steps": "a step is sampled, scored and trained in one call",
}


def check_args(args: TrainingArguments) -> None:
    """Raise ArgumentError for training arguments that would be ignored or fail later."""
    check_arguments(args)
    for name, reason in _REFUSED.items():
        if getattr(args, name, None) not in (None, False, [], ""):
            raise ArgumentError(f"args.{name}: not supported by POPITrainer: {reason}")


def check_engine(trainer: Any) -> None:
    """Raise ArgumentError for an engine or a setting of FSDP under which a role cannot run by itself."""
    if (reason := why_not_alone(trainer)) is not None:
        raise ArgumentError(f"args: each role's model runs by itself, and {reason}; use FSDP2, DDP or a single process")
    plugin = fsdp_plugin(trainer)
    if plugin is None:
        return
    policy = plugin.auto_wrap_policy
    if getattr(policy, "func", policy) is not transformer_auto_wrap_policy:
        raise ArgumentError(
            "args.fsdp_config: expected auto_wrap_policy TRANSFORMER_BASED_WRAP, got "
            f"{getattr(policy, '__name__', policy)}, with which the roles' models would not be sharded one by one"
        )
    if plugin.activation_checkpointing:
        raise ArgumentError(
            "args.fsdp_config: expected activation_checkpointing False, as it puts the roles' models into other "
            "modules; set the training argument of this name (gradient_checkpointing before transformers 5.20)"
        )


def check_batches(args: TrainingArguments, users: int) -> None:
    """Raise ArgumentError if there are too few users for a single batch."""
    batch = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and users < batch:
        raise ArgumentError(f"args.dataloader_drop_last: True leaves no batch of {batch}, there are {users} users")


def within_context(config: POPIConfig, roles: Roles) -> POPIConfig:
    """Return the settings with token budgets that fit into the models' contexts; a summary alone must fit."""
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
    """Make both roles from the arguments of `POPITrainer`; refuse what does not fit or cannot be trained exactly."""
    two = {"inference_model": inference_model, "generator_model": generator_model}
    for name, given in {"model": model, **two}.items():
        if given is not None and not isinstance(given, nn.Module):
            raise ArgumentTypeError(f"{name}: expected a torch module, got {type(given).__name__}")
    frozen = {"freeze_inference": config.freeze_inference, "freeze_generator": config.freeze_generator}
    if isinstance(model, Roles):
        _check_given(model, frozen, {**two, "generator_tokenizer": generator_tokenizer, "peft_config": peft_config})
        roles = model
    elif (model is None) is (inference_model is None) or (inference_model is None) is not (generator_model is None):
        raise ArgumentError(
            "model: expected one model for both roles, or inference_model and generator_model together, got "
            f"{[type(given).__name__ for given in (model, *two.values())]}"
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
    """Return the users that can be drawn from, or None for None; errors name the argument `name`.

    BudgetError if a pair leaves no room for a summary in the generator's prompt; RecordError if no user is left.
    """
    if given is None:
        return None
    if isinstance(given, dict):
        raise ArgumentTypeError(f"{name}: expected users or records, got a dict")
    are_users = isinstance(given, (list, tuple)) and all(isinstance(each, User) for each in given)
    found = given if are_users else users_from_records(load_records(given))
    with naming(name):
        counts = check_users(found, num_pairs=1, num_signals=config.signals_per_user)
    if counts.skipped:
        warnings.warn(f"{name}: {counts}", UserWarning, stacklevel=4)
    for user in counts.users:
        for pair in user.pairs:
            prompts.check(pair, config.max_summary_tokens, f"{name}: user {user.user_id!r}")
    return counts


def check_warm_start(config: POPIConfig, users: UserCounts | None, prompts: InferencePrompts) -> None:
    """Raise ArgumentError if the warm start needs given summaries, and a user has none or one that does not fit."""
    if not (config.warm_start_steps and config.warm_start == "given") or users is None:
        return
    missing = [user.user_id for user in users.users if user.summary is None]
    if missing:
        raise ArgumentError(
            f"warm_start: expected every user's records to have a field 'summary' with warm_start='given', "
            f"{len(missing)} of {len(users.users)} users have none, such as {missing[0]!r}"
        )
    for user in users.users:
        with naming(f"warm_start: user {user.user_id!r}", "text"):
            prompts.summary_ids(user.summary or "")

"""The settings of POPI's training."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from nextquill.data._checks import check_integer
from nextquill.errors import ArgumentError
from nextquill.popi.objective import ESTIMATORS, KINDS, PreferenceLoss


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
    pairs_per_user: int = _setting(4, "Pairs of a user that a step's rewards are averaged over.")
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
    alternate_every: int = _setting(1, "With alternate: steps of one model in a row, the generator first.")
    freeze_inference: bool = _setting(False, "Train only the generator.")
    freeze_generator: bool = _setting(False, "Train only the inference model.")
    warm_start_steps: int = _setting(0, "First steps, in which the inference model learns to imitate summaries.")
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
                _check_number(name, value, positive=name in ("beta", "temperature"))
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


def _check_number(name: str, value: object, *, positive: bool) -> None:
    if not (isinstance(value, (int, float)) and math.isfinite(value) and (value > 0 or (value == 0 and not positive))):
        raise ArgumentError(f"{name}: expected a number {'above' if positive else 'of at least'} 0, got {value!r}")

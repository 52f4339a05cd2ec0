"""The settings of POPI's training."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from nextquill.errors import ArgumentError, ArgumentTypeError
from nextquill.popi.objective import ESTIMATORS, KINDS, PreferenceLoss

UPDATES = ("joint", "alternate")
WARM_STARTS = ("given", "self")
ROLLOUTS = ("hf", "vllm")


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
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ArgumentError(f"{name}: expected one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name, least in _INTEGERS.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ArgumentTypeError(f"{name}: expected an integer, got {value!r}")
            if value < least:
                raise ArgumentError(f"{name}: expected at least {least}, got {value}")
        for name in ("kl_coef", "length_penalty", "unfinished_penalty"):
            value = getattr(self, name)
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
                raise ArgumentError(f"{name}: expected a number of at least 0, got {value!r}")
        if not (
            isinstance(self.temperature, (int, float)) and math.isfinite(self.temperature) and self.temperature > 0
        ):
            raise ArgumentError(f"temperature: expected a number above 0, got {self.temperature!r}")
        PreferenceLoss(self.objective, self.beta)
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


_CHOICES = {"objective": KINDS, "estimator": ESTIMATORS, "update": UPDATES, "warm_start": WARM_STARTS,
            "rollouts": ROLLOUTS}  # fmt: skip
_INTEGERS = {
    "group_size": 1,
    "pairs_per_user": 1,
    "signals_per_user": 1,
    "max_summary_tokens": 1,
    "max_signal_tokens": 1,
    "max_length": 2,
    "alternate_every": 1,
    "warm_start_steps": 0,
    "rollout_batch_size": 1,
}
